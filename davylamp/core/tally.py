"""From rows to estimates, one row at a time: what a suite's metrics say, by slice, with intervals. Rows are not kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from davylamp.core.nouns import Estimate, Metric
from davylamp.core.stats import UNFIT, clustered_rate, corrected_rate, macro_rate, paired_difference, rate

#: A judge's measured error: how many of the rows labelled 1 (positives) and 0 (negatives) it called so.
Error = Mapping[str, int]
Slice = tuple[str | None, str | None]  # (category, arm)


def look(case: Mapping[str, Any], path: str) -> Any:
    """The value at `category`, `group`, `answer` or `meta.x` of a case's plain form; None if it has none.

    >>> look({"id": "1", "meta": {"arm": "none"}}, "meta.arm")
    'none'
    """
    if path.startswith("meta."):
        return case.get("meta", {}).get(path[5:])
    return case.get(path)


def metric_json(metric: Metric) -> dict[str, Any]:
    return {
        "name": metric.name,
        "flip": metric.flip,
        "where": [list(pair) for pair in metric.where],
        "by": list(metric.by),
        "against": list(metric.against) if metric.against else None,
        "higher_is_better": metric.higher_is_better,
        **({"per": metric.per} if metric.per != "case" else {}),
        **({"label": metric.label} if metric.label else {}),
    }


def metric_from(row: Mapping[str, Any]) -> Metric:
    return Metric(
        row["name"],
        flip=row["flip"],
        where=tuple((path, value) for path, value in row["where"]),
        by=tuple(row["by"]),
        against=tuple(row["against"]) if row["against"] else None,
        higher_is_better=row["higher_is_better"],
        per=row.get("per", "case"),
        label=row.get("label", ""),
    )


@dataclass(slots=True)
class _Any:
    """Sums of one metric `per` group in one slice: the largest value of each group so far, and which groups have an unscored row."""

    best: dict[str, float] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)

    def add(self, value: float | None, group: str) -> None:
        self.best[group] = max(self.best.get(group, 0.0), value or 0.0)
        if value is None:
            self.open.add(group)

    def estimate(self, **about: Any) -> Estimate:
        """A group with an unscored row and no 1 among the others could be either: it is unscored."""
        known = [value for group, value in self.best.items() if value == 1.0 or group not in self.open]
        return rate(sum(known), len(known), len(self.best) - len(known), **about)


@dataclass(slots=True)
class _Macro:
    """Sums of one metric `per` category in one slice: hits and scored rows of each category."""

    parts: dict[str, list[float]] = field(default_factory=dict)
    unscored: int = 0

    def add(self, value: float | None, category: str) -> None:
        if value is None:
            self.unscored += 1
            return
        part = self.parts.setdefault(category, [0.0, 0.0])
        part[0] += value
        part[1] += 1

    def estimate(self, **about: Any) -> Estimate:
        hits, sizes = [part[0] for part in self.parts.values()], [int(part[1]) for part in self.parts.values()]
        return macro_rate(hits, sizes, self.unscored, **about)


@dataclass(slots=True)
class _Cell:
    """Sums of one metric in one slice. `groups` holds (sum, rows) by group; ungrouped rows only count in the totals."""

    hits: float = 0.0
    n: int = 0
    unscored: int = 0
    loose: int = 0
    loose_hits: float = 0.0
    loose_squares: float = 0.0
    groups: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, value: float | None, group: str | None) -> None:
        if value is None:
            self.unscored += 1
            return
        self.hits += value
        self.n += 1
        if group is None:
            self.loose += 1
            self.loose_hits += value
            self.loose_squares += value * value
        else:
            total, count = self.groups.get(group, (0.0, 0))
            self.groups[group] = (total + value, count + 1)

    def estimate(self, **about: Any) -> Estimate:
        if not any(count > 1 for _, count in self.groups.values()):  # every row its own cluster: independent rows
            return rate(self.hits, self.n, self.unscored, **about)
        sums = [total for total, _ in self.groups.values()]
        sizes = [count for _, count in self.groups.values()]
        singles = (self.loose_hits, self.loose_squares, self.loose)
        return clustered_rate(sums, sizes, self.unscored, singles=singles, **about)


class Tally:
    """Adds rows of a run and gives the estimates of its metrics, overall first, then by slice in order of appearance.

    An epoch's repeats of a case count as one cluster even where the case names no group.
    """

    def __init__(self, metrics: Iterable[Metric], *, epochs: int = 1):
        self.metrics, self.epochs = tuple(metrics), epochs
        self.cells: dict[tuple[int, Slice], _Cell] = defaultdict(_Cell)
        self.sets: dict[tuple[int, Slice], _Any | _Macro] = {}
        self.pairs: dict[tuple[int, Slice], dict[str, dict[str, list[float | None]]]] = {}
        self.counts = {"rows": 0, "scored": 0, "unscored": 0, "failed": 0}

    def add(self, row: Mapping[str, Any]) -> None:
        """One row of `rows.jsonl`. A failed row (no reply) counts as unscored in every metric: it is never dropped."""
        case, verdict = row["case"], row.get("verdict")
        value = None if verdict is None else verdict["value"]
        self.counts["rows"] += 1
        self.counts["failed" if verdict is None else "unscored" if value is None else "scored"] += 1
        group = case.get("group") or (case["id"] if self.epochs > 1 else None)
        for index, metric in enumerate(self.metrics):
            if any(look(case, path) != wanted for path, wanted in metric.where):
                continue
            score = value
            if metric.label and verdict is not None:  # a verdict without a value still has its label
                score = (
                    float(verdict.get("label") == metric.label) if verdict.get("label") or value is not None else None
                )
            score = score if score is None or not metric.flip else 1.0 - score
            for part in slices(metric, case):
                if metric.per != "case":
                    per_group = metric.per == "group"
                    name = (case.get("group") or case["id"]) if per_group else str(case.get("category"))
                    self.sets.setdefault((index, part), _Any() if per_group else _Macro()).add(score, name)
                elif metric.against is None:
                    self.cells[index, part].add(score, group)
                elif (arm := look(case, metric.against[0])) in metric.against[1:]:
                    arms = self.pairs.setdefault((index, part), {}).setdefault(case.get("group") or case["id"], {})
                    arms.setdefault(str(arm), []).append(score)

    def estimates(self, *, seed: int = 0, error: Error | None = None) -> tuple[Estimate, ...]:
        """All estimates. seed: for the bootstrap of contrasts.  error: the judge's measured error, to correct rates with."""
        out = []
        for index, metric in enumerate(self.metrics):
            misfit = False
            parts = [part for found in (self.cells, self.sets, self.pairs) for number, part in found if number == index]
            for part in sorted(
                parts or [(None, None)],
                key=lambda part: (part != (None, None), part[1] is not None and part[0] is not None),
            ):
                about = {
                    "name": metric.name,
                    "category": part[0],
                    "arm": part[1],
                    "higher_is_better": metric.higher_is_better,
                }
                if metric.against is not None:
                    out.append(self._contrast(metric, self.pairs.get((index, part), {}), seed, about))
                    continue
                if (
                    metric.per != "case"
                ):  # the judge's error is that of one verdict, not of the largest of several or of a mean of means
                    found_set = self.sets.get((index, part)) or (_Any() if metric.per == "group" else _Macro())
                    out.append(found_set.estimate(**about))
                    continue
                estimate = self.cells[index, part].estimate(**about)
                if error and not metric.label:
                    flipped = {
                        "true_hits": error["true_passes"],
                        "positives": error["negatives"],
                        "true_passes": error["true_hits"],
                        "negatives": error["positives"],
                    }
                    if misfit:  # what does not fit all rows is not made to fit a slice of them, which is only smaller
                        estimate = replace(estimate, method=f"{estimate.method}; {UNFIT}")
                    else:
                        estimate = corrected_rate(estimate, **(flipped if metric.flip else error))
                    misfit |= part == (None, None) and estimate.method.endswith(UNFIT)
                out.append(estimate)
        return tuple(out)

    @staticmethod
    def _contrast(
        metric: Metric, pairs: Mapping[str, Mapping[str, list[float | None]]], seed: int, about: dict[str, Any]
    ) -> Estimate:
        import numpy as np

        _, left, right = metric.against or ("", "", "")
        a, b, dropped = [], [], 0
        for arms in pairs.values():
            scores = [arms.get(arm, [None]) for arm in (left, right)]
            if any(score is None for arm in scores for score in arm):
                dropped += 1  # one arm missing or unscored: the pair is left out and counted
                continue
            a.append(sum(s for s in scores[0] if s is not None) / len(scores[0]))
            b.append(sum(s for s in scores[1] if s is not None) / len(scores[1]))
        estimate = paired_difference(a, b, rng=np.random.default_rng(seed), unscored=dropped, **about)
        return replace(estimate, arm=f"{left} - {right}", unit="difference")


def slices(metric: Metric, case: Mapping[str, Any]) -> list[Slice]:
    """Overall, and one slice for each `by` whose values the case has. `meta.arm` fills arm, other paths fill category.

    >>> slices(Metric("m", by=("meta.tags",)), {"id": "1", "meta": {"tags": ["a", "b"]}})
    [(None, None), ('tags=a', None), ('tags=b', None)]
    """
    out: list[Slice] = [(None, None)]
    for by in metric.by:
        found: list[Slice] = [(None, None)]
        for path in by.split("*"):
            value = look(case, path)
            values = value if isinstance(value, list | tuple) else () if value is None else (value,)
            if path == "meta.arm":
                found = [(category, str(one)) for category, _ in found for one in values]
            else:
                name = "" if path == "category" else f"{path.removeprefix('meta.')}="
                found = [(f"{name}{one}", arm) for _, arm in found for one in values]
        out += found
    return out
