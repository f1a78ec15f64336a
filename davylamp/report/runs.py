"""The run folders of a report: loaded, named apart, and how to run each of them again."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davylamp.core.errors import DavylampError
from davylamp.core.nouns import Record
from davylamp.core.record import load, told_apart
from davylamp.report import plots, worst

SUITE, TARGET, JUDGE = "suite", "target", "judge"
ABOUT_ELSEWHERE = ("command", "notes", "confusion", "judge_error", "created", "continued", "figures")
LINEAGE_DEPTH, INPUTS_LIMIT = 12, 200_000


@dataclass(slots=True)
class Run:
    """A run folder as the report uses it. label: what tells it apart from the others of its suite."""

    folder: Path
    record: Record
    label: str = ""
    rows: worst.Picked = field(default_factory=worst.Picked)

    def part(self, name: str) -> Mapping[str, Any]:
        value = self.record.inputs.get(name)
        return value if isinstance(value, Mapping) else {}

    def name(self, part: str) -> str:
        return str(self.part(part).get("name", ""))

    @property
    def suite(self) -> str:
        verb, name = self.record.verb, self.record.name
        return self.name(SUITE) or (name if name == verb else f"{verb} {name}")

    @property
    def title(self) -> str:
        return f"{self.suite} on {self.label}" if self.name(TARGET) else self.suite


def gather(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders; a `check` stands for its runs. Labels differ within a suite."""
    runs = [Run(path, load(path)) for folder in folders for path in _members(folder)]
    for run in runs:
        run.label = run.name(TARGET) or run.record.name
    seen = Counter((run.suite, run.label) for run in runs)
    for (suite, label), count in seen.items():
        if count > 1:
            alike = [run for run in runs if (run.suite, run.label) == (suite, label)]
            for run, words in zip(alike, told_apart([run.record for run in alike]), strict=True):
                run.label += f" · {words}"
    return runs


def _members(folder: Path) -> list[Path]:
    """The folder itself; for a `check`, the folders beside it that hold its runs, where they are all there."""
    record = load(folder)
    if record.verb != "check":
        return [folder]
    found = [beside(folder, parent) for parent in record.parents]
    return [path for path in found if path] if found and all(found) else [folder]


def beside(folder: Path, run_id: str) -> Path | None:
    """The folder of another record in the same runs folder; None where it is not, or cannot be read."""
    if not re.fullmatch("[0-9a-f]{64}", run_id):
        return None
    for path in sorted(folder.absolute().parent.glob(f"*-{run_id[:8]}")):
        try:
            if load(path).id == run_id:
                return path
        except DavylampError:  # a folder beside the run is not the reader's concern
            continue
    return None


def lineage(folder: Path, record: Record, depth: int = LINEAGE_DEPTH) -> list[dict[str, Any]]:
    """What the record came from, and what that came from: a tree of id, name, status and its own parents."""
    out: list[dict[str, Any]] = []
    for parent in record.parents:
        found = beside(folder, parent) if depth else None
        if found is None:
            out.append({"id": parent, "name": "not in this runs folder", "status": "", "parents": []})
            continue
        other = load(found)
        out.append(
            {
                "id": parent,
                "name": f"{other.verb} {other.name}",
                "status": other.status,
                "parents": lineage(found, other, depth - 1),
            }
        )
    return out


def provenance(run: Run) -> dict[str, Any]:
    """What to know to run it again and to trust that it is the same."""
    record = run.record
    command = [str(word) for word in record.about.get("command") or ()]
    versions: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for name, value in record.about.items():
        if name not in ABOUT_ELSEWHERE:
            plain = isinstance(value, str | int | float) and len(str(value)) <= 200
            (versions if plain else other)[name] = value
    return {
        "title": run.title,
        "id": record.id,
        "status": record.status,
        "folder": run.folder.absolute().name,
        "created": str(record.about.get("created") or ""),
        "parents": lineage(run.folder, record),
        "command": _masked(shlex.join(["davylamp", *command])) if command else "",
        "versions": {name: _masked(str(value)) for name, value in versions.items()},
        "counts": ", ".join(f"{value:,} {name}" for name, value in record.counts.items()),
        "cost": ", ".join(f"{value:,} {name}" for name, value in record.cost.items()),
        "inputs": plots.clip(_masked(plots.pretty(record.inputs)), INPUTS_LIMIT),
        "other": plots.clip(_masked(plots.pretty(other)), INPUTS_LIMIT) if other else None,
        "hashes": hashes(record.inputs),
    }


def hashes(inputs: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Every SHA-256 in a record's inputs, by its path.

    >>> hashes({"suite": {"cases": "ab" * 32, "version": 1}})["suite.cases"][:4]
    'abab'
    """
    out: dict[str, str] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            out |= hashes(value, f"{path}{name}.")
        elif isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
            out[f"{path}{name}"] = value
    return out


def _masked(text: str) -> str:
    """Without passwords in addresses: a report is made to be sent.

    >>> _masked("--target openai/m@http://me:secret@host/v1")
    '--target openai/m@http://…@host/v1'
    """
    return re.sub(r"://[^/@\s\"']+@", "://…@", text)
