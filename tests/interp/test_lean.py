"""The lean second half of a layer: what the library's own modules give, and nothing where the layer is of another kind."""

import pytest

pytest.importorskip("torch")

import torch
import transformers

from davylamp.interp._lean import SecondHalf
from davylamp.interp._scores import score_heads
from davylamp.models.hooks import capture
from tests.interp.naive import scores as naive_scores

SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def model_of(name, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def around(model):
    """(before, after) the second half of the first layer, (2, 7, width)."""
    with torch.no_grad(), capture(model, "layer_input", "attention", "layer") as seen:
        model(torch.randint(60, (2, 7), generator=torch.Generator().manual_seed(1)))
    return seen["layer_input", 0] + seen["attention", 0], seen["layer", 0]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_candidates_are_what_the_layer_gives(name):
    model = model_of(name)
    layer, (before, after) = model.model.layers[0], around(model)
    half = SecondHalf.of(layer, before, after)
    assert half is not None
    x, change, through = before.flatten(0, 1), torch.randn(3, 14, 8), torch.randn(3, 8, 32)
    with torch.no_grad():
        found = half.changed(x, half.projected(x), change, through)
        moved = x + torch.bmm(change, through)
        theirs = moved + layer.mlp(layer.post_attention_layernorm(moved))
        assert (found - theirs).abs().max() <= 2e-5 * theirs.abs().max()
        assert torch.allclose(half.tiled(before), layer.mlp(before), atol=1e-6)


def test_other_layers_are_left_to_their_modules():
    gemma = model_of("Gemma2", head_dim=8)
    with torch.no_grad():  # as trained ones are: (1 + weight), which Llama's form does not give
        gemma.model.layers[0].post_attention_layernorm.weight.fill_(0.3)
    assert SecondHalf.of(gemma.model.layers[0], *around(gemma)) is None
    llama = model_of("Llama")
    layer, (before, after) = llama.model.layers[0], around(llama)
    assert SecondHalf.of(layer, before, after * 1.01) is None  # a layer that gives something else
    handle = layer.mlp.up_proj.register_forward_hook(lambda module, args, output: output)
    assert SecondHalf.of(layer, before, after) is None
    handle.remove()
    assert SecondHalf.of(model_of("Llama", mlp_bias=True).model.layers[0], before, after) is None


def test_many_rows_are_taken_in_parts(monkeypatch):
    from davylamp.interp import _lean

    model = model_of("Llama")
    prompts = torch.randint(60, (5, 9), generator=torch.Generator().manual_seed(2)).tolist()
    whole = score_heads(model, prompts).ships
    monkeypatch.setattr(_lean, "ROWS", 4)
    assert abs(score_heads(model, prompts).ships - whole).max() <= 1e-6
    assert abs(whole - naive_scores(model, prompts)[0]).max() <= 1e-6
