"""Mix k safety rows into a fine-tuning file, so that refusing is not forgotten while something else is learnt.

Source: arXiv:2310.03693, section 5 (fine-tuning data mixed with safety data). It helps against forgetting more than against an adversary,
who leaves it out. Its control is the same number of ordinary rows: give those as `rows_file` and compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from davylamp.core import Case, InputError, data
from davylamp.core.rows import CaseFile

if TYPE_CHECKING:
    from numpy.random import Generator


@data(
    version=1,
    source="arXiv:2310.03693",
    licence="Apache-2.0",
    stage="data",
    threats=("fine-tuning",),
    systems=("23",),
)
def mix_safety(rows: Iterable[Case], *, rng: Generator, safety: str, k: int = 100) -> Iterator[Case]:
    """All rows and k of the rows of the file `safety` (requests that should be refused, each with its refusal), in a new order.

    safety: a .jsonl file of rows.  k: how many, 0 or more; each is taken once, so the file must hold as many.
    """
    if k < 0:
        raise InputError(f"k must be 0 or more, got {k}")
    yield from mixed(list(rows), list(CaseFile(safety)), k, rng=rng)


def mixed(rows: Sequence[Case], pool: Sequence[Case], k: int, *, rng: Generator) -> list[Case]:
    """`rows` and k of the pool, shuffled. Rows of the pool get ids of their own and `meta.mixed_in`.

    >>> import numpy as np
    >>> from davylamp.core import Message
    >>> row = Case("1", (Message("user", "a"), Message("assistant", "b")))
    >>> sorted(case.id for case in mixed([row], [row], 1, rng=np.random.default_rng(0)))
    ['1', 'mixed-in-00000']
    """
    if k > len(pool):
        raise InputError(f"{k} rows are to be mixed in, but the file holds {len(pool)}. Give more rows or a smaller k")
    for i, case in enumerate(pool, 1):
        if case.messages[-1].role != "assistant":
            raise InputError(f"row {i} ({case.id}) of the rows to mix in must end in the assistant's reply")
    chosen = rng.permutation(len(pool))[:k].tolist()
    extra = [
        replace(pool[i], id=f"mixed-in-{number:05d}", meta={**pool[i].meta, "mixed_in": True})
        for number, i in enumerate(chosen)
    ]
    every = [*rows, *extra]
    return [every[i] for i in rng.permutation(len(every)).tolist()]
