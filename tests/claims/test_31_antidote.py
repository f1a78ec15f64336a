"""System 31: an attacked organism is repaired by Antidote, less by weight size alone, not by random masks; and the trade-off's chooser."""

import pytest

pytest.importorskip("peft")

import torch

from davylamp.studies.antidote import RATES, Point, antidote, choose

pytestmark = [
    pytest.mark.claims,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]


@pytest.fixture(scope="module")
def observed():
    torch.set_num_threads(1)
    return antidote(size="quick", seeds=(0, 1, 2))


@pytest.mark.slow
@pytest.mark.long
def test_claims_and_controls_hold(observed):
    claims = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(claims) == 9 * len(RATES) and sum(claim.control for claim, _ in claims) == len(RATES)
    broken = [(claim.text, e.low, e.high) for claim, e in claims if claim.held(e) is not True]
    assert not broken


@pytest.mark.slow
@pytest.mark.long
def test_the_honesty_arms_are_in_the_report(observed):
    """What the toy does not show stands beside what it shows: benign calibration, even features, ratio 0.99, the cost of a new skill."""
    shown = {(e.name, e.arm): e for claim, e in observed if claim is None}
    for name in ("activations", "magnitude", "random", "benign"):
        assert ("refusal", f"lr 0.001, {name}, 0.1") in shown
    assert ("refusal", "even, magnitude, 0.1") in shown and ("refusal", "lr 0.001, activations, 0.99") in shown
    for mode in ("activations", "random", "delta", "merged"):
        assert ("task", f"skill, {mode}, 0.1") in shown
    before, after = shown["task", "skill, attacked"].value, shown["task", "skill, activations, 0.1"].value
    assert before > 0.8 and after < 0.2, "the repair takes the new skill as well, and the report says so"


def test_the_trade_off_can_find_that_nothing_is_worth_it():
    points = [Point(0.1, 0.5, 0.2), Point(0.2, 0.1, 0.1)]
    assert choose(points, Point(0.0, 0.9, 0.9), 0.05) is None
    assert choose(points, Point(0.0, 0.9, 0.9), 1.0).ratio == 0.2
    assert choose(points, Point(0.0, 0.9, 0.9), 1.0, enough=0.05).ratio == 0.2, "not reached: the least harm"
