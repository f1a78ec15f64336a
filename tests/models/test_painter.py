"""Every family of pipelines opened; guidance against diffusers' own; what cannot be used."""

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.models import painter as painting
from davylamp.models.painter import Painter, quiet
from davylamp.models.protection import SLD, SLD_NAMES, Protection, sld_guidance
from tests import tiny_pipelines

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sd():
    return tiny_pipelines.pipeline("sd")


@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_embeddings_in_the_place_of_tokens(family):
    """The table's own rows put in by hand give the pipeline's own encoding; others change it; hooks and tokenizers are as before."""
    painter = Painter(tiny_pipelines.pipeline(family), steps=2, size=16)
    assert painter.family == family
    texts = ["a red circle", "red"]  # of unequal length
    rows = [painter.ids(text) for text in texts]
    plain = painter.encode(texts)
    soft = torch.zeros(2, 3, painter.table.shape[1])
    for i, row in enumerate(rows):
        soft[i, : len(row)] = painter.table[row]
    before = painter.pipe.tokenizer
    same = painter.inject(rows, soft)
    for key, value in plain.items():
        assert torch.allclose(same[key].float(), value.float(), atol=1e-5), key
    moved = (soft + torch.randn_like(soft)).requires_grad_()
    other = painter.inject(rows, moved)["embeds"]
    assert not torch.allclose(other, plain["embeds"], atol=1e-3)
    other.sum().backward()
    assert moved.grad[0].abs().sum() > 0
    assert moved.grad[1, 1:].abs().sum() == 0  # places behind the shorter prompt's end are not read
    assert painter.pipe.tokenizer is before
    assert torch.allclose(painter.encode(texts)["embeds"], plain["embeds"])


@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_paints_and_predicts(family):
    painter = Painter(tiny_pipelines.pipeline(family), steps=2, size=16)
    picture = painter.paint(["a red circle"], seeds=[3])
    assert picture.shape == (1, 16, 16, 3) and picture.dtype == np.uint8
    assert (picture == painter.paint(["a red circle"], seeds=[3])).all()
    assert (picture != painter.paint(["a red circle"], seeds=[4])).any()
    latents = painter.latents(torch.from_numpy(picture.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1))
    at = torch.tensor([500])
    noised = painter.noised(latents, torch.randn_like(latents), at)
    assert painter.predict(noised, at, painter.encode(["a red circle"])).shape == latents.shape


def test_flow_matching_noise_is_the_schedulers():
    painter = Painter(tiny_pipelines.pipeline("sd3"), steps=2)
    scheduler = painter.pipe.scheduler
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    at = scheduler.timesteps[[100, 700]]
    assert torch.allclose(painter.noised(latents, noise, at), scheduler.scale_noise(latents, at, noise), atol=1e-5)


def test_noise_is_that_of_the_training_schedule(sd):
    """Also after sampling, when DPM-Solver's own `add_noise` knows only the few steps that it has just taken."""
    from diffusers import DDPMScheduler

    painter = Painter(sd, steps=2)
    painter.paint(["a"], [0])
    latents, noise, at = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([1, 333, 998])
    with quiet():
        wanted = DDPMScheduler.from_config(sd.scheduler.config).add_noise(latents, noise, at)
    assert torch.allclose(painter.noised(latents, noise, at), wanted, atol=1e-6)


@pytest.mark.parametrize("level", SLD)
def test_sld_is_diffusers_own(level, sd):
    """Ten steps of guidance with momentum beside StableDiffusionPipelineSafe's, and its presets."""
    with quiet():
        from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig
    settings = dict(zip(SLD_NAMES, SLD[level], strict=True))
    assert settings == getattr(SafetyConfig, level)
    theirs = Painter(sd, Protection(sld=level, concept="circle")).safe
    momentum, their_momentum = torch.zeros(2, 4, 8, 8), None
    for i in range(settings["sld_warmup_steps"], settings["sld_warmup_steps"] + 10):
        free, text, concept = torch.randn(3, 2, 4, 8, 8) * 0.02
        taken, momentum = sld_guidance(text, free, concept, momentum, level)
        guidance, their_momentum = theirs.perform_safety_guidance(
            True, their_momentum, text - free, [text, free, concept], i, settings["sld_guidance_scale"], settings["sld_warmup_steps"],
            settings["sld_threshold"], settings["sld_momentum_scale"], settings["sld_mom_beta"],
        )  # fmt: skip
        assert torch.allclose(text - free - taken, guidance, atol=1e-5)
        assert torch.allclose(momentum, their_momentum, atol=1e-5)


def test_protections_change_the_picture_as_the_pipelines_do(sd):
    plain = Painter(sd, steps=3).paint(["a red circle"], [1])
    negative = Painter(sd, Protection(negative="circle"), steps=3).paint(["a red circle"], [1])
    with quiet():
        own = sd("a red circle", negative_prompt="circle", num_inference_steps=3, guidance_scale=7.5, output_type="np",
                 generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    assert (negative == np.round(own * 255).astype(np.uint8)).all()
    assert (negative != plain).any()
    assert (Painter(sd, Protection(sld="MAX", concept="circle"), steps=3).paint(["a red circle"], [1]) != plain).any()


def test_what_cannot_be_used(sd):
    with pytest.raises(UnknownNameError, match=r"no SLD strength named 'HIGH'.*WEAK"):
        Protection(sld="HIGH", concept="circle")
    with pytest.raises(InputError, match="concept it steers away from"):
        Protection(sld="MAX")
    with pytest.raises(InputError, match="not both"):
        Protection(negative="a", sld="MAX", concept="a")
    with pytest.raises(InputError, match="guidance scale must be above 0, got 0"):
        Painter(sd, guidance=0)
    with pytest.raises(InputError, match="has 40 tokens and the text encoder takes 22"):
        Painter(sd, steps=1).paint(["circle " * 40], [0])
    with pytest.raises(InputError, match="one length, got 1 and 2"):
        Painter(sd, steps=1).paint(["circle"], [0, 1])
    with pytest.raises(InputError, match="not for StableDiffusionXLPipeline"):
        Painter(tiny_pipelines.pipeline("sdxl"), Protection(sld="MAX", concept="circle"))
    with pytest.raises(InputError, match="no known family"):
        painting.family_of(object())
