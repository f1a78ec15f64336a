"""System 19: unlearning that looks perfect hides more than it removes, hits what is beside it, and the verdicts tell."""

import pytest

pytest.importorskip("torch")

import torch

from davylamp.studies.unlearning_limits import unlearning_limits
from davylamp.studies.unlearning_tradeoff import unlearning_tradeoff

pytestmark = pytest.mark.claims


@pytest.mark.slow
def test_claims_controls_and_verdicts():
    """One seed, for time: what is large is decided on the interval's end, the bounds near zero on the value (24 facts are too few)."""
    torch.set_num_threads(1)
    observed = unlearning_limits(size="quick", seeds=(0,))
    claims = [(claim, estimate) for claim, estimate in observed if claim]
    assert len(claims) == 13 and sum(claim.control for claim, _ in claims) == 4
    small = [
        claim.quantity == "forget" or "asking" in claim.quantity or claim.against == "simnpo" for claim, _ in claims
    ]
    assert not [(c.text, e.low, e.high) for (c, e), few in zip(claims, small, strict=True) if not few and not c.held(e)]
    for (claim, estimate), few in zip(claims, small, strict=True):
        if few and claim.at_most is not None:
            assert estimate.value <= claim.at_most, claim.text
    verdicts = {e.arm: e.name for claim, e in observed if claim is None and e.name.startswith("verdict")}
    assert verdicts["simnpo"] == verdicts["refusal training"] == "verdict: hidden"
    assert verdicts["base"] == "verdict: not forgotten" and verdicts["oracle"] != "verdict: hidden"


@pytest.mark.slow
@pytest.mark.long
def test_strength_trades_what_comes_back_for_what_is_ruined():
    """On seeds that no setting and no claim was chosen on."""
    torch.set_num_threads(1)
    claims = [(claim, estimate) for claim, estimate in unlearning_tradeoff(seeds=(3, 4, 5)) if claim]
    assert len(claims) == 10 and sum(claim.control for claim, _ in claims) == 4
    assert not [(claim.text, e.low, e.high) for claim, e in claims if claim.held(e) is not True]
