"""Unlearning: take facts out of a model by gradient, by one of the published methods or by one of their controls.
Source: arXiv:2501.04952 (the problem); the methods' own papers: see `_unlearn_losses.py`.

What comes out may only hide what it should have lost. `davylamp study unlearning_card` tells the two apart; a forget score does not.

Longer than 400 lines because the table of methods, the options and the one loop that all methods share are read together.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.core.registry import train
from davylamp.models.adapters import Lora, merge, put_on, take_off
from davylamp.models.fit import IGNORED, Encoded, check, encode
from davylamp.models.greedy import padded
from davylamp.train import _unlearn_losses as losses
from davylamp.train._unlearn_data import Sets, need_known, recall, sets

if TYPE_CHECKING:
    from numpy.random import Generator

    from davylamp.core.rows import Dropped

Method = Literal[
    "grad_ascent", "grad_diff", "npo", "simnpo", "dpo_idk", "rmu", "undial", "wga", "satimp", "ceu", "pdu",
    "retain_only", "negation", "refusal", "random_label",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Defaults:
    """forget, retain: weights g and a of L = g L_f + a L_r.  beta, delta: of the loss."""

    forget: float
    retain: float
    beta: float | None = None
    delta: float = 0.0


#: The published settings. The last four are no unlearning methods but what one is held against: see the docstring of `unlearn`.
METHODS: dict[str, Defaults] = {
    "grad_ascent": Defaults(1.0, 0.0),
    "grad_diff": Defaults(1.0, 1.0),
    "npo": Defaults(1.0, 1.0, 0.1),
    "simnpo": Defaults(0.125, 1.0, 4.5),
    "dpo_idk": Defaults(1.0, 1.0, 0.1),
    "rmu": Defaults(1.0, 1200.0),
    "undial": Defaults(1.0, 0.0, 10.0),
    "wga": Defaults(1.0, 1.0, 1.0),
    "satimp": Defaults(0.1, 1.0, 5.0, 1.0),  # beta and delta are beta1 and beta2
    "ceu": Defaults(1.0, 0.0),
    "pdu": Defaults(1.0, 1.0),
    "retain_only": Defaults(0.0, 1.0),
    "negation": Defaults(1.0, 0.0),
    "refusal": Defaults(1.0, 1.0),
    "random_label": Defaults(1.0, 1.0),
}
IDK = ("I don't know.", "I am not sure about that.", "I have no information on this.", "That is beyond what I know.")
REFERENCE = ("npo", "dpo_idk", "undial", "rmu")  # methods that look at the frozen start model
CHECK_ROWS = 256  # forget rows looked at to decide when to stop
_DOWN = re.compile(r"(^|\.)(mlp|feed_forward|block_sparse_moe)\.(.*\.)?(down_proj|c_proj|dense_4h_to_h|fc2|w2)(\.|$)")


@dataclass(frozen=True, slots=True)
class Unlearned:
    """verdict: `reached` (the stopping rule), `all steps`, or `diverged` (then the model is the last good one).  steps: taken and kept.
    log: what was looked at, every `check_every` steps: step, loss, and the share of forget rows still recalled."""

    model: Any
    verdict: str
    steps: int
    log: tuple[dict[str, float], ...]
    dropped: tuple[Dropped, ...] = ()


@train(
    version=1,
    source="arXiv:2501.04952",
    licence="Apache-2.0",
    stage="post-training",
    threats=("harmful-compliance", "capability-loss"),
    needs="hf",
    systems=("19",),
)
def unlearn(
    model: Any,
    rows: Sequence[Case],
    *,
    tokenizer: Any,
    rng: Generator,
    method: Method = "npo",
    lr: float = 1e-5,
    batch: int = 32,
    steps: int | None = None,
    epochs: int = 10,
    stop: float | None = None,
    retain: tuple[str, ...] = ("retain", "general"),
    retain_loss: Literal["nll", "kl"] = "nll",
    forget_weight: float | None = None,
    retain_weight: float | None = None,
    beta: float | None = None,
    delta: float | None = None,
    layer: int = 7,
    steer: float = 6.5,
    module: str = "",
    update: Literal["down", "all"] = "down",
    skip_tokens: int = 1,
    eta: float = 1.0,
    epsilon: float = 0.0,
    replies: tuple[str, ...] = (),
    warmup: int = 0,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    rank: int = 0,
    check_every: int = 5,
    allow_overlap: bool = False,
    force: bool = False,
) -> Any:
    """Unlearn the rows with `meta.part` forget while keeping those whose part `retain` names, by one of fifteen methods.

    Methods: grad_ascent, grad_diff, npo, simnpo, dpo_idk, rmu, undial, wga, satimp, ceu, pdu. Controls, which are no unlearning:
    retain_only (fine-tune on the rest), negation (subtract a fine-tune on the forget set), refusal (learn to refuse the forget questions:
    hides by design), random_label (learn other rows' answers).  rows: prompts with the answer as last message.
    steps: or `epochs` over the forget set.  stop: end at the first look at which this share of forget answers or fewer is recalled.
    forget_weight, retain_weight, beta, delta: of the loss, by default as published (SatImp's beta1 and beta2 are beta and delta).
    layer, steer, module, update: of RMU: where to steer (from 0, or a regular expression that matches one module), how far, and which
    weights move (MLP down-projections of three layers, or all).  skip_tokens: first answer tokens that CE-U leaves alone.
    eta, epsilon: of PDU's dual variable.  replies: what dpo_idk and refusal teach instead.  rank: above 0, LoRA of that rank.
    allow_overlap: rows may be in both sets.  force: unlearn also what the model does not know.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "rows", "tokenizer", "rng")}
    found = unlearn_logged(model, rows, tokenizer=tokenizer, rng=rng, **given)
    last = f", recalls {found.log[-1]['recalled']:.0%} of the forget set" if found.log else ""
    print(f"{method}: {found.verdict} after {found.steps} steps{last}", file=sys.stderr)
    for left_out in found.dropped[:5]:
        print(f"left out row {left_out.case.id}: {left_out.reason}", file=sys.stderr)
    if len(found.dropped) > 5:
        print(f"{len(found.dropped)} rows left out", file=sys.stderr)
    return found.model


def unlearn_logged(
    model: Any,
    rows: Sequence[Case],
    *,
    tokenizer: Any,
    rng: Generator,
    method: str = "npo",
    watch: Callable[[int, Any], object] | None = None,
    **options: Any,
) -> Unlearned:
    """As `unlearn`, with what happened on the way. watch: called as `watch(step, model)` at every look.

    Raises InputError for options out of range, unusable rows, a model that generates nothing, or one that knows nothing of the forget set.
    """
    plan = _Plan(method, **options)
    plan.check()
    if model.config.is_encoder_decoder:
        raise InputError("unlearning works on causal language models, got an encoder-decoder")
    check(model, 1, "full", plan.lr, 1, None, 1)
    data = sets(
        model, rows, tokenizer, retain=plan.retain, allow_overlap=plan.allow_overlap, need_retain=plan.weights[1] > 0
    )
    if not plan.force:
        need_known(model, tokenizer, data.forget, rng)
    return _Run(model, tokenizer, data, plan, rng).go(watch)


@dataclass(slots=True)
class _Plan:
    method: str
    lr: float = 1e-5
    batch: int = 32
    steps: int | None = None
    epochs: int = 10
    stop: float | None = None
    retain: tuple[str, ...] = ("retain", "general")
    retain_loss: str = "nll"
    forget_weight: float | None = None
    retain_weight: float | None = None
    beta: float | None = None
    delta: float | None = None
    layer: int = 7
    steer: float = 6.5
    module: str = ""
    update: str = "down"
    skip_tokens: int = 1
    eta: float = 1.0
    epsilon: float = 0.0
    replies: tuple[str, ...] = ()
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    rank: int = 0
    check_every: int = 5
    allow_overlap: bool = False
    force: bool = False
    weights: tuple[float, float] = field(default=(0.0, 0.0), init=False)

    def check(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError("unlearning method", self.method, METHODS)
        own = METHODS[self.method]
        self.beta = own.beta if self.beta is None else self.beta
        self.delta = own.delta if self.delta is None else self.delta
        self.weights = (
            own.forget if self.forget_weight is None else self.forget_weight,
            own.retain if self.retain_weight is None else self.retain_weight,
        )
        if self.beta is not None and not (math.isfinite(self.beta) and self.beta > 0):
            raise InputError(f"beta must be above 0, got {self.beta}")
        for name in ("epsilon", "eta", "delta", "weight_decay", "clip", "rank", "warmup", "skip_tokens"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name, value in (("lr", self.lr), ("steer", self.steer)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be above 0, got {value}")
        if min(self.weights) < 0 or not any(self.weights) or not all(map(math.isfinite, self.weights)):
            raise InputError(f"forget_weight and retain_weight must be 0 or more, and not both 0, got {self.weights}")
        for name in ("batch", "epochs", "check_every", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.stop is not None and not 0 <= self.stop < 1:
            raise InputError(f"stop must be a share from 0 to below 1, got {self.stop}")
        if self.retain_loss not in ("nll", "kl"):
            raise UnknownNameError("retain loss", self.retain_loss, ("nll", "kl"))
        if self.method == "rmu" and self.rank:
            raise InputError("rmu moves MLP down-projections themselves: use it without rank")


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows: ids and mask (rows, places); labels (rows, places - 1) for the shifted logits, -100 outside the answers."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[Encoded], pad: int, device: Any) -> Batch:
        ids, mask = padded([prompt + answer for prompt, answer in rows], pad, device)
        labels, _ = padded([[IGNORED] * len(prompt) + answer for prompt, answer in rows], IGNORED, device)
        return cls(ids, mask, labels[:, 1:])

    def logits(self, model: Any) -> Tensor:
        return model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits[:, :-1]

    def logp(self, model: Any) -> Tensor:
        """(rows,) ln p(answer | prompt), summed over the answer."""
        return -losses.token_nll(self.logits(model), self.labels).sum(1)


class _Run:
    """One unlearning run: the trained parameters, the frozen start model where the method looks at it, and the loop."""

    def __init__(self, model: Any, tokenizer: Any, data: Sets, plan: _Plan, rng: Generator):
        self.base, self.tokenizer, self.data, self.plan, self.rng = model, tokenizer, data, plan, rng
        self.pad = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
        self.every = math.ceil(len(data.forget) / plan.batch)
        self.total = plan.steps if plan.steps is not None else plan.epochs * self.every
        self.dual = plan.weights[1]
        self.order: list[int] = []
        self.swapped = self._swapped()
        self.layer_path, chosen = rmu_parts(model, plan) if plan.method == "rmu" else ("", None)
        self.asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.needs_ref = plan.method in REFERENCE or plan.retain_loss == "kl"
        # An adapter can be switched off, which is the start model; otherwise a copy is kept beside.
        self.ref = copy.deepcopy(model).requires_grad_(False).eval() if self.needs_ref and not plan.rank else None
        self.model = put_on(model, Lora(plan.rank), rng) if plan.rank else model
        if not plan.rank:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.is_floating_point() and (chosen is None or name in chosen))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        width = model.config.get_text_config().hidden_size
        uniform = torch.as_tensor(rng.random(width), dtype=torch.float32, device=model.device)
        self.target = losses.steering_target(width, plan.steer, uniform)

    def _swapped(self) -> list[Encoded]:
        """What the methods that teach something else teach: for each forget row its prompt with another answer."""
        plan, forget = self.plan, self.data.forget
        if plan.method == "random_label":
            out = []
            for prompt, answer in forget:
                others = [other for _, other in forget if other != answer]
                if not others:
                    raise InputError("random_label needs forget rows with two or more different answers")
                out.append((prompt, others[int(self.rng.integers(len(others)))]))
            return out
        if plan.method not in ("dpo_idk", "refusal"):
            return []
        replies = plan.replies or IDK
        cases = [
            Case(c.id, (*c.messages[:-1], Message("assistant", replies[int(self.rng.integers(len(replies)))])))
            for c in self.data.forget_cases
        ]
        return encode(self.base, self.tokenizer, cases, None)[0]

    def go(self, watch: Callable[[int, Any], object] | None) -> Unlearned:
        plan = self.plan
        self.model.eval()  # no dropout: the model and its frozen start must be compared like for like
        optimiser = torch.optim.AdamW(self.parameters, lr=plan.lr, weight_decay=plan.weight_decay)
        good, kept, log, verdict = self._copy(), 0, list[dict[str, float]](), "all steps"
        start_norm = self._norm()
        try:
            for step in range(1, self.total + 1):
                for group in optimiser.param_groups:
                    group["lr"] = plan.lr * min(1.0, step / plan.warmup if plan.warmup else 1.0)
                loss = self.loss(*self.draw(), step)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, plan.clip or math.inf)
                if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
                    verdict = "diverged"
                else:
                    optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                if step % plan.check_every and step < self.total and verdict != "diverged":
                    continue
                if verdict == "diverged" or not self._norm() < 10 * start_norm:  # NaN fails the comparison too
                    verdict = "diverged"
                    self._restore(good)
                    break
                good, kept = self._copy(), step
                if plan.method == "negation":
                    continue  # until the end this is a fine-tune on the forget set, and says nothing
                log.append(self._look(step, float(loss.detach())))
                if watch is not None:
                    watch(step, self.model)
                if plan.stop is not None and log[-1]["recalled"] <= plan.stop:
                    verdict = "reached"
                    break
            if plan.method == "negation":
                self._negate(start=self._start)
                log.append(self._look(kept, float("nan")))
        except BaseException:
            self._off()
            raise
        model = merge(self.model, self.asked) if plan.rank else self._off()
        return Unlearned(model.eval(), verdict, kept, tuple(log), tuple(self.data.dropped))

    # --- one step -----------------------------------------------------------------------------------------------------------------------
    def draw(self) -> tuple[list[int], list[Encoded]]:
        """(the forget rows of this step, as many random rows to retain): "anchor = forget"."""
        if not self.order:
            self.order = self.rng.permutation(len(self.data.forget)).tolist()
        taken, self.order = self.order[: self.plan.batch], self.order[self.plan.batch :]
        stay = self.data.retain
        picked = [stay[i] for i in self.rng.integers(len(stay), size=len(taken))] if stay else []
        return taken, picked

    def loss(self, taken: Sequence[int], picked: Sequence[Encoded], step: int) -> Tensor:
        """L = g L_f + a L_r; a is PDU's dual variable there."""
        plan = self.plan
        loss: Any = 0.0
        if plan.weights[0] > 0:
            loss = plan.weights[0] * self.forget_loss(taken)
        weight = self.dual if plan.method == "pdu" else plan.weights[1]
        if picked and (plan.weights[1] > 0 or plan.method == "pdu"):
            kept = self.retain_loss(picked)
            loss = loss + weight * kept
            if plan.method == "pdu" and step > 5 * self.every:  # warm-up: five epochs
                self.dual = max(0.0, self.dual + plan.eta * (float(kept.detach()) - plan.epsilon))
        return loss

    def forget_loss(self, taken: Sequence[int]) -> Tensor:
        plan, beta, delta = self.plan, self.plan.beta or 0.0, self.plan.delta or 0.0
        batch = self._batch([self.data.forget[i] for i in taken])
        if plan.method == "rmu":
            return losses.rmu(self._hidden(self.model, batch), self.target, batch.mask)
        if plan.method in ("refusal", "random_label"):
            other = self._batch([self.swapped[i] for i in taken])
            return losses.mean_nll(losses.token_nll(other.logits(self.model), other.labels), other.labels)
        logits = batch.logits(self.model)
        nll = losses.token_nll(logits, batch.labels)
        if plan.method in ("grad_ascent", "grad_diff"):
            return -losses.mean_nll(nll, batch.labels)
        if plan.method == "negation":
            return losses.mean_nll(nll, batch.labels)
        if plan.method == "simnpo":
            return losses.simnpo(nll.sum(1), (batch.labels != IGNORED).sum(1), beta, delta)
        if plan.method == "wga":
            return losses.wga(nll, batch.labels, beta)
        if plan.method == "satimp":
            return losses.satimp(nll, batch.labels, beta, delta)
        if plan.method == "ceu":
            return losses.ceu(logits, batch.labels, plan.skip_tokens)
        if plan.method == "pdu":
            return losses.pdu(logits, batch.labels)
        with self._reference() as ref, torch.no_grad():
            ref_logits = batch.logits(ref)
            ref_logp = -losses.token_nll(ref_logits, batch.labels).sum(1)
        if plan.method == "undial":
            return losses.undial(logits, ref_logits, batch.labels, beta)
        if plan.method == "npo":
            return losses.npo(-nll.sum(1), ref_logp, beta)
        win = self._batch([self.swapped[i] for i in taken])
        with self._reference() as ref, torch.no_grad():
            win_ref = win.logp(ref)
        return losses.dpo_idk(win.logp(self.model), win_ref, -nll.sum(1), ref_logp, beta)

    def retain_loss(self, picked: Sequence[Encoded]) -> Tensor:
        batch = self._batch(picked)
        if self.plan.method == "rmu":
            with self._reference() as ref, torch.no_grad():
                stay = self._hidden(ref, batch)
            return losses.rmu(self._hidden(self.model, batch), stay, batch.mask)
        logits = batch.logits(self.model)
        if self.plan.retain_loss == "nll":
            return losses.mean_nll(losses.token_nll(logits, batch.labels), batch.labels)
        with self._reference() as ref, torch.no_grad():
            ref_logits = batch.logits(ref)
        return losses.kl(ref_logits, logits, batch.labels)

    def _batch(self, rows: Sequence[Encoded]) -> Batch:
        return Batch.of(rows, self.pad, self.base.device)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        with nullcontext() if self.ref is not None else self.model.disable_adapter():
            yield self.ref if self.ref is not None else self.model

    def _hidden(self, model: Any, batch: Batch) -> Tensor:
        """(rows, tokens, width) out of the steered module."""
        seen: list[Tensor] = []

        def keep(module: Any, args: Any, out: Any) -> None:
            seen.append(out[0] if isinstance(out, tuple) else out)  # which of the two depends on the architecture

        handle = model.get_submodule(self.layer_path).register_forward_hook(keep)
        try:
            batch.logits(model)
        finally:
            handle.remove()
        return seen[0]

    # --- the weights --------------------------------------------------------------------------------------------------------------------
    def _copy(self) -> list[Tensor]:
        copies = [parameter.detach().clone() for parameter in self.parameters]
        if not hasattr(self, "_start"):
            self._start = copies
        return copies

    def _restore(self, copies: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, old in zip(self.parameters, copies, strict=True):
                parameter.copy_(old)

    def _negate(self, *, start: Sequence[Tensor]) -> None:
        """w = w0 - g (w_fine-tuned - w0) (task arithmetic, arXiv:2212.04089, section 4)."""
        with torch.no_grad():
            for parameter, old in zip(self.parameters, start, strict=True):
                parameter.copy_(old - self.plan.weights[0] * (parameter - old))

    def _norm(self) -> float:
        with torch.no_grad():
            return math.sqrt(sum(float(p.float().square().sum()) for p in self.parameters)) or 1.0

    def _look(self, step: int, loss: float) -> dict[str, float]:
        said = recall(self.model, self.tokenizer, self.data.forget[:CHECK_ROWS])
        return {"step": float(step), "loss": loss, "recalled": sum(said) / len(said)}

    def _off(self) -> Any:
        """Leave the model as its owner had it, apart from the weights: no adapter, the same parameters asking for gradients."""
        if self.plan.rank:
            return take_off(self.model, self.asked)
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(self.asked[name])
        return self.base


def rmu_parts(model: Any, plan: Any) -> tuple[str, set[str] | None]:
    """(name of the module to steer, names of the parameters to train; None for all). Raises InputError, with what there is.

    By default the module is decoder layer `layer`, and trained are the MLP down-projections of layers `layer - 2` to `layer`: `down_proj`,
    GPT-2's `c_proj`, a mixture's experts (one matrix each, or one tensor of three axes).
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    at = max(lists, key=lambda name: (len(lists[name]), -len(name)), default="")
    if not at:
        raise InputError(f"{type(model).__name__} has no list of layers")
    count = len(lists[at])
    if plan.module:
        found = [name for name, _ in model.named_modules() if re.fullmatch(plan.module, name)]
        if len(found) != 1:
            near = found or [f"{at}.{i}" for i in range(count)]
            raise InputError(
                f"module {plan.module!r} must match exactly one module, and matches {len(found)}. There are: {', '.join(near[:8])}"
            )
        path = found[0]
        inside = re.match(rf"{re.escape(at)}\.(\d+)", path)
        layer = int(inside[1]) if inside else count - 1
    else:
        layer, path = plan.layer, f"{at}.{plan.layer}"
        if not 0 <= layer < count:
            raise InputError(f"layer must be from 0 to {count - 1} for this model, got {layer}")
    if plan.update == "all":
        return path, None
    above = tuple(f"{at}.{i}." for i in range(max(0, layer - 2), layer + 1))
    chosen = {name for name, _ in model.named_parameters() if name.startswith(above) and _DOWN.search(name)}
    if not chosen:
        raise InputError(f"no MLP down-projection in layers {layer - 2} to {layer}. Say update=all")
    return path, chosen
