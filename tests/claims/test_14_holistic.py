"""System 14: gates show safety, held-out rows stay fresh, a lost category is found, cards and incidents are what they are."""

import pytest

from davylamp.studies.holistic import holistic

pytestmark = [pytest.mark.claims, pytest.mark.slow]


def test_claims_and_controls_hold():
    observed = holistic()
    assert [(c.text, e.low, e.high) for c, e in observed if c.held(e) is not True] == []
    assert sum(claim.control for claim, _ in observed) == 6
