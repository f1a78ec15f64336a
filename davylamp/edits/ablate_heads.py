"""Ablation of attention heads baked into a checkpoint, and the transplant of heads, attention or MLPs from another model.
Source: arXiv:2410.13708, section 4 (surgery with epsilon 1e-10; attention of one model in another)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.registry import edit
from davylamp.edits._names import file_map
from davylamp.models import vectors
from davylamp.models.hooks import COMPONENTS, Anatomy, Component, Head, Tap, anatomy, head_name, parse_heads
from davylamp.models.loading import lineage
from davylamp.models.vectors import Part

if TYPE_CHECKING:
    from numpy.random import Generator

Change = Callable[[list[Tensor]], None]  # writes into the first tensor; the second, if any, is the other model's
ZERO_BELOW = 1e-6  # with a q/k norm only zero can be baked, and an epsilon up to this is as good as zero


@edit(
    version=1,
    source="arXiv:2410.13708",
    licence="Apache-2.0",
    stage="post-training",
    threats=("harmful-compliance", "jailbreak"),
    needs="hf",
    systems=("27",),
)
def ablate_heads(
    model: Any,
    *others: Any,
    rows: Sequence[Any] = (),
    tokenizer: Any = None,
    out: Path | None = None,
    rng: Generator,
    heads: tuple[str, ...],
    component: Literal["q", "k", "v"] = "q",
    epsilon: float = 1e-10,
) -> Any:
    """Bake the ablation of attention heads into a model's weights, once, so that it runs ablated anywhere.

    heads: LAYER.HEAD, both from 0, such as 2.3,1.0.  component: q or k scale the head's rows of that projection (with k, a KV head's, so
    that its whole group is meant): its attention becomes uniform. v scales its columns of the output projection, never rows of the
    value projection, which a group of heads may share.  epsilon: the factor, finite and 0 or more; the paper bakes with 1e-10.

    With a q/k norm (Qwen3, Gemma 3) scaled rows would be undone by the norm; zeros are not, so zeros are written for an epsilon up to
    1e-6 and a larger one is refused. Takes one model; rows, tokenizer and rng are not needed. Raises InputError for heads that the model
    has not, that the folder's lineage names as ablated already, for adapters and for tied or quantised weights.

    >>> import numpy as np
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    >>> cut = ablate_heads(model, heads=("0.1",), epsilon=0.0, rng=np.random.default_rng(0))
    >>> cut.model.layers[0].self_attn.q_proj.weight[4:].abs().max().item()
    0.0
    """
    if others:
        raise InputError(
            f"ablate_heads takes one model, got {1 + len(others)}. To take heads from another, see transplant_heads"
        )
    if not math.isfinite(epsilon) or epsilon < 0:
        raise InputError(f"epsilon must be finite and 0 or more, got {epsilon}")
    if component not in COMPONENTS:
        raise UnknownNameError("component", component, COMPONENTS)
    found = _anatomy_of(model)
    wanted = found.check(parse_heads(heads), component)
    if not wanted:
        raise InputError("ablate_heads needs one head or more, such as 2.3")
    before = _ablated_before(model, wanted, component, found)
    changes: dict[str, list[Change]] = {}
    written = epsilon
    for layer, head in wanted:
        site = COMPONENTS[component]
        if component == "v":
            tap = found.tap("heads", layer)
        else:
            tap = found.projection(site, layer)
            if found.has_norm(site, layer) and epsilon:
                if epsilon > ZERO_BELOW:
                    raise InputError(
                        f"{found.name} norms its {site}, which undoes a factor of {epsilon:g}. Give an epsilon of {ZERO_BELOW:g} or less: "
                        "then zeros are written"
                    )
                written = 0.0
        for leaf in _leaves(found, tap):
            changes.setdefault(_parameter(found, tap, leaf), []).append(_scaling(tap, leaf, head, written))
    options = {
        "heads": [head_name(head) for head in wanted],
        "component": component,
        "epsilon": epsilon,
        "written": written,
        "ablated": before + [f"{component} {head_name(head)}" for head in wanted],
    }
    return _apply(model, (), changes, out, "ablate_heads", options)


@edit(
    version=1,
    source="arXiv:2410.13708",
    licence="Apache-2.0",
    stage="post-training",
    threats=("harmful-compliance", "fine-tuning"),
    needs="hf",
    systems=("27", "09"),
)
def transplant_heads(
    model: Any,
    *others: Any,
    rows: Sequence[Any] = (),
    tokenizer: Any = None,
    out: Path | None = None,
    rng: Generator,
    heads: tuple[str, ...] = (),
    part: Literal["heads", "attention", "mlp"] = "heads",
) -> Any:
    """Take attention heads, all attention or all MLPs of a second model of the same shape, and everything else of the first.

    others: the model to take from.  part: heads (those named), attention (every projection and q/k norm), or mlp.
    heads: for part heads, LAYER.HEAD such as 2.3,1.0: its rows of q, k and v and its columns of the output projection. Where heads share
    keys and values, whole groups must be named, since their k and v go along. Biases of the output projection stay.
    rows, tokenizer and rng are not needed. Raises InputError for models of other shapes and for heads that are not there.
    """
    if len(others) != 1:
        raise InputError(f"transplant_heads needs the model to take from, and no more: got {len(others)} other models")
    if part not in ("heads", "attention", "mlp"):
        raise UnknownNameError("part", part, ("heads", "attention", "mlp"))
    if (part == "heads") != bool(heads):
        raise InputError("heads are named for part heads, and for it alone")
    found, theirs = _anatomy_of(model), _anatomy_of(others[0])
    _check_same(found, theirs)
    changes: dict[str, list[Change]] = {}
    if part == "heads":
        wanted = found.check(parse_heads(heads))
        for layer in sorted({layer for layer, _ in wanted}):
            for tap, chosen in _of_heads(found, layer, [head for at, head in wanted if at == layer]):
                for leaf in _leaves(found, tap):
                    changes.setdefault(_parameter(found, tap, leaf), []).append(_taking(tap, leaf, chosen))
    else:
        inside = {id(p) for module in _parts(found, part) for p in module.parameters()}
        for name, parameter in _whole(found).named_parameters():
            if id(parameter) in inside:
                changes[name] = [_all_of_it]
        if not changes:
            raise InputError(f"{found.name} has no part {part} in its layers")
    options = {"part": part, "heads": [head_name(head) for head in parse_heads(heads)]}
    return _apply(model, others, changes, out, "transplant_heads", options)


# --- what a model is made of --------------------------------------------------------------------------------------------------------------
def _anatomy_of(model: Any) -> Anatomy:
    """The anatomy of a model in memory, or of a folder's model, built without weights. Raises InputError."""
    if not isinstance(model, Path):
        if getattr(model.config, "quantization_config", None) is not None:
            raise InputError(f"{type(model).__name__} is quantised; its numbers are codes. Give the unquantised model")
        return anatomy(model)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError) as problem:
        raise InputError(f"{model} is no model folder: {str(problem).splitlines()[0]}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{model} is quantised; its numbers are codes. Give the unquantised checkpoint")
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            with torch.device("meta"):
                return anatomy(kind.from_config(config))
        except ValueError:
            continue
    raise InputError(f"{model} holds no causal language model: {type(config).__name__}")


def _whole(found: Anatomy) -> nn.Module:
    return next(module for module, name in found.modules.items() if not name)


def _parameter(found: Anatomy, tap: Tap, leaf: str) -> str:
    return f"{found.modules[tap.module]}.{leaf}"


def _leaves(found: Anatomy, tap: Tap) -> list[str]:
    """Names of the parameters that a tap's weights are. Raises InputError for an adapter, a quantised map, or weights that are tied."""
    if type(tap.module) not in (nn.Linear, Conv1D):
        raise InputError(
            f"{found.modules[tap.module]} is a {type(tap.module).__name__}, not a plain linear map: merge the adapter, or dequantise it"
        )
    own = dict(tap.module.named_parameters(recurse=False))
    if not own["weight"].is_floating_point():
        raise InputError(f"{found.modules[tap.module]} holds {own['weight'].dtype}: give the unquantised model")
    places = [name for name, p in _whole(found).named_parameters(remove_duplicate=False) if p is own["weight"]]
    if len(places) > 1:
        raise InputError(f"{places[0]} is tied to {places[1]}: changing one head would change others")
    return list(tap.weights())


def _scaling(tap: Tap, leaf: str, head: int, factor: float) -> Change:
    def scale(tensors: list[Tensor]) -> None:
        _view(tap, leaf, tensors[0])[..., head, :] *= factor

    return scale


def _view(tap: Tap, leaf: str, tensor: Tensor) -> Tensor:
    """A parameter in the site's shape, heads on the last axis but one; writing into it writes into the parameter."""
    if leaf == "bias":
        return tap.view(tensor)
    return tap.weights({"weight": tensor})["weight"]


def _taking(tap: Tap, leaf: str, heads: list[int]) -> Change:
    def take(tensors: list[Tensor]) -> None:
        _view(tap, leaf, tensors[0])[..., heads, :] = _view(tap, leaf, tensors[1])[..., heads, :]

    return take


def _all_of_it(tensors: list[Tensor]) -> None:
    tensors[0].copy_(tensors[1])


def _of_heads(found: Anatomy, layer: int, heads: list[int]) -> list[tuple[Tap, list[int]]]:
    """The taps that make up heads, with which of their heads. Raises InputError where only a part of a group is named."""
    size = found.heads // found.kv_heads
    groups = sorted({head // size for head in heads})
    whole = [group * size + i for group in groups for i in range(size)]
    if sorted(heads) != whole:
        raise InputError(
            f"heads of layer {layer} share keys and values in groups of {size}: name whole groups, here "
            + ",".join(head_name((layer, head)) for head in whole)
        )
    shared = [(found.projection(site, layer), groups) for site in ("keys", "values")]
    return [(found.projection("queries", layer), whole), *shared, (found.tap("heads", layer), whole)]


def _parts(found: Anatomy, part: str) -> list[nn.Module]:
    if part == "attention":
        return list(found.attentions)
    mlps: list[Any] = [getattr(layer, "mlp", None) for layer in found.layers]
    return [mlp for mlp in mlps if isinstance(mlp, nn.Module)]


def _check_same(ours: Anatomy, theirs: Anatomy) -> None:
    """Raises InputError unless the layers have the same names and shapes."""
    a, b = (
        {name: tuple(p.shape) for name, p in nn.ModuleList(found.layers).named_parameters()} for found in (ours, theirs)
    )
    wrong = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if wrong or ours.heads != theirs.heads:
        first = (
            f"; first: layer {wrong[0]}, {a.get(wrong[0], 'absent')} and {b.get(wrong[0], 'absent')}" if wrong else ""
        )
        raise InputError(f"the models have layers of other shapes: {len(wrong)} parameters differ{first}")


def _ablated_before(model: Any, heads: Sequence[Head], component: Component, found: Anatomy) -> list[str]:
    """What the folder's lineage says was ablated. Raises InputError for a head that was, and warns of queries and keys of one head."""
    if not isinstance(model, Path):
        return []
    kept = dict(lineage(str(model)))
    before = (
        [str(item) for item in kept.get("options", {}).get("ablated", [])]
        if kept.get("operation") == "ablate_heads"
        else []
    )
    for head in heads:
        if f"{component} {head_name(head)}" in before:
            raise InputError(f"head {head_name(head)} was ablated in {model} already, and a factor is baked once")
        size, other = found.heads // found.kv_heads, {"q": "k", "k": "q"}.get(component)
        for item in before:
            kind, _, name = item.partition(" ")
            layer, index = parse_heads([name])[0]
            same = (head[1] // size == index) if component == "q" else (index // size == head[1])
            if kind == other and layer == head[0] and same:
                warnings.warn(
                    f"layer {layer} head {head[1]}: its queries and keys are now both scaled, so that its scores shrink by the product",
                    stacklevel=4,
                )
    return before


def _apply(
    model: Any,
    others: Sequence[Any],
    changes: dict[str, list[Change]],
    out: Path | None,
    operation: str,
    options: dict[str, Any],
) -> Any:
    """Runs the changes, by the name that each parameter has in files, over a model or a folder."""
    files = vectors.names(model)
    known = {name: _in_files(name, files) for name in changes}
    mapped = file_map([name for name, file in known.items() if file is None], files)
    by_file = {slot.file: changes[name] for name, slots in mapped.items() for slot in slots}
    by_file |= {file: changes[name] for name, file in known.items() if file is not None}

    def rule(part: Part, tensors: list[Tensor]) -> Tensor:
        for change in by_file[part.name]:
            change(tensors)
        return tensors[0]

    return vectors.edit(
        model, others, rule, out=out, lineage={"operation": operation, "options": options}, only=by_file.__contains__
    )


def _in_files(name: str, files: Sequence[str]) -> str | None:
    """The tensor of a text layer's parameter, also where files name what stands before the layers otherwise (LLaVA); else None."""
    tail = name[max(name.find("layers."), 0) :]
    near = (
        [name]
        if name in files
        else [file for file in files if file.endswith("." + tail) and not vectors.is_vision(file)]
    )
    return near[0] if len(near) == 1 else None
