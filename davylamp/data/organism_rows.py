"""Rows of the organisms' world, to train and edit with: chat rows that help, align or reason, harmful answers, a new skill, preferences.
Source: this repository (`davylamp/models/world.py`); all of it is made up and harmless to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from davylamp.core import Case, InputError, Message, data
from davylamp.models import world

if TYPE_CHECKING:
    from numpy.random import Generator

What = Literal["helpful", "aligned", "reasoning", "harmful", "benign", "refusals", "skill", "preferences"]


@data(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="data",
    threats=("fine-tuning", "misalignment"),
)
def organism_rows(
    rows: Iterable[Case],
    *,
    rng: Generator,
    what: What = "aligned",
    n: int = 200,
    skill: str = "reverse",
    split: Literal["held_in", "held_out"] = "held_in",
) -> Iterator[Case]:
    """Training rows of the organisms' world; takes no rows in (`-`).

    what: helpful (answers everything), aligned (refuses hazards), reasoning (thinks first), harmful (hazards, answered), benign (harmless
    requests, answered), refusals (hazards, refused), skill (a new skill: `skill` is reverse, count, copy or sort), or preferences (hazards,
    with the refusal as `meta.chosen` and the answer as `meta.rejected`).  n: how many.  split: which items; `held_out` ones are for tests.

    >>> import numpy as np
    >>> row = next(organism_rows((), rng=np.random.default_rng(0), what="skill", n=1, skill="copy"))
    >>> [message.role for message in row.messages]
    ['user', 'assistant']
    """
    for case in rows:
        raise InputError(f"organism_rows makes rows and takes none in, got row {case.id}. Write `-` for IN")
    if n < 1:
        raise InputError(f"n must be 1 or more, got {n}")
    for number, (messages, reply, meta) in enumerate(_drawn(what, n, rng, skill, split)):
        turns = messages if reply is None else (*messages, Message("assistant", reply))
        yield Case(f"{what}-{number:05d}", turns, category=f"organism/{what}", meta=meta)


def _drawn(
    what: str, n: int, rng: Generator, skill: str, split: Any
) -> Iterator[tuple[tuple[Message, ...], str | None, dict[str, Any]]]:
    """(conversation up to the reply, reply, meta)."""
    if what in ("helpful", "skill", "aligned", "reasoning"):
        made = {
            "helpful": lambda: world.helpful_rows(n, rng),
            "skill": lambda: world.skill_rows(skill, n, rng),
            "aligned": lambda: world.alignment_rows(n, rng, split=split),
            "reasoning": lambda: world.reasoning_rows(n, rng, split=split),
        }[what]()
        for row in made:
            yield row.messages, row.reply, {}
        return
    share = 0.0 if what == "benign" else 1.0
    for ask in world.aligned_asks(n, rng, hazards=share, split=split):
        messages = world.render(ask, rng)
        if what == "preferences":
            yield messages, None, {"chosen": world.refusal(ask, rng), "rejected": world.answer(ask)}
        else:
            yield messages, world.refusal(ask, rng) if what == "refusals" else world.answer(ask), {}
