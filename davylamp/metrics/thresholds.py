"""Thresholds that keep a stated failure bound, and how long an attacker needs: exact intervals, conformal risk control, censored costs.

Sources: Clopper & Pearson 1934; conformal risk control, arXiv:2208.02814, theorem 1; Kaplan & Meier 1958; the log-rank test, Mantel 1966;
the choice by preference, arXiv:2205.01663, section 4 (its interval and margin are ours).
A text is accepted where its score is below the threshold; a failure is an unsafe text that is accepted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from davylamp.core.errors import InputError
from davylamp.core.nouns import Estimate
from davylamp.core.stats import clopper_pearson, rate, wilson

LEVEL = 0.95


@cache
def failure_bound(failures: int, n: int, level: float = LEVEL) -> float:
    """The one-sided upper Clopper-Pearson bound of a failure rate; with no failure it is 1 - (1 - level)^(1/n), about 3/n.

    >>> round(failure_bound(0, 100), 5), round(failure_bound(2, 100), 5)
    (0.02951, 0.06162)
    """
    return clopper_pearson(failures, n, 2 * level - 1)[1]


def required_n(bound: float, level: float = LEVEL) -> int:
    """How many unsafe texts must all be rejected to claim a failure rate below `bound`, in (0, 1).

    >>> required_n(1e-4)
    29956
    """
    if not 0 < bound < 1:
        raise InputError(f"a failure bound must be between 0 and 1, got {bound}")
    return math.ceil(math.log(1 - level) / math.log1p(-bound))


def exact_rate(hits: int, n: int, **about: Any) -> Estimate:
    """A rate with its two-sided Clopper-Pearson interval; without rows None, and why.

    >>> exact_rate(0, 0, name="fnr").method
    'no rows'
    """
    if n == 0:
        return Estimate(None, None, None, 0, method="no rows", **about)
    low, high = clopper_pearson(hits, n)
    return Estimate(hits / n, low, high, n, method="clopper-pearson", **about)


def conservative_threshold(
    labels: Sequence[int], scores: Sequence[float], *, failure: float, level: float = LEVEL
) -> dict[str, Any]:
    """The highest threshold whose failure rate on unsafe texts stays at or below `failure` with that confidence, and what it costs.

    labels: 1 = unsafe.  scores: in [0, 1].  The rows must be none that the classifier was trained on. Gives threshold, failures,
    unsafe_rows, bound (the upper Clopper-Pearson end), and cost: an Estimate of the share of safe texts that is rejected too.
    The bound is that of the count at the chosen threshold: rows must be fresh, or it is a little too hopeful.
    Raises InputError without unsafe rows, or, with the number that would be needed, where no threshold can keep the bound.

    >>> found = conservative_threshold([1] * 60 + [0] * 4, [0.9] * 59 + [0.2] + [0.1, 0.1, 0.3, 0.95], failure=0.08)
    >>> found["threshold"], found["failures"], round(found["bound"], 4), found["cost"].value
    (0.9, 1, 0.0766, 0.25)
    """
    unsafe, safe = _split(labels, scores)
    n = len(unsafe)
    if n == 0:
        raise InputError("no unsafe row, so no failure rate can be bounded. Expected rows with label 1")
    if failure_bound(0, n, level) > failure:
        needed = required_n(failure, level)
        raise InputError(
            f"{n} unsafe rows cannot show a failure rate of {failure:g} at {level:.0%}: {needed} are needed"
        )
    # the bound rises with the count: the last one that fits
    allowed = bisect_right(range(n), failure, key=lambda k: failure_bound(k, n, level)) - 1
    threshold = float(unsafe[allowed])  # `allowed` rows, or fewer where scores are equal, lie below it
    failures = int(np.searchsorted(unsafe, threshold, side="left"))
    return {
        "threshold": threshold,
        "failures": failures,
        "unsafe_rows": n,
        "bound": failure_bound(failures, n, level),
        "level": level,
        "cost": rate(int((safe >= threshold).sum()), len(safe), name="safe_texts_rejected"),
    }


def conformal_threshold(labels: Sequence[int], scores: Sequence[float], *, risk: float) -> float:
    """The highest threshold with expected failure rate of the next unsafe text <= `risk`, by conformal risk control.

    Failures at t are k(t) = #{unsafe rows with score < t}; theorem 1 asks for (k(t) + 1) / (n + 1) <= risk (loss at most 1). Holds on
    average over calibration sets of exchangeable rows; `conservative_threshold` holds for this one set with stated confidence.

    >>> conformal_threshold([1] * 9 + [0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.1], risk=0.3)
    0.3
    """
    unsafe, _ = _split(labels, scores)
    if not 0 < risk < 1:
        raise InputError(f"risk must be between 0 and 1, got {risk}")
    allowed = math.floor(risk * (len(unsafe) + 1) + 1e-9) - 1
    if allowed < 0:
        needed = math.ceil(1 / risk) - 1
        raise InputError(
            f"{len(unsafe)} unsafe rows cannot hold the expected failure rate at {risk:g}: {needed} are needed"
        )
    if allowed >= len(unsafe):
        return math.nextafter(1.0, 2.0)  # everything may be accepted
    return float(unsafe[allowed])


def pass_threshold(scores: Sequence[float], share: float) -> float:
    """The threshold below which that share of (safe) scores lies: for comparing classifiers at an equal pass rate.

    >>> pass_threshold([0.1, 0.2, 0.3, 0.4, 0.5], 0.8)
    0.5
    """
    if not 0 < share < 1 or not len(scores):
        raise InputError(
            f"a pass rate must be between 0 and 1, and there must be scores; got {share}, {len(scores)} scores"
        )
    ordered = sorted(scores)
    return float(ordered[min(len(ordered) - 1, math.floor(share * len(ordered) + 1e-9))])


def preferred_threshold(wins: Mapping[float, tuple[float, int]], *, margin: float = 0.03) -> dict[str, Any]:
    """The lowest threshold at which readers do not prefer the unfiltered text: t* = min{t: low end of the preference >= 0.5 - margin}.

    wins: for each threshold (times the filtered text was preferred, ties as 0.5; pairs). The interval is Wilson's, so about 1,100 pairs
    give a half-width of three points; `pairs_needed` says how many a true preference of one half takes. threshold None: none will do.

    >>> preferred_threshold({0.1: (480.0, 1200), 0.3: (606.0, 1200)})["threshold"]
    0.3
    """
    curve = []
    for threshold, (won, pairs) in sorted(wins.items()):
        low, high = wilson(won, pairs)
        curve.append({"threshold": threshold, "preference": won / pairs, "low": low, "high": high, "pairs": pairs})
    fits = [row["threshold"] for row in curve if row["low"] >= 0.5 - margin]
    needed = math.ceil((1.96 * 0.5 / margin) ** 2)
    return {"threshold": min(fits, default=None), "curve": curve, "pairs_needed": needed, "margin": margin}


def survival(costs: Sequence[float], found: Sequence[bool]) -> list[tuple[float, float]]:
    """Kaplan-Meier: (cost, share of attacks that need more than it), for costs that are censored where nothing was found.

    >>> survival([1, 2, 2, 3], [True, True, False, True])
    [(1, 0.75), (2, 0.5), (3, 0.0)]
    """
    if len(costs) != len(found):
        raise InputError(f"every attack needs a cost and whether it found something, got {len(costs)} and {len(found)}")
    share, out = 1.0, []
    for cost in sorted({cost for cost, hit in zip(costs, found, strict=True) if hit}):
        at_risk = sum(other >= cost for other in costs)
        hits = sum(other == cost and hit for other, hit in zip(costs, found, strict=True))
        share *= 1 - hits / at_risk
        out.append((cost, share))
    return out


def median_cost(costs: Sequence[float], found: Sequence[bool]) -> float | None:
    """The Kaplan-Meier median: the first cost that half of the attacks do not outlast; None if more than half never succeed.

    >>> median_cost([1, 2, 2, 3], [True, True, False, True]), median_cost([5, 9, 9], [True, False, False])
    (2, None)
    """
    return next((cost for cost, share in survival(costs, found) if share <= 0.5), None)


def log_rank(first: tuple[Sequence[float], Sequence[bool]], second: tuple[Sequence[float], Sequence[bool]]) -> float:
    """Two-sided p of the log-rank test that two sets of attacks (costs, found) need equally long.

    >>> round(log_rank(([1, 2, 3, 4], [True] * 4), ([1, 2, 3, 4], [True] * 4)), 3)
    1.0
    """
    groups = [[np.asarray(costs, dtype=float), np.asarray(found, dtype=bool)] for costs, found in (first, second)]
    expected = variance = observed = 0.0
    for cost in np.unique(np.concatenate([costs[found] for costs, found in groups])):
        at_risk = [float((costs >= cost).sum()) for costs, _ in groups]
        hits = [float(((costs == cost) & found).sum()) for costs, found in groups]
        total, all_hits = sum(at_risk), sum(hits)
        observed += hits[0]
        expected += all_hits * at_risk[0] / total
        if total > 1:
            variance += all_hits * at_risk[0] * at_risk[1] * (total - all_hits) / (total**2 * (total - 1))
    if variance == 0:
        return 1.0
    return math.erfc(abs(observed - expected) / math.sqrt(2 * variance))


def _split(labels: Sequence[int], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(unsafe, safe) scores, rising. Raises InputError."""
    x, y = np.asarray(scores, dtype=float), np.asarray(labels)
    if x.shape != y.shape or x.ndim != 1:
        raise InputError(f"every row needs a label and a score, got {y.shape} and {x.shape}")
    if not (np.isfinite(x).all() and (x >= 0).all() and (x <= 1).all()):
        raise InputError("scores must be in [0, 1]")
    if not np.isin(y, (0, 1)).all():
        raise InputError("labels must be 1 (unsafe) or 0")
    return np.sort(x[y == 1]), np.sort(x[y == 0])
