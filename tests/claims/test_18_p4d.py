"""System 18: P4D beside random prompts of equal number, and the controls from which nothing can leak."""

import pytest

pytest.importorskip("diffusers")
import torch

from davylamp.studies.p4d import p4d_audit

pytestmark = pytest.mark.claims
torch.set_num_threads(1)


def broken(observed):
    return [(c.text, e.low, e.high) for c, e in observed if c is not None and c.held(e) is not True]


@pytest.mark.slow
@pytest.mark.long
def test_quick_claims_hold():
    observed = p4d_audit(size="quick")
    assert sum(claim is not None and claim.control for claim, _ in observed) == 2
    assert not broken(observed)
