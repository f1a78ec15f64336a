"""Training rows by halves that share no scenario, and leaks that are found."""

import json

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import Dropped
from davylamp.data.labsafety_rows import drop_leaks, labsafety_rows
from tests.suites.test_labsafety import mcq, scenarios, write

RNG = np.random.default_rng(0)


def made(tmp_path, rows, **options):
    return list(labsafety_rows((), rng=RNG, file=write(tmp_path / "x.jsonl", rows), **options))


def test_questions_and_pairs(tmp_path):
    rows = made(tmp_path, mcq(20), half="all")
    assert len(rows) == 20 and rows[1].messages[-1].text == "B: blue 1"
    pairs = made(tmp_path, mcq(20), what="pairs", half="all")
    assert len(pairs) == 60 and all(case.meta["chosen"] != case.meta["rejected"] for case in pairs)
    assert {case.meta["chosen"][0] for case in pairs[:3]} == {"A"}


@pytest.mark.parametrize("what", ["hazards", "consequences"])
def test_no_scenario_stands_in_both_halves(tmp_path, what):
    train, test = (made(tmp_path, scenarios(40), what=what, half=half) for half in ("train", "test"))
    assert train and test and not {case.group for case in train} & {case.group for case in test}
    assert len(train) + len(test) == 40 * (4 if what == "hazards" else 3)


def test_halves_do_not_depend_on_the_order(tmp_path):
    rows = mcq(40)
    first = {case.id for case in made(tmp_path, rows)}
    assert {case.id for case in made(tmp_path, rows[::-1])} == first and 10 < len(first) < 30


@pytest.mark.parametrize("bad", [{"what": "poems"}, {"half": "both"}])
def test_bad_options(tmp_path, bad):
    with pytest.raises(InputError):
        made(tmp_path, mcq(4), **bad)
    with pytest.raises(InputError, match="takes none in"):
        list(labsafety_rows([Case("1", (Message("user", "x"),))], rng=RNG))


def row(id_, text):
    return Case(id_, (Message("user", text), Message("assistant", "Fine.")))


def test_a_planted_duplicate_is_found(tmp_path):
    words = [f"word{i}" for i in range(40)]
    tests = tmp_path / "tests.jsonl"
    tests.write_text(json.dumps(Case("t", (Message("user", " ".join(words)),)).json()) + "\n")
    rows = [
        row("exact", " ".join(words)),
        row("near", "Well, " + ", ".join(words[5:20]).upper() + "! And more."),
        row("far", " ".join(words[::-1])),
        row("short run", " ".join(words[:12]) + " then others"),
    ]
    out = list(drop_leaks(rows, rng=RNG, tests=str(tests)))
    assert [each.case.id for each in out if isinstance(each, Dropped)] == ["exact", "near"]
    with pytest.raises(InputError):
        list(drop_leaks(rows, rng=RNG, tests=str(tests), n=0))
