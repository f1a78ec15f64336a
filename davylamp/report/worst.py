"""The rows a person should look at: the worst of a run, and a few without a verdict, clipped to what fits on a page."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davylamp.core.nouns import Metric
from davylamp.core.tally import look
from davylamp.report import plots

TEXT_LIMIT, EXCERPT_LIMIT, TURN_LIMIT = 6000, 160, 40  # characters of a turn, of its preview, and turns of a row
OTHERS_SHOWN = 5  # unscored and failed rows listed for each run


@dataclass(slots=True)
class Picked:
    """The rows of a run that are shown: the worst, worst first, and the first few unscored and failed ones.

    counts: how many rows there are of each sort (`worst`: of any badness at all).
    """

    worst: list[dict[str, Any]] = field(default_factory=list)
    unscored: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def badness(row: Mapping[str, Any], metrics: Sequence[Metric]) -> tuple[float, str] | None:
    """How bad a row's verdict is, in [0, 1], and by which metric: the first whose `where` the case matches. None: not scored.

    >>> row = {"case": {"id": "1", "meta": {"label": "safe"}}, "verdict": {"value": 0.0}}
    >>> badness(row, [Metric("over_refusal_rate", flip=True, where=(("meta.label", "safe"),))])
    (1.0, 'over_refusal_rate')
    """
    value = (row.get("verdict") or {}).get("value")
    if value is None:
        return None
    for metric in metrics:
        if all(look(row["case"], path) == wanted for path, wanted in metric.where):
            return (1.0 - value if metric.flip != metric.higher_is_better else value), metric.name
    return None


def pick(path: Path, metrics: Sequence[Metric], shown: int) -> Picked:
    """Walk a `rows.jsonl` once and keep the worst; among equally bad ones, every category has its first before any has its second.

    A line with a verdict is final: only a row that failed, or still lacks its verdict, is ever written again under its key. So there
    is no index of all rows, and memory does not grow with them, only with the failed ones.
    """
    out = Picked()
    if not path.is_file() or shown == 0:
        return out
    metrics = [metric for metric in metrics if metric.against is None] or metrics
    heap: list[tuple[float, int, int, str, dict[str, Any]]] = []
    seen: Counter[str] = Counter()
    open_at: dict[str, int] = {}  # key of a row without a verdict -> where its last line stands
    for offset, row in _lines(path):
        key, verdict = str(row["key"]), row.get("verdict")
        open_at.pop(key, None)
        if verdict is None:
            open_at[key] = offset
            continue
        if verdict.get("value") is None:
            out.counts["unscored"] += 1
            if len(out.unscored) < OTHERS_SHOWN:
                out.unscored.append(_row(row, ""))
            continue
        found = badness(row, metrics)
        if found is None or found[0] <= 0:
            continue
        out.counts["worst"] += 1
        category = str(row["case"].get("category"))
        seen[category] += found[0] >= 0.5
        item = (found[0], -seen[category], -offset, found[1], row)
        if len(heap) < shown:
            heapq.heappush(heap, item)
        elif item[:3] > heap[0][:3]:
            heapq.heapreplace(heap, item)
    out.worst = [
        _row(row, name.replace("_", " ")) for *_, name, row in sorted(heap, reverse=True, key=lambda item: item[:3])
    ]
    if open_at:
        out.counts["failed"] = len(open_at)
        with path.open("rb") as file:
            for offset in sorted(open_at.values())[:OTHERS_SHOWN]:
                file.seek(offset)
                out.failed.append(_row(json.loads(file.readline()), ""))
    return out


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it stands, row) of every whole line; a torn last one, of a run that was cut off, is none."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield offset, json.loads(line)
            offset += len(line)


def _row(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A row as the template shows it: clipped, nothing that could be long or active left in it."""
    case, reply, verdict = row["case"], row.get("reply") or [], row.get("verdict") or {}
    messages = [*case["messages"], *reply]
    judged = len(messages) - 1 if reply else -1
    first = max(0, len(messages) - TURN_LIMIT)
    facts = {"row": case["id"], "category": case.get("category"), "arm": (case.get("meta") or {}).get("arm"), "group": case.get("group"),
             "answer key": case.get("answer"), "seed": row.get("seed"), "key": row.get("key")}  # fmt: skip
    last = text_of(messages[-1].get("content"))
    return {
        "metric": metric,
        "value": verdict.get("value"),
        "label": verdict.get("label") or "",
        "categories": [str(name) for name in verdict.get("categories") or ()],
        "why": plots.clip(text_of(verdict.get("why")), 1200)[0],
        "error": plots.clip(text_of(row.get("error")), 1200)[0],
        "facts": {name: plots.clip(text_of(value), 200)[0] for name, value in facts.items() if value is not None},
        "excerpt": " ".join(plots.clip(last, EXCERPT_LIMIT)[0].split()) + ("…" if len(last) > EXCERPT_LIMIT else ""),
        "turns": [_turn(message, index == judged) for index, message in enumerate(messages) if index >= first],
        "turns_left": first,
        "length": len(last),
    }


def _turn(message: Mapping[str, Any], judged: bool) -> dict[str, Any]:
    media = [
        f"data URL, {len(item):,} characters" if item.startswith("data:") else item[:200]
        for item in map(text_of, message.get("media") or ())
    ]
    finish = str(message.get("finish") or "")
    return {
        "role": str(message.get("role", "?")),
        "judged": judged,
        "text": plots.clip(text_of(message.get("content")), TEXT_LIMIT),
        "reasoning": plots.clip(text_of(message.get("reasoning")), TEXT_LIMIT),
        "calls": plots.clip(plots.pretty(message["calls"]), TEXT_LIMIT) if message.get("calls") else None,
        "media": [f"data URL, {len(item):,} characters" if item.startswith("data:") else item[:200] for item in media],
        "finish": "" if finish == "stop" else finish,
    }


def text_of(value: Any) -> str:
    """A value as text: itself, nothing for None, else its JSON."""
    return (
        value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    )
