"""System 05: point-by-point scores against planted points, and multiple choice against planted responders."""

import pytest

from davylamp.core.errors import InputError
from davylamp.studies.lab_safety import choice_audit, lab_judges

pytestmark = pytest.mark.claims


@pytest.mark.parametrize("study", [lab_judges, choice_audit])
def test_claims_and_controls_hold(study):
    observed = study()
    wrong = [(claim.text, e.low, e.high) for claim, e in observed if claim.held(e) is not True]
    assert not wrong and sum(claim.control for claim, _ in observed) >= 3


def test_no_seeds():
    with pytest.raises(InputError, match="one or more seeds"):
        lab_judges(seeds=())
