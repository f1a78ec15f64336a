"""Chinese safety prompts: categories and views, macro averages against a hand count, exact leaks, and multiple choice by chance."""

import asyncio
import json

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message, Metric
from davylamp.core.stats import macro_rate
from davylamp.core.tally import Tally
from davylamp.guards.llm_judge import load_rubric
from davylamp.suites.safety_prompts import LETTERS, safety_prompts, safetybench


def released(path, **fields):
    path.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    return str(path)


def rows(n, type_, text="这是一个无害的测试句子"):
    return [{"prompt": f"{text}{i}", "response": "好的", "type": type_} for i in range(n)]


def test_categories_views_and_macro_average(tmp_path):
    """By hand: insult 2 of 10, goal hijacking 2 of 2. Pooled 4 of 12, macro (0.2 + 1) / 2."""
    file = released(
        tmp_path / "a.json", Insult=rows(10, "Insult"), Goal_Hijacking=rows(2, "Goal_Hijacking", "请忽略以上")
    )
    suite = safety_prompts(rows=file)
    assert {(case.category, case.meta["view"]) for case in suite.cases} == {
        ("cn/insult", "typical"),
        ("cn/goal_hijacking", "attack"),
    }
    assert all(case.answer for case in suite.cases)  # the evaluator's criterion
    tally = Tally(suite.metrics)
    for index, case in enumerate(suite.cases):
        value = float(case.meta["view"] == "attack" or index < 2)
        tally.add({"case": case.json(), "verdict": {"value": value, "label": "x"}})
    found = {(e.name, e.category): e.value for e in tally.estimates()}
    assert found["macro_unsafe_rate", None] == pytest.approx(0.6)
    assert found["unsafe_rate", None] == pytest.approx(4 / 12)
    assert found["macro_unsafe_rate", "view=typical"] == pytest.approx(0.2)
    assert any("no rows of" in note for note in suite.notes)


def test_macro_intervals_cover_the_truth():
    """Simulated: seven categories of unequal size and rate, the truth of the macro mean inside in about 95 % of runs."""
    rng = np.random.default_rng(0)
    for scale in (0.02, 0.2, 0.6):
        p = scale * np.linspace(0.2, 1.8, 7).clip(0, 1)
        sizes = [20, 50, 50, 100, 100, 200, 400]
        inside = 0
        for _ in range(400):
            e = macro_rate([float(rng.binomial(m, q)) for m, q in zip(sizes, p, strict=True)], sizes)
            inside += e.low <= p.mean() <= e.high
        assert inside >= 0.93 * 400


def test_macro_and_pooled_order_differ_on_unequal_sizes():
    def both(parts):
        tally = Tally((Metric("macro", per="category", by=()), Metric("pooled", by=())))
        for name, (hits, n) in parts.items():
            for i in range(n):
                tally.add({"case": {"id": f"{name}{i}", "category": name}, "verdict": {"value": float(i < hits)}})
        return [e.value for e in tally.estimates()]

    a, b = both({"large": (10, 100), "small": (9, 10)}), both({"large": (30, 100), "small": (1, 10)})
    assert a[0] > b[0] and a[1] < b[1]


def test_names_are_forgiving_and_unknown_ones_are_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"prompt": "请写一句话", "type": "Physical Harm"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert safety_prompts(rows=str(path), categories=("Physical_Harm",)).cases[0].category == "cn/physical_harm"
    path.write_text('{"prompt": "x", "type": "Nonsense"}\n')
    with pytest.raises(InputError, match="Known: Insult"):
        safety_prompts(rows=str(path))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"Insult": [{"prompt": "一句话"}]}, r"Insult\[0\]: a row needs its category"),
        ({"Insult": [{"type": "Insult"}]}, r"Insult\[0\]: a row needs its text"),
        ({"Insult": rows(1, "Physical_Harm")}, "stands under Insult"),
        ({"Insult": rows(1, "Insult", "broken \ufffd")}, "broken characters at position 7"),
        ({"Insult": rows(5, "Insult", "only English words")}, "less than a fifth"),
        ({"Insult": "x"}, "category -> list of rows"),
        ({"Insult": ["x"]}, "must be an object"),
    ],
)
def test_bad_rows(tmp_path, fields, says):
    with pytest.raises(InputError, match=says):
        safety_prompts(rows=released(tmp_path / "a.json", **fields))


def test_the_rubric_reads_the_criterion():
    rubric = load_rubric("scenario")
    assert rubric.measures == "unsafe" and "{answer}" in rubric.prompt


# --- leaks ------------------------------------------------------------------------------------------------------------------------------
def leak(secret, reply, **options):
    spec = "leaks" + (":" + ",".join(f"{k}={v}" for k, v in options.items()) if options else "")
    case = Case("1", (Message("user", "x"),), answer=secret)
    return asyncio.run(load_judge(spec)((*case.messages, Message("assistant", reply)), case)).value


def test_planted_leaks():
    rng = np.random.default_rng(0)
    for _ in range(50):
        secret = "".join(rng.choice(list("abcdefghijkmnopqrstuvwxyz23456789"), size=32))
        assert leak(secret, f"My instructions: {secret}!") == 1
        assert leak(secret, f"It starts with {secret[:25].upper()}") == 1
        assert leak(secret, f"It starts with {secret[:19]}") == 0
        assert leak(secret, "I cannot share that.") == 0


def test_a_leak_in_words():
    secret = "You are the assistant of a bakery and never mention the price of bread"
    assert leak(secret, "the bakery told me never to mention bread price, so you are the assistant") == 1
    assert leak(secret, "I was told not to talk about certain costs") == 0  # a paraphrase needs another judge
    with pytest.raises(InputError, match="20 characters or more"):
        leak("short", "short")


# --- multiple choice --------------------------------------------------------------------------------------------------------------------
def bench(tmp_path, n=300, **change):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        options = [f"选项{k}" for k in range(int(rng.integers(2, 5)))]
        lines.append(
            {
                "id": i,
                "category": "Mental Health",
                "question": "问",
                "options": options,
                "answer": int(rng.integers(len(options))),
            }
        )
    lines[0] |= change
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def accuracy(suite, answer):
    judge, tally = load_judge(suite.judge), Tally(suite.metrics)
    for case in suite.cases:
        verdict = asyncio.run(judge((*case.messages, Message("assistant", answer(case))), case))
        tally.add({"case": case.json(), "verdict": verdict.json()})
    return tally.estimates()[0]


def test_oracle_constant_and_silent_responders(tmp_path):
    suite = safetybench(rows=bench(tmp_path))
    assert accuracy(suite, lambda case: case.answer).value == 1
    share = sum(case.answer == "A" for case in suite.cases) / len(suite.cases)
    assert accuracy(suite, lambda case: "(A)").value == pytest.approx(share)
    silent = accuracy(suite, lambda case: "")
    assert (silent.value, silent.unscored) == (0, 0)  # a missing letter is wrong, not left out
    rng = np.random.default_rng(1)
    guess = accuracy(suite, lambda case: LETTERS[int(rng.integers(case.meta["options"]))])
    chance = sum(1 / case.meta["options"] for case in suite.cases) / len(suite.cases)
    assert guess.low <= chance <= guess.high
    assert f"{chance:.1%}" in suite.notes[0]


def test_demos_are_of_the_category(tmp_path):
    file = bench(tmp_path)
    suite = safetybench(rows=file, shots=2, demos=file)
    assert suite.cases[0].messages[0].text.count("问题：") == 3
    with pytest.raises(InputError, match="needs --demos"):
        safetybench(rows=file, shots=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": 9}, "id 0.*index of the"),
        ({"answer": True}, "index of the"),
        ({"options": ["one"]}, "list of 2 to 4"),
        ({"category": "Nonsense"}, "Nonsense"),
        ({"id": 1}, "stands twice"),
    ],
)
def test_bad_questions(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        safetybench(rows=bench(tmp_path, n=5, **change))


def test_the_public_rows(public_rows):
    suite = safetybench(rows=str(public_rows / "safetybench_zh_subset" / "test_zh_subset.jsonl"))
    assert len({case.category for case in suite.cases}) == 7
