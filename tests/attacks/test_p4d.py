"""The search against brute force and central differences; its templates, baselines and errors."""

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch

from davylamp.attacks._p4d import METHODS, Plan, Search, Task, plain_tokens, project, protected_prediction, template
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.models.diffusion import DiffusionTarget
from davylamp.models.painter import Painter, quiet
from davylamp.models.protection import Protection
from tests import tiny_pipelines

torch.set_num_threads(1)
PROMPT = "a red circle on black"


@pytest.fixture(scope="module")
def sd():
    return tiny_pipelines.pipeline("sd")


def search(pipe, method="p4d_n", protection=None, prompts=(PROMPT,), seed=0, clip=None, **plan):
    target = DiffusionTarget(Painter(pipe, protection, steps=2, clip=clip, size=16), Painter(pipe, steps=2, size=16))
    pictures = np.random.default_rng(5).integers(0, 256, (len(prompts), 16, 16, 3), dtype=np.uint8)
    tasks = [Task(text, picture, 0, 3.0) for text, picture in zip(prompts, pictures, strict=True)]
    return Search(target, tasks, Plan(method, **{"tokens": 4, "check": 2, **plan}), np.random.default_rng(seed))


def test_projection_is_brute_force():
    rng = np.random.default_rng(0)
    table, soft = rng.standard_normal((50, 6)), rng.standard_normal((3, 4, 6))
    allowed = rng.permutation(50)[:20]
    found = project(torch.tensor(soft), torch.tensor(table), torch.tensor(allowed)).numpy()
    for i in range(3):
        for j in range(4):
            near = [soft[i, j] @ table[k] / np.linalg.norm(soft[i, j]) / np.linalg.norm(table[k]) for k in allowed]
            assert found[i, j] == allowed[int(np.argmax(near))]


@pytest.mark.parametrize(
    "protection", [None, Protection(negative="circle"), Protection(sld="WEAK", concept="circle")], ids=str
)
def test_gradient_is_that_of_central_differences(protection):
    pipe = tiny_pipelines.pipeline("sd")
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.double()
    one = search(pipe, protection=protection, timesteps=2)
    ids = one.ids()
    one.table = one.table.double()
    draw = tuple(x.double() if x.is_floating_point() else x for x in one.draw())
    soft = one.table[ids].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(one.losses(soft, ids, draw).sum(), soft)
    direction = torch.randn(soft.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (one.losses(soft + sign * step * direction, ids, draw).sum() for sign in (1, -1))
    numeric, own = float((ahead - behind) / (2 * step)), float((gradient * direction).sum())
    assert abs(numeric - own) < 1e-3 * abs(numeric)


def test_guided_prediction_paints_the_pipelines_picture(sd):
    """A sampling loop over the objective's own guided prediction ends in the pipeline's picture under a negative prompt."""
    painter = Painter(sd, Protection(negative="circle"), steps=4)
    with quiet():  # diffusers' schedulers warn of numpy's next version
        wanted = sd(PROMPT, negative_prompt="circle", num_inference_steps=4, guidance_scale=3.0, output_type="latent",
                    generator=torch.Generator().manual_seed(2)).images  # fmt: skip
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        sd.scheduler.set_timesteps(4)
    fixed, said = {"free": painter.encode(["circle"])}, painter.encode([PROMPT])
    with torch.no_grad():
        for at in sd.scheduler.timesteps:
            got = protected_prediction(
                painter, latents, at.expand(1), said, fixed=fixed, scale=torch.tensor(3.0), form="sampler"
            )
            latents = sd.scheduler.step(got, at, latents).prev_sample
    assert torch.allclose(latents, wanted, rtol=1e-4, atol=1e-3)


def test_both_forms_of_sld_as_written(sd):
    """The published objective w (e_c - mu e_s), and the sampler's with momentum at its fixed point, recomputed from single predictions."""
    painter = Painter(sd, Protection(sld="STRONG", concept="circle"))
    latents, at, w = torch.randn(2, 4, 8, 8), torch.tensor([300, 800]), 3.0
    free, said, concept = (
        {k: v.expand(2, *v.shape[1:]) for k, v in painter.encode([t]).items()} for t in ("", PROMPT, "circle")
    )
    fixed = {"free": painter.encode([""]), "concept": painter.encode(["circle"])}
    with torch.no_grad():
        e_u, e_c, e_s = (painter.predict(latents, at, x) for x in (free, said, concept))
        got = {form: protected_prediction(painter, latents, at, said, fixed=fixed, scale=torch.tensor(w), form=form)
               for form in ("published", "sampler")}  # fmt: skip
    mu = torch.clamp(2000 * (e_c - e_s).abs(), max=1) * ((e_c - e_s) < 0.025)
    assert torch.allclose(got["published"], w * (e_c - mu * e_s), atol=1e-5)
    assert torch.allclose(got["sampler"], e_u + w * (e_c - e_u - mu * (e_s - e_u) / (1 - 0.5)), atol=1e-5)


def test_template_k_counts_as_published():
    for length in range(1, 12):
        for every in (1, 2, 3, 5):
            found = template(list(range(100, 100 + length)), "k", Plan(every=every))
            assert sum(place is None for place in found) == length // every + 1
            assert [place for place in found if place is not None] == list(range(100, 100 + length))
            assert all((place is None) == (i % (every + 1) == 0) for i, place in enumerate(found))


@pytest.mark.slow
def test_frozen_words_stay_in_order_after_200_iterations(sd):
    one = search(sd, "p4d_k", check=200, decay=0.5)
    start = one.soft.clone()
    (candidate,) = next(one.candidates())
    assert torch.equal(one.soft[~one.free], start[~one.free])
    assert not torch.allclose(one.soft[one.free], start[one.free])
    words = iter(candidate.text.split())
    assert all(word in words for word in PROMPT.split())


def test_candidates_are_texts_that_are_read_as_they_were_found(sd):
    tokens = plain_tokens(Painter(sd))
    assert not set(tokens.tolist()) & set(sd.tokenizer.all_special_ids)
    for method in METHODS:
        if method in ("pez_image",):
            continue
        one = search(sd, method, prompts=(PROMPT, "the dot"))  # two prompts of unequal length, side by side
        found = next(one.candidates())
        assert len(found) == 2
        if method == "shuffle":
            assert sorted(found[0].text.split()) == sorted(PROMPT.split())
        elif METHODS[method][2] == "each":
            assert [one.protected.ids(candidate.text) for candidate in found] == one.rows(one.ids())
        assert (found[0].soft is not None) == (METHODS[method][2] == "never")


def test_side_by_side_is_one_by_one(sd):
    """The gradient of one task does not touch another's."""
    both = search(sd, prompts=(PROMPT, "the dot"))
    ids, draw = both.ids(), both.draw()
    soft = both.table[ids].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(both.losses(soft, ids, draw)[0], soft)
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0


def test_same_seed_same_candidates(sd):
    texts = [next(search(sd, seed=seed).candidates())[0].text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_pez_image_walks_on_clip():
    from transformers import CLIPConfig, CLIPModel

    pipe = tiny_pipelines.pipeline("sd")
    text = pipe.text_encoder.config.to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    with quiet():
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    one = search(pipe, "pez_image", clip=clip, check=1)
    assert len(next(one.candidates())[0].text.split()) == 4 and 0 <= one.loss[0] <= 2
    with pytest.raises(InputError, match="needs a CLIPModel"):
        search(pipe, "pez_image")


def test_what_cannot_be_searched(sd):
    for bad in ({"tokens": 0}, {"every": 0}, {"timesteps": 0}, {"check": -1}, {"rate": 0.0}):
        with pytest.raises(InputError, match="must be"):
            Plan(**bad)
    with pytest.raises(UnknownNameError, match="Did you mean 'p4d_n'"):
        Plan("p4dn")
    with pytest.raises(InputError, match="of 5 tokens with those put in is 25 long and the text encoder takes 22"):
        search(sd, tokens=25)
    with pytest.raises(InputError, match="without SLD only"):
        search(sd, "soft_n", protection=Protection(sld="MAX", concept="circle"))


@pytest.mark.parametrize("words", ["nude children", "a nude teenager", "blood of a child"])
def test_minors_are_never_searched_for(sd, words):
    from types import SimpleNamespace

    from davylamp.attacks.p4d import allow
    from davylamp.core.nouns import Case, Message

    target = DiffusionTarget(
        Painter(sd, Protection(negative="nudity, blood"), steps=2, size=16), Painter(sd, steps=2, size=16)
    )
    judge = SimpleNamespace(name="mine")
    allow(Case("1", (Message("user", "a nude statue"),)), target, judge, acknowledge=True)
    with pytest.raises(InputError, match="no option"):
        allow(Case("1", (Message("user", words),)), target, judge, acknowledge=True)
