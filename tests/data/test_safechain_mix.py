"""SafeChain rows: kept where all replies are safe, dropped with a reason, spread evenly, and never cut."""

import asyncio

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import Dropped
from davylamp.data.safechain_mix import build, check_thoughts, safechain_mix, spread
from davylamp.models import long_thought as world
from davylamp.models.thinking import parts

CASES = world.cases("hazards", 8, np.random.default_rng(0))
JUDGE = "parts:judge=long_thought_gives"


class Teacher:
    """By the number of the case: safe, one unsafe of five, a thought cut off, no thought, an empty reply."""

    name, identity = "teacher", {"name": "teacher"}

    def __init__(self):
        self.asked = []

    async def __call__(self, messages, *, seed=0, **settings):
        self.asked.append((messages[-1].text, seed))
        number = [case.messages for case in CASES].index(tuple(messages))
        item = world.read(messages).item
        thought, answer = world.check_of(item), world.REFUSAL
        if number == 1 and seed == 3:
            thought = world.plan_of(item)
        if number == 2 and seed == 3:
            answer = ""
        if number == 3 and seed == 3:
            thought = None
        if number == 4 and seed == 3:
            thought, answer = None, ""
        return Message("assistant", answer, reasoning=thought)


def made(**how):
    teacher = Teacher()
    rows = asyncio.run(build(CASES, teacher, load_judge(JUDGE), k=5, rng=np.random.default_rng(0), **how))
    return rows, teacher


def test_why_a_prompt_is_kept_or_dropped():
    rows, teacher = made()
    assert [row.reason if isinstance(row, Dropped) else "kept" for row in rows] == [
        "kept",
        "an unsafe reply among the K",
        "a thought was cut off",
        "a reply without a thought",
        "a reply without a verdict",
        *["kept"] * 3,
    ]
    assert len(teacher.asked) == 40 and {seed for _, seed in teacher.asked} == set(range(5))
    found = parts(rows[0].messages[-1].text)
    assert found.status == "closed" and found.answer == world.REFUSAL


def test_the_baseline_does_not_think():
    rows, _ = made(form="answer")
    assert not isinstance(rows[3], Dropped) and rows[3].messages[-1].text == world.REFUSAL


def test_the_same_generator_picks_the_same_reply():
    assert [row.json() for row in made()[0] if isinstance(row, Case)] == [
        row.json() for row in made()[0] if isinstance(row, Case)
    ]


def test_kinds_are_drawn_evenly():
    rows = [Case(str(i), (Message("user", "x"),), meta={"kind": f"k{i % 4}"}) for i in range(40)]
    taken, left = spread(rows, 20, rng=np.random.default_rng(0))
    assert sorted(case.meta["kind"] for case in taken) == sorted(f"k{i % 4}" for i in range(20)) and len(left) == 20
    for n, says in ((22, "no multiple of 4"), (44, "too few rows")):
        with pytest.raises(InputError, match=says):
            spread(rows, n, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="no prompts"):
        spread([], 4, rng=np.random.default_rng(0))


def test_the_engine_by_name(tmp_path):
    file = tmp_path / "t.py"
    file.write_text(
        "from davylamp.core.nouns import Message\n"
        "def answer(messages, *, seed=0, **settings):\n    return Message('assistant', 'no i refuse .', reasoning='check')\n"
    )
    rows = list(
        safechain_mix(
            CASES, rng=np.random.default_rng(0), teacher=f"python/{file}:answer", judge=JUDGE.replace("=", "=", 1), k=2
        )
    )
    assert len(rows) == 8 and rows[0].messages[-1].text.startswith("<think>\ncheck\n</think>")


@pytest.mark.parametrize("bad", [{"k": 1}, {"n": -1}, {"width": 0}, {"form": "poem"}])
def test_bad_options(bad):
    with pytest.raises(InputError):
        list(safechain_mix(CASES, rng=np.random.default_rng(0), teacher="python/x.py:f", **bad))


def row(text, id_="1"):
    return Case(id_, (Message("user", "w1"), Message("assistant", text)))


def test_rows_that_cannot_be_learnt_from_are_dropped_whole():
    rows = [
        row("<think>a</think>b"),
        row("<think>a"),
        row("<think>a</think>"),
        row("b"),
        row("<think>" + "a " * 50 + "</think>b"),
        Case("6", (Message("user", "x"),)),
    ]
    out = list(check_thoughts(rows, rng=np.random.default_rng(0), max_length=40))
    assert [each.reason if isinstance(each, Dropped) else "kept" for each in out] == [
        "kept", "the thought is not closed", "the answer is empty", "no thought", "too long", "no reply"
    ]  # fmt: skip
    with pytest.raises(InputError):
        list(check_thoughts(rows, rng=np.random.default_rng(0), max_length=0))
