"""Supervised fine-tuning on rows: the reply's tokens are learnt, the prompt's are not, in the model's own chat template.
Source: arXiv:2310.03693, section 3 (answer-only loss); arXiv:2106.09685 (LoRA); by trl and peft, see `models/fit.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from davylamp.core import Case, InputError, train
from davylamp.models.adapters import Lora
from davylamp.models.fit import fit

if TYPE_CHECKING:
    from numpy.random import Generator


@train(
    version=1,
    source="arXiv:2310.03693",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning",),
    needs="train",
    systems=("23", "12"),
)
def sft(
    model: Any,
    rows: Sequence[Case],
    *,
    tokenizer: Any,
    rng: Generator,
    method: Literal["full", "lora"] = "full",
    lr: float = 2e-5,
    batch: int = 16,
    epochs: int = 1,
    steps: int | None = None,
    micro: int | None = None,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    freeze: tuple[str, ...] = (),
    max_length: int | None = None,
    rank: int = 8,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("all-linear",),
    dropout: float = 0.0,
    keep_adapter: bool = False,
    engine: Literal["auto", "light", "trl"] = "auto",
    skip_bad: bool = False,
) -> Any:
    """Fine-tune a chat model on rows that end in the assistant's reply, in full or by LoRA.

    lr: above 0; 2e-5 in full is the source's level-3 value, LoRA wants about ten times more.  batch, epochs: or `steps` in place of epochs.
    micro: rows at a time.  schedule, warmup, weight_decay, clip (0 = none): of AdamW.  freeze: patterns of parameter names (full).
    max_length: tokens of a row, by default what the model takes.  rank, alpha (2 * rank), targets (all-linear, attention, or module
    names), dropout: of LoRA.  keep_adapter: return the adapter unmerged.  engine: trl's SFTTrainer, the light loop, or by size.
    skip_bad: leave unusable rows out however many; otherwise more than 5 % of them is an error.

    A fine-tune on harmless rows can cost safety too: `davylamp audit MODEL --data ROWS` estimates how much before you train, and
    `davylamp compare` says what happened after.
    """
    if not lr > 0:
        raise InputError(f"lr must be above 0, got {lr}")
    if steps is not None and steps < 1:
        raise InputError(f"steps must be 1 or more, got {steps}")
    if len(targets) == 1 and targets[0] in ("all-linear", "attention"):
        chosen: str | tuple[str, ...] = targets[0]
    else:
        chosen = targets
    found = fit(
        model,
        rows,
        tokenizer=tokenizer,
        rng=rng,
        method=method,
        lora=Lora(rank, alpha, chosen, dropout) if method == "lora" else None,
        lr=lr,
        batch=batch,
        epochs=epochs if steps is None else None,
        steps=steps,
        micro=micro,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        freeze=freeze,
        max_length=max_length,
        keep_adapter=keep_adapter,
        engine=engine,
        skip_bad=skip_bad,
    )
    for left_out in found.dropped[:5]:
        print(f"left out row {left_out.case.id}: {left_out.reason}", file=sys.stderr)
    if len(found.dropped) > 5 or found.cut:
        print(f"{len(found.dropped)} rows left out, {found.cut} replies cut to the model's length", file=sys.stderr)
    return found.model
