"""Annotation, out and back: blind sheets, votes by line, gold labels, agreement, and nothing written over."""

import asyncio
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from davylamp.cli import main
from davylamp.core.errors import InputError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.core.rows import CaseFile, read_objects
from davylamp.core.run import Limits
from davylamp.data.annotate import LABELS, export_sheets, fill_sheet, gold_label, import_votes
from tests import sst

SYSTEM_AS = {"system_as": "user"}


class Bird:
    """Complies with every third prompt, never with a system text; three replies are odd on purpose."""

    def __init__(self, name="bird-9000", every=3):
        self.name, self.identity, self.every = name, {"name": name}, every

    async def __call__(self, messages, *, seed=0, **settings):
        number = int(messages[-1].text.split()[-1].strip("?"))
        bare = messages[0].role == "user" and not messages[0].text.startswith("SYSTEM")
        odd = {1: Message("assistant", ""), 2: Message("assistant", "Fold", finish="content_filter"),
               3: Message("assistant", "=HYPERLINK(\"http://x\")")}  # fmt: skip
        if bare and number in odd:
            return odd[number]
        return Message(
            "assistant", "Fold it in half." if bare and number % self.every == 0 else "I can't help with that."
        )


def run(tmp_path, target=None, **options):
    rows = sst.write(tmp_path / "mine.jsonl", sst.rows())
    loaded, judge = load_suite("simple_safety_tests", {"rows": rows, **options}), load_judge(sst.write_guard(tmp_path))
    folder, _ = asyncio.run(
        evaluate(loaded, target or Bird(), judge, runs=tmp_path / "runs", limits=Limits(tries=1), quiet=True)
    )
    return folder


@pytest.fixture(scope="module")
def sheets(tmp_path_factory):
    """One run and its sheets: 200 rows, of which 1 is empty and 1 blocked."""
    folder = tmp_path_factory.mktemp("annotate")
    paths = export_sheets(run(folder), folder / "out", rng=np.random.default_rng(0))
    return folder, paths


def truth(reply):
    return "unsafe" if "Fold" in reply or "HYPERLINK" in reply else "safe"


def fill(source, out, label=truth, **more):
    """Write a filled-in copy of a sheet: label is a function of the reply, `more` maps a row's name to a label."""
    rows = [{**row, "label": more.get(row["row"], label(row["reply"]))} for _, row in read_objects(source)]
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return out


def names(sheet):
    return [row["row"] for _, row in read_objects(sheet)]


def test_sheets_are_blind_and_each_in_its_own_order(sheets):
    folder, (first, second, key, read_first) = sheets
    assert sorted(names(first)) == sorted(names(second)) and names(first) != names(second) and len(names(first)) == 198
    for sheet in (first, second):
        text = sheet.read_text()
        rows = [row for _, row in read_objects(sheet)]
        assert set(rows[0]) == {"row", "request", "reply", "label", "note"}
        assert "bird-9000" not in text and "safety" not in text and "sst_" not in text and "without putting" not in text
    assert "suicide" in read_first.read_text() and "Take breaks" in read_first.read_text()
    assert "bird-9000" in key.read_text()
    assert folder / "out" == key.parent


def test_a_system_text_in_the_users_turn_does_not_give_the_arm_away(tmp_path):
    first, *_ = export_sheets(run(tmp_path, **SYSTEM_AS), tmp_path / "out", rng=np.random.default_rng(0))
    assert "SYSTEM" not in first.read_text() and "USER" not in first.read_text()
    requests = [row["request"] for _, row in read_objects(first)]
    assert all(request.startswith("How do I fold") for request in requests) and len(requests) == 198


def test_a_reply_cannot_become_a_formula(sheets):
    _, (first, *_) = sheets
    tamed = [row["reply"] for _, row in read_objects(first) if "HYPERLINK" in row["reply"]]
    assert tamed and all(reply.startswith("'=") for reply in tamed)


def test_round_trip(sheets, tmp_path):
    _, (first, second, key, _) = sheets
    filled = [fill(sheet, tmp_path / sheet.name) for sheet in (first, second)]
    found = import_votes(filled, key, tmp_path / "gold.jsonl")
    assert found["rows"] == 200 and found["labelled"] == 198 and found["third"] is None
    # none arm: 33 numbers divide by 3, of which number 3 is the formula; number 1 is empty, number 2 blocked
    assert found["states"] == {"blocked": 1, "nonresponsive": 1, "safe": 165, "unsafe": 33}
    gold = list(CaseFile(tmp_path / "gold.jsonl"))
    assert sum(case.answer for case in gold) == 33 and {case.meta["target"] for case in gold} == {"bird-9000"}
    assert all(set(case.meta["votes"]) == {"annotator_1", "annotator_2"} for case in gold)
    assert all(case.messages[-1].role == "assistant" for case in gold)
    rates = {(e["name"], e["category"], e["arm"]): e for e in found["estimates"]}
    none = rates["unsafe_rate", None, "none"]
    assert (none["n"], none["unscored"], round(none["value"] * 99)) == (99, 1, 33)
    effect = rates["system_prompt_effect", None, "none - safety"]
    assert (effect["n"], effect["unscored"]) == (99, 1), "the blocked reply's pair is left out and counted"
    (agreement,) = found["agreement"].values()
    assert agreement["percent"]["value"] == 1.0 and agreement["kappa"]["value"] == 1.0 and found["alpha"] == 1.0
    assert [(row["arm"], row["rank"]) for row in found["ranking"]] == [("none", (1, 1)), ("safety", (1, 1))]


def test_the_gold_rows_measure_a_filter(sheets, tmp_path, monkeypatch):
    _, (first, second, key, _) = sheets
    filled = [fill(sheet, tmp_path / sheet.name) for sheet in (first, second)]
    import_votes(filled, key, tmp_path / "gold.jsonl")
    words = ["judge", "bench", sst.write_guard(tmp_path), str(tmp_path / "gold.jsonl"), "--runs", str(tmp_path / "r")]
    record = json.loads(CliRunner().invoke(main, [*words, "--json"], catch_exceptions=False).stdout)
    first_of = {estimate["name"]: estimate["value"] for estimate in reversed(record["estimates"])}
    assert first_of["sensitivity"] == 1.0 and first_of["specificity"] == 1.0


def test_ties_go_to_a_third_sheet_that_is_never_written_over(sheets, tmp_path):
    _, (first, second, key, _) = sheets
    tied = names(first)[:4]
    filled = [
        fill(sheet, tmp_path / f"{name}.csv", **dict.fromkeys(tied, label))
        for sheet, name, label in ((first, "a", "unsafe"), (second, "b", "safe"))
    ]
    found = import_votes(filled, key, tmp_path / "gold.jsonl")
    third = Path(found["third"])
    assert third.name == "gold.third.csv" and sorted(names(third)) == sorted(tied) and found["states"]["tied"] == 4
    assert import_votes(filled, key, tmp_path / "gold.jsonl")["third"], "an empty third sheet may be written again"
    done = fill(third, third, **dict.fromkeys(tied, "unsafe"))
    with pytest.raises(InputError, match="holds labels already: give it among the sheets"):
        import_votes(filled, key, tmp_path / "gold.jsonl")
    before = done.read_bytes()
    final = import_votes([*filled, done], key, tmp_path / "gold.jsonl")
    assert "tied" not in final["states"] and final["labelled"] == 198 and done.read_bytes() == before
    assert list(final["agreement"]) == ["a / b"], "a tie breaker saw disputed rows only, and would bias the agreement"
    assert final["agreement"]["a / b"]["percent"]["value"] == 194 / 198


def test_fewer_than_two_votes_is_not_final(sheets, tmp_path):
    _, (first, second, key, _) = sheets
    row = names(first)[0]
    filled = [fill(first, tmp_path / "a.csv", **{row: ""}), fill(second, tmp_path / "b.csv")]
    found = import_votes(filled, key, tmp_path / "gold.jsonl")
    assert found["states"]["not final"] == 1 and found["labelled"] == 197 and found["third"] is None
    alone = import_votes(filled[:1], key, tmp_path / "alone.jsonl")
    assert alone["states"]["not final"] == 198 and alone["labelled"] == 0 and alone["alpha"] is None


def test_a_nonresponsive_vote_counts_as_safe_with_a_flag(sheets, tmp_path):
    _, (first, second, key, _) = sheets
    row = names(first)[0]
    filled = [fill(sheet, tmp_path / sheet.name, **{row: "Nonresponsive "}) for sheet in (first, second)]
    found = import_votes(filled, key, tmp_path / "gold.jsonl")
    assert found["states"]["nonresponsive"] == 2
    odd = [case for case in CaseFile(tmp_path / "gold.jsonl") if case.meta["label"] == "nonresponsive"]
    assert [case.answer for case in odd] == [0]


def test_bad_sheets_say_which_line(sheets, tmp_path):
    _, (first, second, key, _) = sheets
    row = names(first)[2]
    with pytest.raises(
        InputError, match=r"bad.csv line 4: label must be one of unsafe, safe, nonresponsive or empty, got 'maybe'"
    ):
        import_votes([fill(first, tmp_path / "bad.csv", **{row: "maybe"}), second], key, tmp_path / "gold.jsonl")
    text = fill(first, tmp_path / "bad.csv").read_text()
    (tmp_path / "bad.csv").write_text(text.replace(f"\n{row},", "\nr999999,"))
    with pytest.raises(InputError, match=r"bad.csv line 4: there is no row 'r999999'"):
        import_votes([tmp_path / "bad.csv", second], key, tmp_path / "gold.jsonl")
    (tmp_path / "bad.csv").write_text(text.replace(f"\n{row},", f"\n{names(first)[0]},"))
    with pytest.raises(InputError, match=r"bad.csv line 4: bad labels row .* twice"):
        import_votes([tmp_path / "bad.csv", second], key, tmp_path / "gold.jsonl")
    (tmp_path / "bad.csv").write_text("row;label\nr1;safe\n")
    with pytest.raises(InputError, match="Was it saved with commas"):
        import_votes([tmp_path / "bad.csv", second], key, tmp_path / "gold.jsonl")
    with pytest.raises(InputError, match="is not a key that export_sheets wrote"):
        import_votes([first, second], first, tmp_path / "gold.jsonl")
    with pytest.raises(InputError, match="two sheets are named annotator_1"):
        import_votes([first, first], key, tmp_path / "gold.jsonl")
    with pytest.raises(InputError, match="out must not be a sheet or the key"):
        import_votes([first, second], key, first)
    with pytest.raises(InputError, match="no sheets"):
        import_votes([], key, tmp_path / "gold.jsonl")
    assert not (tmp_path / "gold.jsonl").exists()


def test_an_empty_or_blocked_reply_has_no_row_to_vote_on(sheets, tmp_path):
    _, (first, second, key, _) = sheets
    hidden = [row["row"] for _, row in read_objects(key) if row["state"] != "shown"]
    assert len(hidden) == 2 and not set(hidden) & set(names(first))
    bad = fill(first, tmp_path / "bad.csv")
    bad.write_text(bad.read_text() + f"{hidden[0]},q,r,safe,\n")
    with pytest.raises(InputError, match=f"there is no row '{hidden[0]}'"):
        import_votes([bad, second], key, tmp_path / "gold.jsonl")


def test_export_refuses_what_would_spoil_labels(sheets, tmp_path):
    folder, _ = sheets
    (eval_run,) = (folder / "runs").iterdir()
    with pytest.raises(InputError, match="exists already: its sheets may be out"):
        export_sheets(eval_run, folder / "out", rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="one person's labels are not gold"):
        export_sheets(eval_run, tmp_path / "o", annotators=1, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="given twice"):
        export_sheets([eval_run, eval_run], tmp_path / "o", rng=np.random.default_rng(0))


def test_a_judge_can_fill_in_a_sheet(sheets, tmp_path):
    _, (first, second, key, _) = sheets
    judge = load_judge(sst.write_guard(tmp_path))
    filled = [asyncio.run(fill_sheet(sheet, judge, tmp_path / sheet.name)) for sheet in (first, second)]
    assert import_votes(filled, key, tmp_path / "gold.jsonl")["states"]["unsafe"] == 33


def test_several_targets_are_pooled_and_ranked(tmp_path):
    folders = [run(tmp_path, Bird(f"b{every}", every)) for every in (2, 3, 7)]
    *sheets_, key, _ = export_sheets(folders, tmp_path / "out", rng=np.random.default_rng(0), form="jsonl")
    filled = [fill(sheet, tmp_path / f"{sheet.stem}.csv") for sheet in sheets_]
    found = import_votes(filled, key, tmp_path / "gold.jsonl")
    pooled = next(e for e in found["estimates"] if e["name"] == "pooled_effect")
    assert pooled["n"] == 297 and pooled["unscored"] == 3 and "3 groups" in pooled["method"]
    order = [row["target"] for row in found["ranking"] if row["arm"] == "none"]
    assert order == ["b7", "b3", "b2"] and all(len(row["rank"]) == 2 for row in found["ranking"])


def test_the_command_line(sheets, tmp_path, monkeypatch):
    folder, _ = sheets
    (eval_run,) = (folder / "runs").iterdir()
    monkeypatch.chdir(tmp_path)
    out = CliRunner().invoke(
        main, ["annotate", "export", str(eval_run), "out", "--annotators", "3"], catch_exceptions=False
    )
    assert out.exit_code == 0 and out.output.count("annotator_") == 3
    filled = [str(fill(Path(f"out/annotator_{i}.csv"), tmp_path / f"{i}.csv")) for i in (1, 2, 3)]
    words = ["annotate", "import", *filled, "--key", "out/key.jsonl", "--out", "gold.jsonl"]
    found = json.loads(CliRunner().invoke(main, words, catch_exceptions=False).stdout)
    assert found["states"]["unsafe"] == 33 and len(found["agreement"]) == 3


@given(st.lists(st.sampled_from(sorted(LABELS)), max_size=7))
def test_gold_is_the_side_with_more_votes(votes):
    unsafe, label = votes.count("unsafe"), gold_label(votes)
    if len(votes) < 2 or 2 * unsafe == len(votes):
        assert label is None
    else:
        assert (label == "unsafe") == (2 * unsafe > len(votes)) and label == gold_label(votes[::-1])
