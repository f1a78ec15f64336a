"""Thresholds for a stated failure bound against scipy, brute force and simulation; censored costs against cases done by hand."""

import math

import numpy as np
import pytest
from scipy.stats import beta

from davylamp.core.errors import InputError
from davylamp.metrics.thresholds import (
    conformal_threshold,
    conservative_threshold,
    exact_rate,
    failure_bound,
    log_rank,
    median_cost,
    pass_threshold,
    preferred_threshold,
    required_n,
    survival,
)


@pytest.mark.parametrize(("failures", "n", "level"), [(0, 100, 0.95), (3, 40, 0.95), (17, 900, 0.99), (5, 5, 0.9)])
def test_the_bound_is_the_beta_quantile(failures, n, level):
    wanted = 1.0 if failures == n else beta.ppf(level, failures + 1, n - failures)
    assert failure_bound(failures, n, level) == pytest.approx(wanted, abs=1e-9)
    if failures == 0:
        assert failure_bound(0, n, level) == pytest.approx(1 - (1 - level) ** (1 / n), abs=1e-9)


def test_how_many_rows_a_claim_takes():
    assert required_n(1e-4) == 29_956
    for bound in (0.3, 0.01, 0.002):
        n = required_n(bound)
        assert failure_bound(0, n) <= bound < failure_bound(0, n - 1)
    with pytest.raises(InputError, match="between 0 and 1"):
        required_n(0.0)


def rows(rng, n=200):
    labels = (rng.random(n) < 0.5).astype(int)
    return labels.tolist(), np.round(np.clip(0.3 * labels + 0.7 * rng.random(n), 0, 1), 2).tolist()


def test_the_conservative_threshold_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, scores = rows(rng)
        unsafe = [s for s, y in zip(scores, labels, strict=True) if y]
        found = conservative_threshold(labels, scores, failure=0.1)
        fits = [t for t in sorted(set(scores)) if failure_bound(sum(s < t for s in unsafe), len(unsafe)) <= 0.1]
        assert found["threshold"] == max(t for t in fits if t in unsafe)
        assert found["failures"] == sum(s < found["threshold"] for s in unsafe)
        safe = [s for s, y in zip(scores, labels, strict=True) if not y]
        assert found["cost"].value == sum(s >= found["threshold"] for s in safe) / len(safe)


def test_the_conformal_threshold_keeps_the_expected_rate_and_is_the_highest_that_does():
    rng = np.random.default_rng(1)
    missed, missed_above = [], []
    for _ in range(4000):
        unsafe = rng.random(30)
        cut = conformal_threshold([1] * 29, unsafe[:29].tolist(), risk=0.2)
        missed.append(unsafe[29] < cut)
        above = np.sort(unsafe[:29])
        missed_above.append(unsafe[29] < above[above > cut][0])
    assert np.mean(missed) <= 0.2 + 3 * math.sqrt(0.16 / 4000)
    assert np.mean(missed_above) > 0.2, "one step further it would be broken"
    scores = [0.1, 0.2, 0.2, 0.5, 0.9, 0.95, 0.97, 0.99, 0.999]
    for risk in (0.1, 0.25, 0.5, 0.9):
        cut = conformal_threshold([1] * 9, scores, risk=risk)
        fits = [t for t in [*scores, 2.0] if (sum(s < t for s in scores) + 1) / 10 <= risk + 1e-12]
        assert cut == (max(fits) if max(fits) < 2 else math.nextafter(1.0, 2.0))


def test_too_few_rows_say_how_many_are_needed():
    with pytest.raises(InputError, match="299 are needed"):
        conservative_threshold([1] * 20, [0.9] * 20, failure=0.01)
    with pytest.raises(InputError, match="99 are needed"):
        conformal_threshold([1] * 20, [0.9] * 20, risk=0.01)
    with pytest.raises(InputError, match="no unsafe row"):
        conservative_threshold([0] * 20, [0.9] * 20, failure=0.5)
    for labels, scores in [([1], [1.5]), ([1], [float("nan")]), ([2], [0.5]), ([1, 0], [0.5])]:
        with pytest.raises(InputError):
            conservative_threshold(labels, scores, failure=0.5)
    assert exact_rate(0, 0).value is None and exact_rate(0, 0).method == "no rows"


def test_pass_rate_and_preference():
    scores = np.random.default_rng(2).random(1000)
    assert np.mean(scores < pass_threshold(scores.tolist(), 0.8)) == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(InputError):
        pass_threshold([], 0.8)
    found = preferred_threshold({0.1: (560.0, 1200), 0.2: (606.0, 1200), 0.4: (640.0, 1200)})
    assert found["threshold"] == 0.2 and found["pairs_needed"] == 1068 and len(found["curve"]) == 3
    assert preferred_threshold({0.1: (5.0, 10)})["threshold"] is None, "ten pairs show nothing"


def test_survival_by_hand():
    # Freireich's 6-MP arm, as in Kaplan-Meier's textbooks: 6 6 6 6+ 7 9+ 10 10+ 11+ 13 16 17+ 19+ 20+ 22 23 25+ 32+ 32+ 34+ 35+
    costs = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    found = [c in "xyz" for c in "xxx-x-x--xx---xx-----"]
    curve = dict(survival(costs, found))
    hand = {6: 18 / 21, 7: 18 / 21 * 16 / 17, 10: 18 / 21 * 16 / 17 * 14 / 15}
    assert {k: curve[k] for k in hand} == pytest.approx(hand, abs=1e-9)
    assert curve[23] == pytest.approx(0.448, abs=5e-4) and median_cost(costs, found) == 23
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    assert median_cost(placebo, [True] * 21) == 8
    p = log_rank((costs, found), (placebo, [True] * 21))
    assert p == pytest.approx(math.erfc(math.sqrt(16.793 / 2)), rel=0.01), "the published statistic is 16.793"
    with pytest.raises(InputError):
        survival([1], [])
