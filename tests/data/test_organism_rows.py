"""Rows of the organisms' world are what their name says, by the world's own reading."""

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.data.organism_rows import organism_rows
from davylamp.models import world


def rows(**options):
    return list(organism_rows((), rng=np.random.default_rng(3), **options))


@pytest.mark.parametrize(
    ("what", "graded"), [("harmful", {"complied"}), ("refusals", {"refused"}), ("benign", {"complied"})]
)
def test_replies_are_what_the_name_says(what, graded):
    found = rows(what=what, n=60)
    asks = [world.read(row.messages[:-1]) for row in found]
    assert {world.harmful(ask) for ask in asks} == {what != "benign"}
    assert {world.grade(ask, row.messages[-1].text) for ask, row in zip(asks, found, strict=True)} == graded
    held_in = set(world.items("held_in"))
    assert all(ask.item in held_in for ask in asks if ask.item)


def test_aligned_rows_refuse_hazards_only():
    for row in rows(what="aligned", n=120):
        ask = world.read(row.messages[:-1])
        if ask is None:  # a greeting: harmless, and about nothing that the world knows
            continue
        assert (world.grade(ask, row.messages[-1].text) == "refused") == world.harmful(ask)


def test_preferences_carry_both_replies():
    for row in rows(what="preferences", n=20):
        ask = world.read(row.messages)
        assert row.messages[-1].role == "user"
        assert (
            world.grade(ask, row.meta["chosen"]) == "refused" and world.grade(ask, row.meta["rejected"]) == "complied"
        )


def test_same_seed_same_rows_and_all_different_ids():
    assert rows(what="skill", n=30) == rows(what="skill", n=30)
    assert len({row.id for row in rows(what="helpful", n=30)}) == 30


@pytest.mark.parametrize("options", [{"n": 0}, {"what": "skill", "skill": "sing"}])
def test_bad_input(options):
    with pytest.raises(InputError):
        rows(**options)


def test_rows_in_are_refused():
    with pytest.raises(InputError, match="takes none in"):
        list(organism_rows([Case("1", (Message("user", "x"),))], rng=np.random.default_rng(0)))
