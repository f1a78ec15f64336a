"""`davylamp coverage [RUN...]`: stage of life x threat. What tests it, what defends against it, which of the given runs is evidence.

A query over the registry: a thing's decorator names its stage and threats, and nothing here repeats them. `assets/threats.toml` says
which cells of the map matter at all. A cell that matters and holds nothing is a hole, and the holes come first, ordered.

Sources: stages arXiv:2504.15585; types of attack arXiv:2502.05206; coverage, weak and stale evidence and priorities arXiv:2404.14068
(an idea there; the formula is ours).
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Record
from davylamp.core.record import keep, new_record
from davylamp.core.registry import FOLDERS, STAGES, THREATS, Entry, entries
from davylamp.core.rows import digest
from davylamp.report.cards import by_truth
from davylamp.report.runs import gather

TESTS, DEFENCES = ("suite", "attack", "interp", "study"), ("data", "train", "edit", "guard")
REGISTER = Path(__file__).parent / "assets" / "threats.toml"
NUMBERS = ("severity", "likelihood", "exposure")
HALF_LIFE = {"attack": 90.0}  # days until evidence counts half; attacks age faster than suites
HALF_LIFE_ELSE = 365.0
ROWS_LEAST = 20  # fewer rows than this decide nothing
WEAK = 0.5  # what a weak run weighs beside a sound one
SHORT = {
    "data": "data",
    "pre-training": "pre-train",
    "post-training": "post-train",
    "deployment": "deploy",
    "evaluation": "eval",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """A run that says something about a threat. weak: the reasons why it cannot decide alone.  weight: in [0, 1]."""

    run: str
    name: str
    target: str
    weak: tuple[str, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One stage of one threat. tests, defences: names in the registry.  matters: whether the register lists the stage."""

    stage: str
    threat: str
    matters: bool
    tests: tuple[str, ...] = ()
    defences: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()

    @property
    def state(self) -> str:
        """not applicable, hole, in place (a test or a defence), weak evidence, or evidence."""
        if any(not found.weak for found in self.evidence):
            return "evidence"
        if self.evidence:
            return "weak evidence"
        if self.tests or self.defences:
            return "in place"
        return "hole" if self.matters else "not applicable"


@dataclass(frozen=True, slots=True)
class Threat:
    """A row of the map. covered: 1 - prod(1 - weight) over the things that
    its runs used, in [0, 1].  priority: severity x likelihood x (1 - covered) x
    exposure; span: its lowest and highest value if the three numbers are each off by 0.1."""

    name: str
    about: str
    cells: tuple[Cell, ...]
    covered: float
    numbers: Mapping[str, float]

    @property
    def priority(self) -> float:
        return math.prod(self.numbers.values()) * (1 - self.covered)

    @property
    def span(self) -> tuple[float, float]:
        ends = [math.prod(min(1.0, max(0.0, value + step)) for value in self.numbers.values()) for step in (-0.1, 0.1)]
        return ends[0] * (1 - self.covered), ends[1] * (1 - self.covered)

    @property
    def gaps(self) -> tuple[str, ...]:
        """What is missing, in words."""
        tests, defences = (any(getattr(cell, side) for cell in self.cells) for side in ("tests", "defences"))
        whole = [word for word, there in (("no test", tests), ("no defence", defences)) if not there]
        holes = [f"nothing at {cell.stage}" for cell in self.cells if cell.state == "hole"]
        return tuple(whole + (holes if tests or defences else []))


@dataclass(slots=True)
class Coverage:
    """The map. threats: most urgent first.  unmatched: runs that no thing of the registry stands behind."""

    threats: list[Threat]
    unmatched: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return {
            "threats": [
                {
                    "name": threat.name,
                    "about": threat.about,
                    "covered": round(threat.covered, 4),
                    "priority": round(threat.priority, 4),
                    "priority_span": [round(end, 4) for end in threat.span],
                    **threat.numbers,
                    "gaps": list(threat.gaps),
                    "cells": [
                        {
                            "stage": cell.stage,
                            "state": cell.state,
                            "tests": list(cell.tests),
                            "defences": list(cell.defences),
                            "evidence": [
                                {"run": e.run, "name": e.name, "target": e.target, "weak": list(e.weak), "weight": round(e.weight, 4)}
                                for e in cell.evidence
                            ],
                        }
                        for cell in threat.cells
                    ],
                }
                for threat in self.threats
            ],
            "unmatched": self.unmatched,
        }  # fmt: skip


def register(own: Path | None = None) -> dict[str, dict[str, Any]]:
    """The rows of the register by threat, with a user's own rows over them. Raises InputError for a row that does not fit."""
    rows = tomllib.loads(REGISTER.read_text(encoding="utf-8"))
    if own is not None:
        try:
            given = tomllib.loads(own.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{own}: a register is a TOML file with one table a threat ({error})") from None
        for name, row in given.items():
            if name not in THREATS:
                raise UnknownNameError(f"threat ({own})", name, THREATS)
            if not isinstance(row, Mapping):
                raise InputError(f"{own}: [{name}] must be a table, got {row!r}")
            for key in row:
                if key not in ("about", "stages", *NUMBERS):
                    raise UnknownNameError(f"key of [{name}] ({own})", key, ("about", "stages", *NUMBERS))
            rows[name] = {**rows[name], **row}
    for name, row in rows.items():
        for key in NUMBERS:
            if isinstance(row[key], bool) or not isinstance(row[key], int | float) or not 0 <= row[key] <= 1:
                raise InputError(f"[{name}] {key} must be a number in [0, 1], got {row[key]!r}")
        for stage in row["stages"] if isinstance(row["stages"], list) else [row["stages"]]:
            if stage not in STAGES:
                raise UnknownNameError(f"stage of [{name}]", stage, STAGES)
    return rows


def cover(
    folders: Sequence[Path] = (),
    *,
    own: Path | None = None,
    things: Iterable[Entry] | None = None,
    now: datetime | None = None,
) -> Coverage:
    """The map of all that the registry holds (`things`, default), with the evidence of these run folders.

    now: the time against which a run's age is counted; without it ages are not counted, and equal input gives an equal map.
    """
    rows, known = register(own), list(entries() if things is None else things)
    by_name = {(entry.kind, entry.name): entry for entry in known}
    found: dict[tuple[str, str], list[Evidence]] = {}
    unmatched = []
    for run in gather(folders) if folders else []:
        behind = [
            entry
            for kind in FOLDERS
            if (entry := by_name.get((kind, run.name(kind)))) is not None and kind in (*TESTS, *DEFENCES)
        ]
        if not behind:
            unmatched.append(f"{run.record.verb} {run.record.name} {run.record.id[:8]}")
        for entry in behind:
            evidence = _evidence(run.record, entry, now)
            for threat in entry.threats:
                if evidence not in found.setdefault((entry.stage, threat), []):
                    found[entry.stage, threat].append(evidence)
    threats = []
    for name, row in rows.items():
        cells = tuple(
            Cell(
                stage,
                name,
                stage in row["stages"],
                _names(known, TESTS, stage, name),
                _names(known, DEFENCES, stage, name),
                tuple(found.get((stage, name), ())),
            )
            for stage in STAGES
        )
        best: dict[str, float] = {}  # the same suite on ten targets is one test, not ten
        for evidence in (evidence for cell in cells for evidence in cell.evidence):
            best[evidence.name] = max(best.get(evidence.name, 0.0), evidence.weight)
        covered = 1 - math.prod(1 - weight for weight in best.values())
        threats.append(Threat(name, row["about"], cells, covered, {key: float(row[key]) for key in NUMBERS}))
    return Coverage(sorted(threats, key=lambda threat: (-threat.priority, threat.name)), unmatched)


def _names(known: Iterable[Entry], kinds: Sequence[str], stage: str, threat: str) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in known if e.kind in kinds and e.stage == stage and threat in e.threats))


def _evidence(record: Record, entry: Entry, now: datetime | None) -> Evidence:
    """How far this run carries: whether it is whole, large enough, judged by a judge whose error is known, and fresh."""
    weak = []
    if record.status != "finished":
        weak.append(f"the run is {record.status}")
    shown = [estimate.n for estimate in record.estimates]
    if not shown:
        weak.append("the run measured nothing")
    elif max(shown) < ROWS_LEAST:
        weak.append(f"at most {max(shown)} rows, of {ROWS_LEAST} needed")
    if record.verb in ("eval", "attack") and judge_unknown(record):
        weak.append("its judge's error was not measured")
    freshness, created = 1.0, str(record.about.get("created") or "")
    if now is not None and created:
        age = max(0.0, (now - datetime.fromisoformat(created)).total_seconds() / 86400)
        freshness = 0.5 ** (age / HALF_LIFE.get(entry.kind, HALF_LIFE_ELSE))
        if freshness < 0.5:
            weak.append(f"{age:.0f} days old")
    target = record.inputs.get("target") or record.inputs.get("model") or {}
    weight = freshness * (WEAK if weak else 1.0) if shown else 0.0
    return Evidence(record.id, f"{entry.kind} {entry.name}", str(target.get("name", "")), tuple(weak), weight)


def judge_unknown(record: Record) -> bool:
    """A judge that reads an answer key does not err; another's error must have been measured."""
    judge = record.inputs.get("judge") or {}
    return not by_truth(str(judge.get("name", ""))) and not record.about.get("judge_error")


def run_coverage(
    folders: Sequence[Path],
    *,
    runs: Path = Path("runs"),
    own: Path | None = None,
    now: datetime | None = None,
    command: Sequence[str] = (),
) -> tuple[Path, Record, Coverage]:
    """The map as a record with its figures, in a run folder."""
    found = cover(folders, own=own, now=now or datetime.now(UTC))
    members = [run.record for run in gather(folders)] if folders else []
    record = new_record(
        "coverage",
        "coverage",
        {"runs": sorted(one.id for one in members), "map": digest(found.json())},
        parents=[one.id for one in members],
        command=list(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=figures(found),
        notes=[
            "A cell says that something exists or was run there, not that it is good enough. "
            "Evidence counts for the threats that the thing names.",
            "Severity, likelihood and exposure are judgements, not measurements: read the span of a priority, not its digits.",
        ],
    )
    record = replace(record, status="finished")
    folder = keep(runs, record)
    return folder, record, found


STATES = ("hole", "in place", "weak evidence", "evidence")


def figures(found: Coverage) -> list[dict[str, Any]]:
    """The map as a heat map, the ordered gaps, and what stands in each cell."""
    value = {state: index for index, state in enumerate(STATES)}
    runs = any(cell.evidence for threat in found.threats for cell in threat.cells)
    return [
        {
            "kind": "heatmap",
            "title": "Stage of life x threat",
            "rows": [threat.name for threat in found.threats],
            "columns": list(STAGES),
            "values": [[value.get(cell.state) for cell in threat.cells] for threat in found.threats],
            "note": "0 hole: it matters here and there is nothing. 1 a test or a defence is in place. 2 a run is weak evidence. "
            "3 a run is evidence. Hatched: does not apply." + ("" if runs else " No runs were given, so nothing is above 1."),
        },
        {
            "kind": "table",
            "title": "What to do first",
            "columns": ["threat", "priority", "span", "covered", "missing"],
            "rows": [
                [t.name, round(t.priority, 3), f"{t.span[0]:.2f} to {t.span[1]:.2f}", round(t.covered, 2), "; ".join(t.gaps) or "nothing"]
                for t in found.threats
            ],
            "note": "Priority = severity x likelihood x (1 - covered) x exposure. The span moves the three numbers by 0.1 each.",
        },
        {
            "kind": "table",
            "title": "What stands where",
            "columns": ["threat", "stage", "tests", "defences", "runs"],
            "rows": [
                [threat.name, cell.stage, ", ".join(cell.tests), ", ".join(cell.defences), _told(cell.evidence)]
                for threat in found.threats
                for cell in threat.cells
                if cell.matters or cell.tests or cell.defences
            ],
        },
    ]  # fmt: skip


def _told(evidence: Sequence[Evidence]) -> str:
    return "; ".join(
        f"{e.name} {e.run[:8]}{f' on {e.target}' if e.target else ''}{f' (weak: {e.weak[0]})' if e.weak else ''}" for e in evidence
    )  # fmt: skip


def text(found: Coverage) -> str:
    """The map for a terminal, most urgent threat first.

    >>> print(text(cover(things=[])).splitlines()[1].split()[:2])
    ['harmful-compliance', 'HOLE']
    """
    width = max(len(threat.name) for threat in found.threats)
    out = [" " * width + "  " + "".join(f"{SHORT[stage]:>12}" for stage in STAGES) + "   priority"]
    for threat in found.threats:
        cells = "".join(f"{_glyph(cell):>12}" for cell in threat.cells)
        out.append(
            f"{threat.name:{width}}  {cells}   {threat.priority:.2f} [{threat.span[0]:.2f}, {threat.span[1]:.2f}]"
        )
    out += [
        "",
        "2T 3D: 2 tests, 3 defences   +1: a run is evidence   +1?: only weak evidence   HOLE: nothing   ·: does not apply",
    ]
    gaps = [(threat.name, threat.gaps) for threat in found.threats if threat.gaps]
    out += ["", "Gaps, most urgent first:"] if gaps else ["", "No gap."]
    out += [f"  {name}: {', '.join(missing)}" for name, missing in gaps]
    out += [f"  counted nowhere, as no named thing stands behind it: {name}" for name in found.unmatched]
    return "\n".join(out)


def _glyph(cell: Cell) -> str:
    if cell.state in ("hole", "not applicable"):
        return "HOLE" if cell.state == "hole" else "·"
    parts = [f"{len(names)}{sign}" for names, sign in ((cell.tests, "T"), (cell.defences, "D")) if names]
    if cell.evidence:
        parts.append(f"+{len(cell.evidence)}{'' if cell.state == 'evidence' else '?'}")
    return " ".join(parts)
