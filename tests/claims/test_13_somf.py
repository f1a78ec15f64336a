"""System 13: the mask refuses and does the task where no interpolation does both, and its controls do not refuse; merges by three rules."""

import pytest

pytest.importorskip("peft")

import torch

from davylamp.studies.somf import MERGES, somf, somf_merges

pytestmark = pytest.mark.claims


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def check(observed, claims, controls):
    held = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(held) == claims and sum(claim.control for claim, _ in held) == controls
    broken = [(claim.text, e.low, e.high) for claim, e in held if claim.held(e) is not True]
    assert not broken
    return {(e.name, e.arm): e for claim, e in observed if claim is None}


@pytest.mark.slow
@pytest.mark.long
def test_one_task():
    shown = check(somf(size="quick", seeds=(0, 1, 2)), 8, 3)
    for arm in ("threshold", "soft", "binary"):
        assert ("refusal", f"mask, {arm}") in shown
    # A threshold on an early mask is another model than its probabilities: deploy what was evaluated.
    early = [shown["refusal", f"step 30, {mode}"].value for mode in ("probability", "threshold")]
    assert early[0] - early[1] > 0.3
    assert {("task", arm) for arm in ("RESTA 0.5", "DARE 0.3", "safety fine-tune after")} <= shown.keys()


@pytest.mark.slow
@pytest.mark.long
def test_two_tasks_merged():
    check(somf_merges(size="quick", seeds=(0,)), len(MERGES), 0)
