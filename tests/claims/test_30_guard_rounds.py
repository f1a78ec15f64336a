"""System 30, text side: rounds of filtering leave what the closed form says, and a guard that sees nothing leaves everything."""

import pytest

from davylamp.core.errors import InputError
from davylamp.studies.guard_rounds import guard_rounds

pytestmark = pytest.mark.claims


def test_claims_and_controls_hold():
    observed = guard_rounds(seeds=(3, 4, 5))
    claims = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(claims) == 8 and sum(claim.control for claim, _ in claims) == 2
    assert not [(claim.text, e.low, e.high) for claim, e in claims if claim.held(e) is not True]


def test_seeds_decide_and_are_needed():
    assert guard_rounds(seeds=(1,)) == guard_rounds(seeds=(1,)) != guard_rounds(seeds=(2,))
    with pytest.raises(InputError):
        guard_rounds(seeds=())
