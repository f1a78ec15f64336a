"""Look into a transformers model where it stands: capture, patch, scale and ablate its heads, neurons and layers, by hooks.
Source: arXiv:2410.13708, section 3.1, for the head ablations; this repository for the rest.

Nothing is re-implemented and no weight changes: each function is a context manager that hangs hooks on the library's own modules and
takes them off at its end, also after an error. Without hooks the logits are bit-equal to the library's. Contexts nest; at one place
the outer one acts first. Every hook works at one position at a time, so that causality stays as it is.

A place in a layer is a site. Tensors come in one shape per site, whatever the architecture stores:

    layer_input  attention  mlp  layer      (batch, tokens, width)   before the layer; out of attention and of the MLP; after the layer
    queries  keys  values                   (batch, tokens, heads or KV heads, head size)   before rotary embedding, after a q/k norm
    heads                                   (batch, tokens, heads, head size)   each head's output, before the output projection
    neurons                                 (batch, tokens, neurons)   what goes into the MLP's last projection

Longer than 400 lines because where things lie in each architecture and what is done there are told in one place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from davylamp.core.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = tuple[int, int]  # layer, head; both count from 0
Component = Literal["q", "k", "v"]
Kind = Literal["scale", "mean"]

SITES = ("layer_input", "queries", "keys", "values", "heads", "attention", "neurons", "mlp", "layer")
COMPONENTS = {"q": "queries", "k": "keys", "v": "heads"}
#: Where decoders keep their text layers, what their layers call attention and MLP, and how the MLP calls its last projection.
_BACKBONES = ("model.language_model", "language_model.model", "model", "transformer", "gpt_neox", "")
_LAYERS, _NORMS = ("layers", "h"), ("norm", "final_layer_norm", "final_layernorm", "ln_f")
_ATTENTIONS, _LAST = ("self_attn", "attn", "attention"), ("down_proj", "c_proj", "dense_4h_to_h", "fc2")
_SEPARATE, _FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    {"qkv_proj": "o_proj", "c_attn": "c_proj", "query_key_value": "dense"},
)


@dataclass(frozen=True, slots=True)
class Tap:
    """One site of one layer: the module, whether its input or its output counts, and the view of that tensor in the site's shape.

    A view of features serves weights as well: `features(module)` has the same last axis as what the module gives or takes.
    """

    module: nn.Module
    end: Literal["in", "out"]
    view: Callable[[Tensor], Tensor]

    def weights(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weight (and, at an output, the bias) as writable views in the site's shape; `given` stands in for the module's own."""
        own = dict(self.module.named_parameters(recurse=False)) if given is None else dict(given)
        features_last = isinstance(self.module, Conv1D) == (self.end == "out")
        out = {"weight": self.view(own["weight"] if features_last else own["weight"].transpose(0, 1))}
        if self.end == "out" and own.get("bias") is not None:
            out["bias"] = self.view(own["bias"])
        return out


@dataclass(frozen=True)
class Anatomy:
    """Where the heads of a decoder are. heads, kv_heads: of each layer.  head_dim, width: sizes.  norm: the one before the logits.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8))
    >>> found = anatomy(model)
    >>> len(found.layers), found.heads, found.head_dim
    (2, 2, 4)
    """

    name: str
    backbone: nn.Module
    layers: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    outputs: Sequence[nn.Module]  # the output projections
    norm: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    layout: (
        str  # separate, qkv_proj (rows of q, then k, then v), c_attn (the same, transposed), query_key_value (by head)
    )
    modules: Mapping[nn.Module, str] = field(repr=False)  # module -> its name in the model

    def count(self, component: Component = "q") -> int:
        """How many heads of a layer can be ablated in this component: query heads, or KV heads for `k`."""
        if component not in COMPONENTS:
            raise UnknownNameError("component", component, COMPONENTS)
        return self.kv_heads if component == "k" else self.heads

    def check(self, heads: Iterable[Head], component: Component = "q") -> list[Head]:
        """The heads as a list. Raises InputError for one that the model does not have."""
        many, found = self.count(component), list(heads)
        for layer, head in found:
            if not (0 <= layer < len(self.layers) and 0 <= head < many):
                what = "KV heads" if component == "k" else "heads"
                raise InputError(f"layer {layer} head {head} (model has {len(self.layers)} layers, {many} {what})")
        return found

    def tap(self, site: str, layer: int) -> Tap:
        """The tap of a site in a layer. Raises UnknownNameError, or InputError where the layer has no such place."""
        if site not in SITES:
            raise UnknownNameError("site", site, SITES)
        if not 0 <= layer < len(self.layers):
            raise InputError(f"layer {layer} (model has {len(self.layers)} layers)")
        block, attention = self.layers[layer], self.attentions[layer]
        if site in ("layer_input", "layer"):
            return Tap(block, "in" if site == "layer_input" else "out", _whole)
        if site == "attention":
            return Tap(attention, "out", _whole)
        if site == "heads":
            return Tap(self.outputs[layer], "in", self._split(self.heads))
        if site in ("mlp", "neurons"):
            mlp = getattr(block, "mlp", None)
            last = next((getattr(mlp, name) for name in _LAST if hasattr(mlp, name)), None)
            found = mlp if site == "mlp" else last
            if found is None:
                raise InputError(
                    f"layer {layer} of {self.name} has no single MLP (a mixture of experts?), so no site {site!r}"
                )
            return Tap(found, "out" if site == "mlp" else "in", _whole)
        return self._projection(site, layer)

    def _split(self, many: int, start: int = 0) -> Callable[[Tensor], Tensor]:
        size = self.head_dim
        return lambda whole: whole[..., start * size : (start + many) * size].unflatten(-1, (many, size))

    def projection(self, site: str, layer: int) -> Tap:
        """The tap of queries, keys or values at the linear map itself, before any q/k norm: where weights are."""
        many = self.heads if site == "queries" else self.kv_heads
        attention, place = self.attentions[layer], ("queries", "keys", "values").index(site)
        if self.layout == "separate":
            return Tap(getattr(attention, _SEPARATE[place]), "out", self._split(many))
        fused = getattr(attention, self.layout)
        if self.layout == "query_key_value":  # GPT-NeoX: q, k and v of head 0, then of head 1, …
            size = (self.heads, 3, self.head_dim)
            return Tap(fused, "out", lambda whole: whole.unflatten(-1, size)[..., place, :])
        start = (0, self.heads, self.heads + self.kv_heads)[place]
        return Tap(fused, "out", self._split(many, start))

    def _projection(self, site: str, layer: int) -> Tap:
        plain = self.projection(site, layer)
        norm = getattr(self.attentions[layer], {"queries": "q_norm", "keys": "k_norm"}.get(site, ""), None)
        if not isinstance(norm, nn.Module):
            return plain
        # A norm undoes what is scaled before it, so that queries and keys are taken behind it.
        many = self.heads if site == "queries" else self.kv_heads
        return Tap(norm, "out", lambda whole: plain.view(whole) if whole.dim() == 3 else _by_head(whole, many))

    def has_norm(self, site: str, layer: int) -> bool:
        """Whether queries or keys pass a norm of their own."""
        return self._projection(site, layer).module is not self.projection(site, layer).module


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _by_head(whole: Tensor, many: int) -> Tensor:
    """A normed (batch, tokens, heads, size), or the same with tokens and heads swapped, which only memory tells if both are equal."""
    swapped = whole.shape[2] != many if whole.shape[1] != whole.shape[2] else whole.stride(1) < whole.stride(2)
    return whole.transpose(1, 2) if swapped else whole


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Where the parts of a model are. Raises InputError, with the class and what was sought, if it has no standard decoder attention."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # peft wraps the model
        inner = inner.get_base_model()
    name = type(inner).__name__
    sought = (
        f"{name} has no standard decoder attention. Sought: layers ({' or '.join(_LAYERS)}) that each have "
        f"{' or '.join(_ATTENTIONS)} with {', '.join(_SEPARATE)} and o_proj, or with a fused {', '.join(_FUSED)}"
    )
    backbone = next(
        (part for part in (_at(inner, path) for path in _BACKBONES) if part is not None and _first(part, _LAYERS)), None
    )
    if backbone is None:
        raise InputError(sought)
    layers = list(_first(backbone, _LAYERS))
    attentions = [_first(layer, _ATTENTIONS) for layer in layers]
    norm = _first(backbone, _NORMS)
    config = backbone.config
    heads = getattr(config, "num_attention_heads", 0)
    layouts = {_layout(attention) for attention in attentions}
    if not layers or norm is None or not heads or len(layouts) != 1 or None in layouts:
        raise InputError(sought)
    layout = str(layouts.pop())
    kv_heads = getattr(config, "num_key_value_heads", None) or heads if layout in ("separate", "qkv_proj") else heads
    outputs = [getattr(attention, _FUSED.get(layout, "o_proj")) for attention in attentions]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if any(_features(out)[0] != heads * head_dim for out in outputs) or not _fits(
        attentions[0], layout, heads, kv_heads, head_dim
    ):
        raise InputError(f"{sought}; found them, but not with {heads} heads of size {head_dim}")
    return Anatomy(
        name, backbone, layers, attentions, outputs, norm, heads, kv_heads, head_dim, config.hidden_size, layout,
        {module: path for path, module in model.named_modules()},
    )  # fmt: skip


def _at(module: Any, path: str) -> Any:
    found: Any = module
    for part in path.split(".") if path else ():
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _first(module: Any, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _layout(attention: Any) -> str | None:
    if all(hasattr(attention, name) for name in (*_SEPARATE, "o_proj")):
        return "separate"
    found = next((name for name, out in _FUSED.items() if hasattr(attention, name) and hasattr(attention, out)), None)
    # The name query_key_value also stands for other orders of rows (Falcon, Bloom).
    return None if found == "query_key_value" and not type(attention).__name__.startswith("GPTNeoX") else found


def _features(module: nn.Module) -> tuple[int, int]:
    """(input, output) features of a linear map; an adapter or quantised layer is asked for the attributes of nn.Linear."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return int(getattr(module, "in_features", -1)), int(getattr(module, "out_features", -1))


def _fits(attention: Any, layout: str, heads: int, kv_heads: int, size: int) -> bool:
    if layout == "separate":
        return [_features(getattr(attention, name))[1] for name in _SEPARATE] == [
            heads * size,
            kv_heads * size,
            kv_heads * size,
        ]
    return _features(getattr(attention, layout))[1] == (heads + 2 * kv_heads) * size


def parse_heads(heads: Sequence[str | Head]) -> list[Head]:
    """Heads from their short names. Raises InputError.

    >>> parse_heads(["2.3", "1.0"])
    [(2, 3), (1, 0)]
    """
    found = []
    for head in heads:
        parts = head.strip().split(".") if isinstance(head, str) else [str(part) for part in head]
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise InputError(f"a head reads LAYER.HEAD, such as 2.3, both from 0; got {head!r}")
        if (pair := (int(parts[0]), int(parts[1]))) in found:
            raise InputError(f"head {parts[0]}.{parts[1]} is named twice")
        found.append(pair)
    return found


def head_name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


# --- hooks ------------------------------------------------------------------------------------------------------------------------------
def _hang(tap: Tap, act: Callable[[Tensor], Tensor | None]) -> Any:
    """A hook that hands the whole tensor to `act`; what `act` returns, if anything, takes its place."""
    if tap.end == "out":

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            new = act(output[0] if isinstance(output, tuple) else output)
            return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

        after.edit = getattr(act, "edit", None)  # type: ignore[attr-defined]
        return tap.module.register_forward_hook(after)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else next(iter(kwargs))
        new = act(args[0] if name is None else kwargs[name])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

    return tap.module.register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def edited(model: PreTrainedModel, site: str, layer: int, edit: Callable[[Tensor], None]) -> Iterator[None]:
    """While it lasts, `edit` is called with the site's tensor and may write into it (it is a copy of the model's own)."""
    tap = anatomy(model).tap(site, layer)

    def act(whole: Tensor) -> Tensor:
        copy = whole.clone()
        edit(tap.view(copy))
        return copy

    act.edit = edit  # type: ignore[attr-defined]
    handle = _hang(tap, act)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture(
    model: PreTrainedModel, *sites: str, layers: Sequence[int] | None = None
) -> Iterator[dict[tuple[str, int], Tensor]]:
    """While it lasts, each forward pass leaves the tensors of these sites in the dict, by (site, layer). layers: None = all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    >>> with capture(model, "heads") as seen:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> tuple(seen["heads", 0].shape)
    (1, 3, 2, 4)
    """
    found, seen = anatomy(model), {}
    with ExitStack() as stack:
        for layer in range(len(found.layers)) if layers is None else layers:
            for site in sites:
                tap = found.tap(site, layer)

                def act(whole: Tensor, key: tuple[str, int] = (site, layer), tap: Tap = tap) -> None:
                    seen[key] = tap.view(whole)

                stack.callback(_hang(tap, act).remove)
        yield seen


def _pick(view: Tensor, site: str, index: Sequence[int] | None) -> tuple[Any, ...]:
    """The index of heads, neurons or directions (the third axis of every site). Raises InputError outside it."""
    wrong = [i for i in index or () if not 0 <= i < view.shape[2]]
    if wrong:
        raise InputError(f"index {wrong[0]} of site {site} is outside [0, {view.shape[2]})")
    return (...,) if index is None else (slice(None), slice(None), list(index))


def scale(model: PreTrainedModel, site: str, layer: int, factor: float, *, index: Sequence[int] | None = None) -> Any:
    """Multiplies a site by a finite factor. index: which heads (or neurons, or directions of the residual stream); None = all."""
    if not math.isfinite(factor):
        raise InputError(f"the factor of a scaling must be finite, got {factor}")

    def edit(view: Tensor) -> None:
        where = _pick(view, site, index)
        view[where] = view[where] * factor

    return edited(model, site, layer, edit)


def patch(
    model: PreTrainedModel,
    site: str,
    layer: int,
    value: Tensor,
    *,
    index: Sequence[int] | None = None,
    positions: slice | None = None,
) -> Any:
    """Puts `value` in the place of a site. index: which heads or neurons; positions: which tokens; None = all.

    value: broadcast against the site's shape after `positions` and `index` are taken. To patch from another run, capture there first.
    """

    def edit(view: Tensor) -> None:
        part = view if positions is None else view[:, positions]
        part[_pick(view, site, index)] = value.to(view.dtype)

    return edited(model, site, layer, edit)


def mean_ablate(
    model: PreTrainedModel,
    site: str,
    layer: int,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    index: Sequence[int] | None = None,
) -> Any:
    """Puts a site's mean over all tokens of `batches` in its place. batches: keyword arguments of the model (input_ids, attention_mask).

    The means are taken now, from the model as it is; padding, where the mask is 0, does not count. Raises InputError without a token.
    """
    total: Any = 0.0
    count = 0
    with torch.no_grad(), capture(model, site, layers=[layer]) as seen:
        for batch in batches:
            model(**batch)
            mask = batch.get("attention_mask")
            tokens = seen[site, layer]
            kept = tokens.flatten(0, 1) if mask is None else tokens[mask.bool()]
            total, count = total + kept.double().sum(0), count + len(kept)
    if not count:
        raise InputError("a mean needs one token or more, got none")
    mean = (total / count).float()
    return patch(model, site, layer, mean if index is None else mean[list(index)], index=index)


def _popper(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda whole: kept.pop()


@contextmanager
def skip_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """While it lasts, these layers pass their input on as it came."""
    found = anatomy(model)
    with ExitStack() as stack:
        for layer in layers:
            kept: list[Tensor] = []
            for site, act in (("layer_input", kept.append), ("layer", _popper(kept))):
                stack.callback(_hang(found.tap(site, layer), act).remove)
        yield


# --- head ablation (arXiv:2410.13708) ---------------------------------------------------------------------------------------------------
@contextmanager
def ablate_heads(
    model: PreTrainedModel,
    heads: Sequence[Head] | Literal["each"],
    *,
    component: Component = "q",
    kind: Kind = "scale",
    epsilon: float = 1e-5,
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """While it lasts, these heads are ablated.

    component: `q` or `k`: undifferentiated attention (equation 5): every visible position gets about the same weight. `v`: scaling
    contribution (equation 6): the head's output shrinks; the pattern stays. With `k` a head is a KV head, and its whole group is meant.
    kind: `scale` multiplies by epsilon (>= 0; 1e-5 is the paper's); `mean` puts the mean over all heads of the layer in its place, in
    the order given, so that a later mean sees the earlier ones.  heads: pairs (layer, head), or `each`: all heads of `layers` at once, each
    as if it were the only one. Raises InputError for heads and values that cannot be.
    """
    found = anatomy(model)
    if kind not in ("scale", "mean"):
        raise UnknownNameError("kind of ablation", kind, ("scale", "mean"))
    if not math.isfinite(epsilon) or epsilon < 0:
        raise InputError(f"epsilon of an ablation must be finite and 0 or more, got {epsilon}")
    if isinstance(heads, str):
        places: dict[int, list[int] | None] = dict.fromkeys(range(len(found.layers)) if layers is None else layers)
    else:
        places = {}
        for layer, head in found.check(heads, component):
            own = places.setdefault(layer, [])
            if own is not None:
                own.append(head)
    if component != "v" and kind == "scale":
        _warn_of_both(found, component, places)
    with ExitStack() as stack:
        for layer, own in places.items():

            def edit(view: Tensor, own: list[int] | None = own) -> None:
                if kind == "scale":
                    view[:, :, slice(None) if own is None else own] *= epsilon
                elif own is None:
                    view[:] = view.mean(2, keepdim=True)
                else:
                    for head in own:
                        view[:, :, head] = view.mean(2)

            edit.ablated = (component, own)  # type: ignore[attr-defined]
            stack.enter_context(edited(model, COMPONENTS[component], layer, edit))
        yield


def _warn_of_both(found: Anatomy, component: Component, places: Mapping[int, list[int] | None]) -> None:
    """Queries and keys of one head, both scaled: legal, and seldom meant."""
    group = found.heads // found.kv_heads
    for layer, own in places.items():
        for hook in found.tap("keys" if component == "q" else "queries", layer).module._forward_hooks.values():
            other, theirs = getattr(getattr(hook, "edit", None), "ablated", (component, None))
            if other == component or own is None or theirs is None:
                continue
            queries, keys = (own, theirs) if component == "q" else (theirs, own)
            both = [head for head in queries if head // group in keys]
            if both:
                warnings.warn(
                    f"layer {layer} head {both[0]}: its queries and keys are both scaled, so that its scores shrink by the product",
                    stacklevel=5,
                )
