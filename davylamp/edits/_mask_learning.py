"""Learning SOMF's mask: preference optimisation on the logits alone, the weights stay as they are.
Source: arXiv:2405.09055, section 3; DPO arXiv:2305.18290, equation 7. Differs: a fixed reference model, whose pass is made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.edits._concrete import Mask, logit_noise, logit_shape, masked_vectors
from davylamp.edits._fusion import DARE_KEEP, Merge, drop, fuse, prepare
from davylamp.models.greedy import padded
from davylamp.models.turns import encode_turn, ends_of

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
REFERENCES = ("fixed", "resample", "task")
Vectors = Mapping[str, torch.Tensor]
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


@dataclass(frozen=True)
class Learning:
    """How to learn a mask; see `somf` for what each means. steps: None for `epochs` passes over the pairs."""

    steps: int | None = None
    epochs: int = 3
    batch: int = 16
    lr: float = 1e-3
    beta: float = 0.1
    sft: float = 1.0
    init: float = 0.0
    reference: Literal["fixed", "resample", "task"] = "fixed"
    schedule: Literal["cosine", "constant"] = "cosine"
    coarse: str = "entry"
    temperature: float = 0.5
    cap: float = 10.0

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise InputError(f"reference must be one of {', '.join(REFERENCES)}, got {self.reference!r}")
        if self.schedule not in ("cosine", "constant"):
            raise InputError(f"schedule must be cosine or constant, got {self.schedule!r}")
        for name, low in (("batch", 1), ("epochs", 1), ("cap", 1)):
            if getattr(self, name) < low:
                raise InputError(f"{name} must be {low} or more, got {getattr(self, name)}")
        for name in ("lr", "beta", "temperature"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not (self.sft >= 0 and math.isfinite(self.sft) and math.isfinite(self.init)):
            raise InputError(f"sft must be 0 or more and init finite, got {self.sft} and {self.init}")


# --- preference pairs --------------------------------------------------------------------------------------------------------------------
def preference(case: Case) -> tuple[str, str] | str:
    """(chosen, rejected) of a row, or why it cannot be used.

    A row ends in the user's turn; its meta holds `chosen` and `rejected`, or the fields of PKU-SafeRLHF (response_0, response_1,
    is_response_0_safe, is_response_1_safe), where exactly one response must be safe and is the chosen one.

    >>> from davylamp.core.nouns import Message
    >>> preference(Case("1", (Message("user", "x"),), meta={"chosen": "no .", "rejected": "no ."}))
    'both answers are the same'
    """
    meta = case.meta
    if case.messages[-1].role != "user":
        return "the row does not end in a user turn"
    if "response_0" in meta:
        safe = [meta.get("is_response_0_safe"), meta.get("is_response_1_safe")]
        if safe.count(True) != 1 or safe.count(False) != 1:
            return "not exactly one of the two answers is safe"
        answers = (meta["response_0"], meta.get("response_1"))
        chosen, rejected = answers if safe[0] else answers[::-1]
    else:
        chosen, rejected = meta.get("chosen"), meta.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str) or not chosen.strip() or not rejected.strip():
        return "an answer is missing or empty"
    return "both answers are the same" if chosen.strip() == rejected.strip() else (chosen, rejected)


def usable_pairs(rows: Sequence[Case]) -> tuple[list[tuple[Case, str, str]], dict[str, int]]:
    """(the rows with their two answers, how many were dropped for which reason). Raises InputError if none is left."""
    pairs: list[tuple[Case, str, str]] = []
    dropped: dict[str, int] = {}
    for case in rows:
        found = preference(case)
        if isinstance(found, str):
            dropped[found] = dropped.get(found, 0) + 1
        else:
            pairs.append((case, *found))
    if not pairs:
        why = "; ".join(f"{count} rows: {reason}" for reason, count in dropped.items()) or "there are no rows"
        raise InputError(
            f"no preference pair is left ({why}). A row ends in a user turn and has meta.chosen and meta.rejected"
        )
    return pairs, dropped


def encode_pairs(model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Case, str, str]]) -> list[Pair]:
    """Tokens of prompt, chosen and rejected answer, by the chat template, each answer with its end token."""
    ends, out = ends_of(model, tokenizer), []
    for case, chosen, rejected in pairs:
        prompt, first = encode_turn(tokenizer, case.messages, chosen, ends)
        out.append((prompt, first, encode_turn(tokenizer, case.messages, rejected, ends)[1]))
    return out


# --- losses ------------------------------------------------------------------------------------------------------------------------------
def log_probabilities(
    model: Any, weights: Vectors, rows: Sequence[tuple[list[int], list[int]]], pad: int
) -> torch.Tensor:
    """(rows,) summed log-probability of each answer after its prompt, with some weights replaced."""
    ids, mask = padded([prompt + answer for prompt, answer in rows], pad, model.device)
    labels = torch.full_like(ids, IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer, device=ids.device)
    first = min(len(prompt) for prompt, _ in rows) - 1  # logits before it are not wanted
    words = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    logits = torch.func.functional_call(model, dict(weights), kwargs=words).logits[:, first:-1].float()
    each = F.cross_entropy(logits.transpose(1, 2), labels[:, first + 1 :], ignore_index=IGNORED, reduction="none")
    return -each.sum(1)


def dpo_loss(chosen: Any, rejected: Any, chosen_reference: Any, rejected_reference: Any, beta: float) -> torch.Tensor:
    """-mean ln sigmoid(beta [(lp_w - lpref_w) - (lp_l - lpref_l)]); all (rows,) summed log-probabilities.

    >>> zero = torch.zeros(1)
    >>> round(float(dpo_loss(zero, zero, zero, zero, 0.1)), 4)
    0.6931
    """
    return -F.logsigmoid(beta * ((chosen - chosen_reference) - (rejected - rejected_reference))).mean()


# --- learning ----------------------------------------------------------------------------------------------------------------------------
class Learner:
    """The state of learning: logits, their optimiser, the reference's log-probabilities. `step()` makes one; `mask()` is what there is.

    model: the safe model, changed by nobody.  taus: for each task its vector by parameter name, float32, on the model's device.
    """

    def __init__(
        self,
        model: Any,
        taus: Sequence[Vectors],
        pairs: Sequence[Pair],
        merge: Merge,
        how: Learning,
        rng: Generator,
        pad: int = 0,
    ):
        self.model, self.taus, self.pairs, self.merge, self.how, self.rng, self.pad = (
            model,
            taus,
            pairs,
            merge,
            how,
            rng,
            pad,
        )
        own = dict(model.named_parameters())
        self.safe = {name: own[name].detach() for name in taus[0]}
        self.generator = torch.Generator(device=model.device).manual_seed(int(rng.integers(2**62)))
        self.logits = {
            name: torch.full(logit_shape(name, tau.shape, how.coarse), how.init, device=tau.device, requires_grad=True)
            for name, tau in taus[0].items()
        }
        self.optimiser = torch.optim.AdamW(list(self.logits.values()), lr=how.lr, weight_decay=0.0)
        self.total = how.steps if how.steps is not None else how.epochs * math.ceil(len(pairs) / how.batch)
        self.done, self.order = 0, list[int]()
        with self._frozen(), torch.no_grad():
            self.fixed = None if how.reference == "resample" else self._reference_of_all()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Gradients stop at the weights that no mask touches; the model's mode and flags are put back."""
        asked = {name: p.requires_grad for name, p in self.model.named_parameters()}
        training = self.model.training
        self.model.eval().requires_grad_(False)
        try:
            yield
        finally:
            self.model.train(training)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(asked[name])

    def _noise(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return logit_noise(shape, self.generator, self.model.device)

    def weights(self, logits: Vectors, *, masked: bool = True) -> dict[str, torch.Tensor]:
        """theta_safe + merge of the masked vectors, with a fresh draw of the mask (and of DARE)."""
        vectors: Mapping[str, Sequence[torch.Tensor]] = {name: [tau[name] for tau in self.taus] for name in self.safe}
        if masked:
            how = self.how
            vectors = masked_vectors(
                logits, self.taus, noise=self._noise, coarse=how.coarse, temperature=how.temperature, cap=how.cap
            )
        ties = prepare(self.merge, lambda: ([v.detach() for v in vectors[name]] for name in self.safe))
        keep = DARE_KEEP if self.merge.density is None else self.merge.density
        out = {}
        for name, safe in self.safe.items():
            drops = (
                [drop(safe.shape, keep, self.generator, safe.device) for _ in self.taus]
                if self.merge.rule == "dare"
                else []
            )
            out[name] = (safe.float() + fuse(self.merge, vectors[name], ties, drops)).to(safe.dtype)
        return out

    def _both(self, weights: Vectors, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [(prompt, answer) for prompt, answer, _ in pairs] + [(prompt, answer) for prompt, _, answer in pairs]
        chosen, rejected = log_probabilities(self.model, weights, rows, self.pad).chunk(2)
        return chosen, rejected

    def _reference_of_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        zero = {name: torch.zeros_like(logits) for name, logits in self.logits.items()}
        weights = self.weights(zero, masked=self.how.reference == "fixed")
        parts = [
            self._both(weights, self.pairs[at : at + self.how.batch])
            for at in range(0, len(self.pairs), self.how.batch)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def step(self) -> dict[str, float]:
        """One optimiser step; what it saw: loss, dpo, sft, mean log-probability of chosen and rejected answers, share preferred, kept."""
        how = self.how
        if len(self.order) < how.batch:
            self.order += self.rng.permutation(len(self.pairs)).tolist()
        picked, self.order = self.order[: how.batch], self.order[how.batch :]
        pairs = [self.pairs[i] for i in picked]
        fade = 1.0 if how.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * self.done / max(1, self.total)))
        for group in self.optimiser.param_groups:
            group["lr"] = how.lr * fade
        with self._frozen():
            if self.fixed is None:
                with torch.no_grad():
                    zero = {name: torch.zeros_like(logits) for name, logits in self.logits.items()}
                    reference = self._both(self.weights(zero), pairs)
            else:
                reference = (self.fixed[0][picked], self.fixed[1][picked])
            chosen, rejected = self._both(self.weights(self.logits), pairs)
            dpo = dpo_loss(chosen, rejected, *reference, how.beta)
            lengths = torch.tensor([len(answer) for _, answer, _ in pairs], device=chosen.device)
            sft = -(chosen / lengths).mean()
            loss = dpo + how.sft * sft
            loss.backward()
        if not bool(loss.isfinite()):
            raise InputError(f"the loss is not finite at step {self.done}. Lower lr, or check the models' weights")
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        seen = {"loss": loss, "dpo": dpo, "sft": sft, "chosen": chosen.mean(), "rejected": rejected.mean(),
                "preferred": (chosen > rejected).float().mean()}  # fmt: skip
        return {name: float(value.detach()) for name, value in seen.items()}

    def mask(self, **about: Any) -> Mask:
        """A copy of the mask as it is now, rounded as its file will hold it."""
        how = self.how
        shapes = {name: tuple(tau.shape) for name, tau in self.taus[0].items()}
        return Mask(dict(self.logits), shapes, how.coarse, how.temperature, how.cap, about=about).rounded()


def learn(
    learner: Learner, *, at: Sequence[int] = (), watch: Callable[[int, Mask], object] | None = None
) -> tuple[Mask, list[dict[str, float]]]:
    """Run all steps. `watch(step, mask)` is called after the steps in `at`, for choosing one on a validation split."""
    seen = []
    for step in range(1, learner.total + 1):
        seen.append(learner.step())
        if watch is not None and step in at:
            watch(step, learner.mask())
    return learner.mask(), seen
