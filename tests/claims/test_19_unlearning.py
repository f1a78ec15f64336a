"""System 19: unlearning that looks perfect hides more than it removes, hits what is beside it, and the verdicts tell."""

import pytest

pytest.importorskip("torch")

import torch

from davylamp.studies.unlearning_limits import unlearning_limits

pytestmark = pytest.mark.claims


@pytest.mark.slow
def test_claims_controls_and_verdicts():
    """One seed, for time."""
    torch.set_num_threads(1)
    observed = unlearning_limits(size="quick", seeds=(0,))
    claims = [(claim, estimate) for claim, estimate in observed if claim]
    assert len(claims) == 15 and sum(claim.control for claim, _ in claims) == 5
    assert not [(claim.text, e.low, e.high) for claim, e in claims if claim.held(e) is not True]
    verdicts = {e.arm: e.name for claim, e in observed if claim is None and e.name.startswith("verdict")}
    assert verdicts["oracle"] == "verdict: removed as far as tested"
    assert verdicts["refusal training"] == "verdict: hidden" and verdicts["base"] == "verdict: not forgotten"
