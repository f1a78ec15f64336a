"""Records: what ran, on what, and what came out, as canonical JSON in `runs/<date>-<verb>-<name>-<id8>/record.json`.

The id hashes `inputs` alone: all that determines the result (suite, its version and cases; target; judge; settings; seed).
Time, cost, library versions and the command are kept under `about` and `cost`, so that equal runs have equal ids.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp import __version__
from davylamp.core.errors import InputError
from davylamp.core.nouns import Estimate, Record
from davylamp.core.rows import digest


def new_record(verb: str, name: str, inputs: Mapping[str, Any], *, parents: Sequence[str] = (), **about: Any) -> Record:
    """A record at its start. The id follows from verb and inputs.

    >>> new_record("eval", "demo", {"seed": 0}).id == new_record("eval", "demo", {"seed": 0}, command="x").id
    True
    """
    return Record(
        verb=verb,
        name=name,
        inputs=inputs,
        id=digest({"verb": verb, "name": name, "inputs": inputs}),
        parents=tuple(parents),
        about={"davylamp": __version__, "python": platform.python_version(), **versions(), **about},
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that are loaded and can change a result."""
    return {
        name: str(module.__version__)
        for name in ("numpy", "torch", "transformers", "aiohttp", "inspect_ai")
        if (module := sys.modules.get(name)) is not None and hasattr(module, "__version__")
    }


def to_json(record: Record) -> dict[str, Any]:
    """The record as it is written and as `--json` prints it."""
    return {
        "id": record.id,
        "verb": record.verb,
        "name": record.name,
        "status": record.status,
        "inputs": dict(record.inputs),
        "parents": list(record.parents),
        "estimates": [estimate.json() for estimate in record.estimates],
        "claims": [dict(claim) for claim in record.claims],
        "counts": dict(record.counts),
        "cost": dict(record.cost),
        "about": dict(record.about),
    }


def from_json(row: Mapping[str, Any]) -> Record:
    """The way back. Raises InputError if the id does not fit the inputs: the file was edited or is not ours."""
    try:
        estimates = tuple(
            Estimate(**{**item, "worst": _pair(item["worst"]), "corrected": _pair(item["corrected"])})
            for item in row["estimates"]
        )
        record = Record(
            verb=row["verb"],
            name=row["name"],
            inputs=row["inputs"],
            id=row["id"],
            parents=tuple(row["parents"]),
            status=row["status"],
            estimates=estimates,
            claims=tuple(row["claims"]),
            counts=row["counts"],
            cost=row["cost"],
            about=row["about"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"not a record of davylamp: {error}") from None
    if digest({"verb": record.verb, "name": record.name, "inputs": record.inputs}) != record.id:
        raise InputError(f"record {record.id[:8]}: its id does not fit its inputs, so the file was changed by hand")
    return record


def _pair(value: Any) -> tuple[float, ...] | None:
    return None if value is None else tuple(value)


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or leave the old one. A lone surrogate (broken model output) becomes its escape."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(text.encode("utf-8", "backslashreplace"))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save(folder: Path, record: Record) -> None:
    write_atomic(
        folder / "record.json", json.dumps(to_json(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


def load(folder: Path) -> Record:
    try:
        return from_json(json.loads((folder / "record.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"no record.json in {folder}") from None
    except ValueError as error:
        raise InputError(f"{folder / 'record.json'} is not JSON: {error}") from None


def folder_for(runs: Path, record: Record) -> Path:
    """The folder of this record: the one that an earlier start of the same run made, or a new one with today's date."""
    name = "".join(c if c.isalnum() or c in "_." else "_" for c in record.name)[:60]
    tail = f"-{record.verb}-{name}-{record.id[:8]}"
    for folder in sorted(runs.glob(f"*{tail}")):
        if (folder / "record.json").is_file() and load(folder).id == record.id:
            return folder
    folder = runs / f"{datetime.now(UTC):%Y-%m-%d}{tail}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}. Choose another place with --runs") from None
    return folder


def keep(runs: Path, record: Record) -> Path:
    """Save a record in its folder under `runs`, and say where that is."""
    folder = folder_for(runs, record)
    save(folder, record)
    return folder


def told_apart(records: Sequence[Record]) -> list[str]:
    """What each of some records was given that not all of them were given: options of the suite, judge, settings, seed, epochs.

    Where that is nothing, or long, the first eight digits of the record's id.

    >>> one, two = (new_record("eval", "x", {"suite": {"options": {"language": name, "n": 3}}}) for name in "AB")
    >>> told_apart([one, two])
    ['language=A', 'language=B']
    """
    found = [_given(record.inputs) for record in records]
    names = [
        name
        for name in dict.fromkeys(name for own in found for name in own)
        if len({own.get(name) for own in found}) > 1
    ]
    words = [", ".join(f"{name}={own[name]}" for name in names if name in own) for own in found]
    clear = len(set(words)) == len(words) and all(0 < len(word) <= 60 for word in words)
    return words if clear else [record.id[:8] for record in records]


def _given(inputs: Mapping[str, Any]) -> dict[str, str]:
    def part(*path: str) -> Mapping[str, Any]:
        here: Any = inputs
        for name in path:
            here = here.get(name) if isinstance(here, Mapping) else None
        return here if isinstance(here, Mapping) else {}

    alone = {name: inputs[name] for name in ("seed", "epochs") if name in inputs}
    judge = {"judge": part("judge")["name"]} if "name" in part("judge") else {}
    given = {**part("suite", "options"), **part("settings"), **judge, **alone}
    return {name: str(value) for name, value in given.items()}


def walk(runs: Path) -> Iterator[tuple[Path, Record]]:
    """All records in a runs folder, oldest first by folder name; folders that hold none are passed over."""
    for path in sorted(runs.glob("*/record.json")):
        yield path.parent, load(path.parent)


def find_run(runs: Path, name: str) -> Path:
    """A run by folder, by the start of its id (4 characters or more), or `last`."""
    if (Path(name) / "record.json").is_file():
        return Path(name)
    if (runs / name / "record.json").is_file():
        return runs / name
    if name == "last":
        paths = sorted(runs.glob("*/record.json"), key=lambda path: path.stat().st_mtime)
        if paths:
            return paths[-1].parent
        raise InputError(f"no runs in {runs} yet")
    found = [folder for folder, record in walk(runs) if len(name) >= 4 and record.id.startswith(name)]
    if len(found) == 1:
        return found[0]
    what = "no run" if not found else f"{len(found)} runs"
    raise InputError(f"{what} named {name!r} in {runs}. Give a folder, the first characters of an id, or last")
