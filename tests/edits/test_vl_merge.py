"""Merging a text model into a vision-language model by name, on the architectures that wrap one: closed form, vision parts, bad input."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from davylamp.core.errors import InputError  # noqa: E402
from davylamp.edits.merge import merge  # noqa: E402
from tests import tiny  # noqa: E402

T = tiny.T
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _llava(text):
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=T.CLIPVisionConfig(**CLIP), text_config=text, image_token_index=47)
    )


def _llava_next():
    config = T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(**CLIP), text_config=T.LlamaConfig(**tiny.SIZES), image_token_index=47,
        image_grid_pinpoints=[[16, 16]],
    )  # fmt: skip
    return T.LlavaNextForConditionalGeneration(config)


def _idefics3():
    config = T.Idefics3Config(
        vision_config={**CLIP},
        text_config=T.LlamaConfig(**tiny.SIZES),
        image_token_id=47,
        scale_factor=2,
        pad_token_id=0,
    )
    return T.Idefics3ForConditionalGeneration(config)


GEMMA = {**tiny.SIZES, "head_dim": 8}


def _paligemma():
    config = T.PaliGemmaConfig(
        vision_config={**CLIP, "projection_dim": 32}, text_config={**GEMMA, "model_type": "gemma"}, image_token_index=47,
        projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return T.PaliGemmaForConditionalGeneration(config)


def _qwen2_text():
    return T.Qwen2ForCausalLM(T.Qwen2Config(**tiny.SIZES))


MAKE = {
    "llava of llama": (lambda: _llava(T.LlamaConfig(**tiny.SIZES)), lambda: tiny.model("llama")),
    "llava of qwen2": (lambda: _llava(T.Qwen2Config(**tiny.SIZES)), _qwen2_text),
    "llava_next": (_llava_next, lambda: tiny.model("llama")),
    "qwen2_vl": (lambda: tiny.model("qwen2_vl"), _qwen2_text),
    "idefics3": (_idefics3, lambda: tiny.model("llama")),
    "paligemma": (_paligemma, lambda: T.GemmaForCausalLM(T.GemmaConfig(**GEMMA))),
}


def made(build, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.05)
    return model.eval()


def backbone(model):
    """The decoder without its head, wherever the class keeps it."""
    for path in ("model.language_model", "language_model.model", "model.text_model", "model"):
        part = model
        for name in path.split("."):
            part = getattr(part, name, None)
            if part is None:
                break
        if part is not None and hasattr(part, "layers"):
            return dict(part.named_parameters())
    raise AssertionError(type(model).__name__)


@pytest.mark.parametrize("family", MAKE)
def test_a_text_model_is_merged_into_the_vision_language_model_by_name(family):
    vl, text = (made(build, seed) for seed, build in enumerate(MAKE[family]))
    before = copy.deepcopy(vl)
    merged = merge(vl, text, weight=0.25, rng=np.random.default_rng(0))
    ours, theirs, was = backbone(merged), backbone(text), backbone(before)
    assert set(ours) == set(theirs) and len(ours) > 15
    for name, parameter in ours.items():
        exact = 0.75 * was[name].double() + 0.25 * theirs[name].double()
        assert torch.allclose(parameter.double(), exact, atol=1e-7), name
    inside = {id(p) for p in ours.values()}
    head = merged.get_output_embeddings().weight
    for (name, p), (_, q) in zip(merged.named_parameters(), before.named_parameters(), strict=True):
        if id(p) not in inside and p is not head:
            assert torch.equal(p, q), name  # tower and projector come from the vision-language model alone
    if head is not merged.get_input_embeddings().weight:
        exact = (
            0.75 * before.get_output_embeddings().weight.double() + 0.25 * text.get_output_embeddings().weight.double()
        )
        assert torch.allclose(head.double(), exact, atol=1e-7)


@pytest.mark.parametrize("family", ["llava of llama", "idefics3", "qwen2_vl"])
def test_from_folder_to_folder_it_gives_the_same_weights(family, tmp_path):
    folders = []
    for number, build in enumerate(MAKE[family]):
        folders.append(tiny.save(made(build, number), tmp_path / str(number)))
    models = [tiny.load(folder) for folder in folders]
    streamed = merge(*folders, out=tmp_path / "out", weight=0.25, rng=np.random.default_rng(0))
    merged = merge(*models, weight=0.25, rng=np.random.default_rng(0))
    again = tiny.load(streamed)
    for (name, p), (_, q) in zip(again.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_models_of_two_families_are_refused_with_the_first_differences():
    vl = made(MAKE["llava of llama"][0], 0)
    with pytest.raises(InputError):
        merge(vl, made(MAKE["llava of qwen2"][1], 1), weight=0.5, rng=np.random.default_rng(0))


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_a_coefficient_outside_of_0_and_1_needs_to_be_asked_for(weight):
    vl, text = (made(build, seed) for seed, build in enumerate(MAKE["llava of llama"]))
    with pytest.raises(InputError, match="extrapolate"):
        merge(vl, text, weight=weight, rng=np.random.default_rng(0))


def test_nan_names_the_tensor():
    vl, text = (made(build, seed) for seed, build in enumerate(MAKE["llava of llama"]))
    with torch.no_grad():
        text.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        merge(vl, text, weight=0.5, rng=np.random.default_rng(0))
