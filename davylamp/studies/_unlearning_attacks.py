"""What an attacker may do to a model that has unlearnt something, to see whether it is still there. Each says which facts it gets out.
Source: arXiv:2410.08827 (fine-tune on half of the facts, ask for the other half); arXiv:2402.16835 (access without training).

The attacker knows the facts of split T and wants those of V, which do not follow from them. Every attack works on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.models.adapters import Lora, linear_modules
from davylamp.models.fit import Encoded, encode, fit
from davylamp.models.greedy import padded
from davylamp.models.hooks import anatomy
from davylamp.train._unlearn_data import recall

Hits = list[bool]


@dataclass(frozen=True)
class Kit:
    """What the attacker has. taught: facts T.  wanted: facts V; reworded: in other words.  keep, unrelated: rows of other parts."""

    tokenizer: Any
    taught: Sequence[Case]
    wanted: Sequence[Case]
    reworded: Sequence[Case]
    keep: Sequence[Case]
    unrelated: Sequence[Case]
    lr: float = 3e-4
    batch: int = 32
    seed: int = 0

    def ask(self, model: Any, rows: Sequence[Case]) -> Hits:
        """Whether the model says each row's answer, greedily and to the token."""
        return recall(model, self.tokenizer, self.tokens(model, rows))

    def tokens(self, model: Any, rows: Sequence[Case]) -> list[Encoded]:
        return encode(model, self.tokenizer, rows, None)[0]


def relearn(
    model: Any, kit: Kit, rows: Sequence[Case], looks: Sequence[int], *, rank: int = 0
) -> tuple[dict[int, Hits], Hits]:
    """({step: which of V are back}, which of T are learnt at the end) of a fine-tune on `rows`; LoRA of `rank` if above 0."""
    attacked, curve = copy.deepcopy(model), dict[int, Hits]()

    def look(step: int, now: Any) -> None:
        curve[step] = kit.ask(now, kit.wanted)

    fitted = fit(
        attacked,
        rows,
        tokenizer=kit.tokenizer,
        rng=np.random.default_rng(kit.seed),
        method="lora" if rank else "full",
        lora=Lora(rank) if rank else None,
        lr=kit.lr * (10 if rank else 1),  # an adapter learns slower: models/fit.py
        batch=min(kit.batch, len(rows)),
        steps=max(looks),
        at=tuple(looks),
        watch=look,
        engine="light",
    )
    return curve, kit.ask(fitted.model, kit.taught)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The matrix rounded to `bits` bits (2 to 8), symmetric around 0, with one scale a row.

    >>> rounded(torch.tensor([[0.75, -0.32]]), 4).tolist()
    [[0.75, -0.3214285671710968]]
    """
    if not 2 <= bits <= 8:
        raise InputError(f"bits must be from 2 to 8, got {bits}")
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


def quantised(model: Any, bits: int) -> Any:
    """A copy whose linear maps are rounded to `bits` bits."""
    return _changed(model, lambda weight: rounded(weight, bits))


def pruned(model: Any, share: float) -> Any:
    """A copy with the smallest `share` of every linear map's weights at 0."""
    if not 0 < share < 1:
        raise InputError(f"share must be between 0 and 1, got {share}")

    def cut(weight: torch.Tensor) -> torch.Tensor:
        size = weight.abs()
        return torch.where(size > size.flatten().kthvalue(max(1, int(share * size.numel()))).values, weight, 0.0)

    return _changed(model, cut)


def _changed(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in linear_modules(other):
            weight = other.get_submodule(name).weight
            weight.copy_(change(weight))
    return other


def merged(model: Any, other: Any) -> Any:
    """A copy half way between two models of one shape: what a merge with a copy from before brings back."""
    mean, theirs = copy.deepcopy(model), dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.lerp_(theirs[name].to(parameter.dtype), 0.5)
    return mean


def in_context(model: Any, kit: Kit, *, shots: int = 3) -> Hits:
    """V asked after `shots` questions of T with their answers."""
    rng = np.random.default_rng(kit.seed)
    rows = []
    for case in kit.wanted:
        shown = [kit.taught[i] for i in rng.choice(len(kit.taught), size=min(shots, len(kit.taught)), replace=False)]
        rows.append(Case(case.id, (*(m for one in shown for m in one.messages), *case.messages), meta=case.meta))
    return kit.ask(model, rows)


def states(model: Any, kit: Kit, rows: Sequence[Case]) -> tuple[torch.Tensor, list[int]]:
    """((layers + 1, rows, width) residual stream where the answer begins, the first token of each answer)."""
    pairs = kit.tokens(model, rows)
    pad = int(kit.tokenizer.pad_token_id or 0)
    out = []
    with torch.no_grad():
        for at in range(0, len(pairs), 64):
            part = pairs[at : at + 64]
            ids, mask = padded([prompt for prompt, _ in part], pad, model.device)
            seen = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
            last = mask.sum(1) - 1
            out.append(torch.stack([h[torch.arange(len(part)), last].float() for h in seen]))
    return torch.cat(out, 1), [answer[0] for _, answer in pairs]


def probed(model: Any, kit: Kit) -> Hits:
    """V's answers by a linear probe (ridge regression onto the first answer token), trained on other facts' hidden states.

    The layer is the one that does best on T when the probe is trained on the kept rows; then T is trained on too.
    """
    from_keep, keep = states(model, kit, kit.keep)
    from_taught, taught = states(model, kit, kit.taught)
    from_wanted, wanted = states(model, kit, kit.wanted)

    def said(layer: int, train: torch.Tensor, tokens: Sequence[int], test: torch.Tensor) -> list[int]:
        known = sorted(set(tokens))
        goal = torch.zeros(len(tokens), len(known), dtype=torch.float64)
        goal[torch.arange(len(tokens)), [known.index(t) for t in tokens]] = 1.0
        x, centre = train[layer].double(), train[layer].double().mean(0)
        x, spread = x - centre, (x - centre).std(0).clamp(min=1e-6)
        x = x / spread
        gram = x.T @ x + 0.1 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, x.T @ (goal - goal.mean(0)))
        scores = ((test[layer].double() - centre) / spread) @ weights + goal.mean(0)
        return [known[i] for i in scores.argmax(1).tolist()]

    def right(found: Sequence[int], truth: Sequence[int]) -> Hits:
        return [a == b for a, b in zip(found, truth, strict=True)]

    best = max(range(len(from_keep)), key=lambda k: sum(right(said(k, from_keep, keep, from_taught), taught)))
    both = torch.cat([from_keep, from_taught], 1)
    return right(said(best, both, [*keep, *taught], from_wanted), wanted)


def lensed(model: Any, kit: Kit) -> Hits:
    """V's answers read off a layer before the last by the model's own norm and output head; the layer does best on T."""
    norm, head = anatomy(model).norm, model.get_output_embeddings()

    def right(rows: Sequence[Case]) -> list[Hits]:
        hidden, tokens = states(model, kit, rows)
        with torch.no_grad():
            said = head(norm(hidden[:-1].to(head.weight.dtype))).argmax(-1).tolist()  # the last is normed already
        return [[a == b for a, b in zip(layer, tokens, strict=True)] for layer in said]

    taught, wanted = right(kit.taught), right(kit.wanted)
    return wanted[max(range(len(taught)), key=lambda k: sum(taught[k]))]
