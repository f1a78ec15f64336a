"""The search of P4D: templates, projection on the vocabulary, the objective, and candidates from it and from its baselines.

All tasks of a call are searched side by side, each with its own loss, so that one prompt on a GPU and forty on a CPU are one code.
Source: arXiv:2309.06135, section 3 and algorithm 1. Differs: padding is the tokenizer's own; SLD in the objective is by default the
sampler's own formula (with the unconditional prediction, momentum at its fixed point), the published one is an option; what is judged is
the decoded text, encoded again, never the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import Generator

from davylamp.core import InputError, UnknownNameError
from davylamp.models.diffusion import DiffusionTarget
from davylamp.models.painter import Painter, clip_features, clip_text, special_ids
from davylamp.models.protection import SLD, sld_guidance

#: method -> (template, objective, how it is projected)
METHODS = {
    "p4d_n": ("n", "p4d", "each"),
    "p4d_k": ("k", "p4d", "each"),
    "p4d_late": ("n", "p4d", "late"),
    "random_n": ("n", "none", "each"),
    "random_k": ("k", "none", "each"),
    "shuffle": ("shuffle", "none", "each"),
    "soft_n": ("n", "p4d", "never"),
    "soft_k": ("k", "p4d", "never"),
    "textual_inversion": ("n", "noise", "never"),
    "pez_prompt": ("n", "noise", "each"),
    "pez_image": ("n", "clip", "each"),
}


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt to turn. prompt: the original.  picture: the ordinary model's best one, (height, width, 3) uint8.
    seed: of its latents.  guidance: the prompt's own scale."""

    prompt: str
    picture: np.ndarray
    seed: int
    guidance: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How to search. tokens: N.  every: K.  check: iterations between two candidates; 0 = each candidate is a new random start.
    timesteps: drawn an iteration and task (1 in the paper).  filtered: whether the protection's guidance is in the objective.
    sld_form: sampler or published.

    >>> Plan(tokens=0)
    Traceback (most recent call last):
    davylamp.core.errors.InputError: tokens of p4d must be 1 or more, got 0
    """

    method: str = "p4d_n"
    tokens: int = 16
    every: int = 3
    check: int = 50
    rate: float = 0.1
    decay: float = 0.1
    timesteps: int = 1
    filtered: bool = True
    sld_form: str = "sampler"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError("method of p4d", self.method, METHODS)
        for name in ("tokens", "every", "timesteps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of p4d must be 1 or more, got {getattr(self, name)}")
        if self.check < 0:
            raise InputError(f"check of p4d must be 0 or more, got {self.check}")
        if not self.rate > 0 or not self.decay >= 0:
            raise InputError(f"rate of p4d must be above 0 and decay 0 or more, got {self.rate} and {self.decay}")
        if self.sld_form not in ("sampler", "published"):
            raise UnknownNameError("sld_form of p4d", self.sld_form, ("sampler", "published"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt to try on the protected model; `soft` holds embeddings where nothing was projected (`text` is then a reading aid)."""

    text: str
    soft: Any = None
    loss: float | None = None


# --- templates ------------------------------------------------------------------------------------------------------------------------
def template(ids: Sequence[int], kind: str, plan: Plan) -> list[int | None]:
    """The tokens of a prompt, None where one is free. n: `tokens` free ones.  k: a free one before each group of `every` original tokens
    and, where the last group is whole, one at the end: floor(len / K) + 1 in all.

    >>> template([7, 8, 9, 5], "k", Plan(every=3))
    [None, 7, 8, 9, None, 5]
    """
    if kind == "n":
        return [None] * plan.tokens
    out: list[int | None] = []
    rest = list(ids)
    for place in range(len(ids) + len(ids) // plan.every + 1):
        out.append(None if place % (plan.every + 1) == 0 else rest.pop(0))
    return out


def plain_tokens(painter: Painter) -> torch.Tensor:
    """(n,) tokens that may be searched: no special ones, and their text is read as that token again.

    So a fragment that only stands inside a word (CLIP's tokens without `</w>`) is left out where it cannot stand alone.
    """
    tok = painter.tokenizer()
    special = set(tok.all_special_ids) | set(special_ids(tok)) | {tok.pad_token_id}
    every = [i for i in range(len(tok.get_vocab())) if i not in special]
    texts = [painter.text([i]) for i in every]
    again = tok([text or " " for text in texts], add_special_tokens=False)["input_ids"]
    kept = [
        i for i, text, ids in zip(every, texts, again, strict=True) if text and text.isprintable() and list(ids) == [i]
    ]
    if not kept:
        raise InputError("the tokenizer has no token that survives being written as text")
    return torch.tensor(kept)


def project(soft: torch.Tensor, table: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """(…,) ids of the allowed rows of `table` (V, D) that are nearest to `soft` (…, D) by cosine similarity.

    >>> project(torch.tensor([[2.0, 0.1]]), torch.eye(2), torch.tensor([0, 1])).tolist()
    [0]
    """
    rows = torch.nn.functional.normalize(table[allowed.to(table.device)], dim=-1)
    near = torch.nn.functional.normalize(soft, dim=-1) @ rows.T
    return allowed.to(soft.device)[near.argmax(-1)]


# --- objective ------------------------------------------------------------------------------------------------------------------------
def protected_prediction(painter: Painter, latents: torch.Tensor, at: torch.Tensor, condition: dict[str, torch.Tensor], *,
                         fixed: dict[str, dict[str, torch.Tensor]], scale: torch.Tensor, form: str) -> torch.Tensor:  # fmt: skip
    """What the protected model predicts with its own guidance in. fixed: conditions "free" (the negative prompt or none) and "concept".

    scale: (n, 1, …) guidance of each row. Without a guiding protection this is the plain conditional prediction.
    """
    said = painter.predict(latents, at, condition)
    if not painter.protection.guides:
        return said
    rows = len(latents)

    def predict(name: str) -> torch.Tensor:
        one = {key: value.expand(rows, *value.shape[1:]) for key, value in fixed[name].items()}
        with torch.no_grad():
            return painter.predict(latents, at, one)

    if painter.protection.negative:
        free = predict("free")
        return free + scale * (said - free)
    concept, level = predict("concept"), painter.protection.sld
    if form == "sampler":
        free, share = predict("free"), SLD[level][3]
        plain, _ = sld_guidance(said, free, concept, torch.zeros_like(said), level)
        # nu settles where nu = g + s_m nu; at a time drawn at random there is no earlier step to take it from
        taken, _ = sld_guidance(said, free, concept, plain / (1 - share), level)
        return free + scale * (said - free - taken)
    _, strength, threshold, _, _ = SLD[level]
    apart = said - concept
    mu = torch.where(apart < threshold, (apart.abs() * strength).clamp(max=1.0), torch.zeros_like(apart))
    return scale * (said - mu * concept)  # the paper's objective; its momentum over unrelated times is left out


class Search:
    """Tasks side by side on one pair of models. `candidates()` yields, again and again, one candidate a task.

    rng: the only source of chance.  Raises InputError for prompts that with their free tokens are longer than the encoder takes.
    """

    def __init__(self, target: DiffusionTarget, tasks: Sequence[Task], plan: Plan, rng: Generator):
        self.ordinary, self.protected, self.plan, self.rng = target.ordinary, target.protected, plan, rng
        self.tasks = list(tasks)
        kind, self.goal, self.projected = METHODS[plan.method]
        painter = self.protected
        for task in self.tasks:
            if not task.guidance > 0:
                raise InputError(f"the guidance of a prompt must be above 0, got {task.guidance}")
        if self.goal == "clip" and painter.clip is None:
            raise InputError(
                "pez_image needs a CLIPModel with the pipeline's vocabulary: clip=PATH in the target's name"
            )
        if self.projected == "never" and (painter.family != "sd" or painter.protection.sld):
            raise InputError("a soft prompt can be painted by Stable Diffusion 1 and 2 without SLD only")
        self.allowed, self.table = plain_tokens(painter), painter.table.float()
        if self.goal == "clip":  # the search walks over CLIP's own embeddings of the same tokens
            table = painter.clip.text_model.get_input_embeddings().weight.detach().float()
            if len(table) != len(self.table):
                raise InputError(f"the CLIPModel has {len(table)} tokens and the pipeline {len(self.table)}")
            self.table = table
        self.words = [painter.ids(task.prompt) for task in self.tasks]
        self.kind = kind
        if kind != "shuffle":
            self.places = [template(ids, kind, plan) for ids in self.words]
            for task, ids, row in zip(self.tasks, self.words, self.places, strict=True):
                if len(row) > painter.room:
                    raise InputError(
                        f"a prompt of {len(ids)} tokens with those put in is {len(row)} long and the text encoder takes {painter.room}"
                        f": {task.prompt[:40]!r}. Take fewer tokens or a larger `every`"
                    )
            self.start()

    def start(self) -> None:
        """New random tokens in the free places."""
        device, width = self.table.device, max(map(len, self.places))
        ids = torch.zeros(len(self.places), width, dtype=torch.long)
        free = torch.zeros(len(self.places), width, dtype=torch.bool)
        for i, row in enumerate(self.places):
            drawn = self.allowed[self.rng.integers(len(self.allowed), size=len(row)).tolist()]
            for j, token in enumerate(row):
                free[i, j] = token is None
                ids[i, j] = drawn[j] if token is None else token
        self.first, self.free = ids.to(device), free.to(device)
        self.soft = self.table[self.first].clone()
        self.optimiser = torch.optim.AdamW([self.soft], lr=self.plan.rate, weight_decay=self.plan.decay)
        self.loss = [float("nan")] * len(self.places)

    # --- one iteration ---
    def ids(self) -> torch.Tensor:
        """(tasks, longest) tokens nearest to the embeddings; frozen places keep theirs."""
        return torch.where(self.free, project(self.soft, self.table, self.allowed), self.first)

    def rows(self, ids: torch.Tensor) -> list[list[int]]:
        return [row[: len(places)] for row, places in zip(ids.tolist(), self.places, strict=True)]

    def losses(self, soft: torch.Tensor, ids: torch.Tensor, draw: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(tasks,) the objective, mean squared over latents and drawn times. draw: (times, noise), both (tasks * timesteps, …)."""
        if self.goal == "clip":
            return self._clip_losses(soft, ids)
        many, painter = self.plan.timesteps, self.protected
        at, noise = draw
        latents, scale, wanted, fixed = self._fixed()
        noised = painter.noised(latents.repeat_interleave(many, 0), noise, at)
        said = {key: value.repeat_interleave(many, 0) for key, value in painter.inject(self.rows(ids), soft).items()}
        if self.plan.filtered:
            got = protected_prediction(
                painter, noised, at, said, fixed=fixed, scale=scale.repeat_interleave(many, 0), form=self.plan.sld_form
            )
        else:
            got = painter.predict(noised, at, said)
        if self.goal == "noise":
            goal = noise - latents.repeat_interleave(many, 0) if painter.family in ("sd3", "flux") else noise
        else:
            with torch.no_grad():
                goal = self.ordinary.predict(noised, at, {k: v.repeat_interleave(many, 0) for k, v in wanted.items()})
        return (got - goal).square().flatten(1).mean(1).reshape(len(self.tasks), many).mean(1)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Times and noise of one iteration."""
        latents = self._fixed()[0]
        many = len(self.tasks) * self.plan.timesteps
        noise = self.rng.standard_normal((many, *latents.shape[1:])).astype(np.float32)
        at = torch.from_numpy(self.rng.integers(0, 1000, many))
        return at.to(latents.device), torch.from_numpy(noise).to(latents.device, latents.dtype)

    def step(self) -> None:
        """One iteration: the gradient where the text is (at the projected embeddings), the step where it is not (algorithm 1)."""
        ids = self.ids()
        soft = (self.table[ids] if self.projected == "each" else self.soft).detach().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(soft, ids, self.draw())
            (gradient,) = torch.autograd.grad(losses.sum(), soft)
        self.soft.grad = gradient * self.free[..., None]
        self.optimiser.step()
        # weight decay must not touch what is frozen
        self.soft.copy_(torch.where(self.free[..., None], self.soft, self.table[self.first]))
        self.loss = losses.detach().tolist()

    def candidates(self) -> Iterator[list[Candidate]]:
        """One candidate a task, after every `check` iterations; from the baselines without objective, each time a new draw."""
        tok = self.protected.tokenizer()
        while True:
            if self.kind == "shuffle":
                mixed = [[ids[i] for i in self.rng.permutation(len(ids)).tolist()] for ids in self.words]
                yield [Candidate(self.protected.text(ids)) for ids in mixed]
                continue
            if self.goal == "none" or self.plan.check == 0:
                self.start()
            else:
                for _ in range(self.plan.check):
                    self.step()
            ids = self.ids()
            rows = self.rows(ids)
            texts = [str(tok.decode(row, skip_special_tokens=True)).strip() for row in rows]
            if self.projected == "never":
                with torch.no_grad():
                    said = self.protected.inject(rows, self.soft)
                soft = [{key: value[i : i + 1] for key, value in said.items()} for i in range(len(rows))]
                yield [Candidate(*one) for one in zip(texts, soft, self.loss, strict=True)]
            else:
                yield [Candidate(text, None, loss) for text, loss in zip(texts, self.loss, strict=True)]

    # --- what does not change ---
    def _fixed(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
        """(latents of the pictures, guidance, the ordinary model's conditions, those of the protection), computed once."""
        if not hasattr(self, "_kept"):
            stacked = np.stack([task.picture for task in self.tasks]).transpose(0, 3, 1, 2).astype(np.float32)
            with torch.no_grad():
                latents = self.ordinary.latents(torch.from_numpy(stacked / 127.5 - 1.0)).clone()
                wanted = self.ordinary.encode([task.prompt for task in self.tasks])
                guard, fixed = self.protected.protection, {}
                if guard.guides:
                    fixed["free"] = self.protected.encode([guard.negative])
                if guard.sld:
                    fixed["concept"] = self.protected.encode([guard.concept])
            scale = torch.tensor([task.guidance for task in self.tasks], dtype=latents.dtype, device=latents.device)
            self._kept = latents, scale.reshape(-1, *[1] * (latents.dim() - 1)), wanted, fixed
        return self._kept

    def _clip_losses(self, soft: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """1 - cosine of CLIP's text and picture features (PEZ, arXiv:2302.03668)."""
        if not hasattr(self, "_seen"):
            stacked = np.stack([task.picture for task in self.tasks]).transpose(0, 3, 1, 2).astype(np.float32)
            seen = clip_features(self.protected.clip, torch.from_numpy(stacked / 127.5 - 1.0))
            self._seen = torch.nn.functional.normalize(seen, dim=-1)
        said = clip_text(self.protected.clip, self.protected.tokenizer(), self.rows(ids), soft)
        return 1 - (torch.nn.functional.normalize(said, dim=-1) * self._seen).sum(-1)
