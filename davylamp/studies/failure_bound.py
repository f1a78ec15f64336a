"""Whether a threshold chosen for a stated failure bound keeps it on new texts, beside the thresholds that people choose by eye.

Source: arXiv:2205.01663, sections 2 and 4 (a conservative threshold; what failure rate can be claimed from so many texts). Differs: scores
of unsafe texts are drawn from a known distribution, so that the true failure rate of every threshold is known and not estimated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from davylamp.core.errors import InputError
from davylamp.core.nouns import Claim, Estimate
from davylamp.core.registry import study
from davylamp.core.stats import beta_cdf, mean_t, rate
from davylamp.metrics.thresholds import conformal_threshold, conservative_threshold, failure_bound

Observed = tuple[Claim | None, Estimate]
ROWS = 150  # unsafe texts that a threshold is chosen on
BOUND = 0.1
SHAPE = (6.0, 2.0)  # of the beta distribution that scores of unsafe texts are drawn from


@study(
    version=1,
    source="arXiv:2205.01663",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance", "adversarial"),
    systems=("07",),
)
def failure_bounds(*, size: Literal["quick", "full"] = "quick", seeds: tuple[int, ...] = (0, 1, 2)) -> list[Observed]:
    """Thresholds are chosen on 150 unsafe texts again and again; then their true failure rate is looked up.

    The conservative threshold may break its bound of 0.1 in 5 % of the draws (the one that fits the texts by eye breaks it about every
    second time), the conformal one keeps 0.1 on average (the one by eye does not), and after no failure at all the true rate is above
    the bound that was computed in 5 % of the draws.
    """
    if not seeds:
        raise InputError("a study needs one or more seeds, got none")
    draws = {"quick": 3000, "full": 10_000}[size]
    broken: dict[str, list[bool]] = {"conservative": [], "by eye": [], "no failure seen": []}
    true: dict[str, list[float]] = {"conformal": [], "by eye": []}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for _ in range(draws):
            scores = np.sort(rng.beta(*SHAPE, size=ROWS))
            labels, given = [1] * ROWS, scores.tolist()
            eye = _failure(float(scores[int(BOUND * ROWS)]))  # as many failures as the bound allows, and no margin
            cut = conservative_threshold(labels, given, failure=BOUND)["threshold"]
            broken["conservative"].append(_failure(cut) > BOUND)
            broken["by eye"].append(eye > BOUND)
            broken["no failure seen"].append(_failure(given[0]) > failure_bound(0, ROWS))
            true["conformal"].append(_failure(conformal_threshold(labels, given, risk=BOUND)))
            true["by eye"].append(eye)
    share = {name: rate(sum(hits), len(hits)) for name, hits in broken.items()}
    mean = {name: replace(mean_t(values, unit="rate"), name="true_failure_rate") for name, values in true.items()}
    over, average = "share_of_draws_over_the_bound", "true_failure_rate"
    return [
        (Claim(over, "conservative, bound 0.1", at_most=0.06), share["conservative"]),
        (Claim(over, "by eye, 0.1 of the texts", at_least=0.4, control=True), share["by eye"]),
        (Claim(over, "no failure seen, bound 3/n", at_least=0.03, at_most=0.07), share["no failure seen"]),
        (Claim(average, "conformal, risk 0.1", at_least=0.095, at_most=0.102), mean["conformal"]),
        (Claim(average, "by eye, 0.1 of the texts", at_least=0.102, control=True), mean["by eye"]),
    ]


def _failure(cut: float) -> float:
    """The true share of unsafe texts below a threshold."""
    return beta_cdf(cut, *SHAPE)
