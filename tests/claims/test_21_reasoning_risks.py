"""System 21: thought against answer, the price of reasoning, harm where both are unsafe; injection and patterns as planted."""

import pytest

from davylamp.studies.reasoning_risks import distilled_reasoning, harm_of_answers, risk_instruments, thought_gap

pytestmark = [pytest.mark.claims, pytest.mark.slow]


@pytest.mark.parametrize("study", [thought_gap, distilled_reasoning, harm_of_answers, risk_instruments])
def test_claims_and_controls_hold(study):
    observed = study(seeds=(0, 1, 2))
    wrong = [(claim.text, e.low, e.high) for claim, e in observed if claim.held(e) is not True]
    assert not wrong and sum(claim.control for claim, _ in observed) >= 1
