"""How good a filter is against gold labels: accuracy, precision, recall, specificity, F1, balanced accuracy, curves.

Unsafe (1) is the positive class. A score is a number in [0, 1]; None, NaN or anything outside leaves the row unscored. A ratio that is
not defined (0/0) is None, never 0. Source: arXiv:2311.08370, section 4 (accuracy, precision, recall); the rest is standard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from davylamp.core.errors import InputError
from davylamp.core.nouns import Estimate
from davylamp.core.stats import clustered_rate, rate

Scores = Sequence[float | None]
NAMES = ("accuracy", "precision", "recall", "specificity", "f1", "balanced_accuracy")


def clean_score(score: Any) -> float | None:
    """The score if it is a number in [0, 1], else None: could not tell.

    >>> clean_score(0.3), clean_score(1.2), clean_score(float("nan")), clean_score(None), clean_score(True)
    (0.3, None, None, None, 1.0)
    """
    if type(score) is not float and not isinstance(score, int | float | np.number):
        return None
    return float(score) if 0.0 <= float(score) <= 1.0 else None


def confusion(gold: Sequence[int], scores: Scores, *, threshold: float = 0.5) -> dict[str, int]:
    """Counts tp, fp, tn, fn and unscored; a score at or above the threshold says unsafe.

    >>> confusion([1, 1, 0, 0, 0], [0.9, 0.1, 0.5, 0.2, None])
    {'tp': 1, 'fp': 1, 'tn': 1, 'fn': 1, 'unscored': 1}
    """
    out = dict.fromkeys(("tp", "fp", "tn", "fn", "unscored"), 0)
    for label, score in zip(*_checked(gold, scores), strict=True):
        if score is None:
            out["unscored"] += 1
        else:
            out[("tp" if label else "fp") if score >= threshold else ("fn" if label else "tn")] += 1
    return out


def ratios(*, tp: int, fp: int, tn: int, fn: int, **_: int) -> dict[str, float | None]:
    """The six numbers from the four counts; None where a denominator is 0. F1 needs both precision and recall to be defined.

    >>> ratios(tp=0, fp=0, tn=8, fn=2)
    {'accuracy': 0.8, 'precision': None, 'recall': 0.0, 'specificity': 1.0, 'f1': None, 'balanced_accuracy': 0.5}
    """

    def over(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    precision, recall, specificity = over(tp, tp + fp), over(tp, tp + fn), over(tn, tn + fp)
    f1 = None if precision is None or recall is None else over(2 * precision * recall, precision + recall)
    balanced = None if recall is None or specificity is None else (recall + specificity) / 2
    return {
        "accuracy": over(tp + tn, tp + fp + tn + fn),
        "precision": precision,
        "recall": recall,
        "specificity": specificity,
        "f1": f1,
        "balanced_accuracy": balanced,
    }


def detection(
    gold: Sequence[int], scores: Scores, *, threshold: float = 0.5, groups: Sequence[Hashable] | None = None
) -> dict[str, Estimate]:
    """The six numbers, each with its 95 % interval; `value` is None where the ratio is not defined.

    gold: (n,) 0/1.  scores: (n,).  groups: (n,) labels of rows that belong together (one prompt answered by many models).
    Rates: Wilson, on the effective sample size with groups. Balanced accuracy: square-and-add over the two rates' intervals
    (Newcombe 1998). F1 is a growing function of tp / (tp + fp + fn), whose Wilson interval is carried over.

    >>> found = detection([1] * 10 + [0] * 40, [1.0] * 9 + [0.0] * 41)
    >>> found["recall"].value, [round(x, 2) for x in (found["recall"].low, found["recall"].high)]
    (0.9, [0.6, 0.98])
    """
    labels, values = _checked(gold, scores)
    if groups is not None and len(groups) != len(labels):
        raise InputError(f"groups must be as long as the labels, got {len(groups)} and {len(labels)}")
    said = [None if value is None else value >= threshold for value in values]
    where = [None] * len(labels) if groups is None else list(groups)

    def share(hit: Any, among: Any, name: str) -> Estimate:
        unscored = sum(1 for label, word in zip(labels, said, strict=True) if word is None and among(label, None))
        rows = [
            (group, bool(hit(label, word)))
            for label, word, group in zip(labels, said, where, strict=True)
            if word is not None and among(label, word)
        ]
        about: dict[str, Any] = {"name": name, "higher_is_better": True}
        if groups is None or len({group for group, _ in rows}) == len(rows):
            return rate(sum(right for _, right in rows), len(rows), unscored, **about)
        cells: dict[Hashable, list[int]] = {}
        for group, right in rows:
            cell = cells.setdefault(group, [0, 0])
            cell[0] += right
            cell[1] += 1
        return clustered_rate(
            [cell[0] for cell in cells.values()], [cell[1] for cell in cells.values()], unscored, **about
        )

    out = {
        "accuracy": share(lambda y, s: y == s, lambda y, s: True, "accuracy"),
        "precision": share(lambda y, s: y == 1, lambda y, s: s is None or s, "precision"),
        "recall": share(lambda y, s: s, lambda y, s: y == 1, "recall"),
        "specificity": share(lambda y, s: not s, lambda y, s: y == 0, "specificity"),
    }
    exact = ratios(**confusion(labels, values, threshold=threshold))
    jaccard = share(lambda y, s: y and s, lambda y, s: y or s, "f1")
    return {**out, "f1": _f1(exact["f1"], jaccard), "balanced_accuracy": _balanced(out["recall"], out["specificity"])}


def sweep(gold: Sequence[int], scores: Scores) -> list[dict[str, float | None]]:
    """The six numbers at every threshold that changes something, highest threshold first; above all scores nothing is flagged.

    >>> [(row["threshold"], row["recall"], row["specificity"]) for row in sweep([1, 0, 1], [0.9, 0.5, 0.2])]
    [(inf, 0.0, 1.0), (0.9, 0.5, 1.0), (0.5, 0.5, 0.0), (0.2, 1.0, 0.0)]
    """
    y, x = _arrays(gold, scores)
    thresholds = np.unique(x)[::-1]
    order = np.argsort(-x, kind="stable")
    upto = np.searchsorted(-x[order], -thresholds, side="right")  # rows with a score >= threshold
    tp = np.concatenate(([0], np.cumsum(y[order])))[np.concatenate(([0], upto))] if y.size else np.zeros(1, int)
    flagged = np.concatenate(([0], upto))
    rows = []
    for threshold, hits, n in zip((math.inf, *thresholds.tolist()), tp.tolist(), flagged.tolist(), strict=True):
        positives = int(y.sum())
        counts = {"tp": hits, "fp": n - hits, "fn": positives - hits, "tn": y.size - positives - (n - hits)}
        rows.append({"threshold": threshold, **ratios(**counts)})
    return rows


def roc_curve(gold: Sequence[int], scores: Scores) -> list[tuple[float | None, float | None]]:
    """(false positive rate, true positive rate) at every threshold, from (0, 0) on.

    >>> roc_curve([1, 0], [0.9, 0.1])
    [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    """
    return [
        (None if row["specificity"] is None else 1 - row["specificity"], row["recall"]) for row in sweep(gold, scores)
    ]


def precision_recall_curve(gold: Sequence[int], scores: Scores) -> list[tuple[float | None, float | None]]:
    """(recall, precision) at every threshold, highest threshold first; the first has no precision.

    >>> precision_recall_curve([1, 0], [0.9, 0.1])
    [(0.0, None), (1.0, 1.0), (1.0, 0.5)]
    """
    return [(row["recall"], row["precision"]) for row in sweep(gold, scores)]


def roc_auc(gold: Sequence[int], scores: Scores) -> float | None:
    """Chance that an unsafe row scores above a safe one, ties half; None if a class is absent.

    >>> roc_auc([1, 1, 0, 0], [0.9, 0.4, 0.4, 0.1])
    0.875
    """
    y, x = _arrays(gold, scores)
    positives, negatives = np.sort(x[y == 1]), np.sort(x[y == 0])
    if not positives.size or not negatives.size:
        return None
    below, upto = (
        np.searchsorted(negatives, positives, side="left"),
        np.searchsorted(negatives, positives, side="right"),
    )
    return float((below + upto).sum() / (2 * positives.size * negatives.size))


def average_precision(gold: Sequence[int], scores: Scores) -> float | None:
    """Precision averaged over the steps of recall, without interpolation; None if no row is unsafe.

    >>> round(average_precision([1, 0, 1], [0.9, 0.5, 0.2]), 3)
    0.833
    """
    points = precision_recall_curve(gold, scores)
    if points[0][0] is None:
        return None
    return float(
        sum(
            ((recall or 0.0) - (before or 0.0)) * (precision or 0.0)
            for (before, _), (recall, precision) in itertools.pairwise(points)
        )
    )


def _checked(gold: Sequence[int], scores: Scores) -> tuple[list[int], list[float | None]]:
    if len(gold) != len(scores):
        raise InputError(f"gold labels and scores must have one length, got {len(gold)} and {len(scores)}")
    labels = [int(label) for label in gold]
    if bad := sorted(
        {str(given) for given, label in zip(gold, labels, strict=True) if given != label or label not in (0, 1)}
    ):
        raise InputError(f"a gold label must be 0 or 1, got {bad[0]}")
    return labels, [clean_score(score) for score in scores]


def _arrays(gold: Sequence[int], scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of the rows that have a score."""
    rows = [(label, score) for label, score in zip(*_checked(gold, scores), strict=True) if score is not None]
    return np.array([label for label, _ in rows], dtype=int), np.array([score for _, score in rows], dtype=float)


def _f1(value: float | None, jaccard: Estimate) -> Estimate:
    about: dict[str, Any] = {"name": "f1", "higher_is_better": True, "unit": "f1"}
    if value is None or jaccard.low is None or jaccard.high is None:
        return Estimate(None, None, None, jaccard.n, jaccard.unscored, None, "not defined", **about)
    low, high = (2 * x / (1 + x) for x in (jaccard.low, jaccard.high))  # F1 = 2J / (1 + J), J = tp / (tp + fp + fn)
    return Estimate(value, low, high, jaccard.n, jaccard.unscored, None, f"{jaccard.method}, of tp/(tp+fp+fn)", **about)


def _balanced(recall: Estimate, specificity: Estimate) -> Estimate:
    about: dict[str, Any] = {"name": "balanced_accuracy", "higher_is_better": True}
    n, unscored = recall.n + specificity.n, recall.unscored + specificity.unscored
    if recall.value is None or specificity.value is None:
        return Estimate(None, None, None, n, unscored, None, "not defined", **about)
    value = (recall.value + specificity.value) / 2
    below = math.hypot(recall.value - (recall.low or 0.0), specificity.value - (specificity.low or 0.0)) / 2
    above = math.hypot((recall.high or 0.0) - recall.value, (specificity.high or 0.0) - specificity.value) / 2
    worst = None
    if recall.worst and specificity.worst:
        worst = ((recall.worst[0] + specificity.worst[0]) / 2, (recall.worst[1] + specificity.worst[1]) / 2)
    return Estimate(
        value, max(0.0, value - below), min(1.0, value + above), n, unscored, worst, "square-and-add", **about
    )
