"""Regret bounds hold on every stream: random, drifting, and made by an adversary who sees the weights; beside brute force."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from davylamp.core.errors import InputError
from davylamp.metrics.online import (
    METHODS,
    Learner,
    PageHinkley,
    Settings,
    anytime_bound,
    best_sequence,
    delay_bound,
    hedge_bound,
    losses,
)

STREAMS = ("random", "drifting", "adversarial", "tie_breaking")


def stream(kind, n, rounds, rng, learner):
    """Yields (p, y). adversarial: puts the loss where the weight is; tie_breaking: flips the best two experts for ever."""
    for t in range(rounds):
        if kind == "random":
            yield rng.random(n), int(rng.integers(2))
        elif kind == "drifting":
            y, good = int(rng.integers(2)), (t * 3 // rounds) % n
            right = rng.random(n) < np.where(np.arange(n) == good, 0.95, 0.55)
            yield np.where(right, float(y), float(1 - y)), y
        elif kind == "adversarial":
            heavy = int(learner.weights().argmax())
            yield (np.arange(n) == heavy).astype(float), 0
        else:
            yield np.array([float((t + i) % 2 == 0) for i in range(n)]), 0


def run(kind, n, rounds, seed, **options):
    """(learner, table of weighted losses with NaN where an expert slept, our losses by an independent sum)."""
    rng = np.random.default_rng(seed)
    sleepy, uneven = options.pop("sleepy", 0.0), options.pop("uneven", False)
    learner = Learner(n, Settings(**options))
    table, own = [], []
    for p, y in stream(kind, n, rounds, rng, learner):
        p = np.where(rng.random(n) < sleepy, np.nan, p)
        c = float(rng.choice([1.0, 0.5, 0.2])) if uneven else 1.0
        q = learner.forecast(p)
        learner.update(p, y, propensity=c)
        if q is not None:
            table.append(losses(p, y, loss=learner.settings.loss) / c)
            own.append(float(losses([q], y, loss=learner.settings.loss)[0]) / c)
    return learner, np.array(table).reshape(-1, n), np.array(own)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(STREAMS),
    n=st.integers(1, 6),
    rounds=st.integers(1, 80),
    seed=st.integers(0, 2**31),
    loss=st.sampled_from(("absolute", "squared", "log")),
    eta=st.one_of(st.none(), st.floats(0.01, 8)),
    sleepy=st.sampled_from((0.0, 0.4)),
    uneven=st.booleans(),
    method=st.sampled_from(METHODS),
)
def test_regret_never_exceeds_the_bound(kind, n, rounds, seed, loss, eta, sleepy, uneven, method):
    """Against every expert, by a table kept outside the learner; abstentions, unequal weights of rounds, all methods and losses."""
    learner, table, own = run(kind, n, rounds, seed, method=method, loss=loss, eta=eta, sleepy=sleepy, uneven=uneven)
    if not len(table):
        return
    fade = learner.settings.gamma ** np.arange(len(table))[::-1] if method == "discounted" else np.ones(len(table))
    regrets = np.nansum((own[:, None] - table) * fade[:, None], axis=0)
    assert regrets.max() <= learner.bound() + 1e-9
    report = learner.report()
    assert report["regret"] == pytest.approx(regrets.max(), abs=1e-9) and report["loss"] == pytest.approx(own.sum())


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(STREAMS), n=st.integers(2, 8), rounds=st.integers(1, 80), seed=st.integers(0, 2**31))
def test_the_closed_forms(kind, n, rounds, seed):
    """Known T: sqrt(T ln N / 2). Unknown T: the published anytime bound, and ours is never looser than it."""
    learner, table, own = run(kind, n, rounds, seed, horizon=rounds)
    assert learner.bound() == pytest.approx(hedge_bound(n, rounds))
    assert own.sum() - table.sum(axis=0).min() <= hedge_bound(n, rounds) + 1e-9
    learner, table, own = run(kind, n, rounds, seed)
    assert own.sum() - table.sum(axis=0).min() <= learner.bound() + 1e-9 <= anytime_bound(n, rounds) + 1e-6
    eta = learner.rate(0)
    assert hedge_bound(n, rounds, eta) >= hedge_bound(n, rounds) - 1e-12, "the best eta is the best"


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(STREAMS),
    n=st.integers(2, 5),
    rounds=st.integers(4, 60),
    seed=st.integers(0, 2**31),
    alpha=st.floats(0.001, 0.5),
    switches=st.integers(0, 3),
)
def test_fixed_share_against_the_best_sequence(kind, n, rounds, seed, alpha, switches):
    """Brute force over all sequences with at most so many switches, by dynamic programming."""
    learner, table, own = run(kind, n, rounds, seed, method="fixed_share", alpha=alpha, eta=0.5)
    worst = max(learner.bound(m) for m in range(switches + 1))
    assert own.sum() - best_sequence(table, switches) <= worst + 1e-9


def test_best_sequence_by_brute_force():
    import itertools

    rng = np.random.default_rng(0)
    for _ in range(30):
        table, switches = rng.random((5, 3)), int(rng.integers(4))
        paths = [
            path
            for path in itertools.product(range(3), repeat=5)
            if sum(a != b for a, b in itertools.pairwise(path)) <= switches
        ]
        assert best_sequence(table, switches) == pytest.approx(
            min(sum(table[t, i] for t, i in enumerate(path)) for path in paths)
        )


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(("random", "drifting")),
    delay=st.integers(0, 20),
    eta=st.floats(0.05, 2),
    seed=st.integers(0, 2**31),
)
def test_late_labels(kind, delay, eta, seed):
    """Forecasts that are `delay` updates old: the loss really had stays within the bound for delays."""
    n, rounds, rng = 4, 80, np.random.default_rng(seed)
    learner, waiting, lost, table, missed = Learner(n, Settings(eta=eta)), [], [], [], 0
    for p, y in [*stream(kind, n, rounds, rng, learner), *[(None, None)] * delay]:
        if p is not None:
            waiting.append((p, y, learner.forecast(p), learner.rounds))
        if len(waiting) > delay or p is None:
            p, y, q, then = waiting.pop(0)
            missed += learner.rounds - then
            learner.update(p, y, given=q)
            lost.append(abs(q - y))
            table.append(losses(p, y))
    while waiting:
        p, y, q, then = waiting.pop(0)
        missed += learner.rounds - then
        learner.update(p, y, given=q)
        lost.append(abs(q - y))
        table.append(losses(p, y))
    best = np.array(table).sum(axis=0).min()
    assert sum(lost) - best <= delay_bound(n, rounds, eta, missed) + 1e-9
    report = learner.report()
    assert sum(lost) == pytest.approx(report["loss"] + report["delay_cost"])
    assert (delay > 0) or report["delay_cost"] == pytest.approx(0.0)


def test_weights_by_the_formula():
    """w_i = exp(-eta L_i) / sum, computed anew; a second way for the falling rate and for fixed share."""
    rng = np.random.default_rng(1)
    table, labels = rng.random((30, 3)), rng.integers(2, size=30)
    total = np.abs(table - labels[:, None]).sum(axis=0)
    for eta, options in ((0.7, {"eta": 0.7}), (math.sqrt(8 * math.log(3) / 31), {})):
        learner = Learner(3, Settings(**options))
        for p, y in zip(table, labels, strict=True):
            learner.update(p, int(y))
        raw = np.exp(-eta * total)
        assert learner.weights() == pytest.approx(raw / raw.sum())
    learner, w = Learner(3, Settings(method="fixed_share", alpha=0.1)), np.full(3, 1 / 3)
    for p, y in zip(table, labels, strict=True):
        assert learner.forecast(p) == pytest.approx(w @ p)
        learner.update(p, int(y))
        w = w * np.exp(-0.5 * np.abs(p - y))
        w = 0.9 * w / w.sum() + 0.1 / 3
    assert learner.weights() == pytest.approx(w)


def test_no_underflow_and_fixed_share_recovers():
    """After 20,000 rounds the loser's weight is 0 as a float; its logarithm is not lost, and fixed share never lets it fall so far."""
    plain, share = Learner(2, Settings(eta=1.0)), Learner(2, Settings(method="fixed_share", eta=1.0))
    for _ in range(20_000):
        for learner in (plain, share):
            learner.update([0.0, 1.0], 0)
    assert plain.weights()[1] == 0.0 and plain.forecast([math.nan, 0.25]) == 0.25
    assert share.weights()[1] >= 0.01 / 2
    for _ in range(20):
        share.update([0.0, 1.0], 1)
        plain.update([0.0, 1.0], 1)
    assert share.weights()[1] > 0.9 and plain.weights()[1] == 0.0


def test_identical_experts_keep_equal_weights():
    for method in METHODS:
        learner, rng = Learner(4, Settings(method=method)), np.random.default_rng(3)
        for _ in range(2000):
            learner.update([float(rng.random())] * 4, int(rng.integers(2)))
        assert np.abs(learner.weights() - 0.25).max() < 1e-9


def test_an_abstention_leaves_a_weight_as_it_was():
    learner = Learner(3, Settings(eta=0.9))
    learner.update([0.1, 0.8, 0.5], 1)
    before = learner.weights()
    learner.update([math.nan, 0.9, 0.2], 1)
    assert learner.weights()[0] == pytest.approx(before[0]) and learner.weights()[1] > before[1]
    learner.update([math.nan] * 3, 1)
    assert learner.rounds == 2 and learner.forecast([math.nan] * 3) is None


@pytest.mark.parametrize("method", METHODS)
def test_state_comes_back_bit_for_bit(method):
    rng = np.random.default_rng(5)
    learner = Learner(3, Settings(method=method))
    for _ in range(50):
        learner.update(rng.random(3), int(rng.integers(2)), propensity=0.7)
    again = Learner.from_json(json.loads(json.dumps(learner.json())))
    for _ in range(50):
        p, y = rng.random(3), int(rng.integers(2))
        learner.update(p, y)
        again.update(p, y)
    assert again.json() == learner.json()


@settings(max_examples=40, deadline=None)
@given(method=st.sampled_from(METHODS), factor=st.floats(0, 1), seed=st.integers(0, 2**31), eta=st.floats(0.05, 3))
def test_the_bound_holds_after_forgetting(method, factor, seed, eta):
    rng = np.random.default_rng(seed)
    learner = Learner(3, Settings(method=method, eta=eta if seed % 2 or method != "hedge" else None))
    for _ in range(30):
        learner.update([0.0, 0.5, 1.0], 0)
    learner.discount(factor)
    for _ in range(40):
        learner.update(rng.random(3), 1)
    assert learner.report()["regret"] <= learner.bound() + 1e-9


def test_zero_one_loss_is_of_a_drawn_expert():
    learner = Learner(2, Settings(loss="zero_one", eta=1.0))
    learner.update([0.9, 0.1], 1)
    assert learner.own == 0.5 and learner.report()["of"] == "an expert drawn by its weight"
    assert losses([0.5, 0.51, np.nan], 1, loss="zero_one")[:2].tolist() == [1.0, 0.0]
    assert losses([0.0, 1.0], 1, loss="log").tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0.0},
        {"eta": -1.0},
        {"eta": math.nan},
        {"alpha": 1.0},
        {"alpha": -0.1},
        {"gamma": 0.0},
        {"horizon": -1},
        {"threshold": 1.0},
        {"most": 0.5},
        {"method": "best"},
        {"loss": "rank"},
    ],
)
def test_bad_settings(options):
    with pytest.raises(InputError):
        Settings(**options)


def test_bad_rounds():
    with pytest.raises(InputError, match="one expert or more"):
        Learner(0)
    learner = Learner(2)
    for p, y, more in (
        ([0.5], 1, {}),
        ([0.5, 1.2], 1, {}),
        ([0.5, -0.1], 1, {}),
        ([0.5, math.inf], 1, {}),
        ([0.5, 0.5], 2, {}),
        ([0.5, 0.5], 0.5, {}),
        ([0.5, 0.5], 1, {"propensity": 0.0}),
    ):
        with pytest.raises(InputError):
            learner.update(p, y, **more)
    with pytest.raises(InputError):
        learner.discount(1.5)
    assert learner.rounds == 0 and learner.bound() == 0.0
    share = Learner(2, Settings(method="fixed_share", alpha=0.0))
    share.update([0, 1], 1)
    assert share.bound(0) < share.bound(1) == math.inf
    share = Learner(2, Settings(method="fixed_share"))
    share.update([0, 1], 1)
    with pytest.raises(InputError, match="5 switches do not fit 1 rounds"):
        share.bound(5)
    learner.update([0, 1], 1)
    with pytest.raises(InputError):
        learner.bound(1)


def test_the_drift_monitor():
    """Silent on 3,000 steady losses in 19 of 20 streams or more; a rise from 0.1 to 0.3 shows within 250 items in as many."""
    quiet, seen = 0, 0
    for seed in range(20):
        rng, monitor = np.random.default_rng(seed), PageHinkley()
        quiet += not any(monitor.add(x) for x in (rng.random(3000) < 0.3).astype(float))
        monitor = PageHinkley()
        for x in (rng.random(1000) < 0.1).astype(float):
            monitor.add(x)
        seen += any(monitor.add(x) for x in (rng.random(250) < 0.3).astype(float))
    assert quiet >= 19 and seen >= 19
