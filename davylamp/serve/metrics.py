"""Counts of a running gateway: plain numbers in one object, written as Prometheus text, and shared between workers as small files.

With several workers each one writes its counts every second; whoever is asked adds the others' files to its own numbers. A worker that is
started again goes on from its predecessor's file, so no count runs backwards (at most the last second before a kill -9 is missing).
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from davylamp.serve.judging import Judged

BUCKETS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)
HELP = {
    "requests": (
        "endpoint outcome",
        "Requests by how they ended: allowed, blocked, unavailable, rejected, upstream_error, disconnected.",
    ),
    "verdicts": ("guard side outcome level", "Verdicts of guards."),
    "failures": ("guard kind", "Verdicts that guards did not give: timeout, raised, no_verdict, unsure."),
    "warnings": ("guard side level", "Messages let through with a warning."),
    "rejected": ("code", "Requests refused before any guard saw them."),
    "upstream_errors": ("kind", "Requests the upstream did not answer well."),
    "regenerations": ("result", "Replies asked for again, and how that ended."),
    "reloads": ("result", "Policy reloads."),
    "feedback": ("guard result", "Labels passed on to guards."),
    "audit_failures": ("", "Lines of the audit log that could not be written."),
}
LATEST = 50  # verdicts kept for the page, and as many of those that were not simply allowed
BEAT = 10  # seconds that one bar of the page's chart stands for
BEATS = 60  # bars
WEIGHTS = 240  # points kept of the experts' weights


class Histogram:
    """Counts of seconds by bucket, with their sum."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def quantile(self, share: float) -> float | None:
        """The upper bound of the bucket that holds this share; None without counts.

        >>> h = Histogram(); h.add(0.003); h.add(0.2); h.quantile(0.5)
        0.005
        """
        total = sum(self.counts)
        if not total:
            return None
        seen = 0
        for bound, count in zip((*BUCKETS, math.inf), self.counts, strict=True):
            seen += count
            if seen >= share * total:
                return bound
        return math.inf


class Metrics:
    """counts: name -> label values -> number.  seconds: histograms by guard, and of whole requests under ""."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in HELP}
        self.seconds: dict[str, Histogram] = {"": Histogram()}
        self.in_flight = 0
        self.started = time.time()
        self.latest: deque[tuple[float, Any, str] | dict[str, Any]] = deque(maxlen=LATEST)
        self.notable: deque[tuple[float, Any, str] | dict[str, Any]] = deque(maxlen=LATEST)
        self.beats: deque[list[int]] = deque(maxlen=BEATS)  # [number of the beat, allowed, blocked, other]
        self._before = (0, 0, 0)
        self.weights: dict[str, deque[tuple[float, dict[str, float]]]] = {}

    def count(self, name: str, *labels: str) -> None:
        self.counts[name][labels] += 1

    def took(self, guard: str, seconds: float) -> None:
        histogram = self.seconds.get(guard)
        if histogram is None:
            histogram = self.seconds[guard] = Histogram()
        histogram.add(seconds)

    def note(self, judged: Judged, text: str) -> None:
        """Count one verdict and keep it for the page. text: what was judged, or "" where pages show none."""
        ruling = judged.ruling
        self.counts["verdicts"][judged.guard, judged.side, ruling.outcome, ruling.level or ""] += 1
        if judged.failure:
            self.counts["failures"][judged.guard, judged.failure] += 1
        if ruling.action == "warn":
            self.counts["warnings"][judged.guard, judged.side, ruling.level or ""] += 1
        self.took(judged.guard, judged.seconds)
        item = (time.time(), judged, text)
        self.latest.append(item)
        if ruling.action != "allow" or judged.failure:
            self.notable.append(item)

    def beat(self) -> None:
        """Add what has been answered since the last call to the bar of this time."""
        sums = Counter[str]()
        for (_, outcome), number in self.counts["requests"].items():
            sums[outcome if outcome in ("allowed", "blocked") else "other"] += number
        now = (sums["allowed"], sums["blocked"], sums["other"])
        number = int(time.time() // BEAT)
        if not self.beats or self.beats[-1][0] != number:
            self.beats.append([number, 0, 0, 0])
        for place, (new, old) in enumerate(zip(now, self._before, strict=True), 1):
            self.beats[-1][place] += new - old
        self._before = now

    def weigh(self, guard: str, weights: Mapping[str, float]) -> None:
        """Note the weights a guard has now; points that repeat the two before them only move the last one."""
        points = self.weights.setdefault(guard, deque(maxlen=WEIGHTS))
        now = (time.time(), dict(weights))
        if len(points) >= 2 and points[-1][1] == points[-2][1] == now[1]:
            points[-1] = now
        else:
            points.append(now)

    def plain(self) -> dict[str, Any]:
        """Everything as plain types: what a worker writes for the others."""
        return {
            "counts": {
                name: [[list(labels), n] for labels, n in counts.items()] for name, counts in self.counts.items()
            },
            "seconds": {name: [item.counts, item.sum] for name, item in self.seconds.items()},
            "in_flight": self.in_flight,
            "started": self.started,
            "latest": [item if isinstance(item, dict) else _latest(*item) for item in self.latest],
            "notable": [item if isinstance(item, dict) else _latest(*item) for item in self.notable],
            "beats": [list(beat) for beat in self.beats],
            "weights": {name: [list(point) for point in points] for name, points in self.weights.items()},
        }

    def load(self, plain: Mapping[str, Any]) -> None:
        """Go on from what a worker wrote. What runs there is over, so `in_flight` stays."""
        for name, rows in plain["counts"].items():
            self.counts[name].update({tuple(labels): n for labels, n in rows})
        for name, (counts, total) in plain["seconds"].items():
            histogram = self.seconds.setdefault(name, Histogram())
            histogram.counts, histogram.sum = list(counts), total
        self.latest.extend(plain["latest"])
        self.notable.extend(plain["notable"])
        self.beats.extend(list(beat) for beat in plain["beats"])
        kept, self.beats = self.beats, deque(maxlen=BEATS)
        self.beat()  # what was counted before is not new
        self.beats = kept
        for name, points in plain["weights"].items():
            self.weights[name] = deque(((at, weights) for at, weights in points), maxlen=WEIGHTS)


def _latest(at: float, judged: Judged, text: str) -> dict[str, Any]:
    return {"time": at, **judged.json(bool(text)), **({"text": text} if text else {})}


class Board:
    """The folder where workers leave their counts. Without a folder there is one worker, and nothing is written."""

    def __init__(self, folder: Path | None, number: int):
        self.folder, self.number = folder, number

    def read(self, number: int) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        try:
            return json.loads((self.folder / f"{number}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, metrics: Metrics) -> None:
        if self.folder is not None:
            part = self.folder / f"{self.number}.part"
            part.write_text(json.dumps(metrics.plain()), encoding="utf-8")
            part.replace(self.folder / f"{self.number}.json")

    def all(self, own: Metrics) -> list[tuple[str, dict[str, Any]]]:
        """(worker, its numbers) of all workers, one's own as they are now."""
        out = {self.number: own.plain()}
        if self.folder is not None:
            for path in self.folder.glob("*.json"):
                if (
                    path.stem.isdigit()
                    and int(path.stem) != self.number
                    and (row := self.read(int(path.stem))) is not None
                ):
                    out[int(path.stem)] = row
        return [(str(number), out[number]) for number in sorted(out)]


def prometheus(workers: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """The text form that Prometheus reads; every series bears its worker, so that one that starts again is no puzzle."""
    workers = list(workers)
    lines: list[str] = []

    def family(name: str, kind: str, help_text: str) -> None:
        lines.append(f"# HELP davylamp_{name} {help_text}")
        lines.append(f"# TYPE davylamp_{name} {kind}")

    for name, (labels, text) in HELP.items():
        family(f"{name}_total", "counter", text)
        for worker, plain in workers:
            rows = plain["counts"].get(name, [])
            if not labels and not rows:
                rows = [[[], 0]]
            for values, number in rows:
                pairs = dict(zip(labels.split(), values, strict=True))
                lines.append(f"davylamp_{name}_total{_labels(pairs, worker)} {number}")
    for name, text in (("request_seconds", "Whole requests."), ("guard_seconds", "One verdict of a guard.")):
        family(name, "histogram", text)
        for worker, plain in workers:
            for guard, (counts, total) in plain["seconds"].items():
                if (guard == "") != (name == "request_seconds"):
                    continue
                pairs, seen = ({"guard": guard} if guard else {}), 0
                for bound, number in zip((*map(repr, BUCKETS), "+Inf"), counts, strict=True):
                    seen += number
                    lines.append(f"davylamp_{name}_bucket{_labels({**pairs, 'le': bound}, worker)} {seen}")
                lines.append(f"davylamp_{name}_sum{_labels(pairs, worker)} {total!r}")
                lines.append(f"davylamp_{name}_count{_labels(pairs, worker)} {seen}")
    family("in_flight", "gauge", "Requests being answered.")
    lines += [f"davylamp_in_flight{_labels({}, worker)} {plain['in_flight']}" for worker, plain in workers]
    family("start_time_seconds", "gauge", "When the worker began, as Unix time.")
    lines += [f"davylamp_start_time_seconds{_labels({}, worker)} {plain['started']!r}" for worker, plain in workers]
    family("guard_weight", "gauge", "Weights of the experts of a guard that mixes several.")
    for worker, plain in workers:
        for guard, points in plain["weights"].items():
            for expert, weight in points[-1][1].items() if points else ():
                lines.append(f"davylamp_guard_weight{_labels({'guard': guard, 'expert': expert}, worker)} {weight!r}")
    return "\n".join(lines) + "\n"


def _labels(pairs: Mapping[str, str], worker: str) -> str:
    """Label values may hold anything a guard invents.

    >>> print(_labels({"level": "x y"}, "0"))
    {level="x y",worker="0"}
    """
    inner = ",".join(f'{name}="{_escape(value)}"' for name, value in {**pairs, "worker": worker}.items())
    return "{" + inner + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
