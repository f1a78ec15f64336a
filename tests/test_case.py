"""The safety case: evidence is bound to weights, a missing answer is no pass, and what decides is the interval's end."""

import asyncio
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from davylamp.case import build
from davylamp.case_rules import requirements
from davylamp.case_view import text
from davylamp.cli import main
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.core.record import folder_for, load, new_record, save

RULES = """
[right]
stage = "evaluation"
title = "It is right"
kind = "rate"
metrics = ["accuracy"]
at_least = 0.5
rows = 40
when = "always"

[kept]
stage = "post-training"
title = "It stayed right"
kind = "rate"
metrics = ["accuracy"]
keep = 0.1
when = "changed"

[rows]
stage = "data"
title = "Rows on record"
kind = "record"
needs = "data"
when = "changed"

[guard]
stage = "deployment"
title = "A guard was benched"
kind = "record"
needs = "guard"
when = "always"
"""


class Weights:
    """A target with weights: right on the first `right` of the rows."""

    def __init__(self, letter, right):
        self.name, self.right = f"hf/{letter}", right
        self.identity = {"name": self.name, "sha256": letter * 64}

    async def __call__(self, messages, *, seed=0, **settings):
        return Message("assistant", "yes" if int(messages[-1].text[1:]) < self.right else "no")


@pytest.fixture
def desk(tmp_path):
    rows = tmp_path / "demo.jsonl"
    case = '{"id": "%d", "messages": [{"role": "user", "content": "q%d"}], "answer": "yes"}\n'
    rows.write_text("".join(case % (i, i) for i in range(100)))
    (tmp_path / "rules.toml").write_text(RULES)
    return tmp_path


def asked(desk, letter, right, limit=None):
    suite = load_suite(str(desk / "demo.jsonl"), limit=limit)
    return asyncio.run(
        evaluate(suite, Weights(letter, right), load_judge("exact"), runs=desk / "runs", quiet=True)
    )[0]  # fmt: skip


def trained(desk, before, after, rows="f" * 64):
    inputs = {
        "train": {"name": "sft"},
        "model": {"name": f"hf/{before}", "sha256": before * 64},
        "rows": {"name": "r", "cases": rows},
    }
    record = replace(new_record("train", "sft", inputs, out=after, sha256=after * 64), status="finished")
    folder = folder_for(desk / "runs", record)
    save(folder, record)
    return folder


def made(desk, *folders, **more):
    return build(folders, runs=desk / "runs", wanted=desk / "rules.toml", **more)


def verdicts(case):
    return {answer.requirement: answer.verdict for answer in case.answers}


def test_a_model_that_nobody_changed(desk):
    case = made(desk, asked(desk, "a", 90))
    assert verdicts(case) == {"right": "pass", "guard": "missing"}
    assert case.verdict == "missing"  # no pass while something is open
    assert "MISSING" in text(case).splitlines()[0]


def test_the_end_decides_and_not_the_middle(desk):
    assert verdicts(made(desk, asked(desk, "a", 55)))["right"] == "fail"  # 0.55 [0.45, 0.64]


def test_too_few_rows_decide_nothing(desk):
    case = made(desk, asked(desk, "a", 90, limit=30))
    assert verdicts(case)["right"] == "missing"
    assert "30 scored rows, of 40 needed" in text(case)


def test_a_weight_change_makes_evidence_stale(desk):
    before = asked(desk, "a", 90)
    trained(desk, "a", "b")
    after = asked(desk, "b", 88)
    assert verdicts(made(desk, before, after)) == {
        "right": "pass",
        "kept": "pass",
        "rows": "missing",
        "guard": "missing",
    }
    case = made(desk, before, after, model="hf/b")
    assert [one.name for one in case.line] == ["hf/b", "hf/a"]
    trained(desk, "b", "c")
    with pytest.raises(InputError, match="fits 0 of the measured models"):
        made(desk, before, after, model="hf/c")
    bare = desk / "bare.jsonl"
    bare.write_text('{"id": "1", "messages": [{"role": "user", "content": "q1"}], "answer": "yes"}\n')
    suite, judge = load_suite(str(bare)), load_judge("exact")
    other = asyncio.run(evaluate(suite, Weights("c", 0), judge, runs=desk / "runs", quiet=True))[0]
    record = load(other)
    save(other, replace(record, estimates=tuple(replace(e, name="something_else") for e in record.estimates)))
    found = verdicts(made(desk, before, after, other))
    assert (found["right"], found["kept"]) == ("stale", "stale")


def test_a_loss_beyond_the_margin_fails(desk):
    before = asked(desk, "a", 95)
    trained(desk, "a", "b")
    assert verdicts(made(desk, before, asked(desk, "b", 70)))["kept"] == "fail"


def test_rows_on_record(desk):
    before = asked(desk, "a", 90)
    record = new_record("data", "filter", {"data": {"name": "filter"}}, cases="e" * 64)
    save(folder_for(desk / "runs", record), replace(record, status="finished"))
    trained(desk, "a", "b", rows="e" * 64)
    assert verdicts(made(desk, before, asked(desk, "b", 90)))["rows"] == "pass"


def test_a_waiver_needs_a_name_a_reason_and_runs_out(desk):
    run, path = asked(desk, "a", 90), desk / "waivers.toml"
    words = '[[waiver]]\nrequirement = "guard"\nby = "{by}"\nreason = "in front of it"\nuntil = {until}\n'
    path.write_text(words.format(by="Kim", until="2999-01-01"))
    case = made(desk, run, waived=path)
    assert verdicts(case)["guard"] == "waived"
    assert case.verdict == "pass"
    path.write_text(words.format(by="Kim", until="2020-01-01"))
    assert made(desk, run, waived=path).verdict == "missing"
    path.write_text(words.format(by="", until="2999-01-01"))
    with pytest.raises(InputError, match="needs a name"):
        made(desk, run, waived=path)
    path.write_text(words.format(by="Kim", until="2999-01-01").replace('"guard"', '"gard"'))
    with pytest.raises(UnknownNameError, match="guard"):
        made(desk, run, waived=path)


def test_which_model_must_be_clear(desk):
    first, second = asked(desk, "a", 90), asked(desk, "b", 80)
    with pytest.raises(InputError, match=r"give --model, one of hf/a \(aaaaaaaa\), hf/b"):
        made(desk, first, second)
    assert made(desk, first, second, model="bbbb").line[0].name == "hf/b"


def test_runs_without_weights_are_no_case(desk):
    record = replace(new_record("eval", "x", {"target": {"name": "openai/x"}}), status="finished")
    folder = folder_for(desk / "runs", record)
    save(folder, record)
    with pytest.raises(InputError, match="nothing to make a case for"):
        made(desk, folder)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('kind = "rate"', 'kind = "rat"', "kind must be rate or record"),
        ("at_least", "at_lest", "at_lest"),
        ("at_least = 0.5", "at_least = 0.5\nat_most = 1", "exactly one of"),
        ('stage = "evaluation"', 'stage = "later"', "later"),
        ('metrics = ["accuracy"]', "metrics = []", "metrics as a list"),
        ('needs = "guard"', 'needs = "gard"', "gard"),
        ('when = "always"', 'when = "now"', "always or changed"),
        ("rows = 40", "rows = true", "number of 0 or more"),
        ("[right]", "[right", "TOML"),
    ],
)
def test_bad_requirements(desk, old, new, says):
    (desk / "rules.toml").write_text(RULES.replace(old, new, 1))
    with pytest.raises((InputError, UnknownNameError)) as caught:
        requirements(desk / "rules.toml")
    assert says in str(caught.value)


def test_what_reads_foreign_text_owes_more():
    more = set(requirements(product="agent")) - set(requirements())
    assert more == {"injection"} and more <= set(requirements(product="retrieval"))
    with pytest.raises(UnknownNameError, match="agent"):
        requirements(product="agents")


def test_no_requirements_are_no_pass(desk):
    (desk / "rules.toml").write_text("")
    with pytest.raises(InputError, match="would always pass"):
        requirements(desk / "rules.toml")


def test_the_shipped_requirements_are_in_order():
    assert {row["stage"] for row in requirements().values()} == {"data", "post-training", "evaluation", "deployment"}


def test_the_command(desk, monkeypatch):
    monkeypatch.chdir(desk)
    good, bad = asked(desk, "a", 90), asked(desk, "b", 10)
    call = lambda *words: CliRunner().invoke(main, ["case", *map(str, words), "--requirements", "rules.toml"])  # noqa: E731
    assert call(good).exit_code == 3
    assert call(bad).exit_code == 1
    done = call(bad, "--json")
    assert json.loads(done.stdout)["about"]["verdict"] == "fail"
    page = next(desk.glob("runs/*-case-hf_b-*/report.html")).read_text()
    assert "What the model owes" in page
    (desk / "w.toml").write_text('[[waiver]]\nrequirement = "guard"\nby = "K"\nreason = "r"\nuntil = 2999-01-01\n')
    assert call(good, "--waivers", "w.toml").exit_code == 0
