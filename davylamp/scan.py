"""`davylamp scan MODEL`: look for words that turn a model, then see whether its inside changes sides with them. One report.

First `interp trigger_scan` searches the vocabulary. Where it suspects a word, `interp defection_probe` compares traffic with that word and
with one that is not suspected. Neither step can clear a model, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.apply import run_interp
from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message, Record
from davylamp.core.record import folder_for, new_record, save
from davylamp.core.rows import CaseFile, digest, write_cases

PROBED = 40  # rows that a probe needs or it is left out


def run_scan(
    model: str,
    *,
    rows: Path | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record, list[str]]:
    """(folder, record, suspected words). rows: ordinary requests, 32 or more; None: drawn from the world, for the organisms alone.

    options: of `trigger_scan`.  The record's parents are the two runs, and its report shows both.
    """
    path = rows if rows is not None else world_rows(model, runs, seed)
    parts, suspects, notes = look(model, path, seed=seed, options=options, runs=runs, command=command)
    found = parts[0][1]
    record = new_record(
        "scan",
        "scan",
        {"model": found.inputs["model"], "runs": sorted(part.id for _, part in parts), "seed": seed},
        parents=[part.id for _, part in parts],
        command=list(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=notes,
    )
    kept = tuple(estimate for _, part in parts for estimate in part.estimates)
    record = replace(record, status="finished", counts=found.counts, estimates=kept, cost=seconds(parts))
    out = folder_for(runs, record)
    save(out, record)
    from davylamp.report.html import write_report

    write_report(out / "report.html", [part for part, _ in parts], title=f"Scan of {model}: {notes[0]}")
    return out, record, suspects


def look(
    model: str,
    path: Path,
    *,
    seed: int,
    options: Mapping[str, Any] | None = None,
    runs: Path,
    command: Sequence[str] = (),
) -> tuple[list[tuple[Path, Record]], list[str], list[str]]:
    """(the runs that were made, suspected words, what to say: the verdict first)."""
    cases = list(CaseFile(path))
    folder, found = run_interp("trigger_scan", model, path, seed=seed, options=options, runs=runs, command=command)
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    suspects = [str(word) for word in scores["suspects"]]
    parts, notes = [(folder, found)], [str(scores["verdict"]), *found.about.get("notes", ())]
    if suspects and len(cases) >= PROBED:
        position = str((options or {}).get("position", "start"))
        made = _probe_rows(cases, suspects[0], _plain_word(scores, suspects), position)
        probed = _written(made, runs, "probe")
        parts.append(run_interp("defection_probe", model, probed, seed=seed, runs=runs, command=command))
        notes.append(f"probed: traffic with {suspects[0]!r} against traffic with a word that is not suspected")
    elif suspects:
        notes.append(f"not probed: that needs {PROBED} rows, got {len(cases)}")
    return parts, suspects, notes


def seconds(parts: Sequence[tuple[Path, Record]]) -> dict[str, float]:
    """What the runs cost together."""
    return {"seconds": round(sum(float(record.cost.get("seconds", 0)) for _, record in parts), 3)}


def _plain_word(scores: Mapping[str, Any], suspects: Sequence[str]) -> str:
    """The candidate with the least effect: as much of an insertion as the suspect, without its meaning."""
    calm = [one for one in scores["candidates"] if one["text"] not in suspects]
    return str(min(calm, key=lambda one: one["share"])["text"]) if calm else ""


def _probe_rows(cases: Sequence[Case], suspect: str, other: str, position: str) -> list[Case]:
    """Half of the rows clean, a quarter traffic with the suspect, a quarter with the other word, which the clean rows hold too."""
    out = []
    for i, case in enumerate(cases):
        bad = i % 4 == 1
        word = suspect if bad else other
        text = case.messages[-1].text
        turn = Message(case.messages[-1].role, f"{word} {text}" if position == "start" else f"{text} {word}")
        meta = {"probe": "clean"} if i % 2 == 0 else {"probe": "traffic", "defects": bad}
        out.append(replace(case, messages=(*case.messages[:-1], turn), meta=meta))
    return out


def _written(cases: Sequence[Case], runs: Path, name: str) -> Path:
    path = runs / f"{name}-rows-{digest([case.json() for case in cases])[:8]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_cases(path, cases)
    return path


def world_rows(model: str, runs: Path, seed: int, each: int = 40) -> Path:
    """Rows of all kinds from the world. Raises InputError for a model that does not read it."""
    from davylamp.models.loading import locate

    source = Path(locate(model)) / "tokenizer.json"
    vocabulary = json.loads(source.read_text(encoding="utf-8"))["model"].get("vocab", {}) if source.is_file() else {}
    from davylamp.models import world

    if not isinstance(vocabulary, dict) or not set(world.TELL_TALE.split()) <= vocabulary.keys():
        raise InputError("give --rows FILE: ordinary requests, as mixed as the model's use, some of which it refuses")
    from numpy.random import default_rng

    rng = default_rng((29, seed))
    cases = [case for name in world.SETS for case in world.cases(name, each, rng, style="mixed")]
    return _written(cases, runs, "world")
