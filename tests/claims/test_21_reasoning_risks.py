"""System 21: thought against answer, the price of reasoning, harm where both are unsafe; injection and patterns as planted."""

import pytest

from davylamp.studies.reasoning_risks import reasoning_models, risk_instruments

pytestmark = [pytest.mark.claims, pytest.mark.slow]


@pytest.mark.parametrize(("study", "controls"), [(reasoning_models, 3), (risk_instruments, 2)])
def test_claims_and_controls_hold(study, controls):
    observed = study(seeds=(0,)) if study is reasoning_models else study()
    wrong = [(claim.text, e.low, e.high) for claim, e in observed if claim.held(e) is not True]
    assert not wrong and sum(claim.control for claim, _ in observed) >= controls
