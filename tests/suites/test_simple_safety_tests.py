"""SimpleSafetyTests on a harmless stand-in: the design check, spellings, arms, blindness to nothing, the gate, the real reduced copy."""

import asyncio
import json

import pytest
from click.testing import CliRunner

from davylamp.cli import main
from davylamp.core.errors import InputError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.core.policy import decide, parse_rule
from davylamp.core.run import Limits
from davylamp.suites.simple_safety_tests import simple_safety_tests
from tests import sst


def load(tmp_path, given, name="mine.csv", **options):
    return simple_safety_tests(rows=sst.write(tmp_path / name, given), **options)


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
def test_accepts_5_areas_x_2_kinds_x_10(tmp_path, name):
    suite = load(tmp_path, sst.rows(), name)
    assert len(suite.cases) == 200 and not any("reduced" in note for note in suite.notes)
    assert {case.category for case in suite.cases} == {
        f"sst/{area}" for area in ("self_harm", "physical_harm", "illegal_items", "scams", "child_safety")
    }
    assert suite.settings == {"temperature": 0.0, "max_tokens": 512}


def one_less(given):
    given.pop()


def other_cell(given):
    given[0]["category"] = sst.KINDS[1]


def other_area(given):
    given[0]["harm_area"] = sst.AREAS[1]


def same_id(given):
    given[7]["id"] = given[3]["id"]


def same_prompt(given):
    given[7]["prompts_final"] = given[3]["prompts_final"].upper() + "!"


def odd_area(given):
    given[4]["harm_area"] = "Weather"


def odd_kind(given):
    given[4]["category"] = "Poems"


def no_column(given):
    for row in given:
        del row["category"]


def no_prompt(given):
    given[2]["prompts_final"] = " "


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (one_less, r"found 99 rows:\n.*advice +action(.|\n)*child_safety +10 of 10 +9 of 10"),
        (other_cell, r"self_harm +9 of 10 +11 of 10"),
        (other_area, r"self_harm +9 of 10 +10 of 10\n  physical_harm +11 of 10 +10 of 10"),
        (same_id, r"line 9: id 'sst_004' stands already at mine.csv line 5"),
        (same_prompt, r"line 9: this prompt stands already at mine.csv line 5"),
        (odd_area, r"line 6: no harm area 'Weather'. Accepted: .*Child Abuse.*Physical Harm"),
        (odd_kind, r"line 6: no category 'Poems'. Accepted: "),
        (no_column, r"no column category; found id, harm_area, counter, prompts_final. Expected .* 5 areas x 2 kinds"),
        (no_prompt, r"line 4: id and prompts_final must not be empty"),
    ],
)
def test_rejects_what_is_off(tmp_path, spoil, says):
    given = sst.rows()
    spoil(given)
    with pytest.raises(InputError, match=says) as caught:
        load(tmp_path, given)
    assert "paper bird" not in str(caught.value), "no message shows a prompt"


def test_rejects_bytes_that_are_not_utf8_and_other_files(tmp_path):
    sst.write(tmp_path / "mine.csv", sst.rows())
    data = (tmp_path / "mine.csv").read_bytes().replace(b"paper bird number 1?", b"caf\xe9 1?")
    (tmp_path / "mine.csv").write_bytes(data)
    with pytest.raises(InputError, match=r"not UTF-8 .*10 rows in each of 5 areas x 2 kinds"):
        simple_safety_tests(rows=str(tmp_path / "mine.csv"))
    with pytest.raises(InputError, match=r"must be a \.csv or \.jsonl file"):
        simple_safety_tests(rows="mine.xlsx")
    with pytest.raises(InputError, match="no file"):
        simple_safety_tests(rows=str(tmp_path / "absent.csv"))


def test_paper_and_csv_spellings_are_one(tmp_path):
    paper = {"Physical harm and Violence": "Physical Harm", "Child safety": "Child Abuse",
             "Illegal and Highly Regulated items": "ILLEGAL & highly-regulated items"}  # fmt: skip
    given = [{**row, "harm_area": paper.get(row["harm_area"], row["harm_area"])} for row in sst.rows()]
    hub = [{("prompt" if name == "prompts_final" else name): value for name, value in row.items()} for row in given]
    a, b, c = (load(tmp_path, rows) for rows in (sst.rows(), given, hub))
    assert a.cases == b.cases == c.cases


def test_a_reduced_copy_passes_only_with_partial_and_is_noted(tmp_path):
    with pytest.raises(InputError, match="--partial"):
        load(tmp_path, sst.rows()[:52])
    suite = load(tmp_path, sst.rows()[:52], partial=True)
    assert len(suite.cases) == 104 and "52 of 100 rows" in suite.notes[0] and "self_harm 20" in suite.notes[0]
    extra = [*sst.rows()[:11], {**sst.rows()[0], "id": "new", "prompts_final": "What is a new bird?"}]
    with pytest.raises(InputError, match="11 of 10"):
        load(tmp_path, extra, partial=True)


def test_the_public_copy(public_rows):
    suite = simple_safety_tests(rows=str(public_rows / "simple_safety_tests" / "sst_prompts.jsonl"), partial=True)
    assert len(suite.cases) == 104 and len({case.category for case in suite.cases}) == 4
    with pytest.raises(InputError, match="child_safety"):
        simple_safety_tests(rows=str(public_rows / "simple_safety_tests" / "sst_prompts.jsonl"))


def test_arms_share_items_and_differ_by_the_system_text_alone(tmp_path):
    suite = load(tmp_path, sst.rows(), arms=("none", "safety", "neutral"))
    bare, safe, neutral = suite.cases[:3]
    assert bare.group == safe.group == neutral.group == "sst_001"
    assert [message.role for message in bare.messages] == ["user"]
    assert [message.role for message in safe.messages] == ["system", "user"] and safe.messages[1] == bare.messages[0]
    assert len(safe.messages[0].text) == len(neutral.messages[0].text), "the control is of equal length"
    assert {metric.name for metric in suite.metrics} == {"unsafe_rate", "system_prompt_effect", "neutral_prompt_effect"}
    alone = load(tmp_path, sst.rows(), arms=("safety",))
    assert {metric.name for metric in alone.metrics} == {"unsafe_rate"} and len(alone.cases) == 100


def test_the_system_text_can_stand_in_the_users_turn(tmp_path):
    suite = load(tmp_path, sst.rows(), system_as="user")
    bare, safe = suite.cases[:2]
    text = safe.messages[0].text
    assert len(safe.messages) == 1 and text.startswith("SYSTEM: ") and "\n\nUSER: " in text
    assert text[safe.meta["request_at"] :] == bare.messages[0].text
    assert any("SYSTEM: and USER:" in note for note in suite.notes), "it is recorded that this was done"


def test_own_system_text(tmp_path):
    (tmp_path / "kind.txt").write_text("Be kind.\n")
    suite = load(tmp_path, sst.rows(), system=str(tmp_path / "kind.txt"), arms=("safety", "neutral"))
    assert suite.cases[0].messages[0].text == "Be kind."
    assert any("not of equal length" in note for note in suite.notes)
    (tmp_path / "kind.txt").write_text(" ")
    with pytest.raises(InputError, match="is empty"):
        load(tmp_path, sst.rows(), system=str(tmp_path / "kind.txt"))


class Half:
    """Complies with scams, and elsewhere with one prompt in five unless a system text asks for safety; some rows can be made to fail."""

    name, identity = "half", {"name": "half"}

    def __init__(self, silent=()):
        self.silent = silent

    async def __call__(self, messages, *, seed=0, **settings):
        number = int(messages[-1].text.split()[-1].strip("?"))
        if (number, messages[0].role) in self.silent:
            return Message("assistant", "")
        scam = 61 <= number <= 80
        return Message(
            "assistant", "Fold it." if messages[0].role == "user" and (scam or number % 5 == 0) else "I can't."
        )


def run(tmp_path, target, **options):
    options = {"rows": sst.write(tmp_path / "mine.csv", sst.rows()), **options}
    loaded, judge = load_suite("simple_safety_tests", options), load_judge(sst.write_guard(tmp_path))
    _, record = asyncio.run(evaluate(loaded, target, judge, runs=tmp_path / "runs", limits=Limits(tries=1), quiet=True))
    return record


def at(record, name, category=None, arm=None):
    return next(e for e in record.estimates if (e.name, e.category, e.arm) == (name, category, arm))


def test_rates_by_arm_area_and_kind_and_the_paired_effect(tmp_path):
    record = run(tmp_path, Half())
    assert at(record, "unsafe_rate", arm="none").value == 0.36 and at(record, "unsafe_rate", arm="safety").value == 0
    assert round(at(record, "unsafe_rate", arm="safety").high, 3) == 0.037
    assert at(record, "unsafe_rate", "sst/scams", "none").value == 1.0
    assert round(at(record, "unsafe_rate", "sst/scams", "safety").high, 3) == 0.161
    assert at(record, "unsafe_rate", "kind=advice", "none").n == 50
    effect = at(record, "system_prompt_effect", arm="none - safety")
    assert round(effect.value, 9) == 0.36 and effect.p == 2**-35 and effect.n == 100


def test_a_pair_with_one_arm_unscored_is_left_out_and_counted(tmp_path):
    record = run(tmp_path, Half(silent={(1, "user"), (2, "system"), (61, "system")}))
    effect = at(record, "system_prompt_effect", arm="none - safety")
    assert (effect.n, effect.unscored) == (97, 3) and round(effect.value * 97) == 35
    assert at(record, "unsafe_rate").unscored == 3


def test_one_arm_only_gives_no_effect(tmp_path):
    record = run(tmp_path, Half(), arms="none")
    assert {e.name for e in record.estimates} == {"unsafe_rate"}


def test_the_gate_looks_at_every_area(tmp_path, monkeypatch):
    """Exit 1 if one harm area alone is unsafe, 0 if none is."""
    monkeypatch.chdir(tmp_path)
    rows, guard = sst.write(tmp_path / "mine.csv", sst.rows()), sst.write_guard(tmp_path)
    (tmp_path / "t.py").write_text(
        "def one(messages, **more):\n    return 'Fold it.' if '70?' in messages[-1].text else \"I can't.\"\n"
        'def never(messages, **more):\n    return "I can\'t."\n'
    )
    words = ["eval", "simple_safety_tests", "--rows", rows, "--judge", guard, "--quiet", "--no-report"]
    words += ["--fail-if", "unsafe_rate[*].value > 0"]
    failed = CliRunner().invoke(main, [*words, "--target", "python/t.py:one"])
    assert failed.exit_code == 1 and "FAIL: unsafe_rate[*].value > 0 at sst/scams" in failed.output
    for area in ("self_harm", "physical_harm", "illegal_items", "child_safety"):
        assert f"pass: unsafe_rate[*].value > 0 at sst/{area} (got 0)" in failed.output
    assert CliRunner().invoke(main, [*words, "--target", "python/t.py:never"]).exit_code == 0
    assert "paper bird" not in failed.output, "no prompt on the console"


def test_a_gate_per_area(tmp_path):
    record = run(tmp_path, Half())
    found = decide(parse_rule("unsafe_rate[sst/scams].value > 0.1"), record.estimates)
    assert all(decision.estimate.category == "sst/scams" for decision in found) and found[0].broken


def test_the_record_holds_no_prompt(tmp_path):
    record = run(tmp_path, Half())
    assert "paper bird" not in json.dumps([e.json() for e in record.estimates]) + json.dumps(record.inputs)
