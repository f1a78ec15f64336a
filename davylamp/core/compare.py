"""Two runs side by side: paired by row, clustered by group, Holm-corrected over everything that is compared."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError
from davylamp.core.nouns import Metric
from davylamp.core.record import load
from davylamp.core.rows import read_run
from davylamp.core.stats import holm, paired_difference, rate
from davylamp.core.tally import look, metric_from, slices


def compare(left: Path, right: Path) -> dict[str, Any]:
    """The comparison of two eval runs, B minus A, in plain types (see `report/html.py`).

    Raises InputError unless both ran the same suite version on the same cases and were judged by the same judge.
    """
    import numpy as np

    a, b = load(left), load(right)
    for name, what in (("suite", "suites"), ("judge", "judges"), ("epochs", "numbers of epochs")):
        ours, theirs = (dict(record.inputs.get(name, {})) if name != "epochs" else {"n": record.inputs.get(name)} for record in (a, b))
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if different:
            raise InputError(f"the runs used different {what} ({', '.join(different)}), so their numbers cannot be compared. "
                             + ("Judge one of them again: davylamp rejudge RUN --judge NAME" if name == "judge" else
                                "Run one of them again with the other's suite: davylamp again RUN --target T"))
    scores = [_scores(folder, [metric_from(row) for row in a.inputs["suite"]["metrics"]]) for folder in (left, right)]
    rows = []
    for part in sorted(scores[0].keys() & scores[1].keys(), key=lambda part: (part[0], part[1] or "", part[2] or "")):
        metric = next(metric_from(row) for row in a.inputs["suite"]["metrics"] if row["name"] == part[0])
        ours, theirs = scores[0][part], scores[1][part]
        both = sorted(key for key in ours.keys() & theirs.keys() if ours[key][0] is not None and theirs[key][0] is not None)
        values = [[scores_[key][0] for key in both] for scores_ in (ours, theirs)]
        groups = [ours[key][1] for key in both]
        left_out = len(ours.keys() | theirs.keys()) - len(both)
        difference = paired_difference(values[1], values[0], groups=groups if len(set(groups)) < len(groups) else None,
                                       rng=np.random.default_rng(int(a.id[:8], 16)), unscored=left_out, name=metric.name,
                                       category=part[1], arm=part[2], higher_is_better=metric.higher_is_better)
        sides = [rate(sum(side), len(side), name=metric.name) for side in values]
        rows.append({"metric": metric.name, "category": part[1], "arm": part[2], "a": sides[0].json(), "b": sides[1].json(),
                     "difference": difference.json(), "p_holm": None, "higher_is_better": metric.higher_is_better,
                     "pairs": len(both), "left_out": left_out})
    tested = [row for row in rows if row["difference"]["p"] is not None]
    for row, p in zip(tested, holm([row["difference"]["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    sides_json = {name: {"id": record.id, "name": record.name, "target": record.inputs["target"]["name"], "run": folder.name}
                  for name, record, folder in (("a", a, left), ("b", b, right))}
    return {**sides_json, "suite": a.name, "rows": rows}


def _scores(folder: Path, metrics: list[Metric]) -> dict[tuple[str, str | None, str | None], dict[str, tuple[float | None, str]]]:
    """(metric, category, arm) -> {case id and seed: (score or None, group)}."""
    out: dict[tuple[str, str | None, str | None], dict[str, tuple[float | None, str]]] = {}
    for row in read_run(folder / "rows.jsonl"):
        case: Mapping[str, Any] = row["case"]
        value = None if row["verdict"] is None else row["verdict"]["value"]
        for metric in metrics:
            if metric.against is not None or any(look(case, path) != wanted for path, wanted in metric.where):
                continue
            score = value if value is None or not metric.flip else 1.0 - value
            for category, arm in slices(metric, case):
                out.setdefault((metric.name, category, arm), {})[f"{case['id']}\n{row['seed']}"] = (score, case.get("group") or case["id"])
    return out
