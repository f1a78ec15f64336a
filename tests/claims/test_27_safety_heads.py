"""System 27: a head that refusal was planted in is found, takes the refusal along, and ordinary alignment names no head."""

import pytest

from davylamp.core.errors import InputError
from davylamp.studies.safety_heads import safety_heads

pytestmark = [pytest.mark.claims, pytest.mark.slow, pytest.mark.long]


def test_claims_and_controls_hold():
    """Size quick, three seeds: about 100 s of one core."""
    observed = safety_heads()
    claimed = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(claimed) >= 14 and sum(claim.control for claim, _ in claimed) >= 5
    broken = [(claim.text, e.low, e.high) for claim, e in claimed if claim.held(e) is not True]
    assert not broken


def test_a_study_needs_a_seed():
    with pytest.raises(InputError, match="seeds"):
        safety_heads(seeds=())
