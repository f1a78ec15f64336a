"""System 09: adaptation to pictures costs refusals without a row about hazards, and a merge gives them back; controls beside it."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

from davylamp.studies.vl_adaptation import vl_adaptation

pytestmark = [pytest.mark.claims, pytest.mark.slow, pytest.mark.long]


def test_claims_and_controls_hold_over_four_seeds():
    observed, figures = vl_adaptation(seeds=(0, 1, 2, 3))
    claims = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(claims) >= 17 and sum(claim.control for claim, _ in claims) >= 6 and len(figures) >= 4
    broken = [
        (claim.text, estimate.value, estimate.low, estimate.high)
        for claim, estimate in claims
        if claim.held(estimate) is not True
    ]
    assert not broken
