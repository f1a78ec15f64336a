"""The target by name, erased weights, ESD and filters, and pairs that cannot be compared."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Message
from davylamp.models.concept_removal import EmbeddingFilter, KeywordFilter, erase
from davylamp.models.diffusion import DiffusionTarget, load, read_weights, with_core
from davylamp.models.painter import Painter
from davylamp.models.protection import Protection
from davylamp.models.targets import load_target
from tests import tiny_pipelines

torch.set_num_threads(1)


def ask(target, text, **settings):
    return asyncio.run(target([Message("user", text)], seed=3, **settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny_pipelines.pipeline("sd").save_pretrained(path)
    return path


def test_target_by_name_paints_under_its_protection(folder):
    plain, guarded = (load_target(f"diffusion/{folder}:{more}steps=3") for more in ("", "negative=circle,"))
    text = "a red circle on black"
    assert len(ask(plain, text).media) == 3 and ask(plain, text, pictures=1).media == ask(plain, text).media[:1]
    assert ask(plain, text).media != ask(guarded, text).media
    assert plain.identity["sha256"] == guarded.identity["sha256"] and plain.name != guarded.name
    assert (
        load(f"{folder}:negative=red, blue,steps=2").protected.protection.negative == "red, blue"
    )  # a value may hold commas
    assert ask(load(f"{folder}:sld=MAX,concept=circle,steps=2,pictures=2,device=cpu"), text).text == ""
    with pytest.raises(UnknownNameError, match="no setting of a text-to-image target named 'max_tokens'"):
        ask(plain, text, max_tokens=3)


@pytest.mark.parametrize(
    "spec, problem",
    [
        ("PATH:sld=HIGH,concept=a", "no SLD strength named 'HIGH'"),
        ("PATH:levels=3", "no option of a diffusion target named 'levels'"),
        ("PATH:steps=many", "must be numbers"),
        ("PATH:pictures=0", "1 picture or more"),
        ("PATH:half", "read like negative=TEXT"),
        ("PATH:erased=nowhere.safetensors", "there is no file nowhere.safetensors"),
        ("nowhere/at/all", "could not be loaded"),
    ],
)
def test_names_that_are_none(spec, problem, folder):
    with pytest.raises(InputError, match=problem):
        load(spec.replace("PATH", str(folder)))


def test_two_pipelines_with_other_embeddings_are_not_compared(folder, tmp_path):
    tiny_pipelines.pipeline("sd", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="different vocabularies or token embeddings"):
        load(f"{folder}:ordinary={tmp_path / 'other'}")
    torch.save({"conv_in.bias": torch.ones(8)}, tmp_path / "w.pt")
    erased = load(f"{folder}:erased={tmp_path / 'w.pt'},steps=1")
    assert torch.equal(erased.protected.core.conv_in.bias, torch.ones(8)) and "erased" in erased.identity
    assert not torch.equal(erased.ordinary.core.conv_in.bias, torch.ones(8))


def test_erased_weights_that_do_not_fit(tmp_path):
    pipe = tiny_pipelines.pipeline("sd")
    weights = {f"layer.{i}": torch.zeros(1) for i in range(7)} | {"conv_in.bias": torch.zeros(99)}
    with pytest.raises(InputError, match=r"8 keys do not fit the network: layer.0 \(unknown\)") as caught:
        with_core(pipe, weights)
    assert str(caught.value).count("unknown") == 5
    with pytest.raises(InputError, match=r"conv_in.bias \(\(99,\), expected \(8,\)\)"):
        with_core(pipe, {"conv_in.bias": torch.zeros(99)})
    torch.save({"conv_in.bias": torch.ones(8)}, tmp_path / "w.pt")
    changed = with_core(pipe, read_weights(tmp_path / "w.pt"))
    assert torch.equal(changed.unet.conv_in.bias, torch.ones(8)) and not torch.equal(
        pipe.unet.conv_in.bias, torch.ones(8)
    )
    assert changed.vae is pipe.vae
    (tmp_path / "bad.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(tmp_path / "bad.safetensors")


def test_models_with_other_schedules_are_not_compared():
    one, other = tiny_pipelines.pipeline("sd"), tiny_pipelines.pipeline("sd")
    other.scheduler.register_to_config(beta_end=0.5)
    with pytest.raises(InputError, match=r"different schedules \(beta_end\): 0.02 and 0.5"):
        DiffusionTarget(Painter(other), Painter(one))
    with pytest.raises(InputError, match="different families: sdxl and sd"):
        DiffusionTarget(Painter(one), Painter(tiny_pipelines.pipeline("sdxl")))


@pytest.mark.slow
def test_esd_moves_towards_its_equation_and_touches_nothing_else():
    """After training, the prediction for the erased word is nearer to 2 eps(z) - eps(z, c) (equation 7) on fresh latents."""
    pipe = tiny_pipelines.pipeline("sd")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    weights = erase(pipe, ["circle"], rng=np.random.default_rng(0), steps=60, lr=1e-2)
    assert all("attn2" in name for name in weights)
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())
    old, new = Painter(pipe), Painter(with_core(pipe, weights))
    latents, at = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((16,), 500)
    said, free = ({k: v.expand(16, *v.shape[1:]) for k, v in old.encode([t]).items()} for t in ("circle", ""))
    with torch.no_grad():
        goal = 2 * old.predict(latents, at, free) - old.predict(latents, at, said)
        far, near = ((painter.predict(latents, at, said) - goal).square().mean() for painter in (old, new))
    assert near < 0.7 * far
    rest = erase(pipe, ["circle"], rng=np.random.default_rng(0), steps=1, part="u")
    assert rest and not any("attn2" in name for name in rest)
    for bad in ({"concepts": []}, {"concepts": [" "]}, {"steps": 0}, {"eta": 0.0}):
        with pytest.raises(InputError, match="ESD needs"):
            erase(pipe, **{"concepts": ["a"], "rng": np.random.default_rng(0), **bad})


def test_filters_of_prompts():
    painter = Painter(tiny_pipelines.pipeline("sd"))
    harmless = ["a red square on black", "the green cross"]
    assert KeywordFilter(["a ball on black"], harmless=harmless).words == {"ball"}
    close = EmbeddingFilter(painter, ["a ball on black"], harmless=harmless)
    assert close.refuses("a ball on black") and not any(close.refuses(text) for text in harmless)


def test_protection_needs_no_family_but_sld():
    assert Protection(negative="circle").guides and not Protection().guides
