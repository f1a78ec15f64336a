"""How several masked task vectors become one: none, average, task arithmetic, TIES, DARE, with the constants of SOMF's reference.
Source: arXiv:2405.09055 and its code; TIES arXiv:2306.01708; DARE arXiv:2311.03099. As in that code, TIES sums what agrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.edits._masks import generator, kth_smallest

RULES = ("none", "average", "task_arithmetic", "ties", "dare")
TIES_DROP, DARE_KEEP = 0.2, 0.8  # the reference keeps the largest fifth in TIES and drops a fifth in DARE
Vectors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Merge:
    """A rule with its numbers.

    weight: lambda; None for the reference's: task arithmetic 0.3 on adapters and 0.04 on full weights, TIES 0.4, DARE 0.3.
    density: the share that TIES keeps (None: 0.2) or DARE keeps (None: 0.8), in (0, 1].  adapters: for the default weight.

    >>> Merge("ties", 1).weight_used, Merge("task_arithmetic", 2).weight_used
    (0.4, 0.04)
    """

    rule: str
    tasks: int
    weight: float | None = None
    density: float | None = None
    adapters: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UnknownNameError("merge rule", self.rule, RULES)
        if self.rule == "none" and self.tasks != 1:
            raise InputError(f"{self.tasks} task models need a merge rule: {', '.join(RULES[1:])}")
        if self.weight is not None and not math.isfinite(self.weight):
            raise InputError(f"weight of a merge must be a finite number, got {self.weight}")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"density of a merge must be in (0, 1], got {self.density}")

    @property
    def weight_used(self) -> float:
        default = {"task_arithmetic": 0.3 if self.adapters else 0.04, "ties": 0.4, "dare": 0.3}
        return default.get(self.rule, 1.0) if self.weight is None else self.weight

    @property
    def single(self) -> bool:
        """One vector goes through task arithmetic, TIES and averaging as it is; through DARE it does not. As in the reference."""
        return self.tasks == 1 and self.rule != "dare"


@dataclass(frozen=True)
class Ties:
    """What TIES must know of all tensors before it does one. edges: per task the least |x| that stays.  tie_sign: for a column sum of 0."""

    edges: tuple[float, ...]
    tie_sign: float


def prepare(merge: Merge, masked: Callable[[], Iterable[Sequence[torch.Tensor]]]) -> Ties | None:
    """The thresholds for TIES, exactly and without holding the tensors together; None for the other rules.

    masked: gives, anew at every call, the tasks' vectors of one tensor after another.
    Of P entries those stay with |x| >= the (P - int(share * P))-th smallest, so int(share * P) + 1 of them.
    """
    if merge.rule != "ties" or merge.single:
        return None
    share = TIES_DROP if merge.density is None else merge.density
    total = sum(vectors[0].numel() for vectors in masked())
    k = max(1, total - int(share * total))

    def sizes(task: int) -> Callable[[], Iterable[torch.Tensor]]:
        return lambda: (vectors[task].abs() for vectors in masked())

    edges = tuple(kth_smallest(sizes(task), k) for task in range(merge.tasks))
    signs = sum(float(_kept(vectors, edges).sum(0).sign().sum()) for vectors in masked())
    return Ties(edges, math.copysign(1.0, signs) if signs else 0.0)


def _kept(vectors: Sequence[torch.Tensor], edges: Sequence[float]) -> torch.Tensor:
    """(tasks, ...) with the small entries at zero; gradients pass through the others."""
    return torch.stack([v * (v.detach().abs() >= edge) for v, edge in zip(vectors, edges, strict=True)])


def fuse(
    merge: Merge, vectors: Sequence[torch.Tensor], ties: Ties | None, drops: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """One update from the tasks' vectors of one tensor; differentiable. drops: for DARE, 1.0 where an entry of a task's vector stays.

    >>> fuse(Merge("average", 2), [torch.tensor([1.0, 3.0]), torch.tensor([3.0, 5.0])], None).tolist()
    [2.0, 4.0]
    """
    if merge.single:
        return vectors[0]
    if merge.rule == "average":
        return torch.stack(list(vectors)).mean(0)
    if merge.rule == "task_arithmetic":
        return torch.stack([v * merge.weight_used for v in vectors]).sum(0)
    if merge.rule == "dare":
        keep = DARE_KEEP if merge.density is None else merge.density
        return torch.stack([v * d / keep * merge.weight_used for v, d in zip(vectors, drops, strict=True)]).sum(0)
    assert ties is not None
    kept = _kept(vectors, ties.edges)
    sign = kept.detach().sum(0).sign()
    sign = torch.where(sign == 0, torch.full_like(sign, ties.tie_sign), sign)
    return (kept * (kept.detach().sign() == sign)).sum(0) * merge.weight_used


def drop(shape: Sequence[int], keep: float, generator: torch.Generator | None, device: Any = None) -> torch.Tensor:
    """1.0 where an entry stays (with probability `keep`), else 0.0; the draw that peft's DARE makes."""
    return torch.bernoulli(torch.full(tuple(shape), keep, device=device), generator=generator)


def drops_of(merge: Merge, name: str, shape: Sequence[int], seed: int) -> list[torch.Tensor]:
    """DARE's draws for a tensor, one a task, the same whatever the order of the tensors; none for other rules."""
    if merge.rule != "dare":
        return []
    keep = DARE_KEEP if merge.density is None else merge.density
    return [drop(shape, keep, generator(seed, f"dare {task} {name}")) for task in range(merge.tasks)]
