"""System 19: what unlearning leaves behind, beside an oracle that never saw the facts. One fresh seed at size quick; the docs have more."""

import pytest

from davylamp.studies.unlearning_limits import METHODS_CLAIMED, judged, observe

pytestmark = [pytest.mark.claims, pytest.mark.slow]


def test_the_facts_come_back_and_the_oracle_does_not_learn_them():
    seen = observe(11, "quick")
    observed = judged([seen], "quick")
    claims = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert sum(claim.control for claim, _ in claims) >= 3
    values = {(claim.quantity, claim.arm): estimate.value for claim, estimate in claims}
    assert values["forget", "base"] >= 0.95 and values["forget", "oracle"] <= 0.1
    assert values["V known after relearning", "oracle"] <= 0.1, (
        "the control: relearning half teaches nothing of the other half"
    )
    for arm in METHODS_CLAIMED:
        assert values["forget", arm] <= 0.06, "by the forget score alone it is gone"
        assert values["V known after relearning", arm] >= 0.15, arm
    assert values["V known after 20 steps", "refusal training"] >= 0.5, "refusing hides and removes nothing"
