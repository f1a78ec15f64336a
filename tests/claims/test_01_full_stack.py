"""System 01: a safety case notices each planted gap, and nothing else."""

import pytest

from davylamp.studies.full_stack import full_stack

pytestmark = [pytest.mark.claims, pytest.mark.slow]


def test_claims_and_controls_hold():
    observed = full_stack()
    assert [(c.text, e.low, e.high) for c, e in observed if c.held(e) is not True] == []
    assert sum(claim.control for claim, _ in observed) == 2
