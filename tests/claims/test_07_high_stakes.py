"""System 07: what adversarial training buys against the attack it was trained on, beside extra ordinary rows and labels by chance."""

import pytest

pytest.importorskip("transformers")

from davylamp.core.errors import InputError
from davylamp.studies.high_stakes import high_stakes_training

pytestmark = pytest.mark.claims


@pytest.mark.slow
@pytest.mark.long
def test_claims_and_controls_hold():
    observed = high_stakes_training()
    claims = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(claims) == 8 and sum(claim.control for claim, _ in claims) == 2
    assert not [(claim.text, e.low, e.high) for claim, e in claims if claim.held(e) is not True]


def test_a_study_needs_seeds():
    with pytest.raises(InputError):
        high_stakes_training(seeds=())
