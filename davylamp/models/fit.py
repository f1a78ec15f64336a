"""Fine-tuning a chat model on rows: full or LoRA, the reply's tokens learnt and the prompt's not, in the model's own chat template.

Source: arXiv:2310.03693, section 3 (minimise -sum ln p(reply | prompt)); libraries: trl's SFTTrainer, peft, torch's AdamW.

Two engines run one and the same plan. `trl` is SFTTrainer: accumulation, half precision, several devices. `light` is the loop below, for
what SFTTrainer cannot do: it seeds the process's global generators, needs an output folder, takes seconds to set up where a tiny model's
step takes 20 ms, and cannot be paused and gone on with, which sequential halving needs. A test holds the two to equal weights.

Longer than 400 lines because the plan, the loop and trl's engine are held to equal weights, and stand side by side for that.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from davylamp.core.errors import InputError, NeedsError
from davylamp.core.nouns import Case
from davylamp.models.adapters import Lora, frozen_except, merge, put_on, take_off
from davylamp.models.greedy import padded
from davylamp.models.turns import encode_turn, ends_of, usable

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from davylamp.core.rows import Dropped

IGNORED = -100
SCHEDULES = ("constant", "linear", "cosine")
LIGHT_BELOW = 100_000_000  # parameters; above, trl's engine is worth its set-up
Encoded = tuple[list[int], list[int]]  # prompt, answer
Watch = Callable[[int, Any], object]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained model and what it took. losses: mean over the reply's tokens, one a step.  tokens: seen, prompts included.  trainable: of
    `total` parameters.  dropped: rows that could not be used, each with its reason."""

    model: Any
    steps: int
    losses: tuple[float, ...]
    tokens: int
    seconds: float
    trainable: int
    total: int
    dropped: tuple[Dropped, ...] = ()
    cut: int = 0


def fit(
    model: PreTrainedModel,
    rows: Sequence[Case],
    *,
    tokenizer: PreTrainedTokenizerBase,
    rng: Generator,
    method: Literal["full", "lora"] = "full",
    lora: Lora | None = None,
    lr: float,
    batch: int = 10,
    epochs: int | None = None,
    steps: int | None = None,
    micro: int | None = None,
    schedule: str = "constant",
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    freeze: Sequence[str] = (),
    max_length: int | None = None,
    at: Sequence[int] = (),
    watch: Watch | None = None,
    keep_adapter: bool = False,
    engine: Literal["auto", "light", "trl"] = "auto",
    skip_bad: bool = False,
) -> Fitted:
    """Train in place and return the model in eval mode, with what it took. Equal inputs and generator give equal weights.

    rows: each ends in the assistant's reply, which is learnt with its end token; earlier turns are prompt. Give `epochs` or `steps` (0
    steps change nothing).  lr: 0 changes nothing.  micro: rows at a time, where a batch does not fit.  warmup: steps.
    freeze: patterns of parameter names that stay as they are (full only).  at: steps (0 = before the first) at which `watch(step, model)`
    is called on the model in eval mode.  keep_adapter: return the peft model instead of merging.  max_length: tokens of a row; the default
    is what the model takes. A longer reply is cut, and `cut` counts them.  skip_bad: go on however many rows are unusable.
    An error or Ctrl-C leaves no adapter on the model. Raises InputError for an unusable plan, row or model.
    """
    kept, dropped = usable(rows, most=1.0 if skip_bad else 0.05)
    check(model, len(kept), method, lr, batch, epochs, steps, schedule, weight_decay)
    every = math.ceil(len(kept) / batch)
    total = steps if steps is not None else every * (epochs or 0)
    outside = [step for step in at if not 0 <= step <= total]
    if outside:
        raise InputError(f"`at` names step {outside[0]}, but there are {total} steps")
    encoded, cut = encode(model, tokenizer, kept, max_length)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if method == "lora" and freeze:
        raise InputError("freeze goes with method full: LoRA freezes all but its adapter. Choose targets instead")
    trained: Any = put_on(model, lora or Lora(), rng) if method == "lora" else model
    try:
        frozen = frozen_except([name for name, _ in model.named_parameters()], freeze)
        for name, parameter in model.named_parameters() if method == "full" else ():
            parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
        chosen = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        if not chosen:
            raise InputError(f"freeze={tuple(freeze)!r} leaves nothing to train")
        sizes = (sum(p.numel() for p in chosen), sum(p.numel() for p in trained.parameters()))
        plan = Plan(lr, batch, micro, schedule, warmup, weight_decay, clip, total)
        light = engine == "light" or (engine == "auto" and (sizes[1] < LIGHT_BELOW or model.config.is_encoder_decoder))
        runner = Loop(trained, encoded, tokenizer=tokenizer, rng=rng, plan=plan, parameters=chosen)
        if light:
            for stop in [*sorted({0, *at} if at else {0}), total]:
                runner.advance(stop - runner.step)
                if watch is not None and stop in at and stop not in runner.watched:
                    runner.show(watch)
        else:
            _trl(runner, at, watch)
    except BaseException:
        if method == "lora":
            take_off(trained, asked)
        raise
    if method == "lora" and not keep_adapter:
        trained = merge(trained, asked)
    elif method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])
    trained.eval()
    return Fitted(
        trained,
        runner.step,
        tuple(runner.losses),
        runner.tokens,
        runner.seconds,
        *sizes,
        dropped=tuple(dropped),
        cut=cut,
    )


def check(
    model: Any,
    n: int,
    method: str,
    lr: float,
    batch: int,
    epochs: int | None,
    steps: int | None,
    schedule: str = "constant",
    weight_decay: float = 0.0,
) -> None:
    """Raises InputError for a plan that cannot be run, or a model that cannot be asked and trained as a chat."""
    if method not in ("full", "lora"):
        raise InputError(f"method must be full or lora, got {method!r}")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not (math.isfinite(lr) and lr >= 0 and weight_decay >= 0):
        raise InputError(f"lr and weight_decay must be 0 or more, got {lr} and {weight_decay}")
    if (epochs is None) == (steps is None):
        raise InputError(f"give epochs or steps, not both and not neither: got epochs={epochs}, steps={steps}")
    if (epochs is not None and epochs < 1) or (steps is not None and steps < 0):
        raise InputError(f"epochs must be 1 or more and steps 0 or more, got epochs={epochs}, steps={steps}")
    if batch < 1 or n < batch:
        raise InputError(f"a batch of {batch} needs as many usable rows or more, got {n}")
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        raise InputError(
            f"{type(model).__name__} cannot be fine-tuned as a chat model: it generates no text (encoder-only or a classifier). "
            "Expected a causal or encoder-decoder language model"
        )


def encode(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Case], max_length: int | None
) -> tuple[list[Encoded], int]:
    """(prompt and answer tokens of every row, how many answers were cut). Raises InputError for a prompt that fills all the room."""
    ends = ends_of(model, tokenizer)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    room = min(room, max_length or room)
    out, cut = [], 0
    for case in rows:
        prompt, answer = encode_turn(tokenizer, case.messages[:-1], case.messages[-1].text, ends)
        left = room if model.config.is_encoder_decoder else room - len(prompt)
        if left < 1:
            raise InputError(
                f"row {case.id}: its prompt has {len(prompt)} tokens, and a row may have {room}. Leave it out"
            )
        cut += len(answer) > left
        out.append((prompt, answer[:left]))
    return out, cut


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train, apart from what and on what; see `fit`."""

    lr: float
    batch: int
    micro: int | None = None
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    total: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        >>> Plan(1.0, 10, schedule="linear", total=4).rate(1), Plan(1.0, 10, warmup=2).rate(0)
        (0.75, 0.5)
        """
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        done = step / max(1, self.total)
        fade = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]
        return self.lr * warm * fade


@dataclass(slots=True)
class Loop:
    """A training run that can be stopped and gone on with: `advance(steps)`. It has its own state of torch's generator (dropout).

    activate: called before each `advance`, where several runs share one model (to switch adapters).
    """

    model: Any
    rows: Sequence[Encoded]
    tokenizer: Any
    rng: Generator
    plan: Plan
    parameters: Sequence[torch.nn.Parameter]
    activate: Callable[[], object] = lambda: None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    watched: set[int] = field(default_factory=set)
    _order: list[int] = field(default_factory=list)
    optimiser: Any = None
    _state: Any = None

    def __post_init__(self) -> None:
        plan = self.plan
        self.optimiser = torch.optim.AdamW(self.parameters, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
        self._state = int(self.rng.integers(2**62))

    def next_batch(self) -> list[Encoded]:
        """The rows of the next step: each epoch in a new order, its last batch smaller where the rows do not divide."""
        if not self._order:
            self._order = self.rng.permutation(len(self.rows)).tolist()
        taken, self._order = self._order[: self.plan.batch], self._order[self.plan.batch :]
        return [self.rows[i] for i in taken]

    def advance(self, steps: int) -> None:
        """Train so many steps more."""
        if steps <= 0:
            return
        self.activate()
        began = time.perf_counter()
        self.model.train()
        try:
            with self._own_generator():
                for _ in range(steps):
                    self._one(self.next_batch())
        finally:
            self.model.eval()
            self.seconds += time.perf_counter() - began

    def show(self, watch: Watch) -> None:
        """Call `watch(step, model)` without touching the run's own randomness."""
        self.activate()
        self.model.eval()
        self.watched.add(self.step)
        watch(self.step, self.model)

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        with torch.random.fork_rng():
            if isinstance(self._state, int):
                torch.manual_seed(self._state)
            else:
                torch.set_rng_state(self._state)
            yield
            self._state = torch.get_rng_state()

    def _one(self, rows: Sequence[Encoded]) -> None:
        plan, learnt = self.plan, sum(len(answer) for _, answer in rows)
        for group in self.optimiser.param_groups:
            group["lr"] = plan.rate(self.step)
        loss = 0.0
        rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
        micro = plan.micro or len(rows)
        for part in (rows[start : start + micro] for start in range(0, len(rows), micro)):
            summed = answer_loss(self.model, self.tokenizer, part)
            (summed / learnt).backward()
            loss += float(summed.detach()) / learnt
            self.tokens += sum(len(prompt) + len(answer) for prompt, answer in part)
        if plan.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, plan.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {self.step + 1}. Lower the learning rate ({plan.lr:g})")
        self.losses.append(loss)
        self.step += 1


def answer_loss(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]) -> torch.Tensor:
    """-sum ln p(answer | prompt) over the answers' tokens of all rows (arXiv:2310.03693, section 3); the prompt's are not learnt."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    device = model.device
    if model.config.is_encoder_decoder:
        ids, mask = padded([prompt for prompt, _ in rows], pad, device)
        labels, _ = padded([answer for _, answer in rows], IGNORED, device)
        logits, wanted = model(input_ids=ids, attention_mask=mask, labels=labels).logits, labels
    else:
        ids, mask = padded([prompt + answer for prompt, answer in rows], pad, device)
        labels, _ = padded([[IGNORED] * len(prompt) + answer for prompt, answer in rows], IGNORED, device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:]
    return F.cross_entropy(logits.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="sum")


def _trl(runner: Loop, at: Sequence[int], watch: Watch | None) -> None:
    """The same plan by trl's SFTTrainer. Its folder is temporary, nothing is saved in it, and it is removed however this ends."""
    if runner.model.config.is_encoder_decoder:
        raise InputError("the engine trl trains causal models only. Use engine='light' for an encoder-decoder")
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise NeedsError("the engine trl needs trl: pip install 'davylamp[train]'") from None
    plan, seed = runner.plan, int(runner.rng.integers(2**31))

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            runner.step = state.global_step
            if watch is not None and runner.step in at:
                runner.show(watch)
                runner.model.train()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                runner.losses.append(float(logs["loss"]))

    rows = [{"input_ids": p + a, "labels": [IGNORED] * len(p) + a} for p, a in runner.rows]
    micro = min(plan.micro or plan.batch, plan.batch)
    if plan.batch % micro:
        raise InputError(f"the engine trl needs a batch ({plan.batch}) that micro ({micro}) divides")
    if watch is not None and 0 in at:
        runner.show(watch)
    if not plan.total:
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="davylamp-fit-") as folder, _kept_generators():
        config = SFTConfig(
            output_dir=folder,
            max_steps=plan.total,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=plan.batch // micro,
            max_grad_norm=plan.clip,
            max_length=None,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=runner.model.dtype == torch.bfloat16 and torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = SFTTrainer(
            runner.model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=runner.tokenizer,
            callbacks=[Watcher()],
            optimizers=(runner.optimiser, LambdaLR(runner.optimiser, lambda step: plan.rate(step) / (plan.lr or 1.0))),
        )
        trainer.remove_callback(PrinterCallback)  # stdout is for results
        trainer.train()
    runner.tokens = round(plan.total * plan.batch * sum(len(p) + len(a) for p, a in runner.rows) / len(runner.rows))
    runner.seconds, runner.step = time.perf_counter() - began, plan.total


@contextmanager
def _kept_generators() -> Iterator[None]:
    """trl seeds Python's, numpy's and torch's global generators; here all are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
