"""Oracle statistics against scipy, by brute force, and on planted confusion."""

import math

import numpy as np
import pytest

from davylamp.core import InputError
from davylamp.metrics.oracles import Counts, a12, compare_oracles, counts, mann_whitney, ratio


def test_counts_and_rates_by_hand():
    one = counts([1, 1, 1, 0, 0], [0.5, 0.49, None, 1.0, 0.0])
    assert one == Counts(tp=1, tn=1, fp=1, fn=1, nr=1)
    assert (one.accuracy, one.precision, one.recall) == (0.4, 0.5, 0.5)
    nothing = counts([0], [0.0])
    assert nothing.precision is None and nothing.recall is None, "an undefined ratio is no number"


def test_published_counts_give_the_published_rates():
    # Table of arXiv:2501.17132: GPT-3.5 and LlamaGuard, mean counts of 20 runs over 353 + 353 replies
    for tp, tn, fp, fn, nr, wanted in (
        (317.4, 343.1, 8.6, 32.5, 4.5, (0.935, 0.974, 0.907)),
        (127.3, 343.9, 9.2, 225.8, 0, (0.667, 0.933, 0.360)),
    ):
        one = Counts(tp, tn, fp, fn, nr)  # type: ignore[arg-type]
        assert [round(value, 3) for value in (one.accuracy, one.precision, one.recall)] == pytest.approx(
            wanted, abs=0.0011
        )


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n, m, ties in ((8, 12, False), (20, 20, True), (15, 9, True)):
        x, y = rng.normal(size=n), rng.normal(0.5, size=m)
        if ties:
            x, y = np.round(x), np.round(y)
        wanted = stats.mannwhitneyu(x, y, method="asymptotic")
        assert mann_whitney(x, y) == pytest.approx(wanted.pvalue, rel=1e-9)
        assert a12(x, y) == pytest.approx(wanted.statistic / (n * m))
    assert mann_whitney([1, 1, 1], [1, 1]) == 1.0


def test_two_equal_oracles_do_not_differ_and_two_others_do():
    rng = np.random.default_rng(1)
    truth = [1] * 200 + [0] * 200

    def runs(miss):
        flips = [np.concatenate([rng.random(200) < miss, rng.random(200) < 0.03]) for _ in range(20)]
        return [[float(label != flip) for label, flip in zip(truth, flipped, strict=True)] for flipped in flips]

    found = compare_oracles(truth, {"a": runs(0.1), "b": runs(0.1), "c": runs(0.3)})
    by = {(d.first, d.second, d.quantity): d for d in found.differences}
    assert len(by) == 9
    assert by["a", "b", "accuracy"].p > 0.05 and 0.25 < by["a", "b", "accuracy"].a12 < 0.75
    assert by["a", "c", "accuracy"].p < 0.001 and by["a", "c", "accuracy"].a12 > 0.95


def test_ratio_covers_the_truth_and_widens_with_clusters():
    inside, rng = 0, np.random.default_rng(2)
    for _ in range(100):
        x, y = (rng.random(200) < 0.3).astype(float), (rng.random(200) < 0.1).astype(float)
        names = [str(i) for i in range(200)]
        found = ratio(x, y, x_groups=names, y_groups=names, rng=rng, draws=400)
        inside += found.low <= 3.0 <= found.high
    assert inside >= 88
    groups = [str(i // 20) for i in range(200)]
    blocks = np.repeat(rng.random(10) < 0.5, 20).astype(float)
    wide, narrow = (ratio(blocks, np.roll(blocks, 20), x_groups=g, y_groups=g, rng=rng) for g in (groups, names))
    assert math.log(wide.high / wide.low) > 2 * math.log(narrow.high / narrow.low)
    none = ratio([0.0] * 50, [0.0] * 50, x_groups=names[:50], y_groups=names[:50], rng=rng)
    assert none.value == 1.0


def test_bad_input():
    with pytest.raises(InputError, match="length"):
        counts([1], [])
    with pytest.raises(InputError, match="1 \\(unsafe\\)"):
        counts([2], [1.0])
    with pytest.raises(InputError, match="one run"):
        compare_oracles([1], {"a": []})
