"""Four defences against harmful fine-tuning, as baselines for repairs: Vaccine and RepNoise (before it), Lisa and LDIFS (during it).
Source: arXiv:2402.01109, arXiv:2405.14577, arXiv:2405.18641, arXiv:2308.13320. Each is one small loop over whatever parameters ask for
gradients, a LoRA adapter's or all. `meta.part` of a row: safe (a harmful request refused), harmful (one answered) or task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.core.registry import train
from davylamp.models.fit import Encoded, answer_loss, encode
from davylamp.models.greedy import padded
from davylamp.models.turns import usable

if TYPE_CHECKING:
    from numpy.random import Generator

PARTS = ("safe", "harmful", "task")


@train(
    version=1,
    source="arXiv:2402.01109",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning",),
    needs="hf",
    systems=("31",),
)
def vaccine(
    model: Any, rows: Sequence[Case], *, tokenizer: Any, rng: Generator, steps: int = 1000, lr: float = 1e-3, batch: int = 5,
    rho: float = 2.0,
) -> Any:  # fmt: skip
    """Align under the worst small shift of every layer's output, so that a later fine-tune moves refusals less.

    rows: all are learnt (safe ones).  rho: length of the shift over all layers together (2 in the source).
    """
    run = _Run(model, rows, tokenizer, rng, lr, batch, rho=rho)
    for _ in range(steps):
        picked = run.draw(*PARTS)
        seen: list[torch.Tensor] = []
        with _outputs(model, seen.append):
            loss = run.loss(picked)
            slopes = torch.autograd.grad(loss, seen)
        length = math.sqrt(sum(float(slope.float().square().sum()) for slope in slopes)) or 1.0
        shifts = iter([slope * (rho / length) for slope in slopes])  # algorithm 1: rho * gradient / its norm

        def shifted(out: torch.Tensor, shifts: Iterator[torch.Tensor] = shifts) -> torch.Tensor:
            return out + next(shifts)

        with _outputs(model, shifted):
            run.update(run.loss(picked))
    return run.done()


@train(
    version=1,
    source="arXiv:2405.14577",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning",),
    needs="hf",
    systems=("31",),
)
def repnoise(
    model: Any, rows: Sequence[Case], *, tokenizer: Any, rng: Generator, steps: int = 1000, lr: float = 2e-5, batch: int = 8,
    alpha: float = 1.0, beta: float = 0.001,
) -> Any:  # fmt: skip
    """Align, push what every layer makes of harmful answers towards noise (by maximum mean discrepancy), and unlearn them a little.

    rows: parts safe and harmful.  alpha: weight of the noise term.  beta: weight of the ascent on the harmful answers' log loss.
    """
    run = _Run(model, rows, tokenizer, rng, lr, batch, needs=("safe", "harmful"), alpha=alpha, beta=beta)
    for _ in range(steps):
        loss = run.loss(run.draw("safe"))
        bad, seen = run.draw("harmful"), list[torch.Tensor]()
        with _outputs(model, seen.append):
            ascent = run.loss(bad)
        picked = _answer_places(bad)
        noise = sum((_discrepancy(out[picked], rng) for out in seen), torch.zeros((), device=loss.device)) / len(seen)
        run.update(
            loss + alpha * noise - beta * torch.log(ascent + 1e-6)
        )  # section 3: retain + alpha noise - beta ascent
    return run.done()


@train(
    version=1,
    source="arXiv:2405.18641",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning",),
    needs="hf",
    systems=("31",),
)
def lisa(
    model: Any, rows: Sequence[Case], *, tokenizer: Any, rng: Generator, steps: int = 1000, lr: float = 1e-4, batch: int = 5,
    rho: float = 1.0, align_steps: int = 100, task_steps: int = 900,
) -> Any:  # fmt: skip
    """Fine-tune in turns on the user's rows and on safe ones, each turn held near the weights that the last one ended with.

    rows: parts task and safe.  align_steps, task_steps: length of the turns.  rho: of the proximal term rho/2 ||w - w_last||^2.
    """
    run = _Run(model, rows, tokenizer, rng, lr, batch, needs=("safe", "task"), rho=rho)
    if align_steps < 1 or task_steps < 1:
        raise InputError(f"align_steps and task_steps must be 1 or more, got {align_steps} and {task_steps}")
    last = run.copy()
    for step in range(steps):
        at = step % (align_steps + task_steps)
        if at in (0, align_steps):
            last = run.copy()
        near = sum((p - old).square().sum() for p, old in zip(run.parameters, last, strict=True))
        run.update(run.loss(run.draw("safe" if at < align_steps else "task")) + rho / 2 * near)
    return run.done()


@train(
    version=1,
    source="arXiv:2308.13320",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning",),
    needs="hf",
    systems=("31",),
)
def ldifs(
    model: Any, rows: Sequence[Case], *, tokenizer: Any, rng: Generator, steps: int = 1000, lr: float = 1e-4, batch: int = 5,
    weight: float = 1e-4,
) -> Any:  # fmt: skip
    """Fine-tune with a penalty on how far every layer's output moves from where it was before.

    rows: all are learnt (the user's).  weight: of the squared distance of the features, summed over layers and width, mean over tokens.
    """
    run = _Run(model, rows, tokenizer, rng, lr, batch, weight=weight)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    start = dict(zip(names, run.copy(), strict=True))
    for _ in range(steps):
        picked = run.draw(*PARTS)
        old, new = list[torch.Tensor](), list[torch.Tensor]()
        with _outputs(model, new.append):
            loss = run.loss(picked)
        ids, mask = padded([prompt + answer for prompt, answer in picked], run.pad, model.device)
        with _outputs(model, old.append), torch.no_grad():
            words = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            torch.func.functional_call(model, start, kwargs=words)
        moved = sum(((a - b).square().sum(-1) * mask).sum() / mask.sum() for a, b in zip(new, old, strict=True))
        run.update(loss + weight * moved)
    return run.done()


class _Run:
    """The rows by part, the optimiser (AdamW), and the loss: mean over the answers' tokens."""

    def __init__(
        self, model: Any, rows: Sequence[Case], tokenizer: Any, rng: Generator, lr: float, batch: int,
        *, needs: Sequence[str] = (), **numbers: float,
    ):  # fmt: skip
        for name, value in {"lr": lr, "batch": batch, **numbers}.items():
            if not (math.isfinite(value) and value >= 0) or (name in ("lr", "batch") and not value):
                raise InputError(f"{name} must be a finite number above 0 (0 or more for weights), got {value}")
        kept, _ = usable(rows)
        self.model, self.tokenizer, self.rng, self.batch = model, tokenizer, rng, batch
        self.pad = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
        encoded, _ = encode(model, tokenizer, kept, None)
        self.rows: dict[str, list[Encoded]] = {part: [] for part in PARTS}
        for case, row in zip(kept, encoded, strict=True):
            part = case.meta.get("part", "task")
            if part not in PARTS:
                raise InputError(f"row {case.id}: meta.part must be one of {', '.join(PARTS)}, got {part!r}")
            self.rows[part].append(row)
        if absent := [part for part in needs if not self.rows[part]]:
            raise InputError(f"this defence needs rows of part {' and '.join(absent)} (meta.part), got none")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError("no parameter of the model asks for gradients. Put an adapter on it, or unfreeze it")
        self.optimiser = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        model.eval()  # no dropout: two passes over one batch must be the same

    def draw(self, *parts: str) -> list[Encoded]:
        """A batch of different rows of these parts."""
        pool = [row for part in parts for row in self.rows[part]]
        return [pool[i] for i in self.rng.choice(len(pool), size=min(self.batch, len(pool)), replace=False)]

    def loss(self, rows: Sequence[Encoded]) -> torch.Tensor:
        return answer_loss(self.model, self.tokenizer, rows) / sum(len(answer) for _, answer in rows)

    def update(self, loss: torch.Tensor) -> None:
        """One step; gradients are cut at length 1."""
        if not bool(loss.isfinite()):
            raise InputError(f"the loss is {float(loss):g}: lower lr")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()

    def copy(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def done(self) -> Any:
        self.optimiser.zero_grad(set_to_none=True)
        return self.model


@contextmanager
def _outputs(model: Any, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Show the output of every decoder layer to `change`; what it returns, if anything, takes its place."""
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)

    def hook(module: Any, args: Any, out: Any) -> Any:
        new = change(out[0] if isinstance(out, tuple) else out)
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answer_places(rows: Sequence[Encoded]) -> torch.Tensor:
    """(rows, longest) True at the answers' tokens, as `padded` lays them out."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    places = torch.arange(longest)
    return torch.stack([(places >= len(p)) & (places < len(p) + len(a)) for p, a in rows])


def _discrepancy(out: torch.Tensor, rng: Generator, most: int = 64) -> torch.Tensor:
    """Squared maximum mean discrepancy between rows of `out`, (tokens, width), and standard normal noise, by Gaussian kernels."""
    out = out[torch.as_tensor(rng.permutation(len(out))[:most], device=out.device)].float()
    noise = torch.as_tensor(rng.standard_normal(out.shape), dtype=torch.float32, device=out.device)
    both = torch.cat([out, noise])
    squares = (both[:, None] - both[None]).square().sum(-1)
    width = squares.detach().mean() + 1e-12
    kernel = torch.stack([torch.exp(-squares / (width * scale)) for scale in (0.25, 0.5, 1.0, 2.0, 4.0)]).mean(0)
    n = len(out)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
