"""How far annotators agree: percent agreement, Cohen's kappa (1960), Krippendorff's nominal alpha (1970).

A label is any plain value; None means no vote. Rows without both votes are left out and counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from davylamp.core.errors import InputError
from davylamp.core.nouns import Estimate
from davylamp.core.stats import rate

if TYPE_CHECKING:
    from numpy.random import Generator

Labels = Sequence[Hashable | None]


def percent_agreement(first: Labels, second: Labels) -> Estimate:
    """Share of rows on which two annotators say the same, with Wilson's interval. first, second: (n,) labels or None.

    >>> percent_agreement(["safe", "unsafe", "safe", None], ["safe", "safe", "safe", "safe"]).value.__round__(3)
    0.667
    """
    a, b = _both(first, second)
    same = sum(x == y for x, y in zip(a, b, strict=True))
    return rate(same, len(a), len(first) - len(a), name="agreement", higher_is_better=True)


def cohen_kappa(first: Labels, second: Labels) -> float | None:
    """(observed - expected agreement) / (1 - expected), at most 1; 0 = as good as chance. None if no row has both votes, or
    if both only ever used one and the same label: nothing was put to the test.

    >>> cohen_kappa([1, 1, 0, 0], [1, 0, 0, 0])
    0.5
    >>> cohen_kappa([0, 0], [0, 0]) is None
    True
    """
    a, b = _both(first, second)
    names = {label: i for i, label in enumerate(dict.fromkeys((*a, *b)))}
    table = np.zeros((len(names), len(names)))
    for x, y in zip(a, b, strict=True):
        table[names[x], names[y]] += 1
    return _kappa(table)


def kappa(first: Labels, second: Labels, *, rng: Generator, draws: int = 2000) -> Estimate:
    """Cohen's kappa with a percentile bootstrap interval over rows; draws in which it is undefined are left out.

    >>> kappa([1, 1, 0, 0] * 20, [1, 0, 0, 0] * 20, rng=np.random.default_rng(0)).value
    0.5
    """
    a, b = _both(first, second)
    about: dict[str, Any] = {"name": "kappa", "unit": "kappa", "higher_is_better": True}
    value = cohen_kappa(a, b)
    left_out = len(first) - len(a)
    if value is None:
        why = "undefined: one label only" if a else "no scored rows"
        return Estimate(None, None, None, len(a), left_out, None, why, **about)
    names = {label: i for i, label in enumerate(dict.fromkeys((*a, *b)))}
    k = len(names)
    cells = np.bincount([names[x] * k + names[y] for x, y in zip(a, b, strict=True)], minlength=k * k)
    # Rows with equal cells are exchangeable, so drawing n rows is drawing the table once from a multinomial.
    tables = rng.multinomial(len(a), cells / len(a), size=draws).reshape(draws, k, k)
    found = [value_ for table in tables if (value_ := _kappa(table)) is not None]
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(
        value, float(low), float(high), len(a), left_out, None, f"bootstrap, {len(a)} rows, {draws} draws", **about
    )


def krippendorff_alpha(votes: Sequence[Labels]) -> float | None:
    """1 - observed / expected disagreement for any number of annotators and missing votes; nominal labels.

    votes: (n rows, annotators) labels or None. Rows with fewer than two votes say nothing and are left out. None if undefined.

    >>> round(krippendorff_alpha([[1, 1, None], [0, 0, 0], [1, 0, 1], [0, None, 0]]), 3)
    0.625
    """
    observed, values = 0.0, Counter[Hashable]()
    for row in votes:
        given = [vote for vote in row if vote is not None]
        if len(given) < 2:
            continue
        counts = Counter(given)
        values.update(counts)
        observed += sum(x * y for x, y in itertools.permutations(counts.values(), 2)) / (len(given) - 1)
    n = sum(values.values())
    expected = sum(x * y for x, y in itertools.permutations(values.values(), 2)) / (n - 1) if n > 1 else 0.0
    return 1 - observed / expected if expected else None


def _both(first: Labels, second: Labels) -> tuple[list[Hashable], list[Hashable]]:
    if len(first) != len(second):
        raise InputError(f"two annotators' labels must have one length, got {len(first)} and {len(second)}")
    pairs = [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _kappa(table: np.ndarray) -> float | None:
    n = table.sum()
    if n == 0:
        return None
    observed = np.trace(table) / n
    expected = float(table.sum(axis=0) @ table.sum(axis=1)) / n**2
    return None if expected >= 1.0 else float((observed - expected) / (1 - expected))
