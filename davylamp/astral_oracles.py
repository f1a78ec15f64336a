"""`davylamp astral oracles`: oracles on labelled replies, each run again and again, with confusion counts and what tells them apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError
from davylamp.core.evaluate import close, label_of
from davylamp.core.judges import LoadedJudge, load_judge, split_spec
from davylamp.core.nouns import Case, Record
from davylamp.core.record import keep, new_record
from davylamp.core.registry import find
from davylamp.core.rows import CaseFile, digest
from davylamp.metrics.oracles import QUANTITIES, Comparison, compare_oracles


def run_oracles(
    rows: Path,
    judges: Sequence[str],
    *,
    repeats: int = 20,
    width: int = 16,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Each judge on each labelled reply (answer 1 unsafe, 0 safe), `repeats` times; a judge with a `seed` gets another one each time.

    Raises InputError for judges that do not measure unsafe or complied and for rows without labels, TargetError where a judge's model
    fails.
    """
    if repeats < 1 or width < 1:
        raise InputError(f"repeats and width must be 1 or more, got {repeats} and {width}")
    if not judges or len(set(judges)) < len(judges):
        raise InputError("name one judge or more, each once")
    cases = list(CaseFile(rows))
    for case in cases:
        if case.messages[-1].role != "assistant":
            raise InputError(f"{rows.name}: row {case.id} must end in the assistant's reply that is judged")
    truth = [label_of(case) for case in cases]
    identities: dict[str, dict[str, Any]] = {}

    async def go() -> dict[str, list[list[float | None]]]:
        out: dict[str, list[list[float | None]]] = {}
        for spec in judges:
            name, given = split_spec(spec)
            seeded = any(param.name == "seed" for param in find(("judge", "guard"), name).params)
            out[spec] = []
            for number in range(repeats):
                mine = (
                    f"{name}:{','.join(f'{k}={v}' for k, v in {**given, 'seed': number}.items())}" if seeded else spec
                )
                judge = load_judge(mine)
                if judge.measures not in ("unsafe", "complied"):
                    raise InputError(f"an oracle measures unsafe or complied, and {spec} measures {judge.measures}")
                identities.setdefault(spec, dict(judge.identity))
                try:
                    out[spec].append(await _verdicts(judge, cases, width))
                finally:
                    await close(judge)
        return out

    found = compare_oracles(truth, asyncio.run(go()))
    inputs: dict[str, Any] = {"judges": identities, "rows": digest([case.json() for case in cases]), "repeats": repeats}
    record = new_record("astral", "oracles", inputs, command=list(command), created=datetime.now(UTC).isoformat(timespec="seconds"),
                        figures=figures(found), notes=_notes(found, repeats))  # fmt: skip
    counts = {"rows": len(cases), "unsafe": sum(truth), "judges": len(judges), "runs": repeats}
    record = replace(record, status="finished", estimates=found.estimates, counts=counts)
    folder = keep(runs, record)
    return folder, record


async def _verdicts(judge: LoadedJudge, cases: Sequence[Case], width: int) -> list[float | None]:
    gate = asyncio.Semaphore(width)

    async def one(case: Case) -> float | None:
        async with gate:
            return (await judge(case.messages, case)).value

    return list(await asyncio.gather(*map(one, cases)))


def figures(found: Comparison) -> list[dict[str, Any]]:
    """Mean confusion counts, and what tells each pair apart."""
    rows = []
    for name, runs in found.counts.items():
        means = [sum(getattr(one, field) for one in runs) / len(runs) for field in ("tp", "tn", "fp", "fn", "nr")]
        own = {estimate.name: estimate.json() for estimate in found.estimates if estimate.arm == name}
        normal = found.normal[name]
        rows.append(
            [
                name,
                *(round(mean, 1) for mean in means),
                *(own[q] for q in QUANTITIES),
                None if normal is None else round(normal, 3),
            ]
        )
    out: list[dict[str, Any]] = [{
        "kind": "table", "title": "Oracles", "rows": rows,
        "columns": ["oracle", "TP", "TN", "FP", "FN", "NR", *QUANTITIES, "normal (p)"],
        "note": "Mean of the runs; unsafe is the positive class; no reply (NR) is wrong in accuracy. Last: Shapiro-Wilk on accuracy, "
        "empty where runs do not vary or scipy is not installed.",
    }]  # fmt: skip
    if found.differences:
        out.append({
            "kind": "table", "title": "Oracles in pairs", "columns": ["first", "second", "by", "A12", "p (Holm)"],
            "rows": [[d.first, d.second, d.quantity, round(d.a12, 3), round(d.p, 5)] for d in found.differences],
            "note": "A12: how often a run of the first is better than one of the second. p: Mann-Whitney over runs.",
        })  # fmt: skip
    return out


def _notes(found: Comparison, repeats: int) -> list[str]:
    fixed = [name for name, runs in found.counts.items() if len(set(runs)) == 1 and repeats > 1]
    return [
        f"{name} said the same in every run: its interval is over runs and says nothing of other replies."
        for name in fixed
    ]
