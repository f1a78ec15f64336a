"""Figures that a record brings along: `about["figures"]`, a list of plain dicts, drawn by the report without a template of their own.

    {"kind": "heatmap", "title", "rows": [labels], "columns": [labels], "values": [[number or None]], "unit"?, "note"?}
    {"kind": "curves", "title", "x_label", "y_label", "series": [{"name", "x": [...], "y": [...], "low"?: [...], "high"?: [...]}],
     "x_unit"?, "y_unit"?, "x_log"?, "y_log"?, "note"?}
    {"kind": "scatter", "title", "x_label", "y_label", "points": [{"x", "y", "label"?, "x_low"?, "x_high"?, "y_low"?, "y_high"?,
     "marked"?}], "x_unit"?, "y_unit"?, "x_log"?, "y_log"?, "note"?}
    {"kind": "table", "title", "columns": [labels], "rows": [[text, number, bool, None, or an Estimate's json()]], "note"?}

A key with `?` may be left out or None; any other key, kind, length or type is an InputError that names the place. Numbers are finite.
unit, x_unit, y_unit: `rate` (shown in percent), `difference` (in percentage points), else a word set behind the numbers.
values: a None is a cell without a value and is hatched. All values >= 0 give a scale from pale to dark, mixed signs one about zero.
series: x in any order; a None in y is a gap; low and high come together and make a band. x_log, y_log: powers of ten, numbers > 0.
points: low and high come together and make a whisker; marked points are filled, larger and always labelled. A point whose x or y is
None is not drawn and stands in the table only.
note: one or two sentences under the figure: what is seen, and on how many rows or seeds.

Pictures come with their numbers as a table beside them, so that nothing is told by colour or place alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Estimate
from davylamp.report import charts, plots

CELLS_LIMIT, POINTS_LIMIT = 20_000, 100_000  # of one figure; more is no picture but a file
ROWS_SHOWN = 200  # of the table beside a picture
NUMBERS_UP_TO = 12  # columns of a heatmap whose cells still hold their number

KEYS = {
    "heatmap": (("title", "rows", "columns", "values"), ("unit", "note")),
    "curves": (("title", "x_label", "y_label", "series"), ("x_unit", "y_unit", "x_log", "y_log", "note")),
    "scatter": (("title", "x_label", "y_label", "points"), ("x_unit", "y_unit", "x_log", "y_log", "note")),
    "table": (("title", "columns", "rows"), ("note",)),
}
SERIES_KEYS = (("name", "x", "y"), ("low", "high"))
POINT_KEYS = ((), ("x", "y", "label", "x_low", "x_high", "y_low", "y_high", "marked"))


def views(figures: Any, where: str = "figures") -> list[dict[str, Any]]:
    """The figures of a record, checked and drawn, as the template shows them: title, kind, svg, key, table, words, note.

    where: names the place in errors.  Raises InputError or UnknownNameError.

    >>> views([{"kind": "table", "title": "Edits", "columns": ["edit", "layers"], "rows": [["none", 0]]}])[0]["table"]["rows"]
    [['none', '0']]
    >>> views([{"kind": "pie", "title": "Edits"}])
    Traceback (most recent call last):
    davylamp.core.errors.UnknownNameError: no kind of figure (figures, number 1) named 'pie'. Known: curves, heatmap, scatter, table.
    """
    if figures is None:
        return []
    return [_view(figure, f"{where}, number {index}") for index, figure in enumerate(_list(figures, where), 1)]


def _view(figure: Any, where: str) -> dict[str, Any]:
    if not isinstance(figure, Mapping):
        raise InputError(f"{where}: a figure must be an object, got {type(figure).__name__}")
    kind = figure.get("kind")
    if not isinstance(kind, str) or kind not in KEYS:
        raise UnknownNameError(f"kind of figure ({where})", str(kind), KEYS)
    given = {name: value for name, value in figure.items() if name != "kind"}
    _keys(given, KEYS[kind], f"{where}, {kind}")
    for name in ("title", "x_label", "y_label", "note", "unit", "x_unit", "y_unit"):
        if not isinstance(given.get(name) or "", str):
            raise InputError(f"{where}: {name} must be text, got {type(given[name]).__name__}")
    for name in ("x_log", "y_log"):
        if not isinstance(given.get(name) or False, bool):
            raise InputError(f"{where}: {name} must be true or false, got {given[name]!r}")
    draw: Callable[[Mapping[str, Any], str], dict[str, Any]] = {
        "heatmap": _heatmap,
        "curves": _curves,
        "scatter": _scatter,
        "table": _table,
    }[kind]
    empty: dict[str, Any] = {"svg": None, "key": [], "table": None, "map": None, "words": ""}
    return {**empty, "kind": kind, "title": given["title"], "note": given.get("note") or "", **draw(given, where)}


# Checks


def _keys(row: Mapping[str, Any], known: tuple[Sequence[str], Sequence[str]], where: str) -> None:
    needed, free = known
    for name in row:
        if name not in (*needed, *free):
            raise UnknownNameError(f"key of a figure ({where})", str(name), (*needed, *free))
    for name in needed:
        if row.get(name) is None:
            raise InputError(f"{where}: {name} is missing")


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} must be a list, got {type(value).__name__}")
    return value


def _texts(value: Any, where: str) -> list[str]:
    for item in _list(value, where):
        if not isinstance(item, str | int | float):
            raise InputError(f"{where} must hold texts, got {type(item).__name__}")
    return [str(item) for item in value]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where} must be a finite number, got {value!r:.60}")
    return float(value)


def _numbers(value: Any, where: str, length: int | None = None, *, gaps: bool = False) -> list[float | None]:
    row = [None if gaps and x is None else _number(x, f"{where}[{i}]") for i, x in enumerate(_list(value, where))]
    if length is not None and len(row) != length:
        raise InputError(f"{where} must have {length} numbers, got {len(row)}")
    return row


def _few(count: int, limit: int, what: str, where: str) -> None:
    if count > limit:
        raise InputError(
            f"{where}: {count:,} {what} are too many for a picture (limit {limit:,}). Thin them out, or write a file"
        )


# Heatmap


def _heatmap(figure: Mapping[str, Any], where: str) -> dict[str, Any]:
    rows, names = _texts(figure["rows"], f"{where}: rows"), _texts(figure["columns"], f"{where}: columns")
    unit = figure.get("unit") or ""
    if len(_list(figure["values"], f"{where}: values")) != len(rows):
        raise InputError(f"{where}: values must have {len(rows)} rows, got {len(figure['values'])}")
    _few(len(rows) * len(names), CELLS_LIMIT, "cells", where)
    grid = [_numbers(line, f"{where}: values[{i}]", len(names), gaps=True) for i, line in enumerate(figure["values"])]
    found = [
        (x, row, name)
        for row, line in zip(rows, grid, strict=True)
        for name, x in zip(names, line, strict=True)
        if x is not None
    ]
    shades = charts.Shades([x for x, *_ in found], unit)
    cells = [[charts.cell(x, shades, unit) for x in line] for line in grid]
    missing = len(rows) * len(names) - len(found)
    words = f"{len(rows)} x {len(names)} cells"
    if found:
        least, most = min(found, key=lambda item: item[0]), max(found, key=lambda item: item[0])
        words += f"; lowest {plots.number(least[0], unit)} ({least[1]}, {least[2]})"
        words += f", highest {plots.number(most[0], unit)} ({most[1]}, {most[2]})"
    words += f"; {missing} without a value" if missing else ""
    every = max(1, math.ceil(len(names) / 16))
    return {
        "svg": charts.scale_svg(shades) if found else None,
        "words": words + ".",
        "map": {
            "columns": [
                (name, "" if index % (3 * every) == 0 else "dim" if index % every else "dim-narrow")
                for index, name in enumerate(names)
            ],
            "rows": list(zip(rows, cells, strict=True)),
            "numbers": len(names) <= NUMBERS_UP_TO,
            "margin": min(11.0, 1.2 + 0.45 * max((len(row) for row in rows), default=0)),
            "missing": missing,
        },
    }


# Curves and scatter


def _curves(figure: Mapping[str, Any], where: str) -> dict[str, Any]:
    lines = []
    for index, item in enumerate(_list(figure["series"], f"{where}: series"), 1):
        here = f"{where}, series {index}"
        if not isinstance(item, Mapping):
            raise InputError(f"{here} must be an object, got {type(item).__name__}")
        _keys(item, SERIES_KEYS, here)
        x = _numbers(item["x"], f"{here}: x")
        y = _numbers(item["y"], f"{here}: y", len(x), gaps=True)
        ends: list[list[float | None]] = []
        if (item.get("low") is None) != (item.get("high") is None):
            raise InputError(f"{here}: low and high must come together")
        if item.get("low") is not None:
            ends = [_numbers(item[name], f"{here}: {name}", len(x), gaps=True) for name in ("low", "high")]
            if any((a is None) != (b is None) for a, b in zip(*ends, strict=True)):
                raise InputError(f"{here}: low and high must have their gaps at the same places")
        order = sorted(range(len(x)), key=lambda i: x[i] or 0.0)
        low, high = ([end[i] for i in order] for end in ends) if ends else ([None] * len(x), [None] * len(x))
        points = list(zip([x[i] for i in order], [y[i] for i in order], low, high, strict=True))
        lines.append(charts.Line(str(item["name"]), points))  # type: ignore[arg-type]
    _few(sum(len(line.points) for line in lines), POINTS_LIMIT, "points", where)
    every_x = [x for line in lines for x, *_ in line.points]
    every_y = [y for line in lines for _, *ys in line.points for y in ys if y is not None]
    across, up = _scales(figure, every_x, every_y, where)
    rows = [
        [line.name, across.text(x), up.text(y), plots.interval(low, high, up.unit) or "–"]
        for line in lines
        for x, y, low, high in line.points
    ]
    banded = any(low is not None for line in lines for _, _, low, _ in line.points)
    said = [f"{line.name}: {_course(line, across, up)}" for line in lines]
    heads = ["series", figure["x_label"], figure["y_label"], *(["interval"] if banded else [])]
    return {
        "svg": charts.curves(lines, across, up, figure["x_label"], figure["y_label"]),
        "key": [(charts.line_key(index), line.name) for index, line in enumerate(lines)] if len(lines) > 1 else [],
        "words": f"{figure['y_label']} by {figure['x_label']}. {'; '.join(said) or 'No series'}.",
        "table": _grid(heads, [row[: len(heads)] for row in rows], "lrrl"),
    }


def _course(line: charts.Line, across: charts.Scale, up: charts.Scale) -> str:
    seen = [(x, y) for x, y, *_ in line.points if y is not None]
    if not seen:
        return "no values"
    (first, start), (last, end) = seen[0], seen[-1]
    return f"{up.text(start)} at {across.text(first)}, {up.text(end)} at {across.text(last)}"


def _scatter(figure: Mapping[str, Any], where: str) -> dict[str, Any]:
    points, rows = [], []
    units = [figure.get(name) or "" for name in ("x_unit", "y_unit")]
    for index, item in enumerate(_list(figure["points"], f"{where}: points"), 1):
        here = f"{where}, point {index}"
        if not isinstance(item, Mapping):
            raise InputError(f"{here} must be an object, got {type(item).__name__}")
        _keys(item, POINT_KEYS, here)
        label, marked = item.get("label") or "", item.get("marked") or False
        if not isinstance(marked, bool) or not isinstance(label, str):
            raise InputError(f"{here}: marked must be true or false, and label text")
        numbers = {
            name: _number(item[name], f"{here}: {name}")
            for name in ("x", "y", "x_low", "x_high", "y_low", "y_high")
            if item.get(name) is not None
        }
        said = []
        for name, unit in zip(("x", "y"), units, strict=True):
            if name not in item:
                raise InputError(f"{here}: {name} is missing")
            low, high = (numbers.get(f"{name}_{end}") for end in ("low", "high"))
            if (low is None) != (high is None):
                raise InputError(f"{here}: {name}_low and {name}_high must come together")
            value = plots.number(numbers[name], unit) if name in numbers else "–"
            said.append(f"{value} {plots.interval(low, high, unit)}".strip())
        rows.append([label or "–", *said, "yes" if marked else "no"])
        if "x" in numbers and "y" in numbers:
            points.append(charts.Point(label=label, marked=marked, **numbers))
    _few(len(rows), POINTS_LIMIT, "points", where)
    across, up = _scales(
        figure,
        [x for point in points for x in (point.x, point.x_low, point.x_high) if x is not None],
        [y for point in points for y in (point.y, point.y_low, point.y_high) if y is not None],
        where,
    )
    named = [point.label or "one without a name" for point in points if point.marked]
    words = f"{figure['y_label']} against {figure['x_label']}, {plots.many(len(points), 'point')}."
    if named:
        words += f" Marked: {', '.join(named[:12])}{' and others' if len(named) > 12 else ''}."
    if len(points) < len(rows):
        words += f" {len(rows) - len(points)} without a number are not drawn."
    return {
        "svg": charts.scatter(points, across, up, figure["x_label"], figure["y_label"]),
        "words": words,
        "table": _grid(["point", figure["x_label"], figure["y_label"], "marked"], rows, "lrrl"),
    }


def _scales(
    figure: Mapping[str, Any], xs: Sequence[float], ys: Sequence[float], where: str
) -> tuple[charts.Scale, charts.Scale]:
    out = []
    for name, values in (("x", xs), ("y", ys)):
        log = bool(figure.get(f"{name}_log"))
        if log and any(value <= 0 for value in values):
            raise InputError(f"{where}: {name}_log needs numbers > 0, got {min(values):g}")
        out.append(charts.scale(values, figure.get(f"{name}_unit") or "", log=log))
    return out[0], out[1]


# Table


def _table(figure: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads = _texts(figure["columns"], f"{where}: columns")
    rows = []
    for index, row in enumerate(_list(figure["rows"], f"{where}: rows")):
        if len(_list(row, f"{where}: rows[{index}]")) != len(heads):
            raise InputError(f"{where}: rows[{index}] must have {len(heads)} cells, got {len(row)}")
        rows.append(row)
    _few(len(rows) * len(heads), CELLS_LIMIT, "cells", where)
    texts = [[_cell(x, f"{where}: rows[{i}][{j}]") for j, x in enumerate(row)] for i, row in enumerate(rows)]
    aligned = "".join(
        "r" if column and all(isinstance(x, int | float | None) and not isinstance(x, bool) for x in column) else "l"
        for column in ([row[j] for row in rows] for j in range(len(heads)))
    )
    return {"table": {**_grid(heads, texts, aligned), "rows": texts, "left": 0}}


def _cell(value: Any, where: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        try:
            pairs = {name: tuple(value[name]) if value.get(name) else None for name in ("worst", "corrected")}
            return plots.in_words(Estimate(**{**value, **pairs}))
        except (TypeError, ValueError):
            raise InputError(f"{where}: an object in a table must be an Estimate's json(), got {value!s:.60}") from None
    return plots.number(_number(value, where), "")


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]], aligned: str) -> dict[str, Any]:
    return {
        "columns": list(zip(heads, aligned, strict=False)),
        "rows": [list(row) for row in rows[:ROWS_SHOWN]],
        "left": max(0, len(rows) - ROWS_SHOWN),
    }
