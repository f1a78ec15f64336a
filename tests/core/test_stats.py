import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from davylamp.core.errors import InputError
from davylamp.core.stats import (
    beta_cdf,
    bootstrap,
    clopper_pearson,
    clustered_rate,
    corrected_rate,
    holm,
    mcnemar,
    mean_t,
    paired_difference,
    rate,
    t_quantile,
    wilson,
)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_agree_with_scipy(counts):
    hits, n = counts
    for ours, method in ((wilson(hits, n), "wilson"), (clopper_pearson(hits, n), "exact")):
        theirs = scipy.stats.binomtest(hits, n).proportion_ci(method=method)
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.floats(0.501, 0.9999), st.floats(1, 1e4))
def test_t_quantile_agrees_with_scipy(q, df):
    assert t_quantile(q, df) == pytest.approx(scipy.stats.t.ppf(q, df), rel=1e-6)


@given(st.floats(0, 1), st.floats(0.1, 500), st.floats(0.1, 500))
def test_beta_cdf_agrees_with_scipy(x, a, b):
    assert beta_cdf(x, a, b) == pytest.approx(scipy.stats.beta.cdf(x, a, b), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_agrees_with_scipy(a, b):
    wanted = scipy.stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(min(1.0, wanted))


def test_mean_t_agrees_with_scipy():
    values = [0.3, 1.7, 2.2, 9.0, -1.0]
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    estimate = mean_t(values)
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_holm_by_hand():
    # Sorted: .005*4, .01*3, .03*2, .04*1, made monotone.
    assert holm([0.03, 0.01, 0.04, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])


def test_no_rows_give_no_rate():
    estimate = rate(0, 0, unscored=4)
    assert (estimate.value, estimate.low, estimate.worst) == (None, None, (0.0, 1.0))


def test_one_value_has_no_interval():
    assert mean_t([3.0]).low is None


@pytest.mark.parametrize("bad", [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(bad):
    with pytest.raises(InputError):
        wilson(*bad)


@pytest.mark.parametrize(("k", "size", "p", "rho"), [(10, 10, 0.3, 0.3), (50, 4, 0.05, 0.5), (20, 5, 0.1, 0.3)])
def test_clustered_interval_covers_where_the_naive_one_does_not(k, size, p, rho):
    rng = np.random.default_rng(1)
    covered, naive = 0, 0
    a, b = p * (1 - rho) / rho, (1 - p) * (1 - rho) / rho
    for _ in range(600):
        sums = rng.binomial(size, rng.beta(a, b, size=k))
        estimate = clustered_rate(sums.tolist(), [size] * k)
        covered += estimate.low <= p <= estimate.high
        low, high = wilson(int(sums.sum()), k * size)
        naive += low <= p <= high
    assert covered / 600 >= 0.91
    assert naive < covered - 30


def test_singles_equal_listed_clusters_of_one():
    listed = clustered_rate([2, 1, 0, 1.0, 0.5, 0.0], [3, 2, 2, 1, 1, 1])
    short = clustered_rate([2, 1, 0], [3, 2, 2], singles=(1.5, 1.25, 3))
    assert (listed.value, listed.low, listed.high) == pytest.approx((short.value, short.low, short.high))


@pytest.mark.parametrize(
    ("truth", "n", "se", "sp", "m"), [(0.05, 200, 0.9, 0.9, 100), (0.3, 300, 0.8, 0.95, 80), (0.5, 100, 0.7, 0.7, 100)]
)
def test_corrected_rate_covers_the_planted_truth(truth, n, se, sp, m):
    rng = np.random.default_rng(2)
    covered = raw = 0
    for _ in range(500):
        bad = rng.binomial(n, truth)
        seen = rate(int(rng.binomial(bad, se) + rng.binomial(n - bad, 1 - sp)), n)
        fixed = corrected_rate(
            seen, true_hits=int(rng.binomial(m, se)), positives=m, true_passes=int(rng.binomial(m, sp)), negatives=m
        )
        covered += fixed.corrected is not None and fixed.corrected[1] <= truth <= fixed.corrected[2]
        raw += seen.low <= truth <= seen.high
    assert covered / 500 >= 0.93
    if truth < 0.1:
        assert raw / 500 < 0.7  # the control: what the judge says uncorrected is off


def test_a_judge_that_says_nothing_corrects_nothing():
    assert corrected_rate(rate(5, 10), true_hits=50, positives=100, true_passes=50, negatives=100).corrected is None


def test_perfect_judge_changes_little():
    estimate = corrected_rate(rate(30, 100), true_hits=1000, positives=1000, true_passes=1000, negatives=1000)
    assert estimate.corrected == pytest.approx((0.3, estimate.low, estimate.high), abs=0.01)


def test_bootstrap_is_reproducible_and_clustered_is_wider():
    values = [1.0] * 30 + [0.0] * 70
    groups = [str(i // 10) for i in range(100)]
    flat = bootstrap(values, rng=np.random.default_rng(0))
    assert flat == bootstrap(values, rng=np.random.default_rng(0))
    clustered = bootstrap(values, groups=groups, rng=np.random.default_rng(0))
    assert clustered.high - clustered.low > 1.5 * (flat.high - flat.low)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_paired_p_is_mcnemars(pairs):
    a, b = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    estimate = paired_difference(a, b, rng=np.random.default_rng(0))
    assert estimate.p == pytest.approx(
        mcnemar(sum(x > y for x, y in zip(a, b, strict=True)), sum(x < y for x, y in zip(a, b, strict=True)))
    )
    assert estimate.low <= estimate.value <= estimate.high


def test_paired_test_holds_its_level_under_clusters():
    rng = np.random.default_rng(3)
    small = 0
    for _ in range(200):
        shift = np.repeat(rng.normal(size=15), 8)  # whole groups move together, no true difference
        a, b = (rng.random(120) < 0.5).astype(float), ((rng.random(120) + 0.15 * shift) < 0.5).astype(float)
        small += paired_difference(a, b, groups=[str(i // 8) for i in range(120)], rng=rng).p < 0.05
    assert small / 200 <= 0.10


def test_a_judges_error_that_cannot_fit_gives_no_correction():
    """A judge with 40 % false alarms cannot have said yes to 5 % of 200 rows: no corrected rate, and the method says why."""
    error = {"true_hits": 90, "positives": 100, "true_passes": 60, "negatives": 100}
    found = corrected_rate(rate(10, 200), **error)
    assert found.corrected is None and "does not fit" in found.method
    assert corrected_rate(rate(195, 200), **error).corrected is None
    assert corrected_rate(rate(80, 200), **error).corrected is not None
