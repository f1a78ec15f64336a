"""`davylamp data | train | edit | interp NAME …`: do one thing of the registry to rows or to a model, and leave a record.

What is written (rows, a model) is written whole or not at all; the record says from what it was made, and points to the records
of what it was made from, where those are known.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Record
from davylamp.core.record import keep, new_record, write_atomic
from davylamp.core.registry import Entry, find
from davylamp.core.rows import CaseFile, Dropped, canonical, write_cases

NO_ROWS = "-"


def run_data(
    name: str,
    source: str,
    out: Path,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Put the rows of `source` (a .jsonl file, or `-` for none) through a @data function into `out`; dropped rows go beside it.

    `OUT.dropped.jsonl` holds each dropped row with its reason in `meta.dropped`. Raises InputError before anything is written.
    """
    entry = find("data", name)
    filled, started = entry.options(options or {}), time.monotonic()
    if out.exists():
        raise InputError(f"{out} exists already: choose another name")
    read = _Hashed(CaseFile(source) if source != NO_ROWS else ())
    reasons: Counter[str] = Counter()
    aside = out.with_name(out.name.removesuffix(".jsonl") + ".dropped.jsonl")
    dropped: list[Case] = []

    def kept() -> Iterator[Case]:
        for item in entry.load()(read, rng=_rng(seed), **filled):
            if isinstance(item, Dropped):
                reasons[item.reason] += 1
                dropped.append(replace(item.case, meta={**item.case.meta, "dropped": item.reason}))
            else:
                yield item

    out.parent.mkdir(parents=True, exist_ok=True)
    wrote = _Hashed(kept())
    written = write_cases(out, wrote)
    if dropped:
        write_cases(aside, dropped)
    inputs = {"data": _identity(entry, filled), "rows": {"name": source, "cases": read.digest()}, "seed": seed}
    return _leave(
        "data",
        entry.name,
        inputs,
        runs=runs,
        command=command,
        seconds=time.monotonic() - started,
        counts={"rows": read.count, "written": written, "dropped": sum(reasons.values())},
        about={"out": str(out), "sha256": _file_hash(out), "cases": wrote.digest(), "dropped": dict(reasons)},
    )


def run_train(
    name: str,
    model: str,
    rows: Path,
    out: Path,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Train a model on rows (each ends in the assistant's reply) into the folder `out`."""
    from davylamp.models.loading import identity, load_pair

    entry = find("train", name)
    filled, started = entry.options(options or {}), time.monotonic()
    function = _loaded(entry, out)
    cases = list(CaseFile(rows))
    loaded, tokenizer = load_pair(model)
    before = identity(model, loaded)
    trained = function(loaded, cases, tokenizer=tokenizer, rng=_rng(seed), **filled)
    inputs = {"train": _identity(entry, filled), "model": before, "rows": _rows_identity(rows, cases), "seed": seed}
    return _leave_model(entry, inputs, (model,), trained, tokenizer, out, runs, command, started, len(cases))


def run_edit(
    name: str,
    model: str,
    others: Sequence[str],
    out: Path,
    *,
    rows: Path | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Change a model's weights without training, folder to folder: streamed, so that a model need not fit into memory."""
    from davylamp.models.loading import identity, locate

    entry = find("edit", name)
    filled, started = entry.options(options or {}), time.monotonic()
    function = _loaded(entry, out)
    cases = list(CaseFile(rows)) if rows is not None else []
    folders = [_local(locate(spec), spec) for spec in (model, *others)]
    inputs = {
        "edit": _identity(entry, filled),
        "model": identity(model),
        "others": [identity(other) for other in others],
        "rows": _rows_identity(rows, cases) if rows is not None else None,
        "seed": seed,
    }
    given: dict[str, Any] = {"out": out, "rng": _rng(seed), **({"rows": cases} if cases else {})}
    if "tokenizer" in inspect.signature(function).parameters:
        from transformers import AutoTokenizer

        given["tokenizer"] = AutoTokenizer.from_pretrained(folders[0])
    function(*folders, **given, **filled)
    return _leave_model(entry, inputs, (model, *others), None, None, out, runs, command, started, len(cases))


def run_interp(
    name: str,
    model: str,
    rows: Path | None,
    *,
    other: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Look inside a model: scores in the run's `scores.json`, estimates and figures in its record and report.

    other: a second model, for the things that compare two.
    """
    from davylamp.models.loading import identity, load_pair

    entry = find("interp", name)
    filled, started = entry.options(options or {}), time.monotonic()
    function = entry.load()
    takes = inspect.signature(function).parameters
    if other is not None and "other" not in takes:
        raise InputError(f"{name} looks into one model: leave --other out")
    cases = list(CaseFile(rows)) if rows is not None else []
    loaded, tokenizer = load_pair(model)
    given: dict[str, Any] = {"tokenizer": tokenizer, "rng": _rng(seed)}
    if other is not None:
        given["other"] = load_pair(other)[0]
    found = dict(function(loaded, cases, **given, **filled))
    estimates, figures, notes = tuple(found.pop("estimates", ())), found.pop("figures", []), found.pop("notes", [])
    inputs = {
        "interp": _identity(entry, filled),
        "model": identity(model, loaded),
        "other": identity(other) if other is not None else None,
        "rows": _rows_identity(rows, cases) if rows is not None else None,
        "seed": seed,
    }
    folder, record = _leave(
        "interp",
        entry.name,
        inputs,
        runs=runs,
        command=command,
        seconds=time.monotonic() - started,
        counts={"rows": len(cases)},
        about={"figures": figures, "notes": notes},
        parents=_parents((model,) if other is None else (model, other)),
        estimates=estimates,
    )
    write_atomic(folder / "scores.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    return folder, record


# --- what they share --------------------------------------------------------------------------------------------------------------------
class _Hashed:
    """Cases that are counted and hashed as they are walked; the hash is of all of them, once."""

    def __init__(self, cases: Iterable[Case]):
        self.cases, self.count, self.state = cases, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[Case]:
        self.count, self.state = 0, hashlib.sha256()
        for case in self.cases:
            self.count += 1
            self.state.update(canonical(case.json()).encode("utf-8", "backslashreplace") + b"\n")
            yield case

    def digest(self) -> str:
        return self.state.hexdigest()


def _rows_identity(path: Path, cases: Sequence[Case]) -> dict[str, Any]:
    hashed = _Hashed(cases)
    for _ in hashed:
        pass
    return {"name": path.name, "cases": hashed.digest()}


def _identity(entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": entry.name, "version": entry.version, "options": dict(options)}


def _rng(seed: int) -> Any:
    from numpy.random import default_rng

    return default_rng(seed)


def _loaded(entry: Entry, out: Path) -> Callable[..., Any]:
    """The function, after the checks that cost nothing."""
    if out.exists():
        raise InputError(f"{out} exists already: choose another folder with --out")
    return entry.load()


def _local(source: str, spec: str) -> Path:
    if not Path(source).is_dir():
        raise InputError(
            f"an edit streams folders, and {spec} is a hub id: download it first (hf download {spec}) and give its folder"
        )
    return Path(source)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parents(specs: Sequence[str]) -> list[str]:
    """The records that the models came from, where davylamp made them."""
    from davylamp.models.loading import lineage

    return [record for spec in specs if (record := lineage(spec).get("record"))]


def _leave_model(
    entry: Entry,
    inputs: Mapping[str, Any],
    specs: Sequence[str],
    model: Any,
    tokenizer: Any,
    out: Path,
    runs: Path,
    command: Sequence[str],
    started: float,
    rows: int,
) -> tuple[Path, Record]:
    """Save the model (an edit has written it already), note the record in its lineage, and leave the record."""
    from davylamp.models.loading import folder_hash, quiet_transformers

    if model is not None:
        part = out.with_name(f".{out.name}.part")
        try:
            with quiet_transformers():
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
            part.replace(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    folder, record = _leave(
        entry.kind,
        entry.name,
        inputs,
        runs=runs,
        command=command,
        seconds=time.monotonic() - started,
        counts={"rows": rows},
        about={"out": str(out), "sha256": folder_hash(out)},
        parents=_parents(specs),
    )
    path = out / "lineage.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_atomic(path, json.dumps({**written, "record": record.id, "inputs": record.inputs}, indent=1) + "\n")
    return folder, record


def _leave(
    verb: str,
    name: str,
    inputs: Mapping[str, Any],
    *,
    runs: Path,
    command: Sequence[str],
    seconds: float,
    counts: Mapping[str, int],
    about: Mapping[str, Any],
    parents: Sequence[str] = (),
    estimates: tuple[Any, ...] = (),
) -> tuple[Path, Record]:
    record = new_record(
        verb,
        name,
        inputs,
        parents=parents,
        command=list(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
    )
    record = replace(record, status="finished", counts=counts, cost={"seconds": round(seconds, 3)}, estimates=estimates)
    folder = keep(runs, record)
    return folder, record
