"""Figures a record brings along: drawn where their numbers are, told apart without colour, refused where they are malformed."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from davylamp.core.errors import InputError
from davylamp.core.record import load, save
from davylamp.core.stats import rate
from davylamp.report import charts, figures

CURVES = {
    "kind": "curves",
    "title": "Loss",
    "x_label": "step",
    "y_label": "loss",
    "series": [{"name": "train", "x": [0, 50, 100], "y": [4, 2, 1]}],
}
SCATTER = {
    "kind": "scatter",
    "title": "S",
    "x_label": "harm",
    "y_label": "skill",
    "points": [{"x": 0, "y": 1}, {"x": 10, "y": 5, "label": "b", "marked": True}],
}
HEATMAP = {
    "kind": "heatmap",
    "title": "Heads",
    "rows": ["layer 0", "layer 1"],
    "columns": ["a", "b", "c"],
    "values": [[0, 0.5, 1.0], [None, 0.25, 0.75]],
}
TABLE = {"kind": "table", "title": "T", "columns": ["edit", "layers"], "rows": [["none", 0], ["soft", 12]]}
BOTTOM, TALL = charts.HEIGHT - charts.TOP, charts.HEIGHT - 2 * charts.TOP


def drawn(figure):
    (view,) = figures.views([figure])
    return view


def marks(svg, kind="mark"):
    """(percent across, pixels from the top, shape) of every mark."""
    found = re.findall(
        rf'<svg x="([\d.-]+)%" y="([\d.-]+)" overflow="visible"><path class="{kind} s\d" d="([^"]+)"', svg
    )
    return [(float(x), float(y), shape) for x, y, shape in found]


def paths(svg, kind):
    return [
        [tuple(map(float, pair.split())) for pair in d.strip("MZ").split("L")]
        for d in re.findall(rf'<path class="{kind} s\d d\d" d="([^"]+)"', svg)
    ]


def test_curves_pass_through_their_numbers():
    svg = str(drawn(CURVES)["svg"])
    wanted = [
        (2 + 96 * x / 100, charts.TOP + TALL * (1 - (y - 1) / 3)) for x, y in zip((0, 50, 100), (4, 2, 1), strict=True)
    ]
    assert [mark[:2] for mark in marks(svg)] == [pytest.approx(pair, abs=0.06) for pair in wanted]
    assert paths(svg, "line") == [[pytest.approx((10 * x, y), abs=0.06) for x, y in wanted]]
    assert 'viewBox="0 0 1000 240" preserveAspectRatio="none"' in svg


def test_axes_bear_the_right_numbers_at_the_right_places():
    svg = str(drawn(CURVES)["svg"])
    across = re.findall(r'<text x="([\d.]+)%" y="\d+" text-anchor="middle">([^<]+)<', svg)
    assert [(float(x), text) for x, text in across] == [(2 + 0.96 * n, str(n)) for n in (0, 25, 50, 75, 100)]
    up = re.findall(r'<text x="\d+" y="([\d.]+)" text-anchor="end">([^<]+)<', svg)
    assert [(float(y) - 4, text) for y, text in up] == [
        (pytest.approx(BOTTOM - TALL * (n - 1) / 3, abs=0.06), str(n)) for n in (1, 2, 3, 4)
    ]
    assert re.findall(r'class="[xy]-label">([^<]+)<', svg) == ["loss", "step"]
    grid = [float(y) for y in re.findall(r'<line class="grid" x1="0" x2="100%" y1="([\d.]+)"', svg)]
    assert grid == [float(y) - 4 for y, _ in up]


def test_gaps_bands_and_order():
    series = {"name": "s", "x": [3, 1, 2, 4], "y": [3, 1, None, 4], "low": [2, 0, None, 3], "high": [4, 2, None, 4]}
    svg = str(drawn({**CURVES, "series": [series]})["svg"])
    lines = paths(svg, "line")
    assert [len(line) for line in lines] == [1, 2] and len(marks(svg)) == 3
    across, up = charts.scale([1, 2, 3, 4]), charts.scale([0, 4])
    there = [
        (10 * across.at(3), up.up(2)),
        (10 * across.at(4), up.up(3)),
        (10 * across.at(4), up.up(4)),
        (10 * across.at(3), up.up(4)),
    ]
    assert paths(svg, "band")[1] == [pytest.approx(pair) for pair in there]


def test_series_are_told_apart_by_shape_and_dashes_and_named():
    many = [{"name": f"s{i}", "x": [0, 1], "y": [i, i]} for i in range(8)]
    view = drawn({**CURVES, "series": many})
    shapes = [mark[2] for mark in marks(str(view["svg"]))][::2]
    assert len(set(shapes[:6])) == 6 and shapes[6] == shapes[0]
    dashes = re.findall(r'class="line s(\d) d(\d)"', str(view["svg"]))
    assert len(set(dashes)) == 8  # where a shape comes again, the dashes differ
    assert [name for _, name in view["key"]] == [f"s{i}" for i in range(8)]
    assert drawn(CURVES)["key"] == []


def test_long_curves_keep_their_line_and_thin_out_their_marks():
    x = list(range(5000))
    svg = str(drawn({**CURVES, "series": [{"name": "s", "x": x, "y": x}]})["svg"])
    assert len(paths(svg, "line")[0]) == 5000 and 10 < len(marks(svg)) < 20


def test_logarithmic_axes():
    figure = {**CURVES, "x_log": True, "series": [{"name": "s", "x": [1, 10, 1000], "y": [0, 1, 2]}]}
    svg = str(drawn(figure)["svg"])
    assert [mark[0] for mark in marks(svg)] == [pytest.approx(x) for x in (2, 34, 98)]
    assert re.findall(r'text-anchor="middle">([^<]+)<', svg) == ["1", "10", "100", "1,000"]
    with pytest.raises(InputError, match="x_log needs numbers > 0, got 0"):
        drawn({**CURVES, "x_log": True})


@pytest.mark.parametrize(
    ("values", "unit", "labels"),
    [
        ([0, 1], "rate", ["0 %", "25 %", "50 %", "75 %", "100 %"]),
        ([-0.1, 0.1], "difference", ["−10 pp", "−5 pp", "0 pp", "+5 pp", "+10 pp"]),
        ([0, 4e6], "", ["0", "10⁶", "2×10⁶", "3×10⁶", "4×10⁶"]),
        ([0, 4e-5], "", ["0", "10⁻⁵", "2×10⁻⁵", "3×10⁻⁵", "4×10⁻⁵"]),
        ([-4000, 0], "", ["−4,000", "−3,000", "−2,000", "−1,000", "0"]),
        ([0.1, 0.3], "", ["0.1", "0.15", "0.2", "0.25", "0.3"]),
    ],
)
def test_labels_of_ticks(values, unit, labels):
    scale = charts.scale(values, unit)
    assert [scale.label(tick) for tick in scale.ticks] == labels


def test_scatter_points_whiskers_and_marks():
    points = [
        {"x": 2, "y": 1, "x_low": 1, "x_high": 4, "y_low": 0, "y_high": 3, "label": "plain"},
        {"x": 8, "y": 4, "label": "chosen", "marked": True},
    ]
    view = drawn({**SCATTER, "points": points})
    svg = str(view["svg"])
    across, up = charts.scale([1, 8]), charts.scale([0, 4])
    assert (across.low, across.high, up.low, up.high) == (0, 8, 0, 4)
    ((x, y, open_shape),), ((mx, my, filled),) = marks(svg, "mark open"), marks(svg)
    assert (
        (x, y) == pytest.approx((across.at(2), up.up(1)))
        and (mx, my) == pytest.approx((across.at(8), up.up(4)))
        and open_shape != filled
    )
    whiskers = re.findall(r'whisker thin" x1="([\d.]+)%" x2="([\d.]+)%" y1="([\d.]+)" y2="([\d.]+)"', svg)
    assert [tuple(map(float, w)) for w in whiskers] == [
        pytest.approx((across.at(1), across.at(4), up.up(1), up.up(1))),
        pytest.approx((across.at(2), across.at(2), up.up(0), up.up(3))),
    ]
    assert "Marked: chosen." in view["words"] and view["table"]["rows"][0] == ["plain", "2 [1, 4]", "1 [0, 3]", "no"]


def test_a_point_without_a_number_stands_in_the_table_only():
    points = [{"x": None, "y": 1, "label": "unknown"}, {"x": 1, "y": 2, "y_low": 1, "y_high": None}]
    with pytest.raises(InputError, match="point 2: y_low and y_high must come together"):
        drawn({**SCATTER, "points": points})
    view = drawn({**SCATTER, "points": [points[0], {"x": 1, "y": 2, "x_low": None, "x_high": None}]})
    assert len(marks(str(view["svg"]), "mark open")) == 1 and "1 without a number are not drawn" in view["words"]
    assert [row[:3] for row in view["table"]["rows"]] == [["unknown", "–", "1"], ["–", "1", "2"]]


def test_labels_of_points_do_not_overlap():
    points = [{"x": i % 5 / 10, "y": i // 5 / 10, "label": f"point {i}", "marked": i == 7} for i in range(25)]
    svg = str(drawn({**SCATTER, "points": points})["svg"])
    found = re.findall(
        r'<svg x="([\d.]+)%" y="([\d.]+)" overflow="visible"><text class="name( marked)?" '
        r'x="(-?\d+)" y="(-?\d+)" text-anchor="(\w+)">([^<]+)<',
        svg,
    )
    assert "point 7" in [text for *_, text in found] and len(found) > 10
    boxes = []
    for x, y, _, dx, dy, anchor, text in found:
        left = 7 * float(x) + int(dx) - (6.6 * len(text) if anchor == "end" else 0)
        boxes.append((left, float(y) + int(dy) - 11, left + 6.6 * len(text), float(y) + int(dy) + 3))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not (a[0] < b[2] - 1 and b[0] < a[2] - 1 and a[1] < b[3] - 1 and b[1] < a[3] - 1)


def test_heatmap_cells_colours_and_missing_values(make_record, report):
    page = report(make_record("interp", "ships", about={"figures": [HEATMAP]}))
    table = page.one("table", "map")
    cells = [row.all("td")[0:] for row in table.one("tbody").all("tr")]
    assert [[cell.words for cell in row] for row in cells] == [["0.0", "0.5", "1.0"], ["no value", "0.2", "0.8"]]
    assert cells[1][0].classes == ["none"] and "style" not in cells[1][0].attrs
    assert [th.attrs["scope"] for th in table.all("th")] == ["col"] * 3 + ["row"] * 2

    def light(cell):
        return charts.luminance(re.search(r"--l:(#\w+)", cell.attrs["style"])[1])

    order = sorted([cell for row in cells for cell in row if "style" in cell.attrs], key=light, reverse=True)
    assert [cell.attrs["title"].rsplit(": ")[1] for cell in order] == ["0", "0.25", "0.5", "0.75", "1"]
    assert "lowest 0 (layer 0, a), highest 1 (layer 0, c); 1 without a value" in page.one("figcaption").words
    assert "hatch" in page.source and page.one("svg", "ramp")


def test_a_wide_heatmap_keeps_every_number_in_the_source(make_record, report):
    figure = {
        "kind": "heatmap",
        "title": "M",
        "rows": ["r"],
        "columns": [f"h{i}" for i in range(40)],
        "values": [[i / 40 for i in range(40)]],
        "unit": "rate",
    }
    page = report(make_record("interp", "x", about={"figures": [figure]}))
    assert [td.words for td in page.one("table", "dense").all("td", "shade")][-1] == "97.5"
    dims = [th.classes[0] if th.classes else "" for th in page.one("table", "map").all("th")[:40]]
    assert dims.count("") == 5 and dims.count("dim-narrow") == 9


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.integers(0, 19))
def test_every_shade_has_readable_ink_and_shades_keep_order(values, index):
    shades = charts.Shades(values)
    style = dict(part.split(":") for part in shades.style(values[index % len(values)]).split(";"))
    assert charts.contrast(style["--l"], style["--li"]) >= 4.5 and charts.contrast(style["--d"], style["--di"]) >= 4.5
    shares = [shades.share(x) for x in sorted(values)]
    assert shares == sorted(shares) and min(shares) >= 0 and max(shares) <= 1
    if min(values) < 0:
        assert shades.share(0) == 0.5


def test_luminance_against_the_reference_values():
    assert charts.luminance("#000000") == 0 and charts.luminance("#808080") == pytest.approx(0.215861, abs=1e-6)
    assert charts.contrast("#767676", "#ffffff") == pytest.approx(
        4.54, abs=0.005
    )  # the lightest grey that WCAG allows on white


def test_tables_align_numbers_and_show_estimates_whole(make_record, report):
    figure = {
        **TABLE,
        "columns": ["edit", "rate", "layers", "kept"],
        "rows": [["none", rate(5, 100, 3).json(), 1200, True], ["x", None, 0.123456, None]],
    }
    page = report(make_record("study", "x", about={"figures": [figure]}))
    table = page.one("table", "plain")
    rows = [[cell.words for cell in row.all("th") + row.all("td")] for row in table.one("tbody").all("tr")]
    assert rows == [["none", "5.0 % [2.2, 11.2], n 100, 3 unscored", "1,200", "yes"], ["x", "–", "0.1235", "–"]]
    assert [th.classes[0] for th in table.one("thead").all("th")] == ["l", "l", "r", "l"]


def test_each_picture_has_its_words_and_numbers_beside_it(make_record, report):
    about = {"figures": [{**CURVES, "note": "Seen on one seed."}, SCATTER]}
    page = report(make_record("train", "sft", about=about))
    chart, other = page.all("div", "chart")
    assert chart.attrs["role"] == "img" and chart.attrs["aria-label"] == "Loss: loss by step. train: 4 at 0, 1 at 100."
    assert "2 points. Marked: b." in other.attrs["aria-label"]
    first, second = page.all("details", "drawn")
    assert [[td.words for td in row.children if td != "\n"] for row in first.all("tr")] == [
        ["series", "step", "loss"],
        ["train", "0", "4"],
        ["train", "50", "2"],
        ["train", "100", "1"],
    ]
    assert "Seen on one seed." in page.one("figcaption").words and len(second.all("tr")) == 3
    assert [figure.one("h4").words for figure in page.section("results").all("figure")] == ["Loss", "S"]


def test_a_long_table_beside_a_picture_is_cut_and_said_so(make_record, report):
    figure = {**CURVES, "series": [{"name": "s", "x": list(range(300)), "y": list(range(300))}]}
    page = report(make_record("train", "sft", about={"figures": [figure]}))
    assert (
        len(page.one("details", "drawn").all("tr")) == 201
        and "100 more rows are in record.json" in page.one("details", "drawn").words
    )


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ([], "figures, number 1: a figure must be an object, got list"),
        ({"kind": "pie", "title": "x"}, r"no kind of figure \(figures, number 1\) named 'pie'"),
        ({"title": "x"}, "no kind of figure"),
        ({**TABLE, "colour": "red"}, r"no key of a figure \(figures, number 1, table\) named 'colour'"),
        ({"kind": "table", "columns": [], "rows": []}, "table: title is missing"),
        ({**TABLE, "title": 7}, "title must be text, got int"),
        ({**TABLE, "rows": [["a"]]}, r"rows\[0\] must have 2 cells, got 1"),
        ({**TABLE, "rows": [["a", {"value": 1}]]}, "must be an Estimate's json"),
        ({**TABLE, "rows": "ab"}, "rows must be a list, got str"),
        ({**TABLE, "rows": [["a", math.nan]]}, "must be a finite number, got nan"),
        ({**HEATMAP, "values": [[0, 1, 2]]}, "values must have 2 rows, got 1"),
        ({**HEATMAP, "values": [[0, 1], [0, 1, 2]]}, r"values\[0\] must have 3 numbers, got 2"),
        ({**HEATMAP, "values": [[0, 1, "x"], [0, 1, 2]]}, r"values\[0\]\[2\] must be a finite number, got 'x'"),
        ({**HEATMAP, "values": [[0, 1, True], [0, 1, 2]]}, "must be a finite number, got True"),
        ({**HEATMAP, "columns": [None, "b", "c"]}, "columns must hold texts, got NoneType"),
        ({**CURVES, "series": [{"name": "s", "x": [1]}]}, "series 1: y is missing"),
        ({**CURVES, "series": [{"name": "s", "x": [1], "y": [1, 2]}]}, "series 1: y must have 1 numbers, got 2"),
        ({**CURVES, "series": [{"name": "s", "x": [1], "y": [1], "low": [1]}]}, "low and high must come together"),
        ({**CURVES, "series": [{"name": "s", "x": [1], "y": [1], "low": [1], "high": [None]}]}, "gaps at the same places"),
        ({**CURVES, "series": [{"name": "s", "x": [None], "y": [1]}]}, r"x\[0\] must be a finite number, got None"),
        ({**CURVES, "series": ["s"]}, "series 1 must be an object, got str"),
        ({**CURVES, "x_log": "yes"}, "x_log must be true or false, got 'yes'"),
        ({**SCATTER, "points": [{"x": 1}]}, "point 1: y is missing"),
        ({**SCATTER, "points": [{"x": 1, "y": 1, "x_low": 0}]}, "x_low and x_high must come together"),
        ({**SCATTER, "points": [{"x": 1, "y": 1, "marked": 1}]}, "marked must be true or false"),
        ({**SCATTER, "points": [{"x": 1, "y": 1, "size": 3}]}, "named 'size'"),
        ({**HEATMAP, "rows": ["r"] * 300, "columns": ["c"] * 100, "values": [[0] * 100] * 300}, "30,000 cells are too many for a picture"),
    ],
)  # fmt: skip
def test_malformed_figures_are_refused(figure, message):
    with pytest.raises(InputError, match=message):
        figures.views([figure])


def test_a_malformed_figure_names_its_run_and_leaves_no_file(make_record, report, tmp_path):
    folder = make_record("edit", "x", about={"figures": [TABLE, {"kind": "pie"}]})
    with pytest.raises(InputError, match=rf"figures of {folder.name}, number 2"):
        report(folder)
    assert not (tmp_path / "report.html").exists()
    save(folder, replace(load(folder), about={"figures": {"kind": "table"}}))
    with pytest.raises(InputError, match="must be a list, got dict"):
        report(folder)


@pytest.mark.parametrize(
    "figure",
    [
        {**CURVES, "series": []},
        {**CURVES, "series": [{"name": "s", "x": [], "y": []}]},
        {**CURVES, "series": [{"name": "s", "x": [1, 2], "y": [None, None]}]},
        {**CURVES, "series": [{"name": "s", "x": [5], "y": [5]}]},
        {**CURVES, "series": [{"name": "s", "x": [5], "y": [5]}], "x_log": True, "y_log": True},
        {**SCATTER, "points": []},
        {**HEATMAP, "rows": [], "values": []},
        {**HEATMAP, "values": [[None] * 3] * 2},
        {**HEATMAP, "values": [[0] * 3] * 2},
        {**TABLE, "rows": []},
    ],
)
def test_empty_and_flat_figures_are_drawn(figure, make_record, report):
    page = report(make_record("study", "x", about={"figures": [figure]}))
    assert page.one("figure").one("h4").words == figure["title"] and "nan" not in page.source


def test_figures_of_several_runs_say_whose_they_are(make_run, report):
    row = [("a", 1.0, "x")]
    page = report(
        make_run(row, target="m1", about={"figures": [TABLE]}), make_run(row, target="m2", about={"figures": [TABLE]})
    )
    assert [figure.one("h4").words for figure in page.all("figure")] == ["m1: T", "m2: T"]
