"""System 03: the coverage map names each planted hole, and none where there is none."""

import pytest

from davylamp.studies.threat_coverage import threat_coverage

pytestmark = [pytest.mark.claims, pytest.mark.slow]


def test_claims_and_controls_hold():
    observed = threat_coverage()
    assert [(c.text, e.low, e.high) for c, e in observed if c.held(e) is not True] == []
    assert sum(claim.control for claim, _ in observed) == 4
