"""The stories' rule: forms mean what they are listed as, words of a role can be exchanged, and what is no story has no answer."""

import re

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.data.fragile_stories import CALM, FAILS, HOLDS, ROLE, ROLES, breaks, fragile_stories, same_role


@pytest.mark.parametrize("form", FAILS + HOLDS + CALM)
def test_every_form_means_what_it_is_listed_as_with_any_words(form):
    rng = np.random.default_rng(0)
    for _ in range(20):
        text = re.sub(r"\{(\w+)\}", lambda m: ROLES[m[1]][rng.integers(len(ROLES[m[1]]))], form)
        assert breaks(text) is (form in FAILS), text


def test_swapping_words_of_one_role_never_changes_the_truth():
    rng = np.random.default_rng(1)
    for case in fragile_stories((), rng=rng, n=300):
        words = case.messages[-1].text.split()
        for place, word in enumerate(words):
            if options := same_role(word):
                words[place] = options[rng.integers(len(options))]
        assert breaks(" ".join(words)) == bool(case.answer)


def test_rows_are_reproducible_and_long_tailed():
    rows = [list(fragile_stories((), rng=np.random.default_rng(3), n=1500)) for _ in range(2)]
    assert rows[0] == rows[1] and 0.3 < np.mean([row.answer for row in rows[0]]) < 0.4
    words = [word for row in rows[0] for word in row.messages[-1].text.split()]
    assert words.count("figurine") < 0.01 * words.count("vase")
    assert len(ROLE) == sum(map(len, ROLES.values())), "a word has one role"


def test_no_story():
    assert [breaks(text) for text in ("", "...", "the cat sat .", "the vase broke the cat .")] == [None] * 4
    for bad in ({"n": 0}, {"failing": 1.0}, {"tail": -1.0}):
        with pytest.raises(InputError):
            list(fragile_stories((), rng=np.random.default_rng(0), **bad))
    row = next(fragile_stories((), rng=np.random.default_rng(0), n=1))
    with pytest.raises(InputError, match="takes none in"):
        list(fragile_stories((row,), rng=np.random.default_rng(0)))
