"""Baked ablation equals the hooked one on every architecture, in memory and on disk, and touches nothing else."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.edits.ablate_heads import ablate_heads, transplant_heads
from davylamp.models import hooks
from tests import tiny

NAMES = tiny.WITH_HEADS
IDS = torch.tensor([[3, 9, 4, 17, 30, 8, 21, 40]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def cut(model, heads, **options):
    return ablate_heads(model, heads=heads, rng=np.random.default_rng(0), **options)


def move(model, other, **options):
    return transplant_heads(model, other, rng=np.random.default_rng(0), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models, by name and seed."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(name, seed=0, **how):
        key = f"{name}-{seed}-{'-'.join(map(str, how.values()))}"
        if key not in made:
            made[key] = root / key
            tiny.heads(name, seed).save_pretrained(made[key], **how)
        return made[key]

    return folder


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("name", NAMES)
def test_baked_equals_hooked(name, component):
    """Two heads, one of them in the last layer: the same logits as with hooks, and other weights than named are bit-equal."""
    model = tiny.heads(name)
    kept = {key: value.clone() for key, value in model.named_parameters()}
    heads = [(0, 1), (2, 0)]
    with hooks.ablate_heads(model, heads, component=component, epsilon=1e-10):
        wanted = logits(model)
    assert cut(model, ("0.1", "2.0"), component=component) is model
    assert torch.allclose(logits(model), wanted, atol=2e-4, rtol=1e-4)
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, kept[key])}
    found = hooks.anatomy(model)
    site = hooks.COMPONENTS[component]
    taps = [found.tap(site, layer) if component == "v" else found.projection(site, layer) for layer, _ in heads]
    allowed = {f"{found.modules[tap.module]}.{leaf}" for tap in taps for leaf in ("weight", "bias")}
    assert changed and changed <= allowed
    if component == "v":
        assert not any(part in key for key in changed for part in ("v_proj", "qkv_proj", "c_attn", "query_key_value"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "qwen2", "mixtral", "llava", "qwen3"])
def test_a_folder_is_cut_as_the_model_in_memory(name, folders, tmp_path):
    source, out = folders(name), tmp_path / "out"
    assert cut(source, ("1.0", "1.1"), out=out, component="q") == out
    model = cut(tiny.heads(name), ("1.0", "1.1"))
    again = type(model).from_pretrained(out)
    ours = dict(model.named_parameters())
    assert all(torch.equal(value, ours[key]) for key, value in again.named_parameters())
    with safe_open(source / "model.safetensors", "pt") as old, safe_open(out / "model.safetensors", "pt") as new:
        assert set(old.keys()) == set(new.keys())
        differing = [key for key in old.keys() if not torch.equal(old.get_tensor(key), new.get_tensor(key))]  # noqa: SIM118
    assert 1 <= len(differing) <= 2  # a weight, and its bias if it has one that is not zero
    manifest = json.loads((out / "lineage.json").read_text())
    assert manifest["operation"] == "ablate_heads" and manifest["options"]["heads"] == ["1.0", "1.1"]
    assert manifest["options"]["component"] == "q" and manifest["options"]["ablated"] == ["q 1.0", "q 1.1"]
    assert manifest["options"]["written"] == (0.0 if name == "qwen3" else 1e-10)


def test_shards_and_half_precision(tmp_path):
    model = tiny.heads("llama").half()
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="12KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    cut(source, ("2.3",), out=tmp_path / "out", component="v", epsilon=0.5)
    again = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.float16
    wanted = model.model.layers[2].self_attn.o_proj.weight.clone()
    wanted[:, 24:] *= 0.5
    assert torch.equal(again.model.layers[2].self_attn.o_proj.weight, wanted)
    assert torch.equal(again.model.layers[1].self_attn.o_proj.weight, model.model.layers[1].self_attn.o_proj.weight)


def test_a_factor_is_baked_once(folders, tmp_path):
    source, once, twice = folders("llama_mha"), tmp_path / "once", tmp_path / "twice"
    cut(source, ("0.1",), out=once)
    with pytest.raises(InputError, match=r"head 0\.1 was ablated"):
        cut(once, ("0.1",), out=twice)
    assert not twice.exists()
    with pytest.warns(UserWarning, match="queries and keys"):
        cut(once, ("0.1",), out=twice, component="k")
    assert json.loads((twice / "lineage.json").read_text())["options"]["ablated"] == ["q 0.1", "k 0.1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut(once, ("0.2",), out=tmp_path / "other", component="k")


# --- transplant ------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama_mha", "llama", "gpt2", "gpt_neox", "phi3", "qwen3", "mixtral"])
def test_attention_and_mlp_make_a_whole(name):
    """Attention and MLPs of B in A, with B's other parameters already there, is B."""
    a, b = tiny.heads(name, 0), tiny.heads(name, 1)
    assert move(move(a, b, part="attention"), b, part="mlp") is a
    found, theirs = hooks.anatomy(a), hooks.anatomy(b)
    inside = {id(p) for part in ("self_attn", "attn", "attention", "mlp") for layer in found.layers
              for p in getattr(layer, part, nn.Module()).parameters()}  # fmt: skip
    wanted = dict(b.named_parameters())
    for key, value in a.named_parameters():
        if id(value) in inside:
            assert torch.equal(value, wanted[key]), key
    assert theirs.heads == found.heads and not torch.equal(logits(a), logits(b))  # the embeddings are still a's


@pytest.mark.parametrize("name", ["llama_mha", "llama", "gpt2", "gpt_neox", "phi3", "qwen2"])
def test_all_heads_moved_are_the_attention_but_for_output_biases(name):
    a, b, c = tiny.heads(name, 0), tiny.heads(name, 1), tiny.heads(name, 0)
    found = hooks.anatomy(a)
    every = tuple(f"{layer}.{head}" for layer in range(len(found.layers)) for head in range(found.heads))
    move(a, b, heads=every)
    move(c, b, part="attention")
    for (key, value), wanted in zip(a.named_parameters(), c.parameters(), strict=True):
        if not key.endswith(("attn.c_proj.bias", "dense.bias")):
            assert torch.equal(value, wanted), key


def test_one_head_moved_gives_that_heads_output(folders, tmp_path):
    """With one head of the first layer from B, that head's output is B's on A's input, and the other heads' are A's."""
    a, b = tiny.heads("llama_mha", 0), tiny.heads("llama_mha", 1)
    b.model.embed_tokens.weight.data.copy_(a.model.embed_tokens.weight.data)
    seen = []
    for model in (a, b):
        with torch.no_grad(), hooks.capture(model, "heads", layers=[0]) as found:
            model(input_ids=IDS, use_cache=False)
        seen.append(found["heads", 0])
    move(a, b, heads=("0.2",))
    with torch.no_grad(), hooks.capture(a, "heads", layers=[0]) as found:
        a(input_ids=IDS, use_cache=False)
    wanted = seen[0].clone()
    wanted[:, :, 2] = seen[1][:, :, 2]
    assert torch.allclose(found["heads", 0], wanted, atol=1e-5)
    out = move(folders("llama_mha", 0), folders("llama_mha", 1), heads=("0.2",), out=tmp_path / "out")
    assert json.loads((out / "lineage.json").read_text())["options"] == {"part": "heads", "heads": ["0.2"]}
    attention = type(a).from_pretrained(out).model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, a.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(attention.o_proj.weight, a.model.layers[0].self_attn.o_proj.weight)


# --- bad input ------------------------------------------------------------
def test_bad_heads_and_options(folders, tmp_path):
    model = tiny.heads("llama")
    for heads, options, words in (
        (("3.9",), {}, r"layer 3 head 9 \(model has 3 layers, 4 heads\)"),
        (("0.2",), {"component": "k"}, "2 KV heads"),
        ((), {}, "one head or more"),
        (("0.1",), {"epsilon": -1.0}, "epsilon"),
        (("0.1",), {"epsilon": float("nan")}, "epsilon"),
        (("0.1", "0.1"), {}, "twice"),
    ):
        with pytest.raises(InputError, match=words):
            cut(model, heads, **options)
    with pytest.raises(UnknownNameError):
        cut(model, ("0.1",), component="o")
    with pytest.raises(InputError, match="one model"):
        ablate_heads(model, model, heads=("0.1",), rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="needs out"):
        cut(folders("llama_mha"), ("0.1",))
    with pytest.raises(InputError, match="layer 9"):
        cut(folders("llama_mha"), ("9.1",), out=tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_norm_takes_only_zeros():
    with pytest.raises(InputError, match="norms its queries"):
        cut(tiny.heads("qwen3"), ("0.1",), epsilon=1e-3)
    model = cut(tiny.heads("qwen3"), ("0.1",), epsilon=1e-8)
    assert not model.model.layers[0].self_attn.q_proj.weight[16:32].any()


def test_adapters_tied_and_quantised_weights_are_refused(folders, tmp_path):
    class Adapted(nn.Linear):
        """Stands in for a LoRA layer: a linear map that is more than its weight."""

    model = tiny.heads("llama_mha")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(32, 32, bias=False)
    with pytest.raises(InputError, match="merge the adapter"):
        cut(model, ("0.1",))
    tied = tiny.heads("llama_mha")
    tied.model.layers[1].self_attn.q_proj.weight = tied.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(InputError, match="tied"):
        cut(tied, ("0.1",))
    quantised = tmp_path / "quantised"
    shutil.copytree(folders("llama_mha"), quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(InputError, match="quantised"):
        cut(quantised, ("0.1",), out=tmp_path / "out")
    with pytest.raises(InputError, match="no model folder"):
        cut(tmp_path, ("0.1",), out=tmp_path / "out")


def test_transplants_that_cannot_be():
    model, other = tiny.heads("llama"), tiny.heads("llama", 1)
    with pytest.raises(InputError, match=r"groups of 2: name whole groups, here 1\.2,1\.3"):
        move(model, other, heads=("1.2",))
    for options in ({}, {"heads": ("0.0",), "part": "attention"}):
        with pytest.raises(InputError, match="part heads"):
            move(model, other, **options)
    with pytest.raises(UnknownNameError):
        move(model, other, part="norms")
    with pytest.raises(InputError, match="other shapes"):
        move(model, tiny.heads("llama_mha"), part="attention")
    with pytest.raises(InputError, match="model to take from"):
        transplant_heads(model, part="mlp", rng=np.random.default_rng(0))
