"""What Antidote scores and masks: which weights of a model as matrices, |W| times the use of each input column, and the report.
Source: arXiv:2408.09600, section 4; Wanda, arXiv:2306.11695, equation 1. Used by `antidote.py`, in memory and on folders."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from davylamp.core.errors import InputError
from davylamp.edits._masks import Threshold, check_ratio, parse_scope, random_scores, top_mask
from davylamp.models.activations import InputNorms, Weight, layer_of, linear_weights, matching, quantised

Mode = Literal["auto", "adapter", "delta", "merged", "full"]
Score = Literal["activations", "magnitude", "random"]
QKV = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "c_attn",
    "query_key_value",
    "Wqkv",
)  # what the reference masks without LoRA
Key = tuple[str, int, int]  # parameter, expert (or 0), half of a stacked gate and up projection (or 0)


@dataclass(frozen=True)
class How:
    """How to score and mask; see `antidote` for what each means. Raises InputError for what cannot be."""

    ratio: float = 0.1
    score: Score = "activations"
    scope: str = "row"
    norm: Literal["rms", "mean"] = "rms"
    benign_ratio: float = 0.1
    early: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_ratio(self.benign_ratio)
        parse_scope(self.scope)
        for name, value, known in (
            ("score", self.score, ("activations", "magnitude", "random")),
            ("norm", self.norm, ("rms", "mean")),
        ):
            if value not in known:
                raise InputError(f"{name} of antidote must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}")


@dataclass
class Report:
    """What was done, in plain types. tensors: entries, removed, fraction and how many of the removed were zero already, by name.

    skipped: weights that were left alone, and why.  seconds: of scoring and of masking.  peak_bytes: of this process, or of the GPU.
    """

    mode: str
    how: How
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sequences: int = 0
    dropped: int = 0
    approximate: bool = False
    state_bytes: int = 0
    limit_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        return sum(row["removed"] for row in self.tensors.values())

    def scored(self, norms: InputNorms | None, seconds: float) -> None:
        """Note what scoring took."""
        self.seconds["scoring"], self.peak_bytes["scoring"] = seconds, peak_bytes()
        if norms is not None:
            self.sequences, self.approximate = norms.sequences, norms.stopped
            self.state_bytes, self.limit_bytes = norms.state_bytes, norms.limit_bytes

    def done(self, seconds: float) -> None:
        """Note what masking took, and warn if it did nothing."""
        self.seconds["masking"], self.peak_bytes["masking"] = seconds, peak_bytes()
        if not self.removed:
            warnings.warn(f"mask ratio {self.how.ratio} is so small that no weight was masked (count 0)", stacklevel=3)

    def add(self, name: str, mask: torch.Tensor, matrix: torch.Tensor) -> None:
        """Count one mask; the parts of a stacked weight are counted together."""
        row = self.tensors.setdefault(name, {"entries": 0, "removed": 0, "zero_before": 0, "fraction": 0.0})
        row["entries"] += mask.numel()
        row["removed"] += int(mask.sum())
        row["zero_before"] += int((matrix[mask] == 0).sum())
        row["fraction"] = row["removed"] / row["entries"]

    def json(self) -> dict[str, Any]:
        how = {name: getattr(self.how, name) for name in self.how.__dataclass_fields__}
        out = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "how"}
        return {**out, "how": how, "removed": self.removed, "entries": sum(r["entries"] for r in self.tensors.values())}


def peak_bytes() -> int:
    """The most memory this process held so far, or its tensors on the GPU if there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- which weights, as matrices ----------------------------------------------------------------------------------------------------------
def parts(name: str, weight: Weight, stored: torch.Tensor) -> Iterator[tuple[Key, torch.Tensor]]:
    """Views (outputs, inputs) into a stored weight: itself, its transpose (Conv1D), or one for each expert and its gate and up half."""
    if not weight.experts:
        yield (name, 0, 0), stored.T if weight.transposed else stored
        return
    for expert in range(weight.experts):
        one = stored[expert].T if weight.transposed else stored[expert]
        if weight.leaf == "gate_up_proj" and not weight.transposed:
            yield from (((name, expert, half), view) for half, view in enumerate(one.chunk(2)))
        else:
            yield (name, expert, 0), one


def targets_of(
    model: Any, mode: Mode, target: Sequence[str] = (), *, skeleton: bool = False
) -> tuple[str, dict[str, Weight]]:
    """(the mode, the weights it masks). For adapter: A and B of the active adapters; for delta and merged: the frozen weights below them.

    Raises InputError where there are none, with the layers that the model has, and for quantised or off-loaded weights.
    """
    every = linear_weights(model)
    active = active_adapters(model)
    if mode == "auto":
        mode = "adapter" if active else "full"
    if mode not in ("adapter", "delta", "merged", "full"):
        raise InputError(f"mode of antidote must be auto, adapter, delta, merged or full, got {mode!r}")
    if mode == "adapter" or (mode == "merged" and active) or (mode == "delta" and active):
        marks = [f".{part}.{name}." for part in ("lora_A", "lora_B") for name in active]
        own = {name: weight for name, weight in every.items() if any(mark in name for mark in marks)}
        if not own:
            raise InputError(
                f"the model has no LoRA adapter to mask. Its layers: {layers(every)}. Use mode full and target"
            )
        if target:
            own = matching(own, target)
        if mode != "adapter":
            below = {name.split(".lora_")[0] + ".base_layer.weight" for name in own}
            own = {name: weight for name, weight in every.items() if name in below}
    elif active and mode == "full":
        raise InputError("the model wears an adapter: use mode adapter or delta, or mode merged for its merged weights")
    elif mode == "merged":
        raise InputError("mode merged needs a model with a LoRA adapter. Use mode full for plain weights")
    else:  # full, or delta of whole models
        own = matching(every, target or QKV)
    if not own:
        what = f"match {', '.join(target)}" if target else f"are named {', '.join(QKV)}"
        raise InputError(f"no layers {what}. The model's layers: {layers(every)}. Name some in target")
    for name, weight in own.items():
        if quantised(weight.module):
            raise InputError(f"{name} is quantised: load the model in 16 or 32 bit, or merge and save it first")
        if weight.parameter.device.type == "meta" and not skeleton:
            raise InputError(f"{name} is off-loaded and holds no values. Load the model whole, or give its folder")
    return mode, own


def active_adapters(model: Any) -> list[str]:
    """Names of the active LoRA adapters; none for a plain model."""
    names = getattr(model, "active_adapters", None) if getattr(model, "peft_config", None) else None
    return list(names() if callable(names) else names or [])


def layers(weights: Mapping[str, Weight]) -> str:
    """The layers' names, each once.

    >>> layers(linear_weights(torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2), "down": torch.nn.Linear(2, 2)})))
    'down, up'
    """
    return ", ".join(sorted({layer_of(name) for name in weights})) or "none"


# --- scores and masks --------------------------------------------------------------------------------------------------------------------
class Picker:
    """Masks for named matrices. matrices: gives (key, matrix) of all of them anew at every call; only scope global walks them."""

    def __init__(
        self,
        how: How,
        matrices: Callable[[], Iterator[tuple[Key, torch.Tensor]]],
        norms: InputNorms | None = None,
        benign: InputNorms | None = None,
    ):
        self.how, self.norms, self.benign = how, norms, benign
        self.edges: list[Threshold] = []
        if how.scope == "global":
            found = [(norms, how.ratio)] + ([(benign, how.benign_ratio)] if benign is not None else [])
            for each, ratio in found:

                def walk(each: InputNorms | None = each) -> Iterator[tuple[Key, torch.Tensor]]:
                    yield from (
                        (k, s) for k, m in matrices() if not self.skip(k) and (s := self.score(k, m, each)) is not None
                    )

                self.edges.append(Threshold(walk, ratio))

    def skip(self, key: Key) -> str:
        """Why a matrix is left alone, or empty."""
        name, expert, _ = key
        for norms in (self.norms, self.benign) if self.how.score == "activations" else ():
            if norms is None:
                continue
            if name not in norms.means:
                return "was never run"
            if not int(norms.tokens[name].reshape(-1)[expert]):
                return "no token was routed to it"
        return ""

    def score(self, key: Key, matrix: torch.Tensor, norms: InputNorms | None) -> torch.Tensor:
        """(outputs, inputs) float32: |W_ij| * sqrt(s_j), or |W_ij|, or a random number."""
        name, expert, half = key
        if self.how.score == "random":
            return random_scores(matrix.shape, f"{name} {expert} {half}", self.how.seed).to(matrix.device)
        magnitude = matrix.detach().float().abs()
        if self.how.score == "magnitude" or norms is None:
            return magnitude
        values = norms.importance(name)
        return magnitude * (values[expert] if values.dim() == 2 else values).to(magnitude.device)

    def mask_or_skip(self, key: Key, matrix: torch.Tensor, report: Report) -> torch.Tensor | None:
        """The mask, counted in the report; None, with the reason noted, for a matrix that is left alone."""
        name, expert, _ = key
        if why := self.skip(key):
            stacked = self.norms is not None and name in self.norms.tokens and self.norms.tokens[name].dim()
            report.skipped[f"{name} expert {expert}" if stacked else name] = why
            return None
        mask = self.mask(key, matrix)
        report.add(name, mask, matrix)
        return mask

    def mask(self, key: Key, matrix: torch.Tensor) -> torch.Tensor:
        """True where a weight goes: the top share, minus what is in the top share for benign text if that was given."""
        wanted = [(self.norms, self.how.ratio)] + (
            [(self.benign, self.how.benign_ratio)] if self.benign is not None else []
        )
        masks = []
        for i, (norms, ratio) in enumerate(wanted):
            score = self.score(key, matrix, norms)
            masks.append(self.edges[i].mask(key, score) if self.edges else top_mask(score, ratio, self.how.scope))
        return masks[0] & ~masks[1] if len(masks) > 1 else masks[0]
