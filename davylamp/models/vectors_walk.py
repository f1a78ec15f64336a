"""The walk over a plan: parts of tensors in fixed blocks, on several threads, with results in order."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from davylamp.core.errors import InputError
from davylamp.models.vectors_io import Source, Spec, scratch
from davylamp.models.vectors_plan import Job, Plan

T = TypeVar("T")
# Entries of a block: in float32 a few of them stay in the second-level cache. Seeds depend on it, so it never changes.
BLOCK = 1 << 18
BUNDLE = 1 << 21  # entries a thread takes at a time
BIG = 1 << 24  # entries from which on whole tensors are worked on one at a time


class Part(NamedTuple):
    """Which tensor, and which of its rows, a rule is given.

    name: as in the checkpoint's files.  shape: of the whole tensor.  start, stop: rows of this part; all of them, unless `blocks`.
    Rows are those of the tensor seen as [product of all but the last dimension, last dimension]; in a vector each entry is a row.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


#: (part, [the model's tensor, then one of each other]) -> the new tensor. Tensors come in float32 (float64 where stored so) and are the
#: rule's own to overwrite. Whole tensors come in their shape; in blocks, [rows, width], and vectors [rows].
Rule = Callable[[Part, list[torch.Tensor]], torch.Tensor]


def scan_plan(
    plan: Plan, look: Callable[[Part, list[torch.Tensor]], T], *, blocks: bool = True, threads: int | None = None
) -> Iterator[tuple[Part, T]]:
    """`scan` over a plan that is made already."""
    jobs = [job for job in plan.jobs if job.inputs and job.name == job.target]

    big_ones = threading.Lock()

    def one(job: Job, part: Part) -> tuple[Part, T]:
        with big_ones if _is_big(part, job.spec) else nullcontext():
            return part, look(part, values(job, part, blocks))

    def work(bundle: list[tuple[Job, Part]]) -> list[tuple[Part, T]]:
        return [one(job, part) for job, part in bundle]

    for found in in_order(bundles(jobs, blocks), work, threads):
        yield from found


def bundles(jobs: Iterable[Job], blocks: bool) -> Iterator[list[tuple[Job, Part]]]:
    """The parts of all jobs, some at a time. The cut depends on shapes alone, so that both forms cut alike."""
    bundle: list[tuple[Job, Part]] = []
    entries = 0
    for job in jobs:
        spec = job.spec
        step = max(1, BLOCK // spec.width) if blocks or not job.inputs else max(1, spec.rows)
        for start in range(0, spec.rows, step):
            stop = min(start + step, spec.rows)
            bundle.append((job, Part(job.name, spec.shape, start, stop)))
            entries += (stop - start) * spec.width
            if entries >= BUNDLE:
                yield bundle
                bundle, entries = [], 0
    if bundle:
        yield bundle


def values(job: Job, part: Part, blocks: bool) -> list[torch.Tensor]:
    """The part of every input, in the dtype that is computed in."""
    wide = any(source.tensors[name].dtype == torch.float64 for source, name in job.inputs)
    dtype = torch.float64 if wide else torch.float32
    shape = (part.stop - part.start, job.spec.width)
    values = []
    for number, (source, name) in enumerate(job.inputs):
        value, _ = scratch.get(number, shape, dtype)
        source.fill(name, part.start, part.stop, value)
        values.append(value.view(part.shape) if not blocks else value.view(-1) if len(part.shape) < 2 else value)
    return values


def worker(
    model: Source, rule: Rule, put: Callable[[Job, Part, torch.Tensor], None], blocks: bool
) -> Callable[[list[tuple[Job, Part]]], None]:
    """What a thread does with a bundle: the rule's result, or the model's own bytes, to `put`."""
    big_ones = threading.Lock()

    def work(bundle: list[tuple[Job, Part]]) -> None:
        for job, part in bundle:
            with big_ones if _is_big(part, job.spec) else nullcontext():
                if job.inputs:
                    put(job, part, _apply(job, part, rule, blocks))
                else:
                    put(job, part, model.raw(job.name, part.start, part.stop))

    return work


def _is_big(part: Part, spec: Spec) -> bool:
    return (part.stop - part.start) * spec.width >= BIG


def _apply(job: Job, part: Part, rule: Rule, blocks: bool) -> torch.Tensor:
    value = rule(part, values(job, part, blocks))
    if value.numel() != (part.stop - part.start) * job.spec.width:
        raise InputError(
            f"the rule gave {tuple(value.shape)} for rows {part.start} to {part.stop} of {part.name} {part.shape}"
        )
    stored = value.to(job.spec.dtype)
    # A sum is the cheapest look at all entries; float16 can overflow in the rounding.
    if not math.isfinite(float((stored if job.spec.dtype == torch.float16 else value).sum(dtype=value.dtype))):
        _explain(job, stored)
    return stored


def _explain(job: Job, stored: torch.Tensor) -> None:
    """Raises InputError that names the tensor and the source whose numbers are not finite, if any is not."""
    count = int((~torch.isfinite(stored)).sum())
    if not count:
        return
    for source, name in job.inputs:
        spec, bad = source.tensors[name], 0
        step = max(1, BLOCK // spec.width)
        for start in range(0, spec.rows, step):
            bad += int((~torch.isfinite(source.raw(name, start, min(start + step, spec.rows)))).sum())
        if bad:
            raise InputError(f"{source.where}: {name} has {bad} entries of {math.prod(spec.shape)} that are not finite")
    kind = str(job.spec.dtype).removeprefix("torch.")
    raise InputError(f"the edit made {count} entries of {job.name} too large for {kind}. Use a smaller weight or scale")


def in_order(
    bundles: Iterable[Any], work: Callable[[Any], T], threads: int | None, *, beside: Iterable[Callable[[], Any]] = ()
) -> Iterator[T]:
    """`work` of every bundle on several threads, results in order. beside: other calls that run when the bundles are handed out."""
    many = threads or min(8, len(os.sched_getaffinity(0)))
    with _one_thread_each(), ThreadPoolExecutor(many, thread_name_prefix="vectors") as pool:

        def quietly(bundle: Any) -> T:
            with torch.no_grad():
                return work(bundle)

        waiting: deque[Future[T]] = deque()
        asides: list[Future[Any]] = []
        try:
            for bundle in bundles:
                waiting.append(pool.submit(quietly, bundle))
                while len(waiting) > 3 * many:  # so that results do not pile up
                    yield waiting.popleft().result()
            asides = [pool.submit(call) for call in beside]
            while waiting:
                yield waiting.popleft().result()
            for aside in asides:
                aside.result()
        finally:
            for future in (*waiting, *asides):
                future.cancel()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """The threads here share the cores out already: torch's own would only get in their way. Put back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
