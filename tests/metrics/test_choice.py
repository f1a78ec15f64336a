"""The option audit against counting by hand."""

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.metrics.choice import option_audit


def rows(pick, n=50):
    """pick(item, gold place) -> place chosen, or None."""
    out = []
    for item in range(n):
        for turn in range(4):
            gold = (item + turn) % 4
            chosen = pick(item, gold)
            out.append((str(item), turn, "ABCD"[gold], None if chosen is None else "ABCD"[chosen]))
    return out


def test_one_who_knows():
    audit = option_audit(rows(lambda item, gold: gold))
    assert audit.accuracy.value == 1.0 and not audit.biased and audit.flips.value == 0.0


def test_one_who_always_picks_the_same_wrong_option():
    audit = option_audit(rows(lambda item, gold: (gold + 1) % 4))
    assert audit.accuracy.value == 0.0 and audit.flips.value == 0.0 and not audit.biased


def test_against_brute_force():
    rng = np.random.default_rng(0)
    picks = {(item, gold): int(rng.integers(4)) for item in range(50) for gold in range(4)}
    given = rows(lambda item, gold: picks[item, gold])
    audit = option_audit(given)
    assert audit.accuracy.value == pytest.approx(np.mean([a == b for _, _, a, b in given]))
    assert audit.picks["C"].value == pytest.approx(np.mean([b == "C" for _, _, _, b in given]))


def test_unreadable_choices_are_left_out():
    audit = option_audit(rows(lambda item, gold: None if item % 2 else gold))
    assert audit.accuracy.value == 1.0 and audit.accuracy.unscored == 100 and audit.flips.unscored == 25


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [("1", 0, "E", "A")],
        [("1", 0, "A", "x")],
        [("1", 0, "A", "A"), ("1", 0, "B", "A")],
        [("1", 0, "A", "A"), ("2", 1, "A", "A")],
    ],
)
def test_bad_rows(bad):
    with pytest.raises(InputError):
        option_audit(bad)
