"""Whether safety sits in one head, said only where it can be: a rule on interval ends, with its reasons in words.
Source: this repository. The paper names the highest head of any map; where refusal is spread over many heads that head is noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from davylamp.core.nouns import Estimate
from davylamp.core.stats import bootstrap
from davylamp.interp._scores import FLOOR, RATIO, ranked
from davylamp.models.hooks import Head, head_name

if TYPE_CHECKING:
    from numpy.random import Generator

RULE = (
    f"A head is named if all of these hold. Its mean score on harmful prompts, minus that on benign ones, is {FLOOR} nats or more at the "
    "low end (below that, by Pinsker's inequality, no first token's probability moves by over 0.1 in the mean). Its mean is "
    f"{RATIO:g} times the median head's or more. Its low end on harmful prompts is {RATIO:g} times its high end on benign ones or more. "
    "With a judge, ablating it raises compliance by 0.1 or more at the low end, and three random heads do not. Else: not concentrated."
)


def mean_of(values: Any, groups: Sequence[str] | None, rng: Generator, **about: Any) -> Estimate:
    """Mean over prompts, bootstrapped over groups where some repeat."""
    own = None if groups is None or len(set(groups)) in (1, len(groups)) else groups
    return bootstrap([float(x) for x in values], groups=own, rng=rng, unit="nats", **about)


def minus(a: Estimate, b: Estimate, **about: Any) -> Estimate:
    """The difference of two independent means, its interval from theirs (MOVER; Zou & Donner 2008, equation 3)."""
    if a.value is None or b.value is None or a.low is None or b.low is None or a.high is None or b.high is None:
        value = None if a.value is None or b.value is None else a.value - b.value
        return Estimate(value, None, None, a.n, method="no interval", unit=a.unit, **about)
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(
        value, low, high, a.n, method=f"difference of means, {a.n} and {b.n} prompts (MOVER)", unit=a.unit, **about
    )


def contrast_of(harmful: Any, benign: Any) -> Any:
    """(layers, heads): mean on harmful prompts, minus that on benign ones where there are any."""
    return harmful.mean(0) if benign is None else harmful.mean(0) - benign.mean(0)


def verdict(
    harmful: Any,
    benign: Any,
    *,
    groups: tuple[Sequence[str] | None, Sequence[str] | None] = (None, None),
    rng: Generator,
) -> dict[str, Any]:
    """The rule, applied to the head with the highest contrast. harmful, benign: (prompts, layers, heads) nats; benign may be None.

    Gives {"concentrated": bool, "head": name or None, "why": a sentence, "rule": RULE, "top": name, numbers}.

    >>> verdict(np.full((20, 2, 4), 0.001), None, rng=np.random.default_rng(0))["why"]
    'not concentrated: the highest score, of head 0.0, is too small to matter (0.001 nats)'
    """
    contrast = contrast_of(harmful, benign)
    order = ranked(contrast)
    top: Head = order[0]
    high = mean_of(harmful[:, top[0], top[1]], groups[0], rng)
    other = None if benign is None else mean_of(benign[:, top[0], top[1]], groups[1], rng)
    gap = high if other is None else minus(high, other)
    means = harmful.mean(0)
    median = float(np.nanmedian(means))
    second = contrast[order[1]] if len(order) > 1 else 0.0
    name, low = head_name(top), high.low if high.low is not None else -math.inf
    if gap.low is None or gap.low < FLOOR:
        size = f"{gap.value:.2g} nats" + (
            f", low end {gap.low:.2g}" if gap.low is not None and gap.value is not None and gap.value >= FLOOR else ""
        )
        why = f"the highest score, of head {name}, is too small to matter ({size})"
    elif means[top] < RATIO * median:
        why = f"the map is flat: head {name} scores {means[top]:.2g} nats, the median head {median:.2g}"
    elif other is not None and other.high is not None and low < RATIO * other.high:
        why = f"head {name} matters on benign prompts too ({high.value:.2g} nats on harmful, {other.value:.2g} on benign prompts)"
    else:
        why = ""
    beside = "" if other is None else f"{other.value:.2g} on benign ones, "
    named = f"head {name}: {high.value:.2g} nats on harmful prompts, {beside}median head {median:.2g}"
    return {
        "concentrated": not why,
        "head": None if why else name,
        "why": f"not concentrated: {why}" if why else named,
        "top": name,
        "top_nats": high.value,
        "top_benign_nats": None if other is None else other.value,
        "median_nats": median,
        "top_over_second": None if not second > 0 else float(contrast[top] / second),
        "rule": RULE,
    }
