"""The safety case as a record, as figures of a report, and as lines on a terminal. What is decided stands in `case.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp import coverage
from davylamp.case import FAIL, MISSING, PASS, STALE, WAIVED, Case, Model, build
from davylamp.case_rules import requirements
from davylamp.core.nouns import Estimate, Record
from davylamp.core.record import keep, new_record
from davylamp.core.rows import digest
from davylamp.report.runs import gather


def run_case(
    folders: Sequence[Path],
    *,
    runs: Path = Path("runs"),
    model: str = "",
    wanted: Path | None = None,
    waived: Path | None = None,
    product: str = "chat",
    command: Sequence[str] = (),
) -> tuple[Path, Record, Case]:
    """Build the case and leave it as a record with its claims and figures, in a run folder."""
    case = build(folders, runs=runs, model=model, wanted=wanted, waived=waived, product=product)
    members = [run.record.id for run in gather(folders)]
    subject = case.line[0]
    record = new_record(
        "case",
        subject.name,
        {
            "model": {"name": subject.name, "sha256": subject.sha256},
            "runs": sorted(members),
            "requirements": digest(requirements(wanted, product)),
            "answers": digest([[a.requirement, a.verdict, a.why] for a in case.answers]),
        },
        parents=members,
        command=list(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=case.verdict,
        figures=[*_figures(case), *coverage.figures(coverage.cover(folders))[:2]],
        notes=[
            f"Verdict: {case.verdict}. A case says what was shown for these weights and these requirements, and what was not.",
        ],
    )
    decided = [answer for answer in case.answers if answer.claim is not None and answer.estimate is not None]
    rest = [answer for answer in case.answers if answer.claim is None]
    claims: list[dict[str, Any]] = [_claim(a.claim.text, a.verdict, a.estimate) for a in decided if a.claim]
    claims += [_claim(f"{a.title}: {a.verdict}", a.verdict, None) for a in rest]
    record = replace(
        record,
        status="finished",
        claims=tuple(claims),
        estimates=tuple(replace(a.estimate, arm=a.claim.arm) for a in decided if a.estimate and a.claim),
    )
    folder = keep(runs, record)
    return folder, record, case


def _claim(words: str, verdict: str, estimate: Estimate | None) -> dict[str, Any]:
    held = {PASS: True, FAIL: False}.get(verdict)
    numbers = estimate.json() if estimate else {}
    return {
        "text": words,
        "held": held,
        "control": False,
        **{k: numbers.get(k) for k in ("value", "low", "high", "n", "unscored", "unit", "method")},
    }


def _figures(case: Case) -> list[dict[str, Any]]:
    order = {FAIL: 0, MISSING: 1, STALE: 2, WAIVED: 3, PASS: 4}
    return [
        {
            "kind": "table",
            "title": "What the model owes, and how it stands",
            "columns": ["stage", "requirement", "verdict", "why", "run"],
            "rows": [[a.stage, a.title, a.verdict, a.why, a.run[:8]] for a in case.answers],
            "note": "missing: no run decides it. stale: decided on weights that have changed since.",
        },
        {
            "kind": "table",
            "title": "The line of models",
            "columns": ["model", "weights", "made by", "from"],
            "rows": [
                [
                    one.name,
                    one.sha256[:12],
                    _maker(one),
                    ", ".join(parent[:12] for parent in one.parents),
                ]
                for one in case.line
            ],
        },
        {
            "kind": "table",
            "title": "What each weight change did",
            "columns": ["suite", "number", *(one.name for one in reversed(case.line))],
            "rows": _regressions(case),
            "note": "Oldest model first. A blank was not measured on that model in these runs.",
        },
        {
            "kind": "table",
            "title": "Gaps",
            "columns": ["verdict", "requirement", "why"],
            "rows": [[a.verdict, a.title, a.why] for a in sorted(case.answers, key=lambda a: order[a.verdict]) if a.verdict != PASS],
        },
    ]  # fmt: skip


def _maker(model: Model) -> str:
    record = model.made_by.record if model.made_by else None
    return f"{record.verb} {record.name} ({record.id[:8]})" if record else "not made here"


def _regressions(case: Case) -> list[list[Any]]:
    """One row a suite and number, a column a model of the line, oldest first."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for one in case.line:
        for run in case.measured.get(one.sha256, ()):
            for estimate in run.record.estimates:
                if estimate.category is None and estimate.arm is None:
                    cells.setdefault((run.suite, estimate.name), {}).setdefault(one.sha256, estimate.json())
    return [[*key, *(row.get(one.sha256) for one in reversed(case.line))] for key, row in sorted(cells.items())]


def text(case: Case) -> str:
    """The case for a terminal: the line of models, then each requirement with its verdict and reason."""
    out = [f"{case.line[0].name}: {case.verdict.upper()}", "  " + " <- ".join(one.name for one in case.line), ""]
    stage = ""
    for answer in case.answers:
        if answer.stage != stage:
            stage = answer.stage
            out.append(stage)
        out.append(f"  {answer.verdict:8} {answer.title}: {answer.why}")
    return "\n".join(out)
