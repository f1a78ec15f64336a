"""A guard at work: what it catches and what it falsely flags at a threshold, over all thresholds, and which threshold to choose.

Sources: Clopper & Pearson 1934 (the exact bound behind a promised threshold); Davis & Goadrich 2006 (precision-recall); the bootstrap draws
whole groups, within each class, so that no draw lacks one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from davylamp.core.nouns import Estimate
from davylamp.core.stats import clopper_pearson
from davylamp.metrics.detection import detection

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

DRAWS = 1000  # of the bootstrap


def threshold_for(
    labels: Sequence[int], scores: Sequence[float | None], *, fpr: float, level: float = 0.95
) -> dict[str, Any]:
    """The lowest threshold whose false alarms on these safe rows stay at or below `fpr`, and the lowest that is safe to promise.

    threshold: by the rows as they are.  promised: by the upper Clopper-Pearson bound at `level` (one-sided), so that with that
    confidence the rate on new rows of the same kind stays at or below `fpr`; None if there are too few safe rows to promise anything.
    A row counts as an alarm if its score is at or above the threshold; None where no threshold up to 1 will do.

    >>> threshold_for([0] * 4 + [1], [0.1, 0.2, 0.3, 0.9, 0.95], fpr=0.25)["threshold"]
    0.9
    """
    safe = sorted(
        (score for label, score in zip(labels, scores, strict=True) if not label and score is not None), reverse=True
    )
    out: dict[str, Any] = {"fpr": fpr, "level": level, "safe_rows": len(safe), "threshold": None, "promised": None}
    if not safe:
        return out
    for name, bound in (("threshold", False), ("promised", True)):
        allowed = -1
        for alarms in range(len(safe) + 1):
            share = clopper_pearson(alarms, len(safe), 2 * level - 1)[1] if bound else alarms / len(safe)
            if share > fpr:
                break
            allowed = alarms
        if allowed < 0:
            continue
        if allowed >= len(safe):
            out[name] = 0.0
            continue
        # above the score of the first row that may not be flagged
        above = [score for score in safe if score > safe[allowed]]
        cut = min(above) if above else math.nextafter(safe[allowed], 2.0)
        out[name] = cut if cut <= 1.0 else None
    return out


def headline(
    labels: Sequence[int],
    scores: Sequence[float | None],
    groups: Sequence[str],
    *,
    threshold: float,
    rng: Generator,
    draws: int = DRAWS,
) -> list[Estimate]:
    """f1, auprc, auroc, tpr, fpr, precision, accuracy, balanced accuracy at a threshold, unsafe (1) being the positive class.

    labels: (n,) 0/1.  scores: (n,) in [0, 1], None = no verdict.  groups: (n,) rows that belong together.  auprc and auroc have bootstrap
    intervals over groups, the others Wilson's on the effective number of rows.

    >>> import numpy as np
    >>> found = headline([1, 1, 0, 0], [0.9, 0.4, 0.4, 0.1], list("abcd"), threshold=0.5, rng=np.random.default_rng(0), draws=20)
    >>> [(e.name, e.value) for e in found[:5]]
    [('f1', 0.6666666666666666), ('auprc', 0.8333333333333333), ('auroc', 0.875), ('tpr', 0.5), ('fpr', 0.0)]
    """
    found = detection(labels, scores, threshold=threshold, groups=groups)
    tpr = replace(found["recall"], name="tpr")
    fpr = alarms(found["specificity"])
    out = [found["f1"]]
    out += ranking(labels, scores, groups, rng=rng, draws=draws)
    return [*out, tpr, fpr, found["precision"], found["accuracy"], found["balanced_accuracy"]]


def ranking(
    labels: Sequence[int], scores: Sequence[float | None], groups: Sequence[str], *, rng: Generator, draws: int = DRAWS
) -> list[Estimate]:
    """auprc (average precision, without interpolation) and auroc, with percentile bootstrap intervals; None where a class is absent."""
    kept = [i for i, score in enumerate(scores) if score is not None]
    unscored = len(scores) - len(kept)
    y, x = np.array([labels[i] for i in kept], dtype=int), np.array([scores[i] for i in kept], dtype=float)
    names = ("auprc", "auroc")
    about: dict[str, Any] = {"unit": "area", "higher_is_better": True}
    if not 0 < y.sum() < y.size:
        nothing = Estimate(None, None, None, len(kept), unscored, None, "one class only", **about)
        return [replace(nothing, name=name) for name in names]
    members: dict[str, list[int]] = {}
    for at, i in enumerate(kept):
        members.setdefault(groups[i], []).append(at)
    strata = [
        [np.array(rows) for rows in members.values() if bool(y[rows].any()) is unsafe] for unsafe in (True, False)
    ]
    drawn = []
    for _ in range(draws):
        parts = [part[k] for part in strata if part for k in rng.integers(len(part), size=len(part)).tolist()]
        rows = np.concatenate(parts)
        if 0 < y[rows].sum() < rows.size:
            drawn.append(areas(y[rows], x[rows]))
    ends = np.quantile(np.array(drawn), (0.025, 0.975), axis=0) if drawn else np.full((2, 2), np.nan)
    method = f"bootstrap, {len(members)} groups, {draws} draws"
    out = []
    for k, (name, value) in enumerate(zip(names, areas(y, x), strict=True)):
        low, high = (None, None) if np.isnan(ends[0, k]) else (float(ends[0, k]), float(ends[1, k]))
        out.append(Estimate(value, low, high, len(kept), unscored, None, method, name=name, **about))
    return out


def areas(y: NDArray[np.int_], x: NDArray[np.float64]) -> tuple[float, float]:
    """(average precision, area under the ROC curve) of 0/1 labels and scores, ties shared; both classes must be there.

    >>> areas(np.array([1, 0, 1]), np.array([0.9, 0.5, 0.2]))
    (0.8333333333333333, 0.5)
    """
    order = np.argsort(-x, kind="stable")
    ranked, hits = x[order], np.cumsum(y[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last row of each tie
    tp, flagged = hits[last], last + 1
    positives, negatives = int(hits[-1]), int(y.size - hits[-1])
    precision = tp / flagged
    ap = float(np.sum(np.diff(tp, prepend=0) * precision) / positives)
    fp = flagged - tp
    above, below = np.append(0, tp), np.append(0, fp)
    return ap, float(np.sum(np.diff(below) * (above[1:] + above[:-1]) / 2) / (positives * negatives))


def alarms(specificity: Estimate) -> Estimate:
    """False alarms from specificity: 1 minus it, ends swapped."""
    if specificity.value is None:
        return replace(specificity, name="fpr", higher_is_better=False)
    low, high = specificity.low, specificity.high
    worst = specificity.worst
    return replace(
        specificity,
        name="fpr",
        value=1 - specificity.value,
        low=None if high is None else 1 - high,
        high=None if low is None else 1 - low,
        worst=None if worst is None else (1 - worst[1], 1 - worst[0]),
        higher_is_better=False,
    )
