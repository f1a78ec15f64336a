"""ESD: fine-tune the network of a text-to-image pipeline until it no longer knows a concept; and two filters of prompts beside it.
Source: arXiv:2303.07345, equation 7 (ESD-x: cross-attention; ESD-u: the rest). Differs: several texts can be erased at once, in turns,
which is how found prompts are fed back; the latents that it trains at come from the model's own sampler, stopped at a drawn step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from davylamp.core.errors import InputError
from davylamp.models.painter import Painter, quiet

if TYPE_CHECKING:
    from numpy.random import Generator


def erase(pipe: Any, concepts: Sequence[str], *, rng: Generator, part: Literal["x", "u", "full"] = "x", eta: float = 1.0, steps: int = 200,
          lr: float = 1e-3, batch: int = 4, guidance: float = 3.0, kept: Sequence[str] = ()) -> dict[str, torch.Tensor]:  # fmt: skip
    """Weights (by name) of the pipeline's network with the concepts erased, for `diffusion.with_core`. The pipeline stays as it is.

    part: x = cross-attention, u = all else, full.  eta: strength of the push away (1 in the paper).  lr: ours, for small networks; the
    paper's is 1e-5.  guidance: of the sampler that draws latents.  kept: prompts whose predictions are held where they are (ours; the
    paper has none), as many a step as concepts.  Stable Diffusion 1, 2 and XL.  Raises InputError without a concept, or for no steps.
    """
    if not concepts or not all(concept.strip() for concept in concepts):
        raise InputError("ESD needs one or more texts to erase, none of them empty")
    if steps < 1 or batch < 1 or not eta > 0:
        raise InputError(f"ESD needs steps and batch of 1 or more and eta above 0, got {steps}, {batch}, {eta}")
    painter = Painter(pipe, guidance=guidance)
    if painter.family not in ("sd", "sdxl"):
        raise InputError(f"ESD is for pipelines with a U-Net, got {type(pipe).__name__}")
    frozen, student = painter.core, copy.deepcopy(painter.core)
    chosen = {name: p for name, p in student.named_parameters() if part == "full" or ("attn2" in name) == (part == "x")}
    for p in chosen.values():
        p.requires_grad_(True)
    optimiser = torch.optim.Adam(chosen.values(), lr=lr)
    learner = copy.copy(painter)
    learner.pipe = copy.copy(pipe)
    object.__setattr__(learner.pipe, "unet", student)
    assert painter.core is frozen
    texts = [*concepts, "", *kept]
    with torch.no_grad():
        conditions = {text: painter.encode([text]) for text in dict.fromkeys(texts)}
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, 2 * (steps - step) / steps)  # flat, then down
        picked = [str(concepts[i]) for i in rng.integers(len(concepts), size=batch)]
        held = [str(kept[i]) for i in rng.integers(len(kept), size=batch)] if kept else []
        said = _stacked([conditions[text] for text in [*picked, *held]])
        nothing = _stacked([conditions[""]] * len(picked))
        with torch.no_grad():
            latents, at = _on_the_way(painter, said, len(picked) + len(held), guidance, rng)
            plain = painter.predict(latents, at, said)
            free = painter.predict(latents[: len(picked)], at[: len(picked)], nothing)
            goal = plain.clone()
            goal[: len(picked)] = free - eta * (plain[: len(picked)] - free)  # eq. 7
        loss = (learner.predict(latents, at, said) - goal).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: p.detach().clone() for name, p in chosen.items()}


def _stacked(conditions: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([one[key] for one in conditions]) for key in conditions[0]}


def _on_the_way(
    painter: Painter, said: dict[str, torch.Tensor], n: int, guidance: float, rng: Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, times) of n pictures at one drawn step of the frozen model's own sampler."""
    core, scheduler = painter.core, copy.deepcopy(painter.pipe.scheduler)
    size = core.config.sample_size
    noise = rng.standard_normal((n, core.config.in_channels, size, size)).astype(np.float32)
    latents = torch.from_numpy(noise).to(painter.device) * scheduler.init_noise_sigma
    with quiet():  # schedulers warn of numpy's next version
        scheduler.set_timesteps(12, device=painter.device)
    nothing = {key: value.expand(n, *value.shape[1:]) for key, value in painter.encode([""]).items()}
    stop = int(rng.integers(len(scheduler.timesteps)))
    for time in scheduler.timesteps[:stop]:
        at = time.expand(n)
        scaled = scheduler.scale_model_input(latents, time)
        free = painter.predict(scaled, at, nothing)
        both = free + guidance * (painter.predict(scaled, at, said) - free)
        latents = scheduler.step(both, time, latents).prev_sample
    time = scheduler.timesteps[stop]
    return scheduler.scale_model_input(latents, time), time.expand(n)


class KeywordFilter:
    """Refuses a prompt that holds a word which found prompts have and harmless ones do not.

    >>> KeywordFilter(["a round thing"], harmless=["a box thing"]).words
    frozenset({'round'})
    """

    def __init__(self, found: Sequence[str], *, harmless: Sequence[str]):
        known = {word for text in harmless for word in text.lower().split()}
        self.words = frozenset(word for text in found for word in text.lower().split() if word not in known)

    def refuses(self, text: str) -> bool:
        return bool(self.words & set(text.lower().split()))


class EmbeddingFilter:
    """Refuses a prompt whose encoding is nearer to a found one's than every harmless prompt is.

    Encodings are the text encoder's, averaged over tokens and centred on the harmless prompts' mean; nearness is their cosine.
    """

    def __init__(self, painter: Painter, found: Sequence[str], *, harmless: Sequence[str]):
        self.painter = painter
        plain = self._mean_encoding(harmless)
        self.centre = plain.mean(0)
        self.found = torch.nn.functional.normalize(self._mean_encoding(found) - self.centre, dim=-1)
        self.threshold = float((torch.nn.functional.normalize(plain - self.centre, dim=-1) @ self.found.T).max())

    def _mean_encoding(self, texts: Sequence[str]) -> torch.Tensor:
        with torch.inference_mode():
            return self.painter.encode(list(texts))["embeds"].float().mean(1)

    def refuses(self, text: str) -> bool:
        one = torch.nn.functional.normalize(self._mean_encoding([text]) - self.centre, dim=-1)
        return float((one @ self.found.T).max()) > self.threshold
