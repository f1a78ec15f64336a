"""System 34: instruction attacks beat plain prompts, what closes the gap and what does not, and whether the instruments can be trusted."""

import pytest

from davylamp.studies.chinese_instruments import chinese_instruments
from davylamp.studies.chinese_safety import chinese_safety

pytestmark = [pytest.mark.claims, pytest.mark.slow]


def wrong(observed):
    return [(claim.text, e.low, e.high) for claim, e in observed if claim is not None and claim.held(e) is not True]


def test_the_instruments_hold_with_their_controls():
    pytest.importorskip("sklearn")
    observed = chinese_instruments()
    assert not wrong(observed) and sum(claim.control for claim, _ in observed) == 6


@pytest.mark.long
def test_attacks_beat_plain_prompts_and_only_attack_rows_close_the_gap():
    pytest.importorskip("torch")
    observed = chinese_safety(seeds=(0, 1))
    assert not wrong(observed) and sum(claim.control for claim, _ in observed if claim is not None) == 4
