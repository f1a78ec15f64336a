"""How good an oracle is on labelled replies over repeated runs, and whether two oracles differ.

Source: arXiv:2501.17132, section 4 (RQ0): confusion counts, with no reply (NR) counted as wrong; Vargha & Delaney 2000 (A12); Mann &
Whitney 1947; Holm 1979; Shapiro & Wilk 1965 by scipy where it is installed. Differs: precision and recall bear their usual names (the
published analysis divides TP by TP + FP for what it calls recall). The positive class is unsafe.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from davylamp.core.errors import InputError
from davylamp.core.nouns import Estimate
from davylamp.core.stats import holm, mean_t

QUANTITIES = ("accuracy", "precision", "recall")
Run = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Counts:
    """One run: unsafe found (tp), safe passed (tn), safe called unsafe (fp), unsafe called safe (fn), no verdict (nr)."""

    tp: int
    tn: int
    fp: int
    fn: int
    nr: int

    @property
    def accuracy(self) -> float | None:
        n = self.tp + self.tn + self.fp + self.fn + self.nr
        return (self.tp + self.tn) / n if n else None

    @property
    def precision(self) -> float | None:
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else None

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN), as published: an unsafe reply without a verdict counts against accuracy alone."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else None


def counts(truth: Sequence[int], run: Run) -> Counts:
    """truth: (n,) 1 unsafe, 0 safe.  run: (n,) values in [0, 1], unsafe from 0.5 on, or None.

    >>> counts([1, 1, 0, 0], [1.0, None, 0.0, 1.0])
    Counts(tp=1, tn=1, fp=1, fn=0, nr=1)
    """
    if len(truth) != len(run):
        raise InputError(f"truth and verdicts must have one length, got {len(truth)} and {len(run)}")
    if not set(truth) <= {0, 1}:
        raise InputError("truth must be 1 (unsafe) or 0 (safe) for every reply")
    cells = [(label, None if value is None else int(value >= 0.5)) for label, value in zip(truth, run, strict=True)]
    tp, tn, fp, fn = (cells.count(cell) for cell in ((1, 1), (0, 0), (0, 1), (1, 0)))
    return Counts(tp, tn, fp, fn, sum(said is None for _, said in cells))


def a12(x: Sequence[float], y: Sequence[float]) -> float:
    """P(X > Y) + P(X = Y) / 2 over all pairs, in [0, 1]; 0.5: neither tends to be larger (Vargha & Delaney 2000, equation 1).

    >>> a12([3, 4], [1, 4])
    0.625
    """
    if not len(x) or not len(y):
        raise InputError("A12 needs values on both sides")
    a, b = np.asarray(x, dtype=float)[:, None], np.asarray(y, dtype=float)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def mann_whitney(x: Sequence[float], y: Sequence[float]) -> float:
    """Two-sided p by the normal approximation, with corrections for ties and continuity; 1.0 where all values are equal.

    Good from about eight values a side on.
    """
    n, m = len(x), len(y)
    u = a12(x, y) * n * m
    _, ties = np.unique(np.asarray([*x, *y], dtype=float), return_counts=True)
    total = n + m
    variance = n * m / 12 * (total + 1 - float((ties**3 - ties).sum()) / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    z = (abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return min(1.0, math.erfc(max(0.0, z) / math.sqrt(2)))


def normality(values: Sequence[float]) -> float | None:
    """p of Shapiro and Wilk's test that runs are normal; None without scipy, for fewer than three runs, or if all are equal."""
    if importlib.util.find_spec("scipy") is None or len(values) < 3 or len(set(values)) == 1:
        return None
    from scipy.stats import shapiro

    return float(shapiro(np.asarray(values, dtype=float)).pvalue)


@dataclass(frozen=True, slots=True)
class Difference:
    """Two oracles by one quantity. p: Mann-Whitney, Holm-adjusted over all pairs and quantities.  a12: that a run of `first` is larger."""

    first: str
    second: str
    quantity: str
    a12: float
    p: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """counts: every run's.  estimates: mean over runs with Student's interval.  normal: Shapiro-Wilk p of accuracy."""

    counts: Mapping[str, Sequence[Counts]]
    estimates: tuple[Estimate, ...]
    normal: Mapping[str, float | None]
    differences: tuple[Difference, ...]


def compare_oracles(truth: Sequence[int], runs: Mapping[str, Sequence[Run]]) -> Comparison:
    """runs: oracle -> its runs, each (n,) verdicts on the same replies. A run in which a quantity is undefined is left out of it.

    >>> found = compare_oracles([1, 0], {"a": [[1.0, 0.0]] * 3, "b": [[0.0, 0.0]] * 3})
    >>> [estimate.value for estimate in found.estimates if estimate.name == "accuracy"]
    [1.0, 0.5]
    """
    found = {name: [counts(truth, run) for run in given] for name, given in runs.items()}
    if not found or not all(found.values()):
        raise InputError("every oracle needs one run or more")
    values = {
        (name, quantity): [value for one in given if (value := getattr(one, quantity)) is not None]
        for name, given in found.items()
        for quantity in QUANTITIES
    }
    estimates = [
        mean_t(value, len(found[name]) - len(value), name=quantity, arm=name, higher_is_better=True)
        for (name, quantity), value in values.items()
    ]
    estimates += [
        mean_t([float(one.nr) for one in given], name="no reply", unit="replies", arm=name)
        for name, given in found.items()
    ]
    pairs = [
        (a, b, quantity)
        for a, b in itertools.combinations(found, 2)
        for quantity in QUANTITIES
        if values[a, quantity] and values[b, quantity]
    ]
    p_values = holm([mann_whitney(values[a, quantity], values[b, quantity]) for a, b, quantity in pairs])
    differences = tuple(
        Difference(a, b, quantity, a12(values[a, quantity], values[b, quantity]), p)
        for (a, b, quantity), p in zip(pairs, p_values, strict=True)
    )
    normal = {name: normality(values[name, "accuracy"]) for name in found}
    return Comparison(found, tuple(estimates), normal, differences)


def ratio(
    x: Sequence[float],
    y: Sequence[float],
    *,
    x_groups: Sequence[str],
    y_groups: Sequence[str],
    rng: np.random.Generator,
    draws: int = 2000,
) -> Estimate:
    """mean(x) / mean(y), each mean with half a hit added so that no failures at all still give a number; bootstrapped over groups.

    x, y: 0/1 of two sets of tests.  groups: rows that hang together; a group is drawn with its rows of both sides.
    """
    if not len(x) or not len(y):
        return Estimate(None, None, None, 0, method="no scored rows", unit="ratio")
    names = {name: i for i, name in enumerate(dict.fromkeys([*x_groups, *y_groups]))}
    sums = np.zeros((4, len(names)))
    for row, (values, groups) in enumerate(((x, x_groups), (y, y_groups))):
        place = [names[group] for group in groups]
        np.add.at(sums[2 * row], place, np.asarray(values, dtype=float))
        np.add.at(sums[2 * row + 1], place, 1.0)

    def of(parts: np.ndarray) -> np.ndarray:
        return ((parts[0] + 0.5) / (parts[1] + 1)) / ((parts[2] + 0.5) / (parts[3] + 1))

    drawn = sums[:, rng.integers(len(names), size=(draws, len(names)))].sum(axis=2)
    low, high = np.quantile(of(drawn), (0.025, 0.975))
    value = float(of(sums.sum(axis=1)))
    return Estimate(
        value,
        float(low),
        float(high),
        len(x) + len(y),
        unit="ratio",
        method=f"bootstrap over {len(names)} groups, half a hit added",
    )
