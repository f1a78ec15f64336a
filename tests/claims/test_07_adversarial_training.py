"""System 07: a threshold for a stated failure bound keeps it, and one chosen by eye does not; over several seeds."""

import pytest

from davylamp.studies.failure_bound import failure_bounds

pytestmark = pytest.mark.claims


def test_claims_and_controls_hold():
    observed = failure_bounds(seeds=(3, 4, 5))
    assert sum(claim.control for claim, _ in observed) == 2
    assert not [(claim.text, e.low, e.high) for claim, e in observed if claim.held(e) is not True]
