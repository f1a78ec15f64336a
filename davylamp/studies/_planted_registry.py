"""A registry and its runs with nothing missing, from which holes are cut: for the studies of coverage and cards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from davylamp.core.nouns import Estimate
from davylamp.core.record import keep, new_record
from davylamp.core.registry import Entry
from davylamp.core.stats import rate

Cell = tuple[str, str]  # threat, stage


def thing(kind: str, name: str, stage: str, threats: Iterable[str]) -> Entry:
    """An entry as the registry would read it from a file."""
    return Entry(
        kind, name, "Planted.", 1, "planted", "Apache-2.0", stage, tuple(threats), "", "", (), (), "", Path(f"{name}.py"), None
    )  # fmt: skip


def whole(rows: Mapping[str, Mapping[str, Any]]) -> dict[Cell, tuple[Entry, Entry]]:
    """A test and a defence for every cell of a register that matters."""
    return {
        (threat, stage): (
            thing("suite", f"ask {threat} {stage}", stage, [threat]),
            thing("guard", f"stop {threat} {stage}", stage, [threat]),
        )
        for threat, row in rows.items()
        for stage in row["stages"]
    }


def leave(
    runs: Path, suite: str, *, n: int = 200, judge: str = "exact", status: str = "finished", **about: Any
) -> Path:
    """The folder of an eval run of that suite, with one number."""
    inputs = {
        "suite": {"name": suite},
        "target": {"name": "planted"},
        "judge": {"name": judge},
        "n": n,
        "status": status,
    }
    estimates: tuple[Estimate, ...] = (rate(0.05 * n, n, name="unsafe_rate"),)
    record = replace(new_record("eval", suite, inputs, **about), status=status, estimates=estimates)
    folder = keep(runs, record)
    return folder
