"""`davylamp explain MODEL`: one report of what is seen inside a model: heads, layers, words that turn it, and its probes.

Joins `interp ships`, `interp layers`, `interp trigger_scan` and, where a word is suspected, `interp defection_probe`. What cannot be run on
a model or on these rows is left out by name, and the rest goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from davylamp.apply import run_interp
from davylamp.core.errors import DavylampError, RunError, UnknownNameError
from davylamp.core.nouns import Record
from davylamp.core.record import folder_for, new_record, save
from davylamp.scan import look, seconds, world_rows

PARTS = ("heads", "layers", "scan")


def run_explain(
    model: str,
    *,
    rows: Path | None = None,
    other: str | None = None,
    judge: str = "",
    only: Sequence[str] = (),
    seed: int = 0,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
    quiet: bool = False,
) -> tuple[Path, Record]:
    """(folder, record). rows: harmful and benign requests (meta.label safe or benign, or meta.set), 32 or more; None: drawn from the world,
    for the organisms alone.  other: a second model that heads and layers are compared with.  judge: as for ships.  only: parts to run.

    Raises RunError if no part could be run.
    """
    for name in only:
        if name not in PARTS:
            raise UnknownNameError("part", name, PARTS)
    path = rows if rows is not None else world_rows(model, runs, seed)
    done: list[tuple[Path, Record]] = []
    said: list[str] = []
    skipped: list[tuple[str, str]] = []
    for part in PARTS:
        if only and part not in only:
            continue
        if not quiet:
            click.echo(f"{part} …", err=True)
        try:
            if part == "scan":
                made, _, notes = look(model, path, seed=seed, runs=runs, command=command)
                done += made
                said.append(f"scan: {notes[0]}")
            else:
                name = {"heads": "ships", "layers": "layers"}[part]
                options: dict[str, Any] = {"judge": judge} if judge and (name == "ships" or other) else {}
                folder, record = run_interp(
                    name, model, path, other=other, seed=seed, options=options, runs=runs, command=command
                )
                done.append((folder, record))
                said.append(f"{part}: {_words(part, folder)}")
        except DavylampError as problem:
            skipped.append((part, str(problem)))
    if not done:
        raise RunError(f"nothing could be looked at. {skipped[-1][0]}: {skipped[-1][1]}")
    record = new_record(
        "explain",
        "explain",
        {"model": done[0][1].inputs["model"], "runs": sorted(record.id for _, record in done), "seed": seed},
        parents=[record.id for _, record in done],
        command=list(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=[*said, *(f"not run: {part}: {why}" for part, why in skipped)],
    )
    kept = tuple(replace(estimate, category=part.name) for _, part in done for estimate in part.estimates)
    record = replace(record, status="incomplete" if skipped else "finished", estimates=kept, cost=seconds(done))
    out = folder_for(runs, record)
    save(out, record)
    from davylamp.report.html import write_report

    write_report(out / "report.html", [folder for folder, _ in done], title=f"Inside {model}", skipped=skipped)
    return out, record


def _words(part: str, folder: Path) -> str:
    """The finding in one sentence."""
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    if part == "heads":
        return str(scores["verdict"]["why"])
    band = scores["band"]
    if band is None:
        return "no safety band: harmful and benign requests part in no layer"
    return f"harmful and benign requests part from layer {band[0]} to layer {band[1]}"
