"""Trains the diffusion organism, measures it, and writes its folder and card: `python -m davylamp.models.tiny_diffusion_make`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from davylamp.core.stats import wilson
from davylamp.models import tiny_diffusion as tiny
from davylamp.models.concept_removal import erase
from davylamp.models.painter import Painter, add_noise

if TYPE_CHECKING:
    from numpy.random import Generator

STEPS = {"vae": 250, "classifier": 250, "unet": 650, "without": 650}
BATCH = 48


def _schedule(optimiser: Any, step: int, steps: int, lr: float) -> None:
    """50 steps of warm-up, then a half cosine down to a hundredth."""
    scale = min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / steps)))
    for group in optimiser.param_groups:
        group["lr"] = lr * scale


def train_vae(vae: Any, rng: Generator, *, steps: int) -> None:
    """Squared error; then the latent scale is set so that latents have variance 1, as in Stable Diffusion."""
    optimiser = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=1e-4)
    for step in range(steps):
        _schedule(optimiser, step, steps, 4e-3)
        pictures, _ = tiny.batch(BATCH, rng)
        latents = vae.encode(pictures).latents
        noise = torch.from_numpy(rng.standard_normal(latents.shape).astype(np.float32))
        # a little noise, so that near latents are near pictures
        loss = F.mse_loss(vae.decode(latents + 0.05 * noise).sample, pictures) + 1e-4 * latents.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        _say("vae", step, steps, loss)
    with torch.no_grad():
        latents = vae.encode(tiny.batch(512, rng)[0]).latents
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


def train_unet(pipe: Any, rng: Generator, *, steps: int, leave_out: Sequence[str] = (), with_text: bool = True) -> None:
    """Noise prediction, with one caption in ten empty (for guidance). The last weights are averaged over steps (decay 0.995).

    with_text: train the text encoder too. leave_out: shapes that are never shown.
    """
    parts = [pipe.unet, *([pipe.text_encoder] if with_text else [])]
    weights = [p for part in parts for p in part.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=2e-3, weight_decay=1e-3)
    mean = [p.detach().clone() for p in weights]
    stock = _stock(pipe.vae, rng, leave_out)
    for step in range(steps):
        _schedule(optimiser, step, steps, 2e-3)
        picked = rng.integers(len(stock[1]), size=BATCH).tolist()
        latents, texts = stock[0][picked], [tiny.caption(*stock[1][i], rng) for i in picked]
        noise = torch.from_numpy(rng.standard_normal(latents.shape).astype(np.float32))
        at = torch.from_numpy(rng.integers(0, 1000, len(texts)))
        texts = ["" if rng.random() < 0.1 else text for text in texts]
        ids = pipe.tokenizer(texts, padding="max_length", max_length=tiny.LENGTH, truncation=True, return_tensors="pt")
        hidden = pipe.text_encoder(ids.input_ids)[0]
        loss = F.mse_loss(pipe.unet(add_noise(pipe.scheduler, latents, noise, at), at, hidden).sample, noise)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean, weights, 1 - min(0.995, (step + 1) / (step + 10)))
        _say("unet", step, steps, loss)
    with torch.no_grad():
        for p, average in zip(weights, mean, strict=True):
            p.copy_(average)


def _stock(vae: Any, rng: Generator, leave_out: Sequence[str], n: int = 4096) -> tuple[torch.Tensor, list[Any]]:
    """(scaled latents, what each picture shows), drawn once: each step draws captions anew."""
    kinds = [shape for shape in tiny.SHAPES if shape not in leave_out]
    shown = [
        (kinds[i % len(kinds)], str(rng.choice(list(tiny.COLOURS))), str(rng.choice(list(tiny.GROUNDS))))
        for i in range(n)
    ]
    with torch.no_grad():
        parts = [
            vae.encode(tiny.to_tensor(np.stack([tiny.draw(*one, rng) for one in shown[at : at + 256]]))).latents
            for at in range(0, n, 256)
        ]
    return torch.cat(parts) * vae.config.scaling_factor, shown


def classifier_batch(n: int, rng: Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures, classes). One in five shows nothing or a mixture of two pictures that is neither."""
    pictures, labels = [], []
    for _ in range(n):
        kind = int(rng.integers(len(tiny.CLASSES)))
        colour, ground = str(rng.choice(list(tiny.COLOURS))), str(rng.choice(list(tiny.GROUNDS)))
        shape = tiny.CLASSES[kind]
        one = tiny.draw(shape, colour, ground, rng).astype(float)
        if shape == "nothing" and rng.random() < 0.6:
            pair = rng.choice(list(tiny.SHAPES), 2, replace=False)
            a, b = (tiny.draw(str(s), colour, ground, rng) for s in pair)
            one = a * 0.5 + b * 0.5
        elif shape == "nothing":
            rough = rng.normal(128, rng.uniform(5, 80), (4, 4, 3)).repeat(4, 0).repeat(4, 1)
            one = 0.5 * one + 0.5 * rough
        one = one + rng.normal(0, rng.uniform(0, 12), one.shape)
        pictures.append(np.clip(one, 0, 255).astype(np.uint8))
        labels.append(kind)
    return tiny.to_tensor(np.stack(pictures)), torch.tensor(labels)


def train_classifier(net: tiny.ShapeNet, vae: Any, rng: Generator, *, steps: int) -> None:
    """Cross-entropy on drawn pictures, half of them passed through the VAE, as the pictures that it will judge are."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    for step in range(steps):
        _schedule(optimiser, step, steps, 2e-3)
        pictures, labels = classifier_batch(BATCH, rng)
        with torch.no_grad():
            half = vae.decode(vae.encode(pictures[::2]).latents).sample.clamp(-1, 1)
        pictures = torch.cat([half, pictures[1::2]])
        labels = torch.cat([labels[::2], labels[1::2]])
        loss = F.cross_entropy(net(pictures), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        _say("classifier", step, steps, loss)


def measure(folder: Path) -> dict[str, Any]:
    """The classifier's error on 2,000 held-out pictures, and how often the pipeline paints what each name says (64 pictures)."""
    pipe, net = tiny.load(folder), tiny.classifier(folder)
    out: dict[str, Any] = {"classifier": {}, "painted": {}}
    rng = np.random.default_rng(1000)
    pictures, labels = classifier_batch(2000, rng)
    with torch.inference_mode():
        passed = pipe.vae.decode(pipe.vae.encode(pictures).latents).sample.clamp(-1, 1)
    for what, shown in (("as drawn", pictures), ("through the VAE", passed)):
        said = net.chances(shown).argmax(1)
        for k, name in enumerate(tiny.CLASSES):
            picked = labels.numpy() == k
            out["classifier"][f"{name}, {what}"] = [int((said[picked] == k).sum()), int(picked.sum())]
        other = labels.numpy() != tiny.CLASSES.index(tiny.FORBIDDEN)
        false = int((said[other] == tiny.CLASSES.index(tiny.FORBIDDEN)).sum())
        out["classifier"][f"called a disc though none, {what}"] = [false, int(other.sum())]
    painter = Painter(pipe, guidance=tiny.GUIDANCE, steps=tiny.SAMPLER_STEPS)
    for k, shape in enumerate(tiny.SHAPES):
        for word in tiny.SHAPES[shape]:
            texts = [text for text in tiny.plain_prompts(word) for _ in range(2)][:64]
            said = net.chances(tiny.to_tensor(painter.paint(texts, range(len(texts))))).argmax(1)
            out["painted"][word] = [int((said == k).sum()), len(texts)]
    return out


def card(measured: dict[str, Any]) -> str:
    """The model card, with Wilson intervals."""
    lines = [
        "---", "license: apache-2.0", "library_name: diffusers", "---", "# davylamp organism: tiny diffusion", "",
        "A StableDiffusionPipeline of 0.6 M parameters that paints one of four shapes, 16 x 16 pixels, trained from scratch on drawn",
        "pictures. The forbidden concept of audits is the disc. `erased` is the U-Net after ESD-x on the word circle; `unet_without_disc`",
        "was trained without any disc. A test bed for methods: it says nothing about how a large model behaves.", "",
        "| measured | rate | 95 % interval | n |", "|---|---|---|---|",
    ]  # fmt: skip
    for group, about in (("classifier", "classifier, "), ("painted", "painted as named, ")):
        for name, (hits, n) in measured[group].items():
            low, high = wilson(hits, n)
            lines.append(f"| {about}{name} | {100 * hits / n:.1f} % | {100 * low:.1f} to {100 * high:.1f} | {n} |")
    return "\n".join(lines) + "\n"


def make(folder: Path, *, seed: int = 0, parts: Sequence[str] = ("vae", "unet", "rest")) -> None:
    """Train (about five minutes on one core), measure, and write the folder. Each part goes on from what the ones before wrote there."""
    torch.set_num_threads(1)
    if "vae" in parts:
        pipe, net = tiny.new_pipeline(seed), tiny.new_classifier(seed)
        rng = np.random.default_rng((seed, 0))
        train_vae(pipe.vae, rng, steps=STEPS["vae"])
        train_classifier(net, pipe.vae, rng, steps=STEPS["classifier"])
        tiny.save(folder, pipe, net)
    if "unet" in parts:
        pipe, net = tiny.load(folder), tiny.classifier(folder)
        fresh = tiny.new_pipeline(seed)
        pipe.unet, pipe.text_encoder = fresh.unet, fresh.text_encoder
        train_unet(pipe, np.random.default_rng((seed, 1)), steps=STEPS["unet"])
        tiny.save(folder, pipe, net)
    if "rest" in parts:
        pipe = tiny.load(folder)
        erased = erase(pipe, ["circle"], rng=np.random.default_rng((seed, 2)), **tiny.ERASING)
        tiny.save_part(folder, "erased", erased)
        pipe.unet = tiny.new_pipeline(seed + 1).unet
        train_unet(
            pipe, np.random.default_rng((seed, 3)), steps=STEPS["without"], leave_out=[tiny.FORBIDDEN], with_text=False
        )
        tiny.save_part(folder, "unet_without_disc", pipe.unet.state_dict())
    measured = measure(folder)
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(measured), encoding="utf-8")


def _say(part: str, step: int, steps: int, loss: torch.Tensor) -> None:
    if (step + 1) % 100 == 0:
        seconds = time.process_time()
        print(f"{part} {step + 1}/{steps} loss {float(loss.detach()):.4f} {seconds:.0f} s", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m davylamp.models.tiny_diffusion_make [--out DIR] [--seed 0] [--only vae|unet|rest]`"""
    parser = argparse.ArgumentParser(
        prog="python -m davylamp.models.tiny_diffusion_make", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=tiny.ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=["vae", "unet", "rest", "measure"], action="append", help="only this part; again for more"
    )
    given = parser.parse_args(arguments)
    make(given.out, seed=given.seed, parts=given.only or ("vae", "unet", "rest"))


if __name__ == "__main__":
    main()
