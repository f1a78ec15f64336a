"""The page as a whole: self-contained, ordered, the same for equal input, and fit for records of every verb."""

import asyncio
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from davylamp.core.compare import compare
from davylamp.core.errors import InputError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Claim, Estimate, Message, Verdict
from davylamp.core.record import load, save
from davylamp.core.stats import mean_t, rate
from davylamp.models.targets import load_target
from davylamp.report import charts
from davylamp.report.claims import beyond_claims, matched
from davylamp.report.html import write_report

ROWS = [("a", 1.0, "yes")] * 4 + [("b", 0.0, "no")] * 16 + [("b", None, "")]
CSS = (Path(charts.__file__).with_name("page.css")).read_text(encoding="utf-8")


@pytest.fixture
def full(make_run, make_record, report):
    """A page with every part."""
    folders = [make_run(ROWS, target=name) for name in ("left", "right")]
    claim = {"text": "rate: a >= 0.1", "held": True, "value": 0.5, "low": 0.4, "high": 0.6, "n": 90}
    study = make_record("study", "s", claims=(claim,), estimates=(rate(45, 90, name="rate"),), command=["study", "s"])
    return report(*folders, study, comparisons=[compare(*folders)], skipped=[("x", "not here")])


def test_one_file_without_scripts_or_requests(full):
    policy = full.one("head").all("meta")[1].attrs
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert not re.search(r"<script|javascript:|https?:|@import|url\(|<link|<iframe|<object|<img|src=", full.source)
    assert full.one("html").attrs["lang"] == "en" and full.declarations == ["doctype html"]
    assert 'name="viewport"' in full.source and 'name="color-scheme" content="light dark"' in full.source


def test_landmarks_headings_and_links(full):
    assert [len(full.all(tag)) for tag in ("main", "nav", "h1", "footer")] == [1, 1, 1, 1]
    levels = [int(e.tag[1]) for e in full.all() if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))
    ids = [e.attrs["id"] for e in full.all() if "id" in e.attrs]
    assert len(ids) == len(set(ids))
    for link in full.all("a"):
        assert link.attrs["href"][1:] in ids
    parts = [link.words for link in full.one("nav").all("a")]
    assert parts == [
        "At a glance",
        "Claims",
        "Results",
        "Comparisons",
        "Rows to look at",
        "Not run",
        "Caveats",
        "Judges",
        "How it was made",
    ]
    assert [s.one("h2").words for s in full.one("main").children if not isinstance(s, str)][:5] == [*parts[:5]]
    for section in full.all("section"):
        assert section.attrs["aria-labelledby"] in ids


def test_tables_have_captions_scopes_and_roles(full):
    for table in full.all("table"):
        assert table.one("caption").words
        for th in table.all("th"):
            assert th.attrs["scope"] in ("col", "row", "rowgroup")
        if (
            "numbers" in table.classes
        ):  # on a phone they are laid out as cards, and must still be tables to a screen reader
            roles = {"table": "table", "tr": "row", "td": "cell", "thead": "rowgroup", "tbody": "rowgroup"}
            for element in table.walk():
                if element.tag in roles:
                    assert element.attrs["role"] == roles[element.tag], element.tag
            widths = {
                sum(int(c.attrs.get("colspan", 1)) for c in row.children if not isinstance(c, str))
                for row in table.all("tr")
            }
            assert len(widths) == 1
    for svg in full.all("svg"):
        outer = not any(e.tag == "svg" for e in parents(svg))
        assert (
            not outer
            or svg.attrs.get("role") == "img"
            or svg.attrs.get("aria-hidden") == "true"
            or any(e.attrs.get("role") == "img" for e in parents(svg))
        )
        assert svg.attrs.get("role") != "img" or svg.one("title").words


def parents(element):
    while element.parent is not None:
        element = element.parent
        yield element


def test_states_are_told_by_shape_and_word(full):
    for verdict in full.all("span", "verdict"):
        state = next(name for name in verdict.classes if name != "verdict")
        assert verdict.one("svg", "sign").classes == ["sign", state] and verdict.words
    from davylamp.report.plots import STATES

    assert len(set(STATES.values())) == 4


def test_equal_input_gives_equal_bytes(make_run, tmp_path):
    folders = [make_run(ROWS, target=name) for name in ("left", "right")]
    texts = []
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, folders, title="t", comparisons=[compare(*folders)])
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    blocks = re.findall(r":root \{([^}]*)\}", CSS)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0]))
    if scheme == "dark":
        dark = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[1]))
        assert dark.keys() == colours.keys()
        colours = dark
    washes = ("paper", "raised", "pass-wash", "fail-wash", "unsure-wash")
    for name in ("ink", "soft"):
        assert min(charts.contrast(colours[name], colours[wash]) for wash in washes) >= 4.5, name
    for name in ("link", "pass", "fail", "unsure"):
        assert charts.contrast(colours[name], colours["paper"]) >= 4.5, name
        assert name == "link" or charts.contrast(colours[name], colours[f"{name}-wash"]) >= 4.5, name
        assert charts.contrast(colours["on"], colours[name]) >= 3
    for state in ("pass", "fail"):  # kept and crossed limits stand in one banner
        assert charts.contrast(colours[state], colours["fail-wash"]) >= 4.5
    for series in range(6):
        assert charts.contrast(colours[f"s{series}"], colours["paper"]) >= 3, series


def test_claims_stand_beside_their_controls_with_their_limits(make_record, report, rows_of):
    pairs = [
        (Claim("unsafe_rate", "off", against="random", at_least=0.3), Estimate(0.5, 0.41, 0.6, 200, unit="difference")),
        (
            Claim("unsafe_rate", "random", against="none", at_most=0.05, control=True),
            Estimate(0.06, -0.01, 0.12, 200, 3, unit="difference"),
        ),
        (None, mean_t([1.0, 2.0, 3.0], unit="seconds", name="time")),
        (Claim("p", "x", at_most=0.01), Estimate(0.001, 0.001, 0.001, 3, unit="p")),
        (Claim("recall", "y", at_least=0.5), rate(0, 0)),
    ]
    claims = tuple(
        {"text": c.text, "held": c.held(e), "control": c.control}
        | {"value": e.value, "low": e.low, "high": e.high, "n": e.n, "method": e.method}
        for c, e in pairs
        if c
    )
    estimates = tuple(replace(e, name=e.name or c.quantity, arm=c.arm) if c else e for c, e in pairs)
    page = report(make_record("study", "s", claims=claims, estimates=estimates))
    first, p, recall = page.section("claims").all("table")
    effect, control = rows_of(first)
    assert first.one("caption").words == "unsafe rate"
    assert (effect["state"], effect["what"], effect["value"], effect["ends"]) == (
        "held",
        "off − random at least +30.0 pp",
        "+50.0 pp",
        "[+41.0, +60.0]",
    )
    assert (control["state"], control["what"]) == ("not held", "random − none at most +5.0 pp control") and control[
        "counts"
    ] == ["200", "3"]
    lanes = first.all("svg", "lane")
    assert [lane.all("line", "limit")[0].attrs["x1"] for lane in lanes] == ["64.4%", "52.4%"]
    assert [lane.classes[1] for lane in lanes] == ["s0", "s1"]
    assert (
        rows_of(p)[0]["value"] == "p 0.001"
        and rows_of(recall)[0]["state"] == "not decidable"
        and rows_of(recall)[0]["value"] == "no number"
    )
    assert [line.words for line in page.one("div", "banner").all("p")] == [
        "3 claims: 1 not decidable, 2 held",
        "1 control: 1 not held",
    ]
    assert [row["value"] for table in page.section("results").all("table") for row in rows_of(table)] == [
        "2 seconds"
    ]  # the rest stands in claims
    assert "fail" in page.one("div", "banner").classes


def test_claims_of_a_strange_form_are_kept_whole(make_record, report):
    claim = {"text": "it just works", "held": None, "value": None, "low": None, "high": None}
    page = report(
        make_record(
            "study",
            "s",
            claims=(claim, {**claim, "text": "a: b >= lots", "value": 0.4, "low": 0.3, "high": 0.5, "n": 9}),
        )
    )
    assert "it just works" in page.section("claims").words and "a: b >= lots" in page.section("claims").words
    assert "0.4 [0.3, 0.5]" in page.section("claims").words


def test_comparisons_in_words(make_run, report):
    def rows(bad):
        return [
            (
                Case(f"r{i}", (Message("user", "q"),), category="a"),
                (Message("assistant", "r"),),
                Verdict(float(i < bad)),
            )
            for i in range(60)
        ]

    base, better, same = make_run(rows(40), target="a"), make_run(rows(5), target="b"), make_run(rows(39), target="c")
    page = report(base, better, comparisons=[compare(base, better), compare(base, same)])
    first, second = page.section("comparisons").all("section", "suite")
    assert [cell.words for cell in first.all("td", "state")] == ["B is better"] * 2
    assert [cell.words for cell in second.all("td", "state")] == ["no difference shown"] * 2
    row = first.all("tr")[1]
    assert row.one("td", "value").words == "−58.3 pp" and re.fullmatch(r"\[−\d.*, −\d.*\]", row.one("td", "ends").words)
    assert next(cell.words for cell in row.all("td", "side")).startswith("66.7 % [") and [
        cell.words for cell in row.all("td", "count")
    ][:2] == ["< 0.001", "60"]
    assert "Of 2 numbers: 2 better in B." in first.words
    worse = report(base, better, comparisons=[compare(better, base)])
    assert "Of 2 numbers: 2 worse in B." in worse.section("comparisons").words and worse.all("svg", "fail")


def test_a_comparison_without_rows(make_run, report):
    folder = make_run(ROWS)
    side = {"id": "a" * 64, "name": "x", "target": "t", "run": "r"}
    page = report(folder, comparisons=[{"a": side, "b": side, "suite": "s", "rows": []}])
    assert page.section("comparisons").one("h3").words == "s"


@pytest.mark.parametrize("verb", ["check", "edit", "train", "interp", "attack", "guard", "repair", "data"])
def test_a_record_of_any_verb_without_anything_in_it(make_record, report, verb):
    page = report(make_record(verb, "thing"))
    assert page.section("made").one("h3").words == f"{verb} thing"
    assert [link.words for link in page.one("nav").all("a")] == ["How it was made"]
    assert not page.all("table") and page.section("results") is None


def test_a_judge_s_own_record(make_record, report):
    counts = {"true_hits": 9, "positives": 10, "true_passes": 7, "negatives": 10}
    judge = {"name": "plain", "version": 1}
    page = report(
        make_record(
            "judge",
            "plain",
            {"judge": judge},
            about={"confusion": counts},
            estimates=(rate(9, 10, name="sensitivity", higher_is_better=True),),
        )
    )
    assert "Says yes on 90.0 %" in page.section("judges").words and "judge plain" in page.section("results").words


def test_a_check_stands_for_its_runs(make_run, make_record, report):
    folders = [make_run(ROWS, target=name) for name in ("left", "right")]
    ids = [load(folder).id for folder in folders]
    page = report(make_record("check", "check", {"runs": ids}, parents=ids))
    assert [h.words for h in page.section("made").all("h3")] == ["demo on left", "demo on right"]
    lost = make_record(
        "check",
        "check",
        {"runs": ["0" * 64]},
        parents=["0" * 64],
        estimates=(rate(3, 9, name="x", category="demo", arm="left"),),
    )
    page = report(lost)
    assert page.section("made").one("h3").words == "check" and "33.3 %" in page.section("results").words


def test_lineage_is_a_tree_and_survives_what_is_missing_or_broken(make_record, report):
    base = load(make_record("train", "sft", {"x": 1}))
    edit = load(make_record("edit", "soft", {"x": 2}, parents=[base.id, "f" * 64, "../../etc", "*"]))
    broken = make_record("edit", "other", {"x": 3})
    broken_id = load(broken).id
    (broken / "record.json").write_text("{")
    page = report(make_record("repair", "r", {"x": 4}, parents=[edit.id, broken_id], command=["repair", "r"]))
    tree = page.section("made").all("ul", "tree")[0]
    assert tree.words.startswith(f"edit soft {edit.id[:8]}train sft {base.id[:8]}not in this runs folder ffffffff")
    assert tree.words.endswith(f"not in this runs folder {broken_id[:8]}")
    assert page.one("pre", "command").words == "davylamp repair r"


def test_what_to_run_again_and_every_hash(make_run, make_record, report):
    folder = make_record("edit", "soft", {"model": {"name": "m", "sha256": "ab" * 32}, "rows": "cd" * 32}, command=["edit", "soft", "a b"],
                         about={"numpy": "2.0", "maps": [1, 2]})  # fmt: skip
    made = report(folder).section("made")
    assert made.one("pre", "command").words == "davylamp edit soft 'a b'"
    assert load(folder).id in made.words and folder.name in made.words and "numpy 2.0" in made.words
    assert "model.sha256" + "ab" * 32 in made.words.replace(" ", "") and "rows" + "cd" * 32 in made.words.replace(
        " ", ""
    )
    assert '"sha256": "abab' in made.all("pre", "code")[1].text and '"maps"' in made.words
    assert "figures" not in made.words
    page = report(
        make_run(ROWS, about={"command": ["eval", "x"]}), make_run(ROWS, target="b", about={"command": ["eval", "x"]})
    )
    assert len(page.all("pre", "command")) == 1  # one command made both


def test_unfinished_runs_say_so_at_the_top(make_run, report):
    folder = make_run([*ROWS, ("a", "failed", "")])
    record = load(folder)
    save(folder, replace(record, status="interrupted", counts={**record.counts, "missing": 7}))
    assert (
        report(folder)
        .section("glance")
        .words.startswith(
            "At a glance demo on model is interrupted: 1 row failed, 7 rows not asked. The same command again"
        )
    )


def test_without_rows_and_without_a_folder(make_run, report, tmp_path):
    folder = make_run(ROWS)
    (folder / "rows.jsonl").unlink()
    assert report(folder).section("rows") is None
    assert report(make_run(ROWS, target="b"), rows_shown=0).section("rows") is None
    with pytest.raises(InputError, match="at least one run folder"):
        write_report(tmp_path / "x.html", [], title="t")
    with pytest.raises(InputError, match="rows_shown must be 0 or more, got -1"):
        write_report(tmp_path / "x.html", [folder], title="t", rows_shown=-1)
    with pytest.raises(InputError, match="no record"):
        write_report(tmp_path / "x.html", [tmp_path / "nowhere"], title="t")


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"key":"0"}', '{"key":"0","case":7,"verdict":{"value":1.0}}', '{"key":7}']
)
def test_a_broken_row_is_named(make_run, report, line):
    folder = make_run(ROWS)
    with (folder / "rows.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl holds a line that is not a row"):
        report(folder)


def test_a_real_run_of_a_python_target(tmp_path, runs, report):
    (tmp_path / "target.py").write_text(
        "from davylamp.core import Message\n\n\ndef answer(messages, *, seed=0, **settings):\n"
        "    return Message('assistant', '<b>Sure</b>', reasoning='hm') if messages[-1].text[-1] in '02468' else \"I can't help.\"\n"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            f'{{"id": "{i}", "messages": [{{"role": "user", "content": "do {i}"}}], "category": "c{i % 3}"}}\n'
            for i in range(12)
        )
    )
    folder, record = asyncio.run(
        evaluate(
            load_suite(str(rows)),
            load_target(f"python/{tmp_path / 'target.py'}:answer"),
            load_judge("refusal"),
            runs=runs,
            quiet=True,
        )
    )
    page = report(folder)
    assert page.section("results").one("h3").words == "rows" and record.counts["rows"] == 12
    assert len(page.section("rows").all("details", "row")) == 6 and "<b>Sure</b>" in page.section("rows").text


def test_claims_find_their_estimates_in_order_even_where_numbers_repeat(make_record):
    one = rate(9, 9)
    row = {"text": "x: a >= 0.5", "held": True, "value": 1.0, "low": one.low, "high": 1.0, "n": 9}
    same, other = replace(one, unit="difference"), mean_t([1.0, 2.0], name="time")
    record = load(make_record("study", "s", claims=(row, row, {**row, "n": 8}), estimates=(one, other, same)))
    assert matched(record) == [0, 2, None] and beyond_claims(record) == [other]
    swapped = replace(
        record, claims=(record.claims[2], row), estimates=(other, one, replace(one, n=8), replace(one, n=7))
    )
    assert matched(swapped) == [2, 1]  # any order
    assert beyond_claims(swapped) == list(
        swapped.estimates
    )  # one arm of this metric has no claim: its table is shown whole


def test_claims_may_name_their_unit_where_the_record_lacks_their_estimate(make_record, report, rows_of):
    claim = {
        "text": "refusal: a - b >= 0.2",
        "held": True,
        "value": 0.41,
        "low": 0.3,
        "high": 0.5,
        "n": 40,
        "unit": "difference",
    }
    row = rows_of(report(make_record("repair", "m", claims=(claim,))).section("claims").one("table"))[0]
    assert (row["value"], row["ends"], row["what"]) == ("+41.0 pp", "[+30.0, +50.0]", "a − b at least +20.0 pp")
