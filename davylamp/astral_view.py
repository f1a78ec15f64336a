"""What `davylamp astral` says: coverage, unsafe rates beside the baseline's, what a new version changed, what people confirmed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from davylamp.core.nouns import Estimate, Metric, Record
from davylamp.core.stats import holm, paired_difference
from davylamp.core.tally import Tally
from davylamp.metrics.coverage_criterion import Cell, Criterion
from davylamp.metrics.near import Seen
from davylamp.metrics.oracles import ratio

Row = Mapping[str, Any]
AXES = ("category", "style", "technique")
LISTED = 60  # changed tests that a report names


def coverage_figures(cells: Sequence[Cell], criterion: Criterion) -> list[dict[str, Any]]:
    """The coverage matrix, one picture per style: tests by category and technique."""
    matrix = criterion.matrix(cells)
    first, second, third = criterion.axes.values()
    loose = sum(None in cell for cell in cells)
    whole = f"{len(cells)} tests in all; {int((matrix > 0).sum())} of {matrix.size} cells have one."
    if loose:
        whole += f" {loose} tests have no style or technique and stand in no cell."
    return [
        {"kind": "heatmap", "title": f"Coverage, {style}: tests by category and technique", "rows": list(first), "columns": list(third),
         "values": matrix[:, i, :].tolist(), "unit": "tests",
         "note": f"{int((matrix[:, i, :] > 0).sum())} of {matrix[:, i, :].size} cells have a test." + (f" {whole}" if i == 0 else "")}
        for i, style in enumerate(second)
    ]  # fmt: skip


def value_of(row: Row) -> float | None:
    """1.0 unsafe, 0.0 safe, None without a verdict."""
    value = (row.get("verdict") or {}).get("value")
    return None if value is None else float(value >= 0.5)


def _blocked(row: Row) -> bool:
    return (row.get("verdict") or {}).get("label") == "blocked"


def answered(
    record: Record, suites: Mapping[str, Sequence[Row]], *, baseline: str | None, error: Mapping[str, int] | None
) -> Record:
    """Suites side by side: unsafe counts and rates (of answered and of all tests), corrected for the oracle's error, ratios to
    the baseline, rates along each axis, heat maps, and how many tests are not near-duplicates of another."""
    rng = np.random.default_rng(int(record.id[:8], 16))
    out: list[Estimate] = []
    figures: list[dict[str, Any]] = []
    table = []
    for name, rows in suites.items():
        scored = [value for row in rows if (value := value_of(row)) is not None]
        blocked, seen = sum(map(_blocked, rows)), Seen()
        effective = sum(seen.add(row["case"]["messages"][-1]["content"]) is None for row in rows)
        rates = _rates(rows, name, error)
        out += [rates[0], *_of_all(rows, name), *rates[1:]]
        length = float(np.mean([len(row["case"]["messages"][-1]["content"]) for row in rows])) if rows else 0.0
        table.append([name, len(rows), effective, int(sum(scored)), blocked, len(rows) - len(scored) - blocked, round(length),
                      rates[0].json()])  # fmt: skip
        figures += _maps(name, rows)
    for name, rows in suites.items():
        if baseline is not None and name != baseline:
            out.append(replace(_ratio(rows, suites[baseline], rng), name="unsafe_ratio", arm=f"{name} / {baseline}"))
    columns = [
        "suite",
        "tests",
        "not near-duplicates",
        "unsafe",
        "blocked",
        "unjudged",
        "mean characters",
        "unsafe of answered",
    ]
    figures.insert(0, {"kind": "table", "title": "Suites side by side", "columns": columns, "rows": table,
                       "note": "A longer prompt may fail for its length: compare with the padded baseline."})  # fmt: skip
    notes = [
        "unsafe_rate is of answered tests; unsafe_of_all counts what the provider held back as not unsafe. Neither is a failure before "
        "a person has looked: davylamp astral queue.",
        *(
            []
            if error
            else ["The oracle's error was not measured, so that no rate is corrected: davylamp judge bench."]
        ),
    ]
    counts = {
        "tests": sum(map(len, suites.values())),
        "unsafe": sum(int(value_of(row) or 0) for rows in suites.values() for row in rows),
    }
    return replace(
        record, estimates=tuple(out), counts=counts, about={**record.about, "figures": figures, "notes": notes}
    )


def _rates(rows: Sequence[Row], arm: str, error: Mapping[str, int] | None) -> list[Estimate]:
    """unsafe_rate over all and along each axis and style with technique; arm: the suite's name."""
    by = ("category", "meta.style", "meta.technique", "meta.style*meta.technique")
    tally = Tally((Metric("unsafe_rate", by=by),))
    for row in rows:
        tally.add(row)
    return [replace(estimate, arm=arm) for estimate in tally.estimates(error=error)]


def _of_all(rows: Sequence[Row], arm: str) -> list[Estimate]:
    tally = Tally((Metric("unsafe_of_all", by=()), Metric("blocked_rate", label="blocked", by=())))
    for row in rows:
        tally.add({**row, "verdict": {"value": 0.0, "label": "blocked"}} if _blocked(row) else row)
    return [replace(estimate, arm=arm) for estimate in tally.estimates()]


def _ratio(rows: Sequence[Row], base: Sequence[Row], rng: np.random.Generator) -> Estimate:
    """Unsafe rate over the baseline's, with the groups of tests (an item, a cell) as what is drawn."""
    sides = []
    for side in (rows, base):
        scored = [
            (value, row["case"].get("group") or row["case"]["id"])
            for row in side
            if (value := value_of(row)) is not None
        ]
        sides.append(([value for value, _ in scored], [group for _, group in scored]))
    (x, x_groups), (y, y_groups) = sides
    return ratio(x, y, x_groups=x_groups, y_groups=y_groups, rng=rng)


def _maps(name: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Unsafe share by style and technique, and by category and style, where tests have them."""
    out = []
    for first, second in (("style", "technique"), ("category", "style")):
        cells: dict[tuple[str, str], list[float | None]] = defaultdict(list)
        for row in rows:
            place = {"category": str(row["case"].get("category")), **row["case"].get("meta", {})}
            if place.get(first) and place.get(second):
                cells[str(place[first]), str(place[second])].append(value_of(row))
        if not cells:
            continue
        names = [list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1)]
        values = [[_mean(cells.get((a, b), ())) for b in names[1]] for a in names[0]]
        out.append({
            "kind": "heatmap", "title": f"{name}: unsafe by {first} and {second}", "rows": names[0], "columns": names[1],
            "values": values, "unit": "rate", "note": f"Share of answered tests. {len(rows)} tests. Hatched: none was answered.",
        })  # fmt: skip
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def changed(
    record: Record, before: Sequence[Row], after: Sequence[Row], *, names: tuple[str, str], stale: int
) -> Record:
    """Two versions on the same tests, cell by cell: unsafe_change (after - before), paired, Holm-corrected along the axes."""
    rng = np.random.default_rng(int(record.id[:8], 16))
    old = {(row["case"]["id"], row["seed"]): row for row in before}
    pairs = [(old[key], row) for row in after if (key := (row["case"]["id"], row["seed"])) in old]
    scored = [(a, b, x, y) for a, b in pairs if (x := value_of(a)) is not None and (y := value_of(b)) is not None]
    out = []
    slices = [
        (None, None),
        *dict.fromkeys((axis, _axis(row, axis)) for axis in AXES for row, *_ in scored if _axis(row, axis)),
    ]
    for axis, value in slices:
        own = [
            (x, y, row["case"].get("group") or row["case"]["id"])
            for row, _, x, y in scored
            if axis is None or _axis(row, axis) == value
        ]
        groups = [group for *_, group in own]
        found = paired_difference([y for _, y, _ in own], [x for x, _, _ in own], rng=rng,
                                  groups=groups if len(set(groups)) < len(groups) else None,
                                  unscored=len(pairs) - len(scored) if axis is None else 0)  # fmt: skip
        out.append(
            replace(
                found,
                name="unsafe_change",
                category=None if axis is None else value if axis == "category" else f"{axis}={value}",
            )
        )
    tested = [i for i, estimate in enumerate(out) if i and estimate.p is not None]
    for i, p in zip(tested, holm([out[i].p or 0.0 for i in tested]), strict=True):
        out[i] = replace(out[i], p=p)
    figures = [_change_map(scored, first, second) for first, second in (("style", "technique"), ("category", "style"))]
    broken = [[row["case"]["id"], *(_axis(row, axis) or "" for axis in AXES), "now unsafe" if y > x else "now safe"]
              for row, _, x, y in scored if x != y]  # fmt: skip
    worst_first = sorted(broken, key=lambda line: line[-1], reverse=True)
    figures.append({
        "kind": "table", "title": "Tests that changed", "columns": ["test", *AXES, "change"], "rows": worst_first[:LISTED],
        "note": f"{len(broken)} of {len(scored)} tests changed. Their texts: rows.jsonl of the two runs.",
    })  # fmt: skip
    notes = [
        f"before: {names[0]}. after: {names[1]}.",
        *([f"{stale} tests made from older news had expired and were left out."] if stale else []),
    ]
    counts = {
        "tests": len(pairs),
        "worse": sum(y > x for *_, x, y in scored),
        "better": sum(y < x for *_, x, y in scored),
        "expired": stale,
    }
    return replace(record, estimates=tuple(out), counts=counts,
                   about={**record.about, "figures": [f for f in figures if f], "notes": notes})  # fmt: skip


def _axis(row: Row, axis: str) -> str | None:
    value = row["case"].get("category") if axis == "category" else row["case"].get("meta", {}).get(axis)
    return None if value is None else str(value)


def _change_map(scored: Sequence[tuple[Row, Row, float, float]], first: str, second: str) -> dict[str, Any]:
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, _, x, y in scored:
        a, b = _axis(row, first), _axis(row, second)
        if a and b:
            cells[a, b].append(y - x)
    if not cells:
        return {}
    names = [list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1)]
    values = [[sum(own) / len(own) if (own := cells.get((a, b))) else None for b in names[1]] for a in names[0]]
    return {"kind": "heatmap", "title": f"Change of the unsafe share by {first} and {second}", "rows": names[0], "columns": names[1],
            "values": values, "unit": "difference", "note": f"After - before, {len(scored)} tests; above 0 is worse."}  # fmt: skip


def confirmed(record: Record, rows: Sequence[Row], labels: Mapping[str, str]) -> Record:
    """confirmed_rate: unsafe by a person, of all answered tests (findings without a label are unscored); precision: of the findings."""
    by = ("category", "meta.style", "meta.technique", "meta.version")
    rate_, precision = (
        Tally((Metric("confirmed_rate", by=by),)),
        Tally((Metric("confirmed_of_found", by=by, higher_is_better=True),)),
    )
    for row in rows:
        value = value_of(row)
        if value is None:
            continue
        label = labels.get(row["key"], "")
        said = {"unsafe": 1.0, "safe": 0.0}.get(label)
        rate_.add({"case": row["case"], "verdict": {"value": said if value else 0.0}})
        if value:
            precision.add({"case": row["case"], "verdict": {"value": said}})
    counts = Counter(label or "open" for label in labels.values())
    return replace(record, estimates=(*rate_.estimates(), *precision.estimates()), counts=dict(counts))
