"""Agreement against scikit-learn and, for alpha, brute force over all pairs of votes."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from davylamp.core.errors import InputError
from davylamp.metrics.agreement import cohen_kappa, kappa, krippendorff_alpha, percent_agreement


@pytest.mark.parametrize("seed", range(20))
def test_kappa_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels = ["safe", "unsafe", "nonresponsive"][: 2 + seed % 2]
    first = rng.choice(labels, 60)
    second = np.where(rng.random(60) < 0.6, first, rng.choice(labels, 60))
    assert cohen_kappa(first.tolist(), second.tolist()) == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_rows_without_both_votes_are_left_out_and_counted():
    first, second = [1, 1, 0, None, 0, 0], [1, 0, 0, 1, None, 0]
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score([1, 1, 0, 0], [1, 0, 0, 0]))
    e = percent_agreement(first, second)
    assert (e.value, e.n, e.unscored) == (0.75, 4, 2)
    k = kappa(first, second, rng=np.random.default_rng(0))
    assert (k.n, k.unscored) == (4, 2)


def test_undefined_is_none_not_a_number():
    assert cohen_kappa([], []) is None and cohen_kappa([1, 1], [1, 1]) is None and cohen_kappa([None], [1]) is None
    e = kappa([1, 1], [1, 1], rng=np.random.default_rng(0))
    assert e.value is None and e.method == "undefined: one label only"
    assert krippendorff_alpha([]) is None and krippendorff_alpha([[1], [0, None]]) is None
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    with pytest.raises(InputError, match="one length, got 1 and 2"):
        cohen_kappa([1], [1, 0])


def test_the_interval_of_kappa_covers():
    """Over 200 samples of two annotators with 10 % error each, the interval holds the analytic kappa 0.64 in about 95 %."""
    inside = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth = rng.random(200) < 0.5
        first, second = ((truth ^ (rng.random(200) < 0.1)).tolist() for _ in range(2))
        e = kappa(first, second, rng=rng, draws=300)
        inside += e.low <= 0.64 <= e.high
    assert 180 <= inside <= 198


def brute_alpha(votes):
    """1 - mean disagreement of pairs within a row / mean disagreement of all pairs, each row weighted by its votes."""
    rows = [[vote for vote in row if vote is not None] for row in votes]
    rows = [row for row in rows if len(row) > 1]
    everything = [vote for row in rows for vote in row]
    within = sum(len(row) * np.mean([a != b for a, b in itertools.permutations(row, 2)]) for row in rows) / len(
        everything
    )
    return 1 - within / np.mean([a != b for a, b in itertools.permutations(everything, 2)])


@pytest.mark.parametrize("seed", range(10))
def test_alpha_is_brute_force(seed):
    rng = np.random.default_rng(seed)
    votes = rng.choice([0, 1, 2], size=(15, 4)).tolist()
    votes = [[None if rng.random() < 0.3 else vote for vote in row] for row in votes]
    assert krippendorff_alpha(votes) == pytest.approx(brute_alpha(votes), abs=1e-12)
