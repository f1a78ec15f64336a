"""`interp layers`: the gap, the probes and the shifts against independent ways to compute them, and planted differences found."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import RidgeClassifier

from davylamp.core.errors import InputError, RunError
from davylamp.core.nouns import Case, Message
from davylamp.interp._prompts import encode
from davylamp.interp.layers import (
    cka,
    cosine_pairs,
    last_states,
    layers,
    probe,
    rank_correlation,
    safety_band,
    swapped,
    weight_shift,
)
from davylamp.models import hooks
from davylamp.report import figures
from tests import tiny


def rows(n, kind, seed=0):
    """Harmful rows begin with w1, benign ones with w2; the rest is random."""
    rng = np.random.default_rng(seed)
    return [
        Case(
            f"{kind}-{i}",
            (
                Message(
                    "user",
                    f"{'w1' if kind == 'bad' else 'w2'} "
                    + " ".join(f"w{k}" for k in rng.integers(5, 60, size=1 + i % 3)),
                ),
            ),
            meta={"label": "unsafe" if kind == "bad" else "safe"},
        )
        for i in range(n)
    ]


GIVEN = rows(20, "bad") + rows(20, "good", 1)


def look(model, given=GIVEN, **options):
    return layers(model, given, tokenizer=tiny.tokenizer(), rng=np.random.default_rng(0), **options)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"])
def test_states_are_the_librarys_hidden_states(name):
    model, prompts = tiny.heads(name), tiny.prompts(7)
    states = last_states(model, prompts)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer in range(len(states) - 1):  # the library norms the last one
            assert np.allclose(states[layer, i], hidden[layer + 1][0, -1].numpy(), atol=1e-3, rtol=1e-4)


def test_a_result_is_plain_and_drawable():
    found = look(tiny.heads("llama"), other=tiny.heads("llama", 1))
    assert len(found["cosine_gap"]) == len(found["weight_shift"]) == len(found["state_cka"]) == 3
    assert {e.name for e in found.pop("estimates")} == {"cosine_gap", "probe_accuracy", "weight_shift", "state_shift"}
    assert len(figures.views(found["figures"])) == 2
    json.dumps(found, allow_nan=False)


def test_the_gap_is_found_where_it_was_planted():
    """Classes that part in layer 2 of 4, and a control of one class split in two, which must not show it."""
    rng = np.random.default_rng(0)
    bad = np.arange(200) < 100
    base = rng.normal(size=(200, 32)) + 3.0
    gaps, control = [], []
    for layer in range(4):
        states = base + (layer >= 2) * (layer - 1) * np.where(bad, 2.0, -2.0)[:, None] * np.eye(32)[0] * 4
        for out, labels in ((gaps, bad), (control, rng.permutation(bad))):
            same, across = cosine_pairs(states[~labels], states[labels], 4000, rng)
            out.append(float((same - across).mean()))
    assert max(map(abs, gaps[:2])) < 0.01 and gaps[2] > 0.15 and gaps[3] > gaps[2] and max(map(abs, control)) < 0.05
    assert safety_band(gaps)[1] in (2, 3)


def test_pairs_never_pair_a_prompt_with_itself():
    rng = np.random.default_rng(0)
    same, _ = cosine_pairs(np.eye(5), np.ones((3, 5)), 2000, rng)
    assert not same.any()


def test_bands():
    assert safety_band([0.0, 0.0, 0.1, 0.3, 0.31]) == (2, 3)
    assert safety_band([0.3, 0.2, 0.1]) is None and safety_band([0.1]) is None
    assert safety_band([0.0, 0.5, 0.4, 0.45]) == (1, 1)


def test_the_probe_is_sklearns_ridge():
    """On folds of equal classes the probe's signs are those of scikit-learn's ridge classifier with the same penalty."""
    rng = np.random.default_rng(2)
    labels = np.tile([True, False], 50)
    states = rng.normal(size=(100, 20)) + labels[:, None] * np.linspace(0, 1, 20) * 0.6
    groups = [f"pair {i // 2}" for i in range(100)]
    right = probe(states, labels, groups, np.random.default_rng(0))
    order = list(dict.fromkeys(groups))
    drawn = np.random.default_rng(0).permutation(50)
    folds = {order[i]: k % 5 for k, i in enumerate(drawn)}
    fold = np.array([folds[group] for group in groups])
    for k in range(5):
        train = fold != k
        middle = (states[train & labels].mean(0) + states[train & ~labels].mean(0)) / 2
        x = states - middle
        alpha = 1e-2 * (x[train] ** 2).sum() / train.sum()
        fitted = RidgeClassifier(alpha=alpha, fit_intercept=False).fit(x[train], labels[train])
        assert np.array_equal(right[~train], fitted.predict(x[~train]) == labels[~train])
    assert 0.7 < right.mean() < 1.0
    shuffled = probe(states, rng.permutation(labels), groups, np.random.default_rng(0))
    assert 0.3 < shuffled.mean() < 0.65  # the control: labels that say nothing


def test_similarity_and_ranks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 5)), rng.normal(size=(30, 4))
    centre = np.eye(30) - 1 / 30
    k, l_ = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    assert cka(a, b) == pytest.approx(np.trace(k @ l_) / np.sqrt(np.trace(k @ k) * np.trace(l_ @ l_)), abs=1e-9)
    assert cka(a, a @ np.linalg.qr(rng.normal(size=(5, 5)))[0] * 3) == pytest.approx(1.0)
    x, y = rng.integers(4, size=9).tolist(), rng.integers(4, size=9).tolist()
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None and rank_correlation([1] * 5, [1, 2, 3, 4, 5]) is None


def test_shifts_are_where_the_weights_moved():
    model, other = tiny.heads("llama"), tiny.heads("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    moved = weight_shift(hooks.anatomy(model), hooks.anatomy(other))
    assert moved[0][0] == moved[2][0] == 0.0
    assert moved[1][0] == pytest.approx(0.5 / 7, abs=1e-6) and moved[1][1] == pytest.approx(1.0, abs=1e-6)
    found = look(model, other=other)
    assert found["state_shift"][0] == pytest.approx(0.0, abs=1e-9) and found["state_shift"][1] > 1e-6
    assert any("equal weights" in note for note in look(model, other=model)["notes"])


def test_a_swapped_layer_is_the_others_and_comes_back():
    model, other = tiny.heads("llama"), tiny.heads("llama", 1)
    ids = torch.tensor([encode(model, tiny.tokenizer(), GIVEN[:1])[0]])
    with torch.no_grad():
        before = model(ids).logits
        with swapped(hooks.anatomy(model), hooks.anatomy(other), 1):
            between = model(ids).logits
        patched = tiny.heads("llama")
        patched.model.layers[1].load_state_dict(other.model.layers[1].state_dict())
        assert torch.equal(between, patched(ids).logits) and not torch.equal(between, before)
        with pytest.raises(ZeroDivisionError), swapped(hooks.anatomy(model), hooks.anatomy(other), 0):
            1 / 0  # noqa: B018
        assert torch.equal(model(ids).logits, before)
    found = look(model, other=other, judge="refusal", new_tokens=2)
    assert sum(e.name == "compliance" for e in found["estimates"]) == 4


def test_bad_input():
    model = tiny.heads("llama")
    with pytest.raises(InputError, match="10 harmful and 10 benign"):
        look(model, rows(20, "bad") + rows(3, "good"))
    with pytest.raises(InputError, match="pairs"):
        look(model, pairs=1)
    with pytest.raises(InputError, match="second model"):
        look(model, judge="refusal")
    with pytest.raises(InputError, match="share a vocabulary"):
        look(model, other=tiny.heads("llama", vocab_size=50))
    gpt = tiny.heads("llama")
    gpt.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 41, bias=False)
    with pytest.raises(InputError, match=r"not of one family.*layers\.0\.mlp\.up_proj"):
        look(model, other=gpt)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(RunError, match="bad-0 gives states"):
        look(model)
