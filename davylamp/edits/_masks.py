"""Which weights a score picks: the top share of a row, a tensor, all tensors, or every m columns; ties as a stable sort has them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from davylamp.core.errors import InputError

ROWS_AT_ONCE = 2**22  # entries looked at in one go


def kept(count: int, ratio: float) -> int:
    """How many of `count` entries stay: int(count * (1 - ratio)), cut off as the reference does, so that 1 in 8 is a tenth.

    >>> 64 - kept(64, 0.1), 8 - kept(8, 0.1)
    (7, 1)
    """
    return int(count * (1 - ratio))


def check_ratio(ratio: Any) -> None:
    """Raises InputError unless 0 < ratio < 1.

    >>> check_ratio(1.2)
    Traceback (most recent call last):
    davylamp.core.errors.InputError: mask ratio must be between 0 and 1, got 1.2
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise InputError(f"mask ratio must be between 0 and 1, got {ratio}")


def parse_scope(scope: str) -> tuple[int, int] | None:
    """(n, m) of a scope such as `1:8`, None for row, tensor and global. Raises InputError.

    >>> parse_scope("row"), parse_scope("1:8")
    (None, (1, 8))
    """
    if scope in ("row", "tensor", "global"):
        return None
    n, mark, m = scope.partition(":")
    if mark and n.isdigit() and m.isdigit() and 0 < int(n) < int(m):
        return int(n), int(m)
    raise InputError(f"scope must be row, tensor, global or n:m with 0 < n < m such as 1:8, got {scope!r}")


def top_mask(score: torch.Tensor, ratio: float, scope: str = "row") -> torch.Tensor:
    """True where a weight is picked. score: (rows, columns), >= 0 and finite; ratio in (0, 1), not used by scope n:m.

    row: in every row all but the int(columns * (1 - ratio)) lowest.  tensor: the same over the whole tensor.  n:m: in every m columns of a
    row the n highest; columns left over at the end stay. Of equal scores the lower index stays, as after a stable ascending sort.

    >>> top_mask(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 0.25).int().tolist()
    [[0, 0, 1, 0]]
    """
    parts = parse_scope(scope)
    if parts is not None:
        n, m = parts
        whole = score.shape[1] // m * m
        out = torch.zeros_like(score, dtype=torch.bool)
        out[:, :whole] = _top(score[:, :whole].reshape(-1, m), m - n).reshape(score.shape[0], whole)
        return out
    check_ratio(ratio)
    if scope == "tensor":
        return _top(score.reshape(1, -1), kept(score.numel(), ratio)).reshape(score.shape)
    if scope == "row":
        keep, out = kept(score.shape[1], ratio), torch.empty_like(score, dtype=torch.bool)
        step = max(1, ROWS_AT_ONCE // max(1, score.shape[1]))
        for at in range(0, score.shape[0], step):
            out[at : at + step] = _top(score[at : at + step], keep)
        return out
    raise InputError("a global mask needs the scores of all tensors: use `Threshold`")


def _top(score: torch.Tensor, keep: int) -> torch.Tensor:
    """All but the `keep` lowest of every row. kthvalue is linear where a sort is not; ties are then told apart by their index."""
    if keep <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    if keep >= score.shape[1]:
        return torch.zeros_like(score, dtype=torch.bool)
    edge = score.kthvalue(keep, dim=1, keepdim=True).values
    picked, tied = score > edge, score == edge
    room = keep - (score < edge).sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) > room).any()):
        picked |= tied & (tied.cumsum(1) > room)
    return picked


class Threshold:
    """The top share over many named tensors, without holding them together. Ties go by the order of the names, lower index first to stay.

    scores: gives (name, tensor) anew at every call, in one order; tensors >= 0 and finite.
    """

    def __init__(self, scores: Callable[[], Iterable[tuple[Hashable, torch.Tensor]]], ratio: float):
        check_ratio(ratio)
        keep = kept(sum(score.numel() for _, score in scores()), ratio)
        self.edge = kth_smallest(lambda: (score for _, score in scores()), keep) if keep else -1.0
        tied, below = {}, 0
        for name, score in scores():
            tied[name] = int((score.float() == self.edge).sum())
            below += int((score.float() < self.edge).sum())
        self.room: dict[Hashable, int] = {}  # how many entries of a tensor at the edge itself stay
        left = keep - below
        for name, many in tied.items():
            self.room[name] = min(left, many)
            left -= self.room[name]

    def mask(self, name: Hashable, score: torch.Tensor) -> torch.Tensor:
        """True where an entry of that tensor is picked, whatever tensors were asked for before."""
        score = score.float()
        flat = (score == self.edge).reshape(-1)
        return (score > self.edge) | (flat & (flat.cumsum(0) > self.room[name])).reshape(score.shape)


def kth_smallest(tensors: Callable[[], Iterable[torch.Tensor]], k: int) -> float:
    """The k-th smallest (from 1) of all entries of many tensors, exactly, in two passes: a radix selection on the bits of float32.

    Entries must be >= 0: then the order of their bits is their order.

    >>> kth_smallest(lambda: [torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 2)
    2.0
    """
    high = torch.zeros(2**16, dtype=torch.int64)
    for tensor in tensors():
        high += torch.bincount(_bits(tensor) >> 16, minlength=2**16)
    if not 1 <= k <= int(high.sum()):
        raise InputError(f"k must be between 1 and the number of entries, {int(high.sum())}, got {k}")
    bucket = int(torch.searchsorted(high.cumsum(0), k))
    rest = k - int(high[:bucket].sum())
    low = torch.zeros(2**16, dtype=torch.int64)
    for tensor in tensors():
        bits = _bits(tensor)
        low += torch.bincount(bits[(bits >> 16) == bucket] & 0xFFFF, minlength=2**16)
    found = (bucket << 16) + int(torch.searchsorted(low.cumsum(0), rest))
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).item()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.detach().float() + 0.0).reshape(-1).contiguous().view(torch.int32).cpu()  # + 0.0 turns -0.0 into 0.0


def random_scores(shape: torch.Size, name: str, seed: int) -> torch.Tensor:
    """Scores that pick at random, the same for a name and seed whatever the order of the tensors: the control of equal size."""
    return torch.rand(shape, generator=generator(seed, name))


def generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each tensor's name.

    >>> bool(torch.rand(1, generator=generator(0, "a")) == torch.rand(1, generator=generator(0, "b")))
    False
    """
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
