"""System 26: the claims beside their controls over several seeds; the two tuned experts; the shipped base is what its script makes."""

import numpy as np
import pytest

from davylamp.metrics.online import Learner, Settings, hedge_bound
from davylamp.studies import _house as house
from davylamp.studies.aegis import ERRORS, ITEMS, aegis_experts, aegis_online, experts, phrase_rule, row, stream, wrap

pytestmark = pytest.mark.claims


def broken(observed):
    return [
        (claim.text, estimate.low, estimate.high)
        for claim, estimate in observed
        if claim is not None and claim.held(estimate) is not True
    ]


@pytest.mark.slow
def test_online_claims_and_controls_hold():
    observed = aegis_online()
    assert len(observed) == 12 and sum(claim.control for claim, _ in observed) == 6
    assert not broken(observed)


@pytest.mark.slow
@pytest.mark.long
def test_the_tuned_experts():
    assert not broken(aegis_experts())


def test_the_stream_by_a_second_way():
    """One steady stream, weights and regret from cumulative losses in one go; the planted error rates are there."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=ITEMS)
    table = experts(rng, labels, ERRORS)
    wrong = ((table > 0.5) != labels[:, None].astype(bool)).mean(axis=0)
    assert wrong == pytest.approx(ERRORS, abs=0.03)
    given, _, learner = stream(table, labels, Settings(horizon=ITEMS))
    loss = np.abs(table - labels[:, None])
    eta = np.sqrt(8 * np.log(4) / ITEMS)
    before = np.vstack([np.zeros(4), np.cumsum(loss, axis=0)[:-1]])
    raw = np.exp(-eta * (before - before.min(axis=1, keepdims=True)))
    expected = (raw / raw.sum(axis=1, keepdims=True) * table).sum(axis=1)
    assert given == pytest.approx(expected, abs=1e-9)
    regret = np.abs(expected - labels).sum() - loss.sum(axis=0).min()
    assert learner.report()["regret"] == pytest.approx(regret, abs=1e-6) and regret < hedge_bound(4, ITEMS)


def test_a_forecaster_that_cheats_breaks_the_bound():
    """Control for the bound itself: weights that run to the loser have more regret than it allows."""
    good, bad = Learner(2, Settings(horizon=500)), 0.0
    for _ in range(500):
        good.update([0.0, 1.0], 0)
        bad += float(good.weights()[0])  # the loss of a forecast with the weights swapped
    assert good.report()["regret"] <= good.bound() < bad


def test_rows_and_wrappers_are_what_they_say():
    rng = np.random.default_rng(1)
    for number in range(200):
        case = row(rng, number, kind="unsafe")
        assert phrase_rule(wrap(case, "plain", rng)) and phrase_rule(wrap(case, "framed", rng))
        assert not phrase_rule(wrap(case, "split", rng))
        safe = row(rng, number, kind="safe")
        named = {word for _, words in safe.meta["policy"] for word in words.split()}
        assert not named & set(safe.messages[0].text.split()) and safe.answer == 0


def test_the_base_recalls_and_has_never_seen_a_verdict():
    """Better than half on drills it never saw; on the guard's prompt it says neither word."""
    import torch

    model, tokenizer = house.load()
    ids, labels = house.drill(np.random.default_rng(99), 64)
    with torch.inference_mode():
        said = model(torch.tensor(ids)).logits[:, :-1].argmax(-1).numpy()
    wanted = labels[:, 1:]
    assert ((said == wanted) & (wanted >= 0)).sum() / (wanted >= 0).sum() > 0.6
    rows = [house.concept_row(np.random.default_rng(i), house.TRAINED, i) for i in range(20)]
    from davylamp.studies.aegis2 import ask

    assert all(verdict.value is None for verdict in ask(model, rows, np.random.default_rng(0)))
    assert tokenizer.vocab_size == model.config.vocab_size == 310
