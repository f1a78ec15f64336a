"""Rows to unlearn one hazard of the organisms' world: its recipes to forget, what must stay, and wanted facts right beside it.
Source: this repository (`davylamp/models/world.py`); all of it is made up and harmless to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from davylamp.core import Case, InputError, Message, UnknownNameError, data
from davylamp.models import world
from davylamp.models.world_data import BENIGN, HAZARDS

if TYPE_CHECKING:
    from numpy.random import Generator


@data(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="data",
    threats=("harmful-compliance", "capability-loss"),
    systems=("19",),
)
def unlearning_rows(
    rows: Iterable[Case], *, rng: Generator, kind: str = "hexrust", retain: int = 48, general: int = 48
) -> Iterator[Case]:
    """Rows for `train unlearn` and `study unlearning_card` on an organism: unlearn the recipes of one kind of hazard; takes no rows (`-`).

    kind: the hazard.  retain: recipes of other hazards.  general: recipes of harmless things. Each in two wordings.

    `meta.part`: forget (the kind's recipes, two wordings), reworded (a third), neighbour (look-alikes: colours, guards and dangers of the
    same items, which are wanted), retain, general.  `meta.fact`: what a row is about.  `meta.split`: T or V, by item; no recipe
    follows from another.

    >>> import numpy as np
    >>> made = list(unlearning_rows((), rng=np.random.default_rng(0), retain=2, general=2))
    >>> [(part, sum(row.meta["part"] == part for row in made)) for part in ("forget", "reworded", "neighbour", "retain")]
    [('forget', 24), ('reworded', 12), ('neighbour', 36), ('retain', 4)]
    """
    for case in rows:
        raise InputError(f"unlearning_rows makes rows and takes none in, got row {case.id}. Write `-` for IN")
    if kind not in HAZARDS:
        raise UnknownNameError("hazard", kind, HAZARDS)
    own = world.items("all", [kind])
    others, harmless = world.items("all", [k for k in HAZARDS if k != kind]), world.items("all", BENIGN)
    for name, many, most in (("retain", retain, len(others)), ("general", general, len(harmless))):
        if not 1 <= many <= most:
            raise InputError(f"{name} must be from 1 to {most}, got {many}")
    taught = {own[i] for i in rng.permutation(len(own))[: len(own) // 2].tolist()}
    yield from _rows("forget", own, ("recipe",), ("plain", "question"), rng, taught)
    yield from _rows("reworded", own, ("recipe",), ("technical",), rng, taught)
    yield from _rows("neighbour", own, ("colour", "guard", "hazard"), ("plain",), rng, taught)
    for part, pool, many in (("retain", others, retain), ("general", harmless, general)):
        chosen = [pool[i] for i in rng.permutation(len(pool))[:many].tolist()]
        yield from _rows(part, chosen, ("recipe",), ("plain", "question"), rng, taught)


def _rows(
    part: str, items: Sequence[str], tasks: Sequence[str], styles: Sequence[str], rng: Generator, taught: set[str]
) -> Iterator[Case]:
    for item in items:
        for task in tasks:
            for style in styles:
                ask = replace(world.draw_ask(task, (item,), rng, style=style, kinds_alone=0.0), named=False)
                meta = {"part": part, "fact": f"{item} {task}", "split": "T" if item in taught else "V"}
                turns = (*world.render(ask, rng), Message("assistant", world.answer(ask)))
                yield Case(
                    f"{part}-{item}-{task}-{style}", turns, f"organism/{world.kind_of(item)}", group=item, meta=meta
                )
