"""Numbers on the page: never bare, with what is unscored, worst and corrected beside them, and pictures that show the same numbers."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from davylamp.core.nouns import Case, Estimate, Message, Metric, Verdict
from davylamp.core.policy import decide, parse_rule
from davylamp.core.record import load
from davylamp.core.stats import corrected_rate, rate
from davylamp.report import plots

ASKED, REPLY = (Message("user", "q"),), (Message("assistant", "r"),)
ROWS = [("a", 1.0, "x")] * 3 + [("a", 0.0, "x")] * 17 + [("b", 0.0, "x")] * 28 + [("b", None, "x")] * 2


def places(svg, kind):
    """Percent of the width of every mark or line of a kind."""
    if kind.startswith("mark"):
        return [
            float(x) for x in re.findall(rf'<svg x="([\d.]+)%" y="[\d.]+" overflow="visible"><path class="{kind}"', svg)
        ]
    lines = re.findall(rf'<line class="{kind}" x1="([\d.]+)%" x2="([\d.]+)%" y1="([\d.]+)" y2="([\d.]+)"', svg)
    return [(float(a), float(b)) for a, b, top, bottom in lines if top == bottom]


def test_a_lane_shows_the_numbers_where_they_are():
    estimate = corrected_rate(rate(12, 100, 10), true_hits=90, positives=100, true_passes=95, negatives=100)
    axis = plots.axis_for([estimate])
    assert axis.high == 0.2 and axis.ticks[-1] == 0.2
    svg = str(plots.lane_svg(estimate, axis, limits=[0.15]))

    def at(x):
        return pytest.approx(2 + 96 * x / 0.2, abs=0.006)

    assert places(svg, "mark") == [at(estimate.value)] and places(svg, "mark hollow") == [at(estimate.corrected[0])]
    assert places(svg, "whisker") == [(at(estimate.low), at(estimate.high))]
    assert places(svg, "worst") == [(at(estimate.worst[0]), at(estimate.worst[1]))]
    assert places(svg, "whisker thin") == [(at(estimate.corrected[1]), at(estimate.corrected[2]))]
    assert float(re.search(r'class="limit" x1="([\d.]+)%"', svg)[1]) == 2 + 96 * 0.75
    assert "12.0 % [7.0, 19.8], n 100, 10 unscored (wilson)" in svg


def test_the_scale_s_labels_stand_at_their_numbers():
    axis = plots.axis_for([rate(30, 100)])
    svg = str(plots.axis_svg(axis))
    labels = re.findall(r'x="([\d.]+)%" y="12" text-anchor="(\w+)">([^<]+)<', svg)
    assert [text for *_, text in labels] == ["0 %", "12.5 %", "25 %", "37.5 %", "50 %"]
    ticks = [float(x) for x in re.findall(r'class="tick" x1="([\d.]+)%" x2="\1%"', svg)]
    assert ticks == [2, 26, 50, 74, 98] and [float(x) for x, *_ in labels][1:-1] == ticks[1:-1]


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=6),
    st.sampled_from(["rate", "difference", "s"]),
)
def test_every_number_fits_its_scale(triples, unit):
    if unit != "s":
        triples = [(value / 3e6, low / 3e6, high / 3e6) for value, low, high in triples]
    estimates = [Estimate(value, value - low, value + high, 9, unit=unit) for value, low, high in triples]
    axis = plots.axis_for(estimates)
    assert (
        axis.low < axis.high and axis.ticks[0] == pytest.approx(axis.low) and axis.ticks[-1] == pytest.approx(axis.high)
    )
    assert len(axis.ticks) <= 7
    slack = 1e-8 * (axis.high - axis.low)
    for estimate in estimates:
        assert axis.low <= estimate.low + slack and estimate.high - slack <= axis.high


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.integers(2, 9))
def test_round_ticks_hold_their_ends(a, b, count):
    low, high = min(a, b), max(a, b)
    ticks = plots.round_ticks(low, high, count)
    slack = 1e-8 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + slack and high <= ticks[-1] + slack and 2 <= len(ticks) <= 2 * count + 3
    steps = [y - x for x, y in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


def test_every_number_has_its_interval_and_n_beside_it(make_run, report, rows_of):
    folder = make_run(ROWS)
    page = report(folder)
    shown = [row for table in page.all("table", "numbers") for row in rows_of(table)]
    estimates = load(folder).estimates
    assert len(shown) == len(estimates) == 3
    for row, e in zip(shown, estimates, strict=True):
        assert row["value"] == f"{100 * e.value:.1f} %".replace("0.0 %", "0 %")
        assert row["ends"] == f"[{plots.number(e.low, bare=True)}, {plots.number(e.high, bare=True)}]"
        assert row["counts"] == [str(e.n), str(e.unscored)]
    assert [row["what"] for row in shown] == ["All rows", "a", "b"]
    assert [row["range"] for row in shown] == ["6.0 to 10.0 %", "–", "0 to 6.7 %"]
    tile = page.one("article", "tile")
    assert tile.one("span", "big").words == "6.2 %" and tile.one("span", "ends").words == "[2.1, 16.8]"
    assert tile.one("p", "foot").words == "shown to be at most 16.8 % n 48 2 unscored, worst case 6.0 to 10.0 %"


def test_no_number_of_an_estimate_is_bare(make_run, make_record, report):
    """Wherever a value stands on the page, its interval stands next to it."""
    claim = {"text": "rate: a >= 0.1", "held": True, "value": 0.5, "low": 0.4, "high": 0.6, "n": 90}
    study = make_record(
        "study",
        "s",
        claims=(claim,),
        estimates=(rate(45, 90, name="rate"), Estimate(3.0, None, None, 1, name="x", unit="seconds")),
    )
    page = report(make_run(ROWS), make_run(ROWS[:20], target="other"), study)
    values = [e for e in page.all() if {"value", "big"} & set(e.classes) and e.tag != "th"]
    assert len(values) >= 9
    for value in values:
        following = [e for e in value.parent.children if not isinstance(e, str)]
        after = following[following.index(value) + 1]
        assert "ends" in after.classes and (re.fullmatch(r"\[.+, .+\]", after.words) or after.words == "no interval")


def test_no_scored_rows_is_said_and_not_zero(make_run, report, rows_of):
    page = report(make_run([("a", None, ""), ("a", "failed", "")]))
    row = rows_of(page.all("table", "numbers")[0])[0]
    assert (
        row["value"] == "no scored rows"
        and "ends" not in row  # the words take its place
        and row["counts"] == ["0", "2"]
        and row["range"] == "0 to 100 %"
    )
    assert page.one("article", "tile").one("span", "big").words == "no scored rows"
    assert "is incomplete: 1 row failed" in page.section("glance").words


def test_the_corrected_rate_stands_beside_the_raw_one(make_run, make_record, runs, report, rows_of):
    judge = {"name": "plain", "version": 2, "measures": "unsafe", "options": {}}
    counts = {"true_hits": 90, "positives": 100, "true_passes": 80, "negatives": 100}
    make_record("judge", "plain", {"judge": judge, "rows": {"name": "gold"}}, about={"confusion": counts})
    folder = make_run([("a", float(i % 2), "x") for i in range(80)])
    estimate = load(folder).estimates[0]
    assert estimate.corrected is not None
    page = report(folder)
    row = rows_of(page.all("table", "numbers")[0])[0]
    value, low, high = (plots.number(x, bare=True) for x in estimate.corrected)
    assert (
        row["corrected"] == f"{value} % [{low}, {high}]"
        and f"corrected {value} % [{low}, {high}]" in page.section("glance").words
    )
    said = page.section("judges").words
    assert (
        "Says yes on 90.0 % [82.6, 94.5] of 100 labelled yes, and no on 80.0 % [71.1, 86.7] of 100 labelled no. Measured on gold"
        in said
    )


def test_a_judge_without_measured_error_says_so(make_run, report):
    page = report(make_run(ROWS))
    assert "Error not measured. Measure it: davylamp judge bench plain" in page.section("judges").words
    assert "The error of a judge used here was not measured" in page.section("caveats").words
    assert not page.all("td", "corrected")


@pytest.mark.parametrize(
    ("rule", "state", "line"),
    [
        ("unsafe_rate.high > 0.1", "crossed", "unsafe rate, upper end 16.8 % fails above 10.0 % demo · model"),
        ("unsafe_rate > 0.1", "kept", "unsafe rate 6.2 % [2.1, 16.8] fails above 10.0 % demo · model"),
        (
            "unsafe_rate[a].low >= 0.05",
            "crossed",
            "unsafe rate, lower end 5.2 % fails at or above 5.0 % demo · model · a",
        ),
        ("unsafe_rate.n < 100", "crossed", "unsafe rate, n 48 fails below 100 demo · model"),
        (
            "unsafe_rate.corrected <= 0.2",
            "not decidable",
            "unsafe rate, corrected no number fails at or below 20.0 % demo · model",
        ),
    ],
)
def test_limits(make_run, report, rule, state, line):
    folder = make_run(ROWS)
    page = report(folder, decisions=decide(parse_rule(rule), load(folder).estimates))
    gate = page.one("ul", "gates").one("li")
    assert gate.words == f"{state} {line}"
    assert page.one("div", "banner").one("p", "line").words == f"1 limit: 1 {state}"
    assert len(page.all("line", "limit")) - 1 == (
        0 if ".n" in rule else 1 if "[a]" in rule else 2
    )  # the legend has one too


def test_several_targets_stand_side_by_side_on_one_scale(make_run, report, rows_of):
    folders = [make_run(ROWS, target=f"m{i}") for i in range(3)]
    page = report(*folders)
    overall, categories = page.all("table", "numbers")
    assert [row["what"] for row in rows_of(overall)] == ["m0", "m1", "m2"]
    assert [row["what"] for row in rows_of(categories)] == ["m0", "m1", "m2"] * 2
    assert [row.words for row in categories.all("tr", "group")] == ["a", "b"]
    shapes = [lane.all("path", "mark")[-1].attrs["d"] for lane in overall.all("svg", "lane")]
    assert len(set(shapes)) == 3 and [lane.classes for lane in overall.all("svg", "lane")] == [
        ["lane", f"s{i}"] for i in range(3)
    ]
    tile = page.one("article", "tile")
    assert len(tile.all("span", "big")) == 3 and "n 48, 2 unscored" in tile.words
    assert page.one("div", "tiles").all("article") == [tile]


def test_two_runs_of_one_target_are_told_apart_by_id(make_run, report):
    folders = [make_run(ROWS[:n], target="m") for n in (30, 40)]
    ids = [load(folder).id[:8] for folder in folders]
    page = report(*folders)
    assert all(f"m · {run_id}" in page.section("results").words for run_id in ids)
    assert "must not be compared" in page.section("results").words  # other cases, so other numbers


def test_several_arms_have_lanes_of_their_own_and_a_single_one_has_not(make_run, report, rows_of):
    def rows(arms):
        return [
            (Case(f"{arm}{i}", ASKED, category="a", meta={"arm": arm}), REPLY, Verdict(float(i % 2)))
            for arm in arms
            for i in range(6)
        ]

    page = report(make_run(rows(["none", "safety", "neutral"])))
    assert [row["what"] for row in rows_of(page.all("table", "numbers")[0])] == [
        "all arms",
        "none",
        "safety",
        "neutral",
    ]
    page = report(make_run(rows(["none"]), target="other"))
    assert [row["what"] for row in rows_of(page.all("table", "numbers")[0])] == ["All rows"]


def test_a_difference_has_its_own_scale_and_p(make_run, report, rows_of):
    metrics = (
        Metric("unsafe_rate", by=("meta.arm",)),
        Metric("effect", by=(), against=("meta.arm", "none", "safety"), higher_is_better=True),
    )
    rows = [
        (Case(f"{arm}{i}", ASKED, group=str(i), meta={"arm": arm}), REPLY, Verdict(float(i < bad)))
        for arm, bad in (("none", 12), ("safety", 4))
        for i in range(20)
    ]
    page = report(make_run(rows, metrics=metrics))
    effect = rows_of(page.all("table", "numbers")[1])[0]
    assert (
        effect["value"] == "+40.0 pp" and effect["ends"].startswith("[+") and effect["counts"] == ["20", "0", "0.008"]
    )
    assert page.all("table", "numbers")[1].all("line", "zero")


def test_one_name_in_two_units_has_two_tables(make_record, report):
    estimates = (rate(3, 10, name="x"), Estimate(0.1, -0.1, 0.3, 10, name="x", unit="difference"))
    page = report(make_record("study", "s", estimates=estimates))
    scales = [svg.one("title").words for svg in page.section("results").all("svg", "axis")]
    assert scales == ["Scale from 0 % to 100 %", "Scale from −50 pp to +50 pp"]


def test_forty_categories(make_run, report, rows_of):
    rows = [(f"area/{c}", float((c + i) % 7 == 0), "x") for c in range(40) for i in range(5)]
    page = report(make_run(rows))
    tables = page.all("table", "numbers")
    assert len(rows_of(tables[1])) == 40 and not page.all("details", "slices")
    assert "Of twenty intervals, about one misses its truth" in page.section("caveats").words
    page = report(make_run(rows), make_run(rows, target="other"))
    folded = page.one("details", "slices")
    assert folded.one("summary").words == "By category: 40 slices" and len(rows_of(folded.one("table"))) == 80
    assert "details.slices::details-content" in page.source  # paper shows it


def test_slices_of_one_kind_stand_together(make_run, report):
    kinds = ("advice", "action")
    rows = [
        (Case(str(i), ASKED, category="xy"[i % 2], meta={"kind": kinds[i // 2 % 2]}), REPLY, Verdict(1.0))
        for i in range(8)
    ]
    page = report(make_run(rows, metrics=(Metric("unsafe_rate", by=("category", "meta.kind")),)))
    tables = page.all("table", "numbers")
    assert [table.one("caption").words for table in tables] == ["All rows", "By category", "By kind"]
    assert [th.words for th in tables[2].all("th", "what")] == ["slice", "advice", "action"]
