"""The live page: counts, guards, experts' weights, latest verdicts. Whole without scripts; one script of our own makes it move.

Nothing on it comes from elsewhere, and its content security policy allows exactly the style and the script that it carries, by hash. Texts
of users stand on it only where the policy says so.
"""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from davylamp.serve.config import Policy
from davylamp.serve.metrics import BEAT, BEATS, Histogram

HERE = Path(__file__).parent
OUTCOMES = ("allowed", "blocked", "unavailable", "rejected", "upstream error", "disconnected")
SHOWN = 20  # verdicts in each table of the page

Workers = Sequence[tuple[str, Mapping[str, Any]]]


def page(workers: Workers, policy: Policy, *, now: float | None = None) -> tuple[bytes, dict[str, str]]:
    """The page and its headers. workers: (name, numbers) as `Board.all` gives them."""
    template, css, script, policy_header = _parts()
    at = time.time() if now is None else now
    requests: Counter[str] = Counter()
    for _, plain in workers:
        for (_, outcome), number in plain["counts"].get("requests", ()):
            requests[outcome.replace("_", " ")] += number
    total = sum(requests.values())
    flight = sum(plain["in_flight"] for _, plain in workers)
    # Any other outcome is shown too, so that the tiles always add up.
    names = [*OUTCOMES, *sorted(set(requests) - set(OUTCOMES))]
    html = template.render(
        css=css,
        script=script,
        upstream=urlsplit(policy.upstream.url).netloc,
        workers=len(workers),
        uptime=_span(at - min(plain["started"] for _, plain in workers)),
        now=time.strftime("%H:%M:%S UTC", time.gmtime(at)),
        tiles=[("requests", total), *((name, requests[name]) for name in names), ("in flight", flight)],
        rate=_rate(workers, at),
        guards=_guards(workers, policy),
        weights=_weights(workers, at),
        notable=_verdicts(workers, "notable"),
        latest=_verdicts(workers, "latest"),
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy_header,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return html.encode("utf-8", "replace"), headers


@cache
def _parts() -> tuple[Any, Markup, Markup, str]:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    css, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    header = (
        f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(script)}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return (
        environment.from_string((HERE / "page.html").read_text(encoding="utf-8")),
        Markup(css),
        Markup(script),
        header,
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _guards(workers: Workers, policy: Policy) -> list[dict[str, Any]]:
    """A line for each guard and side of the policy, with the sums of all workers."""
    counts: Counter[tuple[str, str, str]] = Counter()
    failures: dict[str, Counter[str]] = {}
    seconds: dict[str, Histogram] = {}
    for _, plain in workers:
        for (guard, side, outcome, _), number in plain["counts"].get("verdicts", ()):
            counts[guard, side, outcome] += number
        for (guard, kind), number in plain["counts"].get("failures", ()):
            failures.setdefault(guard, Counter())[kind] += number
        for guard, (bins, total) in plain["seconds"].items():
            histogram = seconds.setdefault(guard, Histogram())
            histogram.counts = [a + b for a, b in zip(histogram.counts, bins, strict=True)]
            histogram.sum += total
    out = []
    for guard_settings in policy.guard:
        name = guard_settings.name
        for side in ("input", "output") if guard_settings.on == "both" else (guard_settings.on,):
            histogram = seconds.get(name, Histogram())
            row: dict[str, Any] = {"name": name, "side": side, "on_failure": guard_settings.on_failure}
            row |= {outcome: counts[name, side, outcome] for outcome in ("allowed", "blocked", "unavailable")}
            kinds = failures.get(name, Counter())
            row["failures"] = ", ".join(f"{kind} {kinds[kind]}" for kind in sorted(kinds)) if row["unavailable"] else ""
            row |= {"p50": _seconds(histogram.quantile(0.5)), "p99": _seconds(histogram.quantile(0.99))}
            out.append(row)
    return out


def _weights(workers: Workers, now: float) -> list[dict[str, Any]]:
    """For each guard that mixes experts, a line for each of them: the first worker that knows the guard speaks for all."""
    out = []
    seen: dict[str, Any] = {}
    for _, plain in workers:
        for guard, points in plain["weights"].items():
            if points and guard not in seen:
                seen[guard] = points
    for guard, points in seen.items():
        first, last = points[0][0], max(points[-1][0], now)
        width = max(last - first, 1e-9)
        lines = []
        for name in dict.fromkeys(expert for _, weights in points for expert in weights):
            known = [(at, weights[name]) for at, weights in points if name in weights and math.isfinite(weights[name])]
            if not known:
                continue
            known.append((last, known[-1][1]))
            dots = [
                f"{1000 * (at - first) / width:.1f},{200 * (1 - min(max(weight, 0.0), 1.0)):.1f}"
                for at, weight in known
            ]
            lines.append({"name": name, "points": " ".join(dots), "last": f"{known[-1][1]:.3f}"})
        out.append({"guard": guard, "lines": lines, "since": f"{_span(last - first)} ago"})
    return out


def _rate(workers: Workers, now: float) -> dict[str, Any]:
    """Bars of the requests that ended in each 10 s: blocked at the bottom, other endings above, allowed on top; heights in percent."""
    sums: Counter[tuple[int, int]] = Counter()
    for _, plain in workers:
        for number, *kinds in plain["beats"]:
            for kind, count in enumerate(kinds):
                sums[number, kind] += count
    last = int(now // BEAT)
    numbers = range(last - BEATS + 1, last + 1)
    most = max(max(sum(sums[number, kind] for kind in range(3)) for number in numbers), 1)
    bars = []
    for x, number in enumerate(numbers):
        floor = 0.0
        for kind, name in ((1, "blocked"), (2, "other"), (0, "allowed")):
            if height := 100 * sums[number, kind] / most:
                floor += height
                bars.append({"name": name, "x": x * 10 + 1, "y": f"{100 - floor:.2f}", "height": f"{height:.2f}"})
    return {"bars": bars, "width": BEATS * 10, "most": most, "seconds": BEAT, "since": f"{_span(BEAT * BEATS)} ago"}


def _verdicts(workers: Workers, which: str) -> list[dict[str, Any]]:
    rows = sorted((row for _, plain in workers for row in plain[which]), key=lambda row: row["time"], reverse=True)
    out = []
    for row in rows[:SHOWN]:
        value = row.get("value")
        out.append(
            {
                "at": time.strftime("%H:%M:%S", time.gmtime(row["time"])),
                **{name: row[name] for name in ("guard", "side", "outcome", "action", "id")},
                "level": row.get("level", ""),
                "value": "–" if value is None else f"{value:.2f}",
                "label": row.get("label", "") or row.get("why", ""),
                "text": row.get("text", ""),
                "ms": f"{row['seconds'] * 1000:.2f}",
            }
        )
    return out


def _seconds(value: float | None) -> str:
    """A bucket's bound as people read it.

    >>> _seconds(0.00025), _seconds(2.5), _seconds(None)
    ('0.25 ms', '2.5 s', '–')
    """
    if value is None:
        return "–"
    if math.isinf(value):
        return "over 300 s"
    return f"{value * 1000:g} ms" if value < 1 else f"{value:g} s"


def _span(seconds: float) -> str:
    """Time as people say it.

    >>> _span(59), _span(3700), _span(200000)
    ('59 s', '1 h 1 min', '2 d 7 h')
    """
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
