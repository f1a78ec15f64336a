"""Two runs side by side: paired by row, clustered by group, Holm-corrected over everything that is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError
from davylamp.core.nouns import Metric, Record
from davylamp.core.record import load
from davylamp.core.rows import read_run
from davylamp.core.stats import holm, paired_difference, rate
from davylamp.core.tally import look, metric_from, slices

Part = tuple[str, str | None, str | None]  # (metric, category, arm)
Scores = dict[str, tuple[float | None, str]]  # {case id and seed: (score or None, group)}


def compare(left: Path, right: Path) -> dict[str, Any]:
    """The comparison of two eval runs, B minus A, in plain types (see `report/html.py`).

    Raises InputError unless both ran the same suite version on the same cases and were judged by the same judge.
    """
    import numpy as np

    a, b = load(left), load(right)
    _check_alike(a, b)
    metrics = {row["name"]: metric_from(row) for row in a.inputs["suite"]["metrics"]}
    ours, theirs = (_scores(folder, metrics) for folder in (left, right))
    rows: list[dict[str, Any]] = []
    arms = {(name, arm) for name, _, arm in ours if arm is not None}
    lone = {
        name for name, _ in arms if sum(other == name for other, _ in arms) == 1
    }  # its slices say what those of all rows say
    for part in sorted(ours.keys() & theirs.keys(), key=lambda part: (part[0], part[1] or "", part[2] or "")):
        if part[2] is not None and part[0] in lone:
            continue
        pairs = [
            (x, y, group)
            for key, (x, group) in sorted(ours[part].items())
            if x is not None and (y := theirs[part].get(key, (None, ""))[0]) is not None
        ]
        first, second, groups = [pair[0] for pair in pairs], [pair[1] for pair in pairs], [pair[2] for pair in pairs]
        left_out = len(ours[part].keys() | theirs[part].keys()) - len(pairs)
        better = metrics[part[0]].higher_is_better
        about: dict[str, Any] = {"name": part[0], "category": part[1], "arm": part[2], "higher_is_better": better}
        difference = paired_difference(
            second,
            first,
            groups=groups if len(set(groups)) < len(groups) else None,
            rng=np.random.default_rng(int(a.id[:8], 16)),
            unscored=left_out,
            **about,
        )
        rows.append(
            {
                "metric": part[0],
                "category": part[1],
                "arm": part[2],
                "a": rate(sum(first), len(first), **about).json(),
                "b": rate(sum(second), len(second), **about).json(),
                "difference": difference.json(),
                "p_holm": None,
                "higher_is_better": better,
                "pairs": len(pairs),
                "left_out": left_out,
            }
        )
    tested = [row for row in rows if row["difference"]["p"] is not None]
    for row, p in zip(tested, holm([row["difference"]["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return {"a": _side(a, left), "b": _side(b, right), "suite": a.name, "rows": rows}


def _check_alike(a: Record, b: Record) -> None:
    mend = {
        "suite": "Run one of them again with the other's suite: davylamp again RUN --target T",
        "judge": "Judge one of them again: davylamp rejudge RUN --judge NAME",
        "epochs": "Run one of them again with the other's epochs",
    }
    for name, advice in mend.items():
        one, two = ({"": value} if not isinstance(value := r.inputs.get(name), dict) else value for r in (a, b))
        different = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
        if different:
            what = f"{name}{'s' if name != 'epochs' else ''} ({', '.join(different)})".removesuffix(" ()")
            raise InputError(f"the runs used different {what}, so their numbers cannot be compared. {advice}")


def _side(record: Record, folder: Path) -> dict[str, str]:
    return {"id": record.id, "name": record.name, "target": record.inputs["target"]["name"], "run": folder.name}


def _scores(folder: Path, metrics: dict[str, Metric]) -> dict[Part, Scores]:
    out: dict[Part, Scores] = {}
    for row in read_run(folder / "rows.jsonl"):
        case = row["case"]
        value = None if row["verdict"] is None else row["verdict"]["value"]
        group = case.get("group") or case["id"]
        for metric in metrics.values():
            if metric.against is not None or any(look(case, path) != wanted for path, wanted in metric.where):
                continue
            score = value if value is None or not metric.flip else 1.0 - value
            for category, arm in slices(metric, case):
                part = out.setdefault((metric.name, category, arm), {})
                part[f"{case['id']}\n{row['seed']}"] = (score, group)
    return out
