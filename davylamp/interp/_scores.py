"""Head scores of many prompts, and what is read from them: Ships, generalized Ships, an approximate pre-screen, overlap, the verdict.
Source: arXiv:2410.13708, equations 7 to 10. Differs: angles by atan2 in float64, where arccos loses small ones; the leading directions come
from the N x N Gram matrix; the pre-screen, the contrast with benign prompts and the verdict are this repository's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from davylamp.core.errors import InputError, RunError
from davylamp.interp._engine import Broken, Engine, Group
from davylamp.models.hooks import Component, Head, Kind, head_name

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedModel

TINY = 1e-12  # added to every probability, as the reference does
#: A mean score below this moves the probability of no first token by more than 0.1 on average: Pinsker, |dp| <= sqrt(KL / 2), and Jensen.
FLOOR = 0.02
SCREENED = 32  # prompts that the pre-screen looks at: which heads matter shows on few
RATIO = 3.0  # of the top head to the median head, and of harmful to benign prompts


@dataclass(frozen=True, slots=True)
class HeadScores:
    """ships: (prompts, layers, heads) nats, NaN where a head was not scored.  angles: (layers, heads) degrees, or None.
    states: (prompts, width), the last hidden states of the plain pass.  passes: what it cost, in forward passes of one mean prompt."""

    ships: Any
    angles: Any
    states: Any
    passes: float

    def mean(self) -> Any:
        """(layers, heads): mean over prompts."""
        return self.ships.mean(0)


def kl(plain: Tensor, ablated: Tensor) -> Tensor:
    """Equation 7: KL(plain || ablated) in nats over the last axis of logits; 1e-12 is added to both distributions, as the reference does.

    >>> kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0])).item()
    0.0
    """
    p, q = plain.float().softmax(-1) + TINY, ablated.float().softmax(-1) + TINY
    return (p * (p.log() - q.log())).sum(-1).clamp_min(0.0)  # rounding alone goes below 0


def leading(states: Tensor, r_main: int = 1) -> Tensor:
    """The first r left singular vectors of (…, prompts, width) states, (…, prompts, r), in float64, by the smaller Gram matrix."""
    x = states.double()
    if x.shape[-2] <= x.shape[-1]:
        return torch.linalg.eigh(x @ x.mT).eigenvectors[..., -r_main:].flip(-1)
    values, vectors = torch.linalg.eigh(x.mT @ x)
    u = x @ vectors[..., -r_main:].flip(-1)
    return u / values[..., -r_main:].flip(-1).clamp_min(torch.finfo(torch.float64).tiny).sqrt().unsqueeze(-2)


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """Equation 9: the sum of the principal angles between the spans of orthonormal columns (…, n, r), in degrees.

    arccos loses angles below 1e-6 near a cosine of 1; here each angle is atan2 of its sine and cosine, which is exact at both ends.

    >>> round(principal_angles(torch.eye(3, 1), torch.tensor([[1.0], [1.0], [0.0]]) / 2**0.5).item(), 4)
    45.0
    """
    cosines = torch.linalg.svdvals(u.mT @ v)
    sines = torch.linalg.svdvals(v - u @ (u.mT @ v)).flip(-1)  # the largest cosine goes with the smallest sine
    return torch.rad2deg(torch.atan2(sines[..., : cosines.shape[-1]], cosines)).sum(-1)


def score_heads(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    component: Component = "q",
    kind: Kind = "scale",
    epsilon: float = 1e-5,
    group: Sequence[Head] = (),
    heads: Sequence[Head] | None = None,
    ships: bool = True,
    generalized: bool = True,
    r_main: int = 1,
    against: Any = None,
    tokens_at_once: int = 0,
    names: Sequence[str] = (),
) -> HeadScores:
    """Scores of all heads (or of `heads`), exact up to rounding: see `_engine.py`.

    group: heads that are ablated throughout.  against: plain states of another pass, (prompts, width), for the angles; None = this one's.
    names: of the prompts, for errors. Raises RunError where logits are not finite.
    """
    engine = Engine(model, component=component, kind=kind, epsilon=epsilon, group=group, tokens_at_once=tokens_at_once)
    layers, many, n = len(engine.anatomy.layers), engine.many, len(prompts)
    wanted = [(layer, head) for layer in range(layers) for head in range(many)] if heads is None else list(heads)
    wanted = [head for head in engine.anatomy.check(wanted, component) if head not in engine.group]
    found = np.full((n, layers, many), np.nan)
    states: Any = torch.zeros(n, engine.anatomy.width)
    kept = {head: torch.zeros(n, engine.anatomy.width) for head in wanted} if generalized else {}
    with engine, _named(names):
        for part in engine.groups(prompts, changed={layer for layer, _ in wanted}):
            states[part.rows] = part.last.float().cpu()
            for layer in sorted({layer for layer, _ in wanted}):
                for some, last in engine.candidates(part, layer, [head for at, head in wanted if at == layer]):
                    if generalized:
                        for head, rows in zip(some, last.float().cpu(), strict=True):
                            kept[layer, head][part.rows] = rows
                    values = kl(part.logits, engine.logits(last)) if ships else last.float().sum(-1)
                    if not torch.isfinite(values).all():
                        raise RunError(
                            f"ablating head {layer}.{some[0]} or a neighbour gives logits that are not finite; nothing was ranked"
                        )
                    if ships:
                        found[np.ix_(part.rows, [layer], some)] = values.T.double().cpu().numpy()[:, None]
        passes = engine.work.token_layers / (layers * sum(map(len, prompts)) / n)
    angles = None
    if generalized:
        u = leading(states if against is None else torch.as_tensor(against), r_main)
        angles = np.full((layers, many), np.nan)
        for (layer, head), rows in kept.items():
            angles[layer, head] = principal_angles(u, leading(rows, r_main)).item()
    return HeadScores(found, angles, states.numpy(), passes)


class _named:
    """Turns the number of a broken prompt into its name."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Broken) and self.names:
            raise RunError(
                f"prompt {self.names[error.row]} gives logits that are not finite in the plain pass. Is the model whole?"
            ) from None


# --- the approximate pre-screen -----------------------------------------------------------------------------------------------------------
def prescreen(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    component: Component = "q",
    kind: Kind = "scale",
    epsilon: float = 1e-5,
    draws: int = 1,
    most: int = SCREENED,
    tokens_at_once: int = 0,
    rng: Generator,
) -> tuple[Any, float]:
    """((layers, heads) approximate mean Ships in nats, cost in passes): the second-order term of the KL, linear in the heads' change.

    The gradient of the KL itself vanishes at the plain model. Its second-order term is half the variance, under the plain distribution p,
    of the change of the logits; with signs r it is E (g . change)^2 / 2 for g the gradient of sum_v r_v sqrt(p_v) (logit_v - mean logit),
    one backward pass for all heads. draws: how many sign vectors per prompt.  most: on how many of the prompts, drawn at random.
    For picking heads to score exactly, never for reporting.
    """
    engine = Engine(model, component=component, kind=kind, epsilon=epsilon, tokens_at_once=tokens_at_once)
    layers, many = len(engine.anatomy.layers), engine.many
    total = torch.zeros(layers, many, dtype=torch.float64)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    drawn = [prompts[i] for i in sorted(rng.permutation(len(prompts))[:most].tolist())]
    with engine:
        for part in engine.groups(drawn):
            for _ in range(draws):
                total += _second_order(engine, part, generator)
        passes = engine.work.token_layers / (layers * sum(map(len, prompts)) / len(prompts))
    return (total / (2 * draws * len(drawn))).numpy(), passes


def _second_order(engine: Engine, part: Group, generator: torch.Generator) -> Tensor:
    """Sum over prompts of (g . change)^2 for every candidate head, (layers, heads)."""
    signs = torch.randint(0, 2, part.logits.shape, generator=generator).to(part.logits) * 2 - 1
    weights = part.logits.softmax(-1).sqrt() * signs
    with torch.inference_mode(False), torch.enable_grad():
        logits, heads = engine.differentiable(part.ids.clone())
        p = part.logits.clone().softmax(-1)
        centred = logits - (p * logits).sum(-1, keepdim=True)
        gradients = torch.autograd.grad((weights.clone() * centred).sum(), heads)
    out = []
    for layer, gradient in zip(part.layers, gradients, strict=True):
        each = (
            (gradient.view_as(layer.plain) * (layer.changed - layer.plain)).sum((1, 3)).double().cpu()
        )  # (rows, heads)
        out.append(each.unflatten(1, (engine.many, -1)).sum(2).square().sum(0))
    return torch.stack(out)


# --- what is read from scores -------------------------------------------------------------------------------------------------------------
def ranked(scores: Any) -> list[Head]:
    """Heads by falling score, ties by place; heads without a score are left out.

    >>> ranked([[0.1, 3.0], [2.0, float("nan")]])
    [(0, 1), (1, 0), (0, 0)]
    """
    grid = np.asarray(scores, dtype=float)
    places = [
        (layer, head)
        for layer in range(grid.shape[0])
        for head in range(grid.shape[1])
        if not math.isnan(grid[layer, head])
    ]
    return sorted(places, key=lambda place: (-grid[place], place))


def votes(ships: Any, top: int) -> dict[str, int]:
    """How many prompts have a head among their `top` highest, for each head that any prompt has, most first."""
    counts: dict[str, int] = {}
    for one in ships:
        for head in ranked(one)[:top]:
            counts[head_name(head)] = counts.get(head_name(head), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def rank_biased_overlap(a: Sequence[Head], b: Sequence[Head], *, p: float = 0.9) -> float:
    """Rank-biased overlap of two equally long rankings, extrapolated to the end: in [0, 1], 1 for equal ones.

    Source: Webber, Moffat & Zobel 2010, equation 30. p: how far down the list counts, in (0, 1).

    >>> rank_biased_overlap([(0, 0), (0, 1)], [(0, 0), (0, 1)])
    1.0
    """
    depth = min(len(a), len(b))
    if not depth or not 0 < p < 1:
        raise InputError(f"overlap needs two rankings and p in (0, 1), got {depth} places and p={p}")
    shares = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, depth + 1)]
    return shares[-1] * p**depth + (1 - p) / p * sum(share * p**d for d, share in enumerate(shares, 1))
