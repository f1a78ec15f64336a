"""Whether the coverage map finds what is missing: planted holes, evidence that is none, and what comes first.

Source: arXiv:2502.05206 (types of attack, what exists against what is executed); arXiv:2404.14068 (weak evidence, priorities). The registry
is planted, so that the truth is known; `davylamp coverage` is the same query over the real one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from davylamp.core.errors import InputError
from davylamp.core.nouns import Claim, Estimate
from davylamp.core.registry import Entry, study
from davylamp.core.stats import rate
from davylamp.coverage import Coverage, cover, register
from davylamp.studies import _planted_registry as planted

Observed = tuple[Claim | None, Estimate]
HOLES, EMPTIED = 5, 2  # cells cut in a round, and threats emptied in another


@study(
    version=1,
    source="arXiv:2502.05206",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("agent", "jailbreak", "backdoor"),
    systems=("03", "14"),
)
def threat_coverage(*, size: Literal["quick", "full"] = "quick", seeds: tuple[int, ...] = (0, 1, 2)) -> list[Observed]:
    """Holes cut at random into a registry without any, weak runs among sound ones, and threats that lose all they had.

    The map must name exactly the cut cells and none where nothing was cut; a run that is unfinished, too small or judged by an unmeasured
    judge must never count as evidence; things without a run are no evidence at all; emptied threats must come among the first three.
    """
    if not seeds:
        raise InputError("a study needs one or more seeds, got none")
    rounds = {"quick": 40, "full": 200}[size]
    rows = register()
    full = planted.whole(rows)
    cells = list(full)
    hits: dict[str, list[bool]] = {}

    def note(name: str, *hit: bool) -> None:
        hits.setdefault(name, []).extend(hit)

    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        sound = {cell: planted.leave(runs, full[cell][0].name) for cell in cells}
        evidence = cover(list(sound.values()), things=_things(full, set()))
        for seed in seeds:
            rng = np.random.default_rng((3, seed))
            for _ in range(rounds):
                cut = {cells[i] for i in rng.permutation(len(cells))[:HOLES]}
                note("exactly the cut cells", _holes(cover(things=_things(full, cut))) == cut)
                note("holes where none was cut", bool(_holes(cover(things=_things(full, set())))))
            for _ in range(rounds // 4):
                at = [cells[i] for i in rng.permutation(len(cells))[:3]]
                weak = {
                    at[0]: planted.leave(runs, full[at[0]][0].name, n=19),
                    at[1]: planted.leave(runs, full[at[1]][0].name, judge="somebody"),
                    at[2]: planted.leave(runs, full[at[2]][0].name, status="incomplete"),
                }
                given = [weak.get(cell, sound[cell]) for cell in cells]
                states = _states(cover(given, things=_things(full, set())))
                note("weak runs as evidence", *(states[cell] == "evidence" for cell in at))
                note("sound runs as evidence", *(states[cell] == "evidence" for cell in cells if cell not in weak))
                emptied = {list(rows)[i] for i in rng.permutation(len(rows))[:EMPTIED]}
                gone = {cell for cell in cells if cell[0] in emptied}
                found = cover([sound[cell] for cell in cells if cell not in gone], things=_things(full, gone))
                note("emptied threats first", emptied <= _first(found))
                note("the same threats, not emptied", emptied <= _first(evidence))
        bare = _states(cover(things=_things(full, set())))
        note("things without runs as evidence", *(bare[cell] == "evidence" for cell in cells))

    def share(
        name: str, *, control: bool = False, at_least: float | None = None, at_most: float | None = None
    ) -> Observed:
        claim = Claim("share", name, control=control, at_least=at_least, at_most=at_most)
        return claim, rate(sum(hits[name]), len(hits[name]))

    return [
        share("exactly the cut cells", at_least=0.95),
        share("holes where none was cut", at_most=0.05, control=True),
        share("sound runs as evidence", at_least=0.99),
        share("weak runs as evidence", at_most=0.05, control=True),
        share("things without runs as evidence", at_most=0.06, control=True),
        share("emptied threats first", at_least=0.85),
        share("the same threats, not emptied", at_most=0.2, control=True),
    ]


def _things(full: dict[planted.Cell, tuple[Entry, Entry]], cut: set[planted.Cell]) -> list[Entry]:
    return [one for cell, pair in full.items() if cell not in cut for one in pair]


def _states(found: Coverage) -> dict[planted.Cell, str]:
    return {(threat.name, cell.stage): cell.state for threat in found.threats for cell in threat.cells}


def _holes(found: Coverage) -> set[planted.Cell]:
    return {cell for cell, state in _states(found).items() if state == "hole"}


def _first(found: Coverage) -> set[str]:
    return {threat.name for threat in found.threats[:3]}
