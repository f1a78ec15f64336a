"""Statistics of rates, means and differences. Everything returns an interval; nothing returns a bare float.

Sources: Wilson 1927 (score interval); Clopper & Pearson 1934; Korn & Graubard 1998 (effective sample size of clustered rates);
Rogan & Gladen 1978 and Lang & Reiczigel 2014 (rate corrected for a test's sensitivity and specificity); Holm 1979; McNemar 1947.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from davylamp.core.errors import InputError
from davylamp.core.nouns import Estimate

if TYPE_CHECKING:
    from numpy.random import Generator

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(hits: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval for `hits` of `n` (n > 0; both may be effective, non-integer counts).

    >>> [round(x, 3) for x in wilson(0, 100)]
    [0.0, 0.037]
    """
    if not n > 0 or not 0 <= hits <= n:
        raise InputError(f"wilson needs 0 <= hits <= n and n > 0, got hits={hits}, n={n}")
    centre = (hits + z * z / 2) / (n + z * z)
    half = z * math.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    # The end is exactly 0 (or 1) at the edge; rounding would leave 1e-17.
    return (0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == n else min(1.0, centre + half))


def worst_range(hits: float, n: int, unscored: int) -> tuple[float, float] | None:
    """(lowest, highest) rate had all unscored rows gone one way; None if there are no rows at all."""
    total = n + unscored
    return (hits / total, (hits + unscored) / total) if total else None


def rate(hits: float, n: int, unscored: int = 0, **about: Any) -> Estimate:
    """A rate of independent rows, Wilson interval. `about` fills the other fields of the Estimate.

    >>> e = rate(hits=7, n=50, unscored=10)
    >>> round(e.value, 2), [round(x, 2) for x in (e.low, e.high)], [round(x, 2) for x in e.worst]
    (0.14, [0.07, 0.26], [0.12, 0.28])
    >>> rate(0, 0).value is None
    True
    """
    worst = worst_range(hits, n, unscored)
    if n == 0:
        return Estimate(None, None, None, 0, unscored, worst, "no scored rows", **about)
    low, high = wilson(hits, n)
    return Estimate(hits / n, low, high, n, unscored, worst, "wilson", **about)


def macro_rate(hits: Sequence[float], sizes: Sequence[int], unscored: int = 0, **about: Any) -> Estimate:
    """The plain mean of several categories' rates, so that a large category counts no more than a small one.

    hits, sizes: (k,) of each category that has scored rows, sizes > 0.  Wilson at the effective number of rows p(1-p)/variance, where the
    variance is the sum of the categories' own over k^2, each with one hit and one miss added: a small category that shows 0 % is not
    certain. n is the number of rows.

    >>> e = macro_rate([0, 50], [10, 100])
    >>> e.value, e.n, e.low < 0.25 < e.high
    (0.25, 110, True)
    """
    if len(hits) != len(sizes):
        raise InputError(f"hits and sizes must have one length, got {len(hits)} and {len(sizes)}")
    k, n = len(sizes), sum(sizes)
    worst = worst_range(float(sum(hits)), n, unscored) if n else (0.0, 1.0)
    if k == 0:
        return Estimate(None, None, None, 0, unscored, worst, "no scored rows", **about)
    p = sum(x / m for x, m in zip(hits, sizes, strict=True)) / k
    smooth = [(x + 1) / (m + 2) for x, m in zip(hits, sizes, strict=True)]
    variance = sum(q * (1 - q) / m for q, m in zip(smooth, sizes, strict=True)) / k**2
    middle = min(max(p, 0.5 / n), 1 - 0.5 / n)  # at 0 and 1 as if half a row had gone the other way
    n_eff = min(float(n), middle * (1 - middle) / variance)
    low, high = wilson(p * n_eff, n_eff)
    return Estimate(p, low, high, n, unscored, worst, f"wilson (mean of {k} categories)", **about)


def clustered_rate(
    sums: Sequence[float],
    sizes: Sequence[int],
    unscored: int = 0,
    *,
    singles: tuple[float, float, int] = (0.0, 0.0, 0),
    **about: Any,
) -> Estimate:
    """A rate over rows that come in clusters: Wilson on the effective sample size (Korn & Graubard 1998, section 2).

    sums: (k,) sum of the row values in [0, 1] of each cluster.  sizes: (k,) rows of each cluster, > 0.
    singles: (sum, sum of squares, number) of rows that are clusters of their own, so that they need not be listed.
    The variance is that of the ratio estimator with k - 1 degrees of freedom; n_eff = p(1-p)/variance, shrunk by
    (z/t_{k-1})^2 and never above n. At p = 0 or 1, where no variance can be seen, every cluster counts as one row.
    Chosen over the percentile bootstrap, which covers too little with few clusters or rare events and is empty at p = 0.

    >>> e = clustered_rate([3, 0, 3, 0], [3, 3, 3, 3])
    >>> e.n, e.value, round(e.low, 2), round(e.high, 2)
    (12, 0.5, 0.06, 0.94)
    """
    if len(sums) != len(sizes):
        raise InputError(f"sums and sizes must have one length, got {len(sums)} and {len(sizes)}")
    k, n, hits = len(sizes) + singles[2], sum(sizes) + singles[2], float(sum(sums)) + singles[0]
    worst = worst_range(hits, n, unscored)
    if n == 0:
        return Estimate(None, None, None, 0, unscored, worst, "no scored rows", **about)
    p = hits / n
    if k < 2:
        n_eff = 1.0
    elif p in (0.0, 1.0):
        n_eff = float(k)
    else:
        residual = math.fsum((total - p * size) ** 2 for total, size in zip(sums, sizes, strict=True))
        residual += singles[1] - 2 * p * singles[0] + p * p * singles[2]
        variance = residual * k / (k - 1) / n**2
        effective = p * (1 - p) / variance if variance > 0 else float(n)
        n_eff = min(float(n), effective * (Z95 / t_quantile(0.975, k - 1)) ** 2)
    low, high = wilson(p * n_eff, n_eff)
    return Estimate(p, low, high, n, unscored, worst, f"wilson, {k} clusters (n_eff {n_eff:.1f})", **about)


def mean_t(values: Sequence[float], unscored: int = 0, **about: Any) -> Estimate:
    """Mean of independent values with Student's t interval. One value has a mean and no interval.

    >>> e = mean_t([1.0, 2.0, 3.0])
    >>> e.value, round(e.low, 2), round(e.high, 2)
    (2.0, -0.48, 4.48)
    """
    n = len(values)
    if n == 0:
        return Estimate(None, None, None, 0, unscored, None, "no scored rows", **about)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, 1, unscored, None, "one value: no interval", **about)
    half = t_quantile(0.975, n - 1) * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return Estimate(mean, mean - half, mean + half, n, unscored, None, "t", **about)


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval for a rate, by the beta distribution's quantiles.

    >>> [round(x, 4) for x in clopper_pearson(0, 20)]
    [0.0, 0.1684]
    """
    if not 0 <= hits <= n or n < 1:
        raise InputError(f"clopper_pearson needs 0 <= hits <= n and n >= 1, got hits={hits}, n={n}")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else _invert(lambda x: beta_cdf(x, hits, n - hits + 1), tail)
    high = 1.0 if hits == n else _invert(lambda x: beta_cdf(x, hits + 1, n - hits), 1 - tail)
    return low, high


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test from the two discordant counts; 1.0 if there are none.

    >>> mcnemar(0, 5), mcnemar(0, 0)
    (0.0625, 1.0)
    """
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    return 2 * min(tail, 0.5)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def bootstrap(
    values: Sequence[float],
    *,
    groups: Sequence[str] | None = None,
    rng: Generator,
    draws: int = 2000,
    unscored: int = 0,
    **about: Any,
) -> Estimate:
    """Mean with a percentile bootstrap interval; whole groups are drawn where `groups` is given.

    values: (n,) floats.  groups: (n,) labels.  The mean is the mean over rows, so larger groups weigh more.

    >>> import numpy as np
    >>> e = bootstrap([0.0, 1.0] * 50, rng=np.random.default_rng(0))
    >>> e.value, round(e.low, 1), round(e.high, 1)
    (0.5, 0.4, 0.6)
    """
    import numpy as np

    x = np.asarray(values, dtype=float)
    if x.size == 0:
        return Estimate(None, None, None, 0, unscored, None, "no scored rows", **about)
    if groups is None:
        sums, sizes = x, np.ones_like(x)
    else:
        if len(groups) != x.size:
            raise InputError(f"values and groups must have one length, got {x.size} and {len(groups)}")
        _, where = np.unique(np.asarray(groups), return_inverse=True)
        sums, sizes = np.bincount(where, weights=x), np.bincount(where).astype(float)
    k = sums.size
    if k == 1:
        return Estimate(float(x.mean()), None, None, int(x.size), unscored, None, "one group: no interval", **about)
    means = np.empty(draws)
    step = max(1, 4_000_000 // k)  # at most about 32 MB of indices at a time
    for start in range(0, draws, step):
        picked = rng.integers(0, k, size=(min(step, draws - start), k))
        means[start : start + step] = sums[picked].sum(axis=1) / sizes[picked].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    method = f"bootstrap, {k} {'rows' if groups is None else 'groups'}, {draws} draws"
    return Estimate(float(x.mean()), float(low), float(high), int(x.size), unscored, None, method, **about)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    groups: Sequence[str] | None = None,
    rng: Generator,
    unscored: int = 0,
    **about: Any,
) -> Estimate:
    """mean(a) - mean(b) over pairs, bootstrapped over pairs (or groups of pairs), with a p value.

    p is McNemar's exact one when the pairs are 0/1 and ungrouped, else that of a sign-flip permutation test over
    pairs or groups (2,000 flips). If no pair differs the interval is Wilson's for the share of discordant pairs, both ways.
    """
    import numpy as np

    if len(a) != len(b):
        raise InputError(f"paired arms must have one length, got {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    estimate = replace(bootstrap(difference, groups=groups, rng=rng, unscored=unscored, **about), unit="difference")
    if estimate.value is None:
        return estimate
    k = difference.size if groups is None else len(set(groups))
    if not difference.any():
        edge = wilson(0, k)[1]
        return replace(estimate, low=-edge, high=edge, p=1.0, method=f"no discordant pair of {k}")
    if groups is None and set(np.unique(difference)) <= {-1.0, 0.0, 1.0}:
        return replace(estimate, p=mcnemar(int((difference > 0).sum()), int((difference < 0).sum())))
    sums = (
        difference
        if groups is None
        else np.bincount(np.unique(np.asarray(groups), return_inverse=True)[1], weights=difference)
    )
    flips = rng.choice((-1.0, 1.0), size=(2000, sums.size)) @ sums
    return replace(estimate, p=float((1 + (np.abs(flips) >= abs(sums.sum()) - 1e-12).sum()) / 2001))


UNFIT = "not corrected: the judge's measured error does not fit these rows"


def corrected_rate(estimate: Estimate, *, true_hits: int, positives: int, true_passes: int, negatives: int) -> Estimate:
    """The estimate with `corrected` set: the rate after the judge's measured error is taken out.

    true_hits of `positives` labelled rows were found (sensitivity), true_passes of `negatives` were passed (specificity).
    Point: Rogan & Gladen 1978, clipped to [0, 1]. Interval: Lang & Reiczigel 2014, equations for unknown Se and Sp, with n
    taken as the effective n behind the estimate's own interval. Left as it was where Se + Sp - 1 <= 0.05: such a judge
    says nothing, and no arithmetic mends that. Left as it was, and said so in `method`, where the whole interval falls outside
    [0, 1]: then the judge cannot err on these rows as it did on the labelled ones, and "0 %, surely" would be a lie.

    >>> e = corrected_rate(rate(30, 100), true_hits=90, positives=100, true_passes=90, negatives=100)
    >>> [round(x, 2) for x in e.corrected]
    [0.25, 0.12, 0.38]
    """
    if estimate.value is None or estimate.low is None or estimate.high is None or not positives or not negatives:
        return estimate
    se, sp = true_hits / positives, true_passes / negatives
    if se + sp - 1 <= 0.05:
        return estimate
    point = (estimate.value + sp - 1) / (se + sp - 1)
    z2 = Z95**2
    width = estimate.high - estimate.low
    n = (
        _n_of_wilson(estimate.value, width)
        if "cluster" in estimate.method or "groups" in estimate.method
        else float(estimate.n)
    )
    n_adj, p_adj = n + z2, (n * estimate.value + z2 / 2) / (n + z2)
    n_se, se_adj = positives + 2, (true_hits + 1) / (positives + 2)
    n_sp, sp_adj = negatives + 2, (true_passes + 1) / (negatives + 2)
    youden = se_adj + sp_adj - 1
    if youden <= 0:
        return estimate
    centre = (p_adj + sp_adj - 1) / youden
    shift = 2 * z2 * (centre * se_adj * (1 - se_adj) / n_se - (1 - centre) * sp_adj * (1 - sp_adj) / n_sp)
    spread = (
        Z95
        * math.sqrt(
            p_adj * (1 - p_adj) / n_adj
            + centre**2 * se_adj * (1 - se_adj) / n_se
            + (1 - centre) ** 2 * sp_adj * (1 - sp_adj) / n_sp
        )
        / youden
    )
    if centre + shift + spread <= 0 or centre + shift - spread >= 1:
        return replace(estimate, method=f"{estimate.method}; {UNFIT}")
    low, high = (min(1.0, max(0.0, centre + shift + sign * spread)) for sign in (-1, 1))
    point = min(1.0, max(0.0, point))
    return replace(estimate, corrected=(point, min(low, point), max(high, point)))


def _n_of_wilson(p: float, width: float) -> float:
    """The n whose Wilson interval at rate p has this width (bisection; width falls with n)."""
    low, high = 1e-3, 1e9
    for _ in range(100):
        middle = math.sqrt(low * high)
        ends = wilson(p * middle, middle)
        low, high = (middle, high) if ends[1] - ends[0] > width else (low, middle)
    return low


def t_quantile(q: float, df: float) -> float:
    """Quantile of Student's t, 0.5 <= q < 1, df > 0, by inverting the incomplete beta function.

    >>> round(t_quantile(0.975, 10), 4)
    2.2281
    """
    if not 0.5 <= q < 1 or df <= 0:
        raise InputError(f"t_quantile needs 0.5 <= q < 1 and df > 0, got q={q}, df={df}")
    x = _invert(lambda x: beta_cdf(x, df / 2, 0.5), 2 * (1 - q))  # P(|T| > t) = I_{df/(df+t^2)}(df/2, 1/2)
    return math.sqrt(df * (1 - x) / x)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (modified Lentz).

    >>> round(beta_cdf(0.3, 2, 3), 4)
    0.3483
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1 / ((1 + numerator * d) or 1e-300)
            c = (1 + numerator / c) or 1e-300
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction


def _invert(cdf: Any, q: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if cdf(middle) < q else (low, middle)
    return (low + high) / 2
