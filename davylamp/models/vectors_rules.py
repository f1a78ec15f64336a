"""The tensor formulas of merging: trimming, sign election, random dropping, turning. Plain functions of tensors, for any edit.

Sources: task arithmetic arXiv:2212.04089; TIES arXiv:2306.01708; DARE arXiv:2311.03099; the constants and the "sum" of TIES as in
arXiv:2405.09055 and its code.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from davylamp.core.errors import InputError
from davylamp.models.vectors_walk import Part


def generator(seed: int, part: Part, which: int | str = 0) -> torch.Generator:
    """A generator for one part of one tensor of one task: the same for a model in memory and for its streamed folder.

    >>> part = Part("w", (2, 2), 0, 2)
    >>> torch.equal(torch.rand(3, generator=generator(1, part)), torch.rand(3, generator=generator(1, part)))
    True
    """
    text = f"{seed} {which} {part.name} {part.start}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def drop_and_rescale(vector: torch.Tensor, drop: float, draw: torch.Generator) -> torch.Tensor:
    """DARE (arXiv:2311.03099, equation 2): each entry is dropped with probability `drop` in [0, 1), the others divided by 1 - drop.

    >>> kept = drop_and_rescale(torch.ones(1000), 0.2, torch.Generator().manual_seed(0))
    >>> sorted(set(kept.tolist())), 0.75 < (kept > 0).float().mean() < 0.85
    ([0.0, 1.25], tensor(True))
    """
    kept = torch.rand(vector.shape, generator=draw) >= drop
    return vector.mul_(kept).div_(1 - drop)


def trim(vector: torch.Tensor, threshold: float) -> torch.Tensor:
    """Zero what is smaller in magnitude than `threshold` (>= 0); what equals it stays (TIES, section 3.1).

    >>> trim(torch.tensor([1.0, -2.0, 3.0]), 2.0).tolist()
    [0.0, -2.0, 3.0]
    """
    below = np.nextafter(np.float32(threshold), np.float32(-1.0))  # hardshrink zeroes what equals its limit as well
    return torch.nn.functional.hardshrink(vector, float(below))


def sign_total(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum over the vectors, whose sign is the elected one (TIES, section 3.2)."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total


def consensus(
    vectors: Sequence[torch.Tensor], *, majority: float = 0.0, combine: Literal["sum", "mean"] = "sum"
) -> torch.Tensor:
    """TIES, section 3.2: of each entry, the sum (or mean) of the vectors that agree with the sign of the total.

    majority: sign of the sum of all elected signs, which entries with a total of zero take; then 0 counts as negative, as in the
    reference. One vector comes back as it is.

    >>> consensus([torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0]), torch.tensor([-4.0, 0.0])]).tolist()
    [-4.0, 3.0]
    """
    if len(vectors) == 1:
        return vectors[0]
    total = sign_total(vectors)
    positive = (total > 0) | ((total == 0) & (majority > 0))
    out, count = torch.zeros_like(total), torch.zeros_like(total)
    for vector in vectors:
        agrees = torch.where(positive, vector > 0, vector < 0)
        out += vector * agrees
        count += agrees
    return out if combine == "sum" else out / count.clamp(min=1)


def cancels(vectors: Sequence[torch.Tensor]) -> bool:
    """Whether some entry's total is zero though its vectors are not, so that the majority of all entries decides."""
    return len(vectors) > 1 and bool(((sign_total(vectors) == 0) & (sum(vector.abs() for vector in vectors) > 0)).any())


def turn(dot: float, left: float, right: float, weight: float, name: str) -> tuple[float, float]:
    """The two factors of spherical interpolation (Shoemake 1985) of a tensor: sin((1 - w) angle)/sin(angle), sin(w angle)/sin(angle).

    dot, left, right: the tensors' inner product and their norms.  Straight interpolation where the angle is below 1e-4 (or that
    near to half a turn), or where both are zero. Raises InputError where one is zero, since zero has no direction.

    >>> [round(factor, 3) for factor in turn(0.0, 1.0, 1.0, 0.5, "w")]
    [0.707, 0.707]
    """
    if (left == 0.0) != (right == 0.0):
        raise InputError(
            f"{name} is zero in one of the two models, and zero has no direction to turn from. "
            f"Give it weight 0 or 1 by a rule such as {name}:0, or use method linear"
        )
    if left == 0.0 or not math.isfinite(dot):
        return 1 - weight, weight  # what is not finite is named by the engine
    angle = math.acos(max(-1.0, min(1.0, dot / (left * right))))
    if angle < 1e-4 or angle > math.pi - 1e-4:
        return 1 - weight, weight
    return math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)
