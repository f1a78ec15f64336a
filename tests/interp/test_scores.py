"""The fast engine against the naive loop, on every architecture; the spectral step against numpy and scipy; what is read from scores."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from davylamp.core.errors import InputError, RunError
from davylamp.interp._engine import Engine
from davylamp.interp._scores import (
    kl,
    leading,
    prescreen,
    principal_angles,
    rank_biased_overlap,
    ranked,
    score_heads,
    votes,
)
from davylamp.interp._verdict import mean_of, minus, verdict
from tests import tiny
from tests.interp import naive

EAGER = {"gemma2": "eager"}  # its soft cap has no sdpa
WAYS = [
    ("q", "scale", (), 0),
    ("k", "scale", (), 0),
    ("v", "scale", ((1, 0),), 0),
    ("q", "mean", ((0, 1), (2, 0)), 0),
    ("q", "scale", (), 4),
    ("v", "mean", (), 4),
]
CASES = [(name, EAGER.get(name, "sdpa"), WAYS[0]) for name in tiny.WITH_HEADS]
CASES += [
    (name, "eager", WAYS[4])
    for name in ("llama_mha", "llama", "mistral", "gemma2", "qwen3", "gpt_neox", "gpt2", "phi3", "mixtral")
]
CASES += [("llama", "sdpa", way) for way in WAYS[1:]] + [("gpt_neox", "sdpa", WAYS[3]), ("qwen3", "sdpa", WAYS[1])]


@pytest.mark.parametrize(
    ("name", "attention", "way"), CASES, ids=lambda x: str(x) if isinstance(x, str) else "-".join(map(str, x))
)
def test_exact_scores_equal_the_naive_loop(name, attention, way):
    component, kind, group, shared = way
    model = tiny.heads(name, attention=attention, spread=8.0 if "gpt" in name else 4.0)
    weights = [p.clone() for p in model.parameters()]
    prompts = tiny.prompts(4, lengths=(6, 7), shared=shared)
    how = {"component": component, "kind": kind}
    ships, angles, z0 = naive.scores(model, prompts, group, **how)
    found = score_heads(model, prompts, group=group, tokens_at_once=25 if shared else 0, **how)
    assert np.nanmax(np.abs(found.ships - ships)) <= 1e-5 and np.array_equal(np.isnan(found.ships), np.isnan(ships))
    assert np.allclose(found.states, z0, atol=1e-5)
    # float32 states: arccos in the reference is what limits the comparison
    assert np.nanmax(np.abs(found.angles - angles)) <= 5e-3
    in_our_order = [ships.mean(0)[head] for head in ranked(found.mean())]
    assert all(a >= b - 2e-5 for a, b in itertools.pairwise(in_our_order))  # the same ranking, but for ties
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert np.nanmax(ships) > 1e-4  # the heads do something


def test_some_heads_are_scored_as_among_all():
    model, prompts = tiny.heads("llama"), tiny.prompts(6)
    every = score_heads(model, prompts)
    some = score_heads(model, prompts, heads=[(2, 1), (0, 3)])
    for head in ((2, 1), (0, 3)):
        assert np.allclose(some.ships[:, *head], every.ships[:, *head], atol=1e-6)
        assert some.angles[head] == pytest.approx(every.angles[head], rel=1e-5)
    assert np.isnan(some.mean()).sum() == 10 and some.passes < every.passes / 2


def test_an_adapted_projection_is_asked_as_a_whole():
    """A linear map of another class (an adapter) gives the same scores as its weight alone would."""

    class Adapted(torch.nn.Linear):
        pass

    model, prompts = tiny.heads("gpt_neox"), tiny.prompts(4)
    wanted = score_heads(model, prompts)
    for layer in model.gpt_neox.layers:
        layer.attention.dense.__class__ = Adapted
    assert np.allclose(score_heads(model, prompts).ships, wanted.ships, atol=1e-6)


def test_what_is_shared_is_run_once():
    model = tiny.heads("llama_mha")
    alike, apart = tiny.prompts(8, lengths=(12, 12), shared=10), tiny.prompts(8, lengths=(12, 12))
    assert score_heads(model, alike).passes < 0.5 * score_heads(model, apart).passes
    # the last layer runs one token, and a candidate nothing below its own layer: far below one pass per head and prompt
    assert score_heads(model, apart).passes < 0.7 * 12 * 8


def test_nothing_is_left_behind_after_an_error():
    model = tiny.heads("llama_mha").train()
    with pytest.raises(ZeroDivisionError), Engine(model, group=[(0, 0)]) as engine:
        next(iter(engine.groups(tiny.prompts(3))))
        1 / 0  # noqa: B018
    assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_broken_models_are_never_ranked():
    model = tiny.heads("llama_mha")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(RunError, match="prompt second gives logits"):
        score_heads(model, [[3, 4, 5], [3, 7, 5]], names=["first", "second"])
    fine = tiny.heads("llama_mha")
    with torch.no_grad():  # one head's output is infinite once it is a plain mean, and cancels before
        fine.model.layers[1].self_attn.o_proj.weight[:, :8] = 3e38
    with pytest.raises(RunError, match="not finite"):
        score_heads(fine, [[3, 4, 5], [3, 6, 5]], names=["first", "second"])


# --- parts of it --------------------------------------------------------------------------------------------------------
def test_kl_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 20)), rng.normal(size=(6, 20))
    p, q = scipy.special.softmax(a, axis=1) + 1e-12, scipy.special.softmax(b, axis=1) + 1e-12
    wanted = scipy.special.rel_entr(p, q).sum(1)
    assert np.allclose(kl(torch.tensor(a), torch.tensor(b)).numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
@pytest.mark.parametrize("r", [1, 3])
def test_leading_directions_and_angles_are_numpys_and_scipys(shape, r):
    rng = np.random.default_rng(1)
    a = rng.normal(size=shape) + 2.0
    b = a + 0.1 * rng.normal(size=shape)
    u, v = (np.linalg.svd(x, full_matrices=False)[0][:, :r] for x in (a, b))
    ours = [leading(torch.tensor(x), r) for x in (a, b)]
    for got, wanted in zip(ours, (u, v), strict=True):
        assert np.allclose(np.abs((got.numpy() * wanted).sum(0)), 1, atol=1e-8)
    wanted = np.degrees(scipy.linalg.subspace_angles(u, v)).sum()
    assert principal_angles(*ours).item() == pytest.approx(wanted, abs=1e-6)


def test_small_angles_survive():
    """1e-9 radians: arccos of the cosine would say 0."""
    u = torch.eye(5, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 1e-9, 0, 0, 0], dtype=torch.float64)[:, None]
    assert principal_angles(u, v).item() == pytest.approx(np.degrees(1e-9), rel=1e-6)
    assert principal_angles(u, -v).item() == pytest.approx(np.degrees(1e-9), rel=1e-6)
    constant = torch.ones(6, 3, dtype=torch.float64)
    assert principal_angles(leading(constant), leading(2 * constant)).item() == pytest.approx(0.0, abs=1e-6)


def test_the_prescreen_is_the_kl_where_changes_are_small():
    """With heads scaled by 0.97 the second-order term is nearly all of the KL; the mean over many sign draws finds it."""
    model, prompts = tiny.heads("llama_mha", spread=3.0, intermediate_size=40), tiny.prompts(3, lengths=(6, 6))
    how = {"component": "v", "epsilon": 0.97}
    exact = score_heads(model, prompts, generalized=False, **how).mean()
    approximate, _ = prescreen(model, prompts, draws=200, rng=np.random.default_rng(0), **how)
    assert np.allclose(approximate, exact, rtol=0.5, atol=exact.max() * 0.05)
    assert ranked(approximate)[0] == ranked(exact)[0]


def test_the_prescreen_works_on_frozen_and_grouped_models():
    model = tiny.heads("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found, _ = prescreen(model, tiny.prompts(4), component="k", rng=np.random.default_rng(0))
    assert found.shape == (3, 2) and (found > 0).all()
    again, _ = prescreen(model, tiny.prompts(4), component="k", rng=np.random.default_rng(0))
    assert np.array_equal(found, again)


def test_rank_biased_overlap_by_its_definition():
    rng = np.random.default_rng(3)
    for _ in range(20):
        a, b = ([(0, int(i)) for i in rng.permutation(12)[:8]] for _ in range(2))
        p, agreement = 0.9, [len(set(a[:d]) & set(b[:d])) / d for d in range(1, 9)]
        # the sum over all depths, with the agreement at depth 8 going on
        tail = agreement + [agreement[-1]] * 5000
        assert rank_biased_overlap(a, b) == pytest.approx((1 - p) * sum(x * p**d for d, x in enumerate(tail)), abs=1e-9)
    with pytest.raises(InputError, match="overlap"):
        rank_biased_overlap([], [])


def test_votes_count_the_prompts():
    ships = np.array([[[3.0, 1.0], [2.0, 0.0]], [[0.0, 1.0], [2.0, 3.0]]])
    assert votes(ships, 2) == {"1.0": 2, "0.0": 1, "1.1": 1}


# --- the verdict --------------------------------------------------------------------------------------------------------
def grid(values, n=40, seed=0):
    """(n, 2, 4) scores about these means, with a tenth of noise."""
    rng = np.random.default_rng(seed)
    return np.asarray(values)[None] * (1 + 0.1 * rng.normal(size=(n, 2, 4)))


FLAT = [[0.5, 0.4, 0.45, 0.5], [0.55, 0.4, 0.5, 0.45]]
ONE = [[0.01, 0.02, 0.01, 0.03], [0.01, 2.0, 0.02, 0.01]]


@pytest.mark.parametrize(
    ("harmful", "benign", "why"),
    [
        (ONE, None, ""),
        (ONE, [[0.01] * 4, [0.01, 0.1, 0.01, 0.01]], ""),
        (FLAT, None, "flat"),
        (ONE, [[0.01] * 4, [0.01, 1.5, 0.01, 0.01]], "benign prompts too"),
        ((np.array(ONE) / 500).tolist(), None, "too small"),
    ],
)
def test_a_head_is_named_only_by_the_rule(harmful, benign, why):
    said = verdict(grid(harmful), None if benign is None else grid(benign, seed=1), rng=np.random.default_rng(0))
    assert said["concentrated"] == (not why) and said["head"] == (None if why else "1.1")
    assert why in said["why"] and said["why"].startswith("not concentrated") == bool(why)


def test_the_difference_of_means_covers():
    """MOVER on two bootstrapped means of 40 holds the true difference in about 95 % of 150 rounds."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(150):
        a, b = rng.exponential(1.0, 40), rng.exponential(0.3, 40)
        gap = minus(mean_of(a, None, rng), mean_of(b, None, rng))
        hits += gap.low <= 0.7 <= gap.high
    assert 0.88 <= hits / 150 <= 0.987
