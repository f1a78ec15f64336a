"""System 07: what adversarial training buys, beside its controls, over several seeds; a threshold that keeps its bound."""

import numpy as np
import pytest

from davylamp.data.fragile_stories import fragile_stories
from davylamp.metrics.thresholds import conformal_threshold, conservative_threshold
from davylamp.models.classifier import PairClassifier, tiny
from davylamp.studies.high_stakes import high_stakes_training

pytestmark = [pytest.mark.claims, pytest.mark.slow]


def test_claims_and_controls_hold():
    observed = high_stakes_training()
    claims = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert sum(claim.control for claim, _ in claims) >= 2
    broken = [
        (claim.text, estimate.low, estimate.high) for claim, estimate in claims if claim.held(estimate) is not True
    ]
    assert not broken


def test_a_bound_holds_on_fresh_rows_and_an_eager_threshold_does_not():
    """Calibrated again and again on 150 rows: the conservative threshold breaks its bound in at most 5 % of the draws, the expected rate
    of the conformal one stays below its risk, and the control (the lowest unsafe score seen, as if that were a promise of 0) does not."""
    rng = np.random.default_rng(0)
    rows = list(fragile_stories((), rng=rng, n=3000))
    pairs = [(row.messages[0].text, row.messages[1].text) for row in rows]
    labels = np.array([row.answer for row in rows])
    classifier = PairClassifier(*tiny(width=32))
    classifier.fit(pairs[:600], labels[:600].tolist(), [1.0] * 600, rng=rng, epochs=4, lr=3e-3)
    scores, labels = classifier.scores(pairs[600:]), labels[600:]
    unsafe = np.flatnonzero(labels)
    broken, rates, eager = [], [], []
    for _ in range(400):
        drawn = rng.choice(unsafe, size=150, replace=False)
        rest = scores[np.setdiff1d(unsafe, drawn)]
        cut = conservative_threshold([1] * 150, scores[drawn].tolist(), failure=0.1)["threshold"]
        broken.append((rest < cut).mean() > 0.1)
        rates.append((rest < conformal_threshold([1] * 150, scores[drawn].tolist(), risk=0.1)).mean())
        eager.append((rest < scores[drawn].min()).mean() > 0)
    assert np.mean(broken) <= 0.08 and np.mean(rates) <= 0.105
    assert np.mean(eager) > 0.3, "zero failures seen is no promise of zero"
