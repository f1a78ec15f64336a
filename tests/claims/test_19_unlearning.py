"""System 19: unlearning that looks perfect hides more than it removes, hits what is beside it, and the verdicts tell."""

import pytest

pytest.importorskip("torch")

import torch

from davylamp.studies.unlearning_limits import unlearning_limits

pytestmark = pytest.mark.claims


@pytest.mark.slow
def test_claims_and_controls_hold():
    """One seed, for time: each claim on its interval's end, but for the share of right verdicts, of which three are too few."""
    torch.set_num_threads(1)
    observed = [(claim, estimate) for claim, estimate in unlearning_limits(size="quick", seeds=(0,)) if claim]
    assert len(observed) == 14 and sum(claim.control for claim, _ in observed) == 4
    *most, (_, right) = observed
    assert not [(claim.text, e.low, e.high) for claim, e in most if claim.held(e) is not True]
    assert right.value == 1.0 and right.n == 3
