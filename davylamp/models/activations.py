"""How strongly each input column of a model's linear weights is used on given texts, collected by forward pre-hooks in one plain pass.

Source: Wanda, arXiv:2306.11695, equation 1 (the norm of a weight's input over tokens). Nothing is kept of the activations but one float32
per column, whatever the number of texts.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from davylamp.core.errors import InputError
from davylamp.models.greedy import padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Norm = Literal["rms", "mean"]
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")  # of the fused experts of transformers 5: (experts, out, in)


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight to watch: the module that holds it, the parameter's own name in it, and how it is laid out.

    transposed: stored as (in, out), as GPT-2's Conv1D is.  experts: how many stacked experts it holds, 0 for a plain matrix.
    """

    module: nn.Module
    leaf: str
    transposed: bool = False
    experts: int = 0

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.leaf)

    @property
    def columns(self) -> int:
        """How many input columns it has (of each expert)."""
        return int(self.parameter.shape[-2 if self.transposed else -1])


@dataclass
class InputNorms:
    """What a pass found. Keys are parameter names; values are (columns,), or (experts, columns) for stacked experts, float32.

    means: for norm rms the mean over sequences of the squared norm over tokens, for norm mean the mean of the norms.
    tokens: how many tokens each weight (or expert) was fed; 0 for an expert that nothing was routed to.
    state_bytes: what the statistics took.  limit_bytes: one float32 per column of every watched weight.  stopped: not all texts were read.
    """

    norm: Norm
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    sequences: int = 0
    seconds: float = 0.0
    state_bytes: int = 0
    limit_bytes: int = 0
    stopped: bool = False

    def importance(self, name: str) -> torch.Tensor:
        """What |weight| is multiplied with: the root of the mean square, or the mean norm."""
        return self.means[name].sqrt() if self.norm == "rms" else self.means[name]


def linear_weights(model: nn.Module) -> dict[str, Weight]:
    """Every weight that multiplies activations, by parameter name, in the model's order: nn.Linear, Conv1D, stacked experts.

    Embeddings, norms and the output head are never among them. Of a model with LoRA, both the frozen weights and the adapter's are.

    >>> layer = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    >>> {name: weight.columns for name, weight in linear_weights(layer).items()}
    {'0.weight': 3}
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    out: dict[str, Weight] = {}
    for name, module in model.named_modules():
        if module is head or "lm_head" in name.split("."):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear) or quantised(module):
            out[f"{prefix}weight"] = Weight(module, "weight")
        elif type(module).__name__ == "Conv1D":
            out[f"{prefix}weight"] = Weight(module, "weight", transposed=True)
        for leaf in EXPERT_WEIGHTS:
            stacked = module._parameters.get(leaf)
            if stacked is not None and stacked.dim() == 3:
                turned = bool(getattr(module, "is_transposed", False))
                out[f"{prefix}{leaf}"] = Weight(module, leaf, transposed=turned, experts=int(stacked.shape[0]))
    return out


def quantised(module: nn.Module) -> bool:
    """Whether a module keeps its weight in packed integers (bitsandbytes, GPTQ, AWQ, torchao), which cannot be set to zero one by one."""
    kind = type(module)
    if kind.__module__.split(".")[0] in ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "aqlm", "hqq"):
        return "Linear" in kind.__name__
    if hasattr(module, "qweight"):
        return True
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and weight is not None and type(weight.data) is not torch.Tensor


def matching(weights: Mapping[str, Weight], patterns: Sequence[str]) -> dict[str, Weight]:
    """The weights whose layer is named like one of the patterns: the last part of the name (`q_proj`), or a glob over all of it.

    >>> list(matching(linear_weights(nn.ModuleDict({"q_proj": nn.Linear(2, 2), "out": nn.Linear(2, 2)})), ["q_proj"]))
    ['q_proj.weight']
    """
    return {
        name: weight
        for name, weight in weights.items()
        if any(layer_of(name) == pattern or fnmatch(name, pattern) for pattern in patterns)
    }


def layer_of(name: str) -> str:
    """The name a person gives a weight: `q_proj` for `model.layers.0.self_attn.q_proj.weight`, with or without LoRA around it.

    >>> layer_of("model.layers.0.mlp.experts.down_proj"), layer_of("layers.0.q_proj.lora_A.default.weight")
    ('down_proj', 'q_proj')
    """
    parts = [part for part in name.split(".") if part not in ("weight", "base_layer")]
    for mark in ("lora_A", "lora_B"):
        if mark in parts:
            parts = parts[: parts.index(mark)]
    return parts[-1] if parts else ""


def input_norms(
    model: PreTrainedModel,
    rows: Sequence[tuple[str, Sequence[int]]],
    weights: Mapping[str, Weight],
    *,
    norm: Norm = "rms",
    width: int = 16,
    pad: int = 0,
    enough: Callable[[InputNorms], bool] | None = None,
) -> InputNorms:
    """Read every row once and collect the norms of what goes into each of `weights`.

    rows: (id, token ids), each row one sequence; padding never counts.  width: rows at a time, rows of near length together.
    enough: asked after every batch; True stops early, and the result says so.
    Raises InputError for no rows, for quantised weights, and for activations that are not finite, with the layer and the row.
    """
    if not rows or not weights:
        raise InputError(f"input_norms needs rows and weights, got {len(rows)} rows and {len(weights)} weights")
    if packed := [name for name, weight in weights.items() if quantised(weight.module)]:
        raise InputError(
            f"{packed[0]} is quantised, and so are {len(packed) - 1} more: load the model in 16 or 32 bit, or merge and save it first"
        )
    share = True
    while True:
        try:
            return _pass(model, rows, weights, norm, width, pad, enough, share)
        except _OneByOneError:
            if width == 1:
                raise InputError("an expert got rows that cannot be told apart even one text at a time") from None
            width = 1
        except _NotSharedError:
            share = False


class _OneByOneError(Exception):
    """A layer saw tokens without their place in the batch (an expert behind a router): read the texts one at a time."""


class _NotSharedError(Exception):
    """Two layers that were fed one tensor in the first batch were fed two later: keep their statistics apart."""


def _pass(
    model: PreTrainedModel,
    rows: Sequence[tuple[str, Sequence[int]]],
    weights: Mapping[str, Weight],
    norm: Norm,
    width: int,
    pad: int,
    enough: Callable[[InputNorms], bool] | None,
    share: bool,
) -> InputNorms:
    start, training = time.perf_counter(), model.training
    watch = _Watch(weights, norm, share)
    model.eval()
    with watch, torch.no_grad():
        done = 0
        for part in _batches(rows, width):
            watch.batch(model, part, pad)
            done += len(part)
            if enough is not None and done < len(rows) and enough(watch.result()):
                break
    model.train(training)
    found = watch.result()
    found.stopped, found.seconds = done < len(rows), time.perf_counter() - start
    return found


def _batches(rows: Sequence[tuple[str, Sequence[int]]], width: int) -> Iterator[list[tuple[str, Sequence[int]]]]:
    """Rows of near length together, but the batches in the order of the rows, so that the first ones are no special ones."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
    parts = [sorted(order[at : at + width]) for at in range(0, len(order), width)]
    yield from ([rows[i] for i in part] for part in sorted(parts))


class _Watch:
    """The hooks and their sums. Layers that are fed the very same tensor (q, k, v) share one sum, and it is computed once."""

    def __init__(self, weights: Mapping[str, Weight], norm: Norm, share: bool):
        self.weights, self.norm, self.share = weights, norm, share
        self.means: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}  # name -> whose sum it uses
        self.sequences = 0
        self.mask: torch.Tensor | None = None  # (rows, tokens), 1 where a token is no padding
        self.padding = False
        self.last: deque[tuple[torch.Tensor, str, int]] = deque(
            maxlen=4
        )  # tensors summed last, for which name, their version
        self.first = True  # who shares with whom is settled by the first batch
        self.seen: set[str] = set()
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        plain = {id(w.module): (name, w) for name, w in self.weights.items() if not w.experts}
        stacked: dict[int, dict[str, Weight]] = {}
        for name, weight in self.weights.items():
            if weight.experts:
                stacked.setdefault(id(weight.module), {})[name] = weight
        for name, weight in plain.values():
            self.handles.append(weight.module.register_forward_pre_hook(self._plain(name)))
        for named in stacked.values():
            module = next(iter(named.values())).module
            self.handles.append(module.register_forward_pre_hook(self._experts(named), with_kwargs=True))

    def __exit__(self, *problem: object) -> None:
        for handle in self.handles:
            handle.remove()

    def batch(self, model: PreTrainedModel, part: Sequence[tuple[str, Sequence[int]]], pad: int) -> None:
        """Run one batch through the model; its rows count once each for every layer."""
        ids, self.mask = padded([row for _, row in part], pad, model.device)
        self.padding = bool((self.mask == 0).any())
        self.sequences += len(part)
        self.seen = set()
        try:
            inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask, "use_cache": False}
            if "logits_to_keep" in _signature(model):
                inputs["logits_to_keep"] = 1  # the head's product is not wanted
            model(**inputs)
        finally:
            self.last.clear()
            self.first = False
        if any(name not in self.seen and lead in self.seen for name, lead in self.leader.items()):
            raise _NotSharedError
        for name in self.means:
            if name not in self.seen:  # a layer that got nothing this time
                self._add(name, torch.zeros_like(self.means[name]), len(part))
        bad = next((name for name in self.weights if name in self.means and not self.means[name].isfinite().all()), "")
        if bad:
            self._blame(model, part, bad, pad)

    def _blame(self, model: PreTrainedModel, part: Sequence[tuple[str, Sequence[int]]], name: str, pad: int) -> None:
        if len(part) > 1:
            for row in part:
                alone = _Watch(self.weights, self.norm, self.share)
                with alone:
                    alone.batch(model, [row], pad)  # raises at the row to blame
        raise InputError(
            f"the input of {name} is not finite at row {part[0][0]}. Check the model's weights and its precision"
        )

    def result(self) -> InputNorms:
        """The means so far; a weight that was never run is not among them."""
        names = [name for name in self.weights if self.leader.get(name, name) in self.means]
        return InputNorms(
            self.norm,
            {name: self.means[self.leader.get(name, name)] for name in names},
            {name: self.tokens[self.leader.get(name, name)] for name in names},
            sequences=self.sequences,
            state_bytes=sum(mean.numel() * mean.element_size() for mean in self.means.values()),
            limit_bytes=sum(4 * w.columns * max(1, w.experts) for w in self.weights.values()),
        )

    def _add(self, name: str, total: torch.Tensor, rows: int, tokens: torch.Tensor | int = 0) -> None:
        """total: sum of the rows' squared norms (or norms). The mean runs over all sequences so far."""
        mean = self.means.get(name)
        if mean is None:
            self.means[name] = total / self.sequences
            self.tokens[name] = torch.as_tensor(tokens).cpu()
        else:
            mean += (total - rows * mean) / self.sequences
            self.tokens[name] = self.tokens[name] + torch.as_tensor(tokens).cpu()

    def _same_as_last(self, x: torch.Tensor) -> str:
        """The name that this very tensor, unchanged, was summed for a moment ago; else empty. With LoRA, B's inputs come in between."""
        for old, name, version in self.last:
            if (
                old.data_ptr() == x.data_ptr()
                and old.shape == x.shape
                and old.stride() == x.stride()
                and version == x._version
            ):
                return name
        return ""

    def _plain(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:  # returns None: a value would replace the input
            assert self.mask is not None
            x = args[0].detach()
            self.seen.add(name)
            if self.share:
                lead = self._same_as_last(x)
                if name in self.leader and lead != self.leader[name]:
                    raise _NotSharedError
                if lead and (name in self.leader or self.first):
                    self.leader[name] = lead
                    return
                self.last.append((x, name, x._version))
            rows, length = self.mask.shape
            if x.shape[:-1].numel() != rows * length or (x.dim() > 2 and x.shape[0] != rows):
                if rows > 1:
                    raise _OneByOneError
                mask = None
                x = x.reshape(1, -1, x.shape[-1])
            else:
                mask = self.mask if self.padding else None
                x = x.reshape(rows, length, -1)
            count = int(x.shape[0] * x.shape[1]) if mask is None else int(mask.sum())
            self._add(name, self._total(x, mask), rows, count)

        return hook

    def _total(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x: (rows, tokens, columns). Sum over rows of the squared norm over tokens, or of the norm; squares are taken in float32."""
        squares = x.float().square()
        if self.norm == "rms":
            flat = squares.reshape(-1, squares.shape[-1])
            return flat.sum(0) if mask is None else mask.reshape(-1).to(flat.dtype) @ flat
        per_row = squares.sum(1) if mask is None else torch.einsum("rt,rtc->rc", mask.to(squares.dtype), squares)
        return per_row.sqrt().sum(0)

    def _experts(self, named: Mapping[str, Weight]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert self.mask is not None
            hidden, index = [
                args[i] if len(args) > i else kwargs[word] for i, word in enumerate(("hidden_states", "top_k_index"))
            ]
            rows, length = self.mask.shape
            hidden = hidden.detach().reshape(rows * length, -1)
            real = self.mask.reshape(-1).bool()
            for name, weight in named.items():
                self.seen.add(name)
                totals, counts = [], []
                for expert in range(weight.experts):
                    fed = ((index.reshape(rows * length, -1) == expert).any(-1) & real).nonzero()[:, 0]
                    x = _inside(module, expert, hidden[fed]) if weight.leaf == "down_proj" else hidden[fed]
                    counts.append(fed.numel())
                    squares = x.float().square()
                    if self.norm == "mean":
                        per_row = torch.zeros(rows, weight.columns, device=x.device)
                        totals.append(per_row.index_add_(0, fed // length, squares).sqrt().sum(0))
                    else:
                        totals.append(squares.sum(0))
                self._add(name, torch.stack(totals), rows, torch.tensor(counts))

        return hook


def _inside(module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What goes into the down projection of one stacked expert, as its eager form computes it."""
    up = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
    matrix = up[expert].T if getattr(module, "is_transposed", False) else up[expert]
    bias = getattr(module, f"{'gate_up' if hasattr(module, 'gate_up_proj') else 'up'}_proj_bias", None)
    out = F.linear(x, matrix, None if bias is None else bias[expert])
    if not hasattr(module, "gate_up_proj"):
        return module.act_fn(out)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(out)
    gate, other = out.chunk(2, dim=-1)
    return module.act_fn(gate) * other


def _signature(model: PreTrainedModel) -> Mapping[str, Any]:
    inner = getattr(model, "get_base_model", lambda: model)()  # PeftModel.forward takes anything
    return inspect.signature(inner.forward).parameters
