"""The last hidden state of many prompts under the ablation of each head in turn, exactly, without running the whole model for each.

Source: the definition is arXiv:2410.13708, section 3; the way is this repository's. What is shared is computed once:

- an ablation in layer l changes nothing below it, so that candidates start at layer l from the residual stream of one plain pass;
- heads of a layer do not see each other, so that one extra run of its attention, with every head ablated, gives all candidates at once:
  candidate i adds (ablated output - plain output) of head i, through its slice of the output projection, to what attention gave;
- candidates of a layer and prompts of one length go on together as one batch, in chunks that fit `tokens_at_once`;
- what a candidate changes has a head's size, so that the norm and the MLP behind it need not see the whole width again (`_lean.py`);
- tokens that all prompts of a chunk share at their start (a system prompt) are run once per candidate, and their keys and values reused;
- the last layer needs keys and values of all tokens, but everything else of the last token alone.

The layers that run are the library's own modules, called as the model itself calls them, but for MLPs of Llama's kind, which are checked
against the plain pass; prompts of different length are never padded.

Longer than 400 lines because the plain pass, the candidates and the way to the logits share one set of kept states.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from davylamp.core.errors import InputError, RunError
from davylamp.interp._lean import SecondHalf
from davylamp.models.hooks import Component, Head, Kind, ablate_heads, anatomy, capture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHES = (
    "cache",
    "past_key_values",
    "past_key_value",
    "layer_past",
)  # what layers call their cache, by version and architecture
SHARED_AT_LEAST = (
    0.2  # share of a chunk's tokens that sharing must save; below it the longer masks cost more than it brings
)


@dataclass(slots=True)
class Layer:
    """What a layer saw and gave in the plain pass. residual, attended: (rows, tokens, width).  plain, changed: every head's output,
    (rows, tokens, heads, head size), as it is and when that head is ablated.  call: the layer's other arguments.
    half: norm and MLP, where they are of a known kind."""

    module: nn.Module
    attention: nn.Module
    cache: str
    call: dict[str, Any] = field(default_factory=dict)
    attend: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    residual: Any = None
    attended: Any = None
    plain: Any = None
    changed: Any = None
    half: SecondHalf | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts of one length after the plain pass. rows: their numbers.  shared: tokens that all of them begin with."""

    rows: list[int]
    ids: Tensor
    shared: int
    layers: list[Layer]
    last: Tensor  # (rows, width): after the final norm, at the last token
    logits: Tensor  # (rows, vocabulary), float32


class Work:
    """What was run, in tokens times layers, so that cost can be told in whole forward passes."""

    def __init__(self) -> None:
        self.token_layers = 0

    def add(self, tokens: int) -> None:
        self.token_layers += tokens


class _Stop(Exception):
    """Ends a forward pass early, once what was wanted is there."""


class _Store:
    """Stands in for a layer's cache: hands out earlier keys and values, keeps the new ones, or stops right after them."""

    def __init__(self, past: tuple[Tensor, Tensor] | None = None, *, stop: bool = False):
        self.past, self.stop = past, stop
        self.kept: Any = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.kept = (keys, values)
        if self.stop:
            raise _Stop
        if self.past is not None:
            keys, values = torch.cat([self.past[0], keys], dim=2), torch.cat([self.past[1], values], dim=2)
        return keys, values


class Engine:
    """One model, one kind of ablation, and a `group` of heads that is ablated throughout (Sahara's, empty for Ships).

    A context: inside it the model is in eval mode, without gradients, and the group is ablated; at its end all is as before.
    tokens_at_once: how many tokens of candidates go through a layer together; 0: as many as suit the machine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        component: Component = "q",
        kind: Kind = "scale",
        epsilon: float = 1e-5,
        group: Sequence[Head] = (),
        tokens_at_once: int = 0,
    ):
        self.model, self.anatomy = model, anatomy(model)
        self.component, self.kind, self.epsilon = component, kind, epsilon
        self.group = self.anatomy.check(group, component)
        self.many = self.anatomy.count(component)
        self.tokens_at_once = tokens_at_once or self._fitting()
        self.work = Work()
        self.direct = True  # logits are lm_head of the last hidden state, until a plain pass shows otherwise
        using = getattr(self.anatomy.backbone.config, "_attn_implementation", None)
        if using not in ("eager", "sdpa", None):
            raise InputError(
                f"head scores need eager or sdpa attention, got {using}: load the model with attn_implementation='sdpa'"
            )
        self.signatures = [inspect.signature(layer.forward) for layer in self.anatomy.layers]
        self.caches = [next((n for n in CACHES if n in signature.parameters), "") for signature in self.signatures]
        if not all(self.caches):
            raise InputError(f"the layers of {self.anatomy.name} take no cache. Known names: {', '.join(CACHES)}")

    def _fitting(self) -> int:
        """Tokens whose activations in one layer take about 12 MB on a CPU, which is what caches hold, and 1 GB on a GPU."""
        config = self.anatomy.backbone.config
        wide = getattr(config, "intermediate_size", None) or 4 * self.anatomy.width
        room = 12e6 if self.model.device.type == "cpu" else 1e9
        return max(1, int(room / (4 * (6 * self.anatomy.width + 3 * wide))))

    def __enter__(self) -> Engine:
        self._stack = ExitStack()
        self._stack.enter_context(torch.inference_mode())
        self._stack.enter_context(_eval(self.model))
        try:
            self._stack.enter_context(
                ablate_heads(self.model, self.group, component=self.component, kind=self.kind, epsilon=self.epsilon)
            )
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # --- the plain pass ---------------------------------------------------------------------------------------------------------------
    def groups(self, prompts: Sequence[Sequence[int]], *, changed: Collection[int] | None = None) -> Iterator[Group]:
        """Prompts by length, plainly run (with `group` ablated). changed: the layers whose candidates will be asked for; None = all.

        Raises RunError for a prompt with non-finite logits."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            by_length[len(prompt)].append(row)
        for length, rows in sorted(by_length.items()):
            rows.sort(key=lambda row: list(prompts[row]))  # neighbours share more of their start
            size = max(1, min(self.tokens_at_once, int(1e9 / (16 * len(self.caches) * self.anatomy.width))) // length)
            for at in range(0, len(rows), size):
                part = rows[at : at + size]
                ids = torch.tensor([list(prompts[row]) for row in part], device=self.model.device)
                yield self._plain(part, ids, changed)

    def _plain(self, rows: list[int], ids: Tensor, changed: Collection[int] | None) -> Group:
        found = self.anatomy
        layers = [
            Layer(layer, attention, cache)
            for layer, attention, cache in zip(found.layers, found.attentions, self.caches, strict=True)
        ]
        last: list[Tensor] = []
        final: list[Tensor] = []  # what goes into the last norm
        with ExitStack() as stack:
            for i, layer in enumerate(layers):
                stack.callback(
                    layer.module.register_forward_pre_hook(
                        self._keep_call(layer, self.signatures[i]), with_kwargs=True
                    ).remove
                )
                stack.callback(layer.attention.register_forward_pre_hook(_keep_attend(layer), with_kwargs=True).remove)
            stack.callback(
                found.norm.register_forward_hook(lambda module, args, output: last.append(output[:, -1])).remove
            )
            stack.callback(found.norm.register_forward_pre_hook(lambda module, args: final.append(args[0])).remove)
            seen = stack.enter_context(capture(self.model, "heads", "attention"))
            keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits[
                :, -1
            ]
        self.work.add(ids.numel() * len(layers))
        finite = torch.isfinite(logits).all(-1)
        if not finite.all():
            raise Broken(rows[int(finite.logical_not().nonzero()[0])])
        for i, layer in enumerate(layers):
            layer.plain, layer.attended = seen["heads", i], seen["attention", i]
            after = layers[i + 1].residual if i + 1 < len(layers) else final[-1]
            layer.half = SecondHalf.of(layer.module, (layer.residual + layer.attended)[:1], after[:1])
            if changed is None or i in changed:
                layer.changed = self._each(layer, i)
        self.direct = self.direct and torch.equal(self._head(last[-1]), logits)
        return Group(rows, ids, self._shared(ids), layers, last[-1], logits.float())

    def _keep_call(self, layer: Layer, signature: inspect.Signature) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = signature.bind(*args, **kwargs).arguments
            given = {
                name: value
                for name, value in bound.items()
                if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
            }
            for name, value in bound.items():
                if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                    given |= value
            layer.residual = given.pop(next(iter(given)))
            given.pop(layer.cache, None)
            layer.call = given

        return keep

    def _each(self, layer: Layer, index: int) -> Tensor:
        """Every head's output with that head ablated: one run of the layer's attention up to the output projection."""
        if self.component == "v":
            return (
                layer.plain * self.epsilon
                if self.kind == "scale"
                else layer.plain.mean(2, keepdim=True).expand_as(layer.plain)
            )

        def stop(module: nn.Module, args: Any) -> None:
            raise _Stop

        every = {"component": self.component, "kind": self.kind, "epsilon": self.epsilon, "layers": [index]}
        with ablate_heads(self.model, "each", **every), capture(self.model, "heads", layers=[index]) as seen:  # type: ignore[arg-type]
            handle = self.anatomy.outputs[index].register_forward_pre_hook(stop)
            try:
                layer.attention(*layer.attend[0], **layer.attend[1])
            except _Stop:
                pass
            finally:
                handle.remove()
        return seen["heads", index]

    def _shared(self, ids: Tensor) -> int:
        """How many tokens of the start to run once for all rows; 0 where that would not pay. The last token is never among them."""
        same = (ids == ids[:1]).all(0)[:-1]
        many = int(same.long().cumprod(0).sum())
        return many if many * (len(ids) - 1) >= SHARED_AT_LEAST * ids.numel() else 0

    # --- candidates -------------------------------------------------------------------------------------------------------------------
    def candidates(self, group: Group, index: int, heads: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """(heads, their last hidden states, (heads, rows, width)) in chunks, for candidates of one layer."""
        layer, final = group.layers[index], index == len(group.layers) - 1
        rows, length = group.ids.shape
        kept = [length - 1] if final else list(range(group.shared)) if group.shared else []
        # The tokens that must be run: shared ones of the first row, then the others of every row; in the last layer the last ones.
        place = torch.arange(rows * length, device=group.ids.device).view(rows, length)
        tokens = place[:, -1] if final else torch.cat([place[0, : len(kept)], place[:, len(kept) :].flatten()])
        residual = layer.residual.flatten(0, 1)[tokens].unsqueeze(0)
        attended = layer.attended.flatten(0, 1)[tokens]
        delta = (layer.changed - layer.plain).flatten(0, 1)[tokens]
        size = max(1, self.tokens_at_once // len(tokens))
        half = layer.half if self._slices(index) else None
        before = residual[0] + attended
        ready = half.projected(before) if half else (before, before)
        for at in range(0, len(heads), size):
            part = list(heads[at : at + size])
            if half:
                changes, maps = self._slice(index, delta, part)
                out = half.changed(before, ready, changes, maps)
            else:
                given = attended + self._through(index, delta, part)
                with _instead(layer.attention, lambda *args, given=given, **kwargs: (given, None)):
                    out = _first(layer.module(residual, **layer.call))
            self.work.add(out.shape[0] * out.shape[1])
            if final:
                last = out
            else:
                shared, rest = out[:, : group.shared], out[:, group.shared :]
                last = self._rest(
                    group, index + 1, shared, rest.reshape(len(part) * rows, length - group.shared, -1), len(part)
                )
                last = last.view(len(part), rows, -1)
            yield part, self.anatomy.norm(last)

    def _slices(self, index: int) -> bool:
        """Whether one head's part of the output projection can be taken alone: not of an adapter or a quantised map."""
        return type(self.anatomy.outputs[index]) in (nn.Linear, Conv1D)

    def _owned(self, heads: Sequence[int], device: Any) -> Tensor:
        """(candidates, query heads of each): a whole group for `k`."""
        per = self.anatomy.heads // self.many
        return torch.tensor([[head * per + i for i in range(per)] for head in heads], device=device)

    def _slice(self, index: int, delta: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(what changed, (candidates, tokens, size); its slice of the output projection, (candidates, size, width))."""
        own = self._owned(heads, delta.device)
        weight = self.anatomy.tap("heads", index).weights()["weight"]  # (width, heads, size)
        return delta[:, own].permute(1, 0, 2, 3).flatten(2), weight[:, own].permute(1, 2, 3, 0).flatten(1, 2)

    def _through(self, index: int, delta: Tensor, heads: Sequence[int]) -> Tensor:
        """What candidates add to attention's output, (candidates, tokens, width): their change through their slice of the projection."""
        if self._slices(index):
            return torch.bmm(*self._slice(index, delta, heads))
        # An adapter or a quantised map: it is asked as a whole, with one candidate's change and zeros elsewhere.
        module, alone = self.anatomy.outputs[index], delta.new_zeros(len(heads), *delta.shape)
        for i, some in enumerate(self._owned(heads, delta.device)):
            alone[i][:, some] = delta[:, some]
        none = module(delta.new_zeros(1, 1, delta.shape[1] * delta.shape[2]))
        return module(alone.flatten(2)) - none

    def _rest(self, group: Group, start: int, shared: Tensor, rest: Tensor, many: int) -> Tensor:
        """Through the layers from `start` on; the last token's residual after the last layer, (candidates x rows, width)."""
        rows, length, first = *group.ids.shape, group.shared
        for index in range(start, len(group.layers)):
            layer, final = group.layers[index], index == len(group.layers) - 1
            past = None
            if first:
                shared, past = self._run(layer, shared, 0, first, stop=final)
                past = (past[0].repeat_interleave(rows, 0), past[1].repeat_interleave(rows, 0))
            if not final:
                rest, _ = self._run(layer, rest, first, length, past=past)
                continue
            if length - first > 1:
                _, own = self._run(layer, rest[:, :-1], first, length - 1, stop=True)
                past = own if past is None else (torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2))
            rest, _ = self._run(layer, rest[:, -1:], length - 1, length, past=past)
        return rest[:, -1]

    def _run(
        self, layer: Layer, states: Tensor, start: int, stop_at: int, *, past: Any = None, stop: bool = False
    ) -> tuple[Tensor, Any]:
        """One layer on the tokens [start, stop_at), behind `past`: (states, keys and values); with `stop`, only the latter."""
        store = _Store(past, stop=stop)
        self.work.add(states.shape[0] * states.shape[1])
        lean = _instead(layer.half.mlp, layer.half.tiled) if layer.half else nullcontext()
        with suppress(_Stop), self._no_queries(layer) if stop else lean:
            states = _first(layer.module(states, **{layer.cache: store}, **_cut(layer.call, start, stop_at)))
        return states, store.kept

    def _no_queries(self, layer: Layer) -> AbstractContextManager[None]:
        """Where only keys and values are wanted, a plain query projection need not run."""
        queries = getattr(layer.attention, "q_proj", None)
        if self.anatomy.layout != "separate" or type(queries) is not nn.Linear:
            return nullcontext()
        return _instead(queries, lambda states: states.new_zeros(1).expand(*states.shape[:-1], queries.out_features))

    # --- gradients ---------------------------------------------------------------------------------------------------------------------
    def differentiable(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits at the last token, every layer's head outputs) of a plain pass that gradients can be taken of, by the latter."""
        heads: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # A leaf at the first layer, so that frozen weights do not end the graph; nothing below it is asked for.
            given = args[0] if heads else args[0].detach().requires_grad_()
            heads.append(given)
            return (given, *args[1:])

        with ExitStack() as stack:
            for output in self.anatomy.outputs:
                stack.callback(output.register_forward_pre_hook(keep).remove)
            logits = (
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1].float()
            )
        self.work.add(3 * ids.numel() * len(self.caches))  # a backward pass costs about two forward ones
        return logits, heads

    # --- logits -----------------------------------------------------------------------------------------------------------------------
    def _head(self, last: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(last)

    def logits(self, last: Tensor) -> Tensor:
        """Logits of last hidden states, (…, vocabulary), with whatever the model does behind its head (soft caps, scales)."""
        if self.direct:
            return self._head(last)
        flat = last.flatten(0, -2).unsqueeze(1)
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (flat,))
        try:
            ids = torch.zeros((1, 1), dtype=torch.long, device=last.device)
            found: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
                :, -1
            ]
        finally:
            handle.remove()
        return found.view(*last.shape[:-1], -1)


class Broken(RunError):
    """A prompt whose logits are not finite; `row` is its number."""

    def __init__(self, row: int):
        super().__init__(f"prompt number {row + 1} gives logits that are not finite")
        self.row = row


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _keep_attend(layer: Layer) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.attend = (args, kwargs)

    return keep


@contextmanager
def _eval(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, calling the module calls `forward`. A forward that somebody else put there comes back."""
    had, before = "forward" in vars(module), vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = before  # type: ignore[assignment]
        else:
            del module.forward


def _cut(call: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """A layer's arguments for the tokens [start, stop) of a row. Masks and positions are the same for all rows, so one row is kept."""
    out = dict(call)
    for name, value in call.items():
        if name in ("attention_mask", "causal_mask"):
            if isinstance(value, Tensor):
                out[name] = value[:1, :, start:stop, :stop]
            elif (
                value is None and start and stop - start > 1
            ):  # sdpa was told "causal" in place of a mask, which starts at 0
                device = next(v.device for v in _tensors(call.values())) if list(_tensors(call.values())) else None
                out[name] = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)[None, None]
        elif name == "position_embeddings" and isinstance(value, tuple):
            out[name] = tuple(part[:1, start:stop] for part in value)
        elif name == "position_ids" and isinstance(value, Tensor):
            out[name] = value[:1, start:stop]
        elif name == "cache_position" and isinstance(value, Tensor):
            out[name] = value[start:stop]
    return out


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
