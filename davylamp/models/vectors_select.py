"""Exact order statistics over all tensors of a plan, without ever holding all of them: what a global threshold needs.

A sample of rows brackets the value, one pass counts what is below the bracket and keeps what is in it, and the exact value is picked from
what was kept. The pass proves the bracket right; a wrong one is widened and the pass is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from davylamp.core.errors import InputError
from davylamp.models.vectors_plan import Job, Plan
from davylamp.models.vectors_walk import BLOCK, Part, in_order, scan_plan, values

ALL_AT_ONCE = 1 << 22  # up to so many entries are simply held
SAMPLED = 64  # one row in so many is in the sample
Array = np.ndarray[Any, Any]
Score = Callable[[Part, list[torch.Tensor]], Sequence[torch.Tensor]]


def entries(plan: Plan) -> int:
    """Number of entries that a scan of the plan sees."""
    return sum(math.prod(job.spec.shape) for job in _jobs(plan))


def kth_smallest(plan: Plan, score: Score, rank: int) -> list[float]:
    """For each of the scores, the value at place `rank` (1 = smallest) among the entries of all tensors.

    score: (part, tensors) -> one float32 tensor for each ranking wanted, an entry's score from that entry alone.
    Raises InputError for a rank that is not there, and for scores that are NaN.

    >>> from davylamp.models import vectors
    >>> layer = torch.nn.Linear(3, 2, bias=False)
    >>> layer.config, layer.weight.data = {}, torch.tensor([[5.0, -1.0, 3.0], [2.0, -4.0, 0.0]])
    >>> plan = vectors.make_plan(layer, [], only=lambda name: True)
    >>> kth_smallest(plan, lambda part, tensors: [tensors[0].abs()], 5)
    [4.0]
    """
    count = entries(plan)
    if not 1 <= rank <= count:
        raise InputError(f"rank must be from 1 to {count}, the number of entries, got {rank}")

    def arrays(part: Part, tensors: list[torch.Tensor]) -> list[Array]:
        return [value.reshape(-1).numpy() for value in score(part, tensors)]

    if count <= ALL_AT_ONCE:
        found = scan_plan(plan, lambda part, tensors: [values.copy() for values in arrays(part, tensors)])
        columns = [np.concatenate(column) for column in zip(*(row for _, row in found), strict=True)]
        _no_nan(columns)
        return [float(np.partition(column, rank - 1)[rank - 1]) for column in columns]
    samples = _sample(plan, arrays)
    margin = max(5e-4, 0.35 / math.sqrt(count / BLOCK))  # rows of a tensor are alike: as if a block counted once
    known: list[float | None] = [None] * len(samples)
    while None in known:
        brackets = [_bracket(sample, rank / count, margin) for sample in samples]
        known = _pass(plan, arrays, brackets, rank, known)
        margin *= 4
    return [float(value) for value in known if value is not None]


def _jobs(plan: Plan) -> list[Job]:
    return [job for job in plan.jobs if job.inputs and job.name == job.target]


def _sample(plan: Plan, arrays: Callable[[Part, list[torch.Tensor]], list[Array]]) -> list[Array]:
    """Sorted scores of a run of rows in every block, at a place that changes from block to block."""

    def runs() -> Iterator[tuple[Job, Part]]:
        for job in _jobs(plan):
            step = max(1, BLOCK // job.spec.width)
            for number, start in enumerate(range(0, job.spec.rows, step)):
                rows = min(step, job.spec.rows - start)
                many = max(1, rows // SAMPLED)
                at = start + (number * 7919) % (rows - many + 1)
                yield job, Part(job.name, job.spec.shape, at, at + many)

    def look(run: tuple[Job, Part]) -> list[Array]:
        return [array.copy() for array in arrays(run[1], values(*run, True))]

    columns = [np.concatenate(column) for column in zip(*in_order(runs(), look, None), strict=True)]
    _no_nan(columns)
    return [np.sort(column) for column in columns]


def _bracket(ordered: Array, share: float, margin: float) -> tuple[float, float]:
    low, high = (math.floor((share + sign * margin) * len(ordered)) for sign in (-1, 1))
    return (
        float(ordered[low]) if low >= 0 else -math.inf,
        float(ordered[high]) if high < len(ordered) else math.inf,
    )


def _pass(
    plan: Plan,
    arrays: Callable[[Part, list[torch.Tensor]], list[Array]],
    brackets: Sequence[tuple[float, float]],
    rank: int,
    known: list[float | None],
) -> list[float | None]:
    """The values whose bracket was right. Entries equal to an end are counted and not kept: there may be very many (zeros)."""

    def look(part: Part, tensors: list[torch.Tensor]) -> list[tuple[int, int, int, Array]]:
        out = []
        for array, (low, high), done in zip(arrays(part, tensors), brackets, known, strict=True):
            if done is not None:
                out.append((0, 0, 0, array[:0].copy()))
                continue
            below = int(np.count_nonzero(array < low))
            near = array[(array >= low) & (array <= high)]
            inside = near[(near > low) & (near < high)]
            if below + near.size + int(np.count_nonzero(array > high)) != array.size:
                _no_nan([array])
            out.append((below, int(np.count_nonzero(near == low)), int(np.count_nonzero(near == high)), inside))
        return out

    found = [row for _, row in scan_plan(plan, look)]
    out = list(known)
    for at, (low, high) in enumerate(brackets):
        if known[at] is not None:
            continue
        below, lows, highs = (sum(int(row[at][part]) for row in found) for part in range(3))
        inside = np.concatenate([row[at][3] for row in found])
        place = rank - below
        if low == high:
            out[at] = low if 0 < place <= lows else None
        elif 0 < place <= lows:
            out[at] = low
        elif lows < place <= lows + inside.size:
            out[at] = float(np.partition(inside, place - lows - 1)[place - lows - 1])
        elif lows + inside.size < place <= lows + inside.size + highs:
            out[at] = high
    return out


def _no_nan(columns: Sequence[Array]) -> None:
    for column in columns:
        bad = int(np.isnan(column).sum())
        if bad:
            raise InputError(f"{bad} entries are NaN, so they cannot be ranked")
