"""Input norms of a hooked pass, against dense arrays of everything that went into each layer."""

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from davylamp.core.errors import InputError
from davylamp.models.activations import input_norms, linear_weights, matching
from tests import tiny

FAMILIES = ("llama", "qwen2", "gpt2", "gemma", "phi3", "mixtral", "mistral", "opt", "qwen2_moe")


def build(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(tiny.config(name)).eval()


def sequences(count=7, seed=0):
    rng = np.random.default_rng(seed)
    return [(f"row {i}", rng.integers(3, 64, size=rng.integers(3, 14)).tolist()) for i in range(count)]


def dense(model, rows, weights):
    """{name: (rows, columns) squared norms over tokens} in float64, each row alone, from stored activations."""
    out = {name: [] for name in weights}
    for _, row in rows:
        stored = {}
        handles = [
            w.module.register_forward_pre_hook(
                lambda m, args, n=name, kept=stored: kept.__setitem__(n, args[0].detach().clone())
            )
            for name, w in weights.items()
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
        for handle in handles:
            handle.remove()
        for name, x in stored.items():
            x = x.double().numpy().reshape(-1, x.shape[-1])
            out[name].append((x**2).sum(axis=0))
    return {name: np.array(values) for name, values in out.items()}


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("norm", ["rms", "mean"])
def test_norms_are_those_of_the_stored_activations(name, norm):
    model, rows = build(name), sequences()
    plain = {key: weight for key, weight in linear_weights(model).items() if not weight.experts}
    assert plain and not any("embed" in key or "lm_head" in key or "wte" in key for key in plain)
    squares = dense(model, rows, plain)
    found = input_norms(model, rows, plain, norm=norm, width=4)
    for key in plain:
        wanted = np.sqrt(squares[key].mean(0)) if norm == "rms" else np.sqrt(squares[key]).mean(0)
        np.testing.assert_allclose(found.importance(key).numpy(), wanted, rtol=2e-5, atol=1e-7)
    assert found.sequences == 7 and not found.stopped and 0 < found.state_bytes <= found.limit_bytes
    assert int(found.tokens[next(iter(plain))].sum()) == sum(len(row) for _, row in rows)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("norm", ["rms", "mean"])
def test_stacked_experts_count_the_tokens_routed_to_them(name, norm, monkeypatch):
    model, rows = build(name), sequences()
    stacked = {key: weight for key, weight in linear_weights(model).items() if weight.experts}
    assert len(stacked) == 4
    found = input_norms(model, rows, stacked, norm=norm, width=4)
    fast = model(input_ids=torch.tensor([rows[0][1]])).logits
    model.set_experts_implementation("eager")
    places = {
        weight.parameter[e].data_ptr(): (key, e) for key, weight in stacked.items() for e in range(weight.experts)
    }
    squares = {(key, e): np.zeros((len(rows), weight.columns)) for key, weight in stacked.items() for e in range(4)}
    linear, current = F.linear, [0]

    def recording(x, matrix, bias=None):
        if matrix.data_ptr() in places and matrix.dim() == 2 and places[matrix.data_ptr()][0] in stacked:
            squares[places[matrix.data_ptr()]][current[0]] += (x.detach().double() ** 2).sum(0).numpy()
        return linear(x, matrix, bias)

    monkeypatch.setattr(F, "linear", recording)
    with torch.no_grad():
        for number, (_, row) in enumerate(rows):
            current[0] = number
            out = model(input_ids=torch.tensor([row])).logits
            if not number:
                assert torch.allclose(out, fast, atol=1e-5)
    for (key, expert), values in squares.items():
        wanted = np.sqrt(values.mean(0)) if norm == "rms" else np.sqrt(values).mean(0)
        np.testing.assert_allclose(found.importance(key)[expert].numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_padding_and_batching_change_nothing_and_hooks_leave_no_trace():
    model, rows = build("llama"), sequences(9)
    weights = linear_weights(model)
    before = model(input_ids=torch.tensor([rows[0][1]])).logits
    alone, together = (input_norms(model, rows, weights, width=width) for width in (1, 9))
    for key in weights:
        assert torch.allclose(alone.means[key], together.means[key], rtol=1e-5, atol=1e-7)
    assert torch.equal(model(input_ids=torch.tensor([rows[0][1]])).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_q_k_and_v_share_one_sum():
    model, rows = build("llama"), sequences()
    three = matching(linear_weights(model), ["q_proj", "k_proj", "v_proj"])
    found = input_norms(model, rows, three)
    assert found.limit_bytes == 4 * 32 * 6 and found.state_bytes == found.limit_bytes // 3


def test_half_precision_is_squared_in_float32():
    model, rows = build("llama").to(torch.bfloat16), sequences()
    weights = matching(linear_weights(model), ["down_proj"])
    found, wanted = input_norms(model, rows, weights, width=1), dense(model, rows, weights)
    for key in weights:
        assert found.means[key].dtype == torch.float32
        np.testing.assert_allclose(found.means[key].numpy(), wanted[key].mean(0), rtol=1e-5)


class Routed(nn.Module):
    """Experts as plain layers behind a router, as older models have them: the first sees even tokens, the second none."""

    def __init__(self, width):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1]).clone()
        even = flat[:, 0] > 0
        flat[even] = self.experts[0](flat[even])
        return flat.reshape(x.shape)


@pytest.mark.parametrize("norm", ["rms", "mean"])
def test_experts_as_plain_layers_are_read_one_text_at_a_time(norm):
    model, rows = build("llama"), sequences()
    torch.manual_seed(0)
    model.model.layers[0].mlp = Routed(32)
    weights = {k: w for k, w in linear_weights(model).items() if "experts" in k}
    found = input_norms(model, rows, weights, norm=norm, width=4)
    busy = next(key for key in weights if "experts.0" in key)
    squares = dense(model, rows, {busy: weights[busy]})[busy]
    wanted = np.sqrt(squares.mean(0)) if norm == "rms" else np.sqrt(squares).mean(0)
    np.testing.assert_allclose(found.importance(busy).numpy(), wanted, rtol=2e-5)
    assert set(found.means) == {busy}, "an expert that nothing was routed to has no statistics"


class Moody(nn.Module):
    """Two layers that are fed one tensor for the first batch and two later."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.calls = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False), 0

    def forward(self, x):
        self.calls += 1
        return self.one(x) + self.two(x if self.calls == 1 else x * 2)


def test_sums_are_kept_apart_when_inputs_part_later():
    model, rows = build("llama"), sequences(4)
    model.model.layers[1].mlp = Moody()
    weights = {k: w for k, w in linear_weights(model).items() if k.endswith(("one.weight", "two.weight"))}
    found = input_norms(model, rows, weights, width=1)  # read again from the start, so `two` gets 2 x throughout
    one, two = (found.means[key] for key in weights)
    assert torch.allclose(two, one * 4, rtol=1e-5)


def test_it_stops_early_and_says_so():
    model, rows = build("llama"), sequences(12)
    found = input_norms(model, rows, linear_weights(model), width=2, enough=lambda so_far: so_far.sequences >= 4)
    assert found.sequences == 4 and found.stopped


def test_activations_that_are_not_finite_name_layer_and_row():
    model, rows = build("llama"), sequences(5)
    model.model.embed_tokens.weight.data[63] = float("inf")
    rows = [(name, [i for i in row if i != 63]) for name, row in rows]
    rows[3] = ("row 3", [5, 63, 7])
    weights = linear_weights(model)
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is not finite at row row 3"):
        input_norms(model, rows, weights)


def test_bad_input():
    model = build("llama")
    weights = linear_weights(model)
    with pytest.raises(InputError, match="needs rows"):
        input_norms(model, [], weights)
    packed = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.model.layers[0].mlp.down_proj = packed(48, 32)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj\.weight is quantised"):
        input_norms(model, sequences(2), linear_weights(model))
