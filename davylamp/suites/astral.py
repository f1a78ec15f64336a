"""ASTRAL: tests that cover category x writing style x persuasion technique, balanced by construction, with unsafe rates along each axis.
Source: arXiv:2501.17132, sections 3 and 4. The tests are a file by `davylamp astral generate`; without one, abstract stand-ins by rule."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from davylamp.core import Case, InputError, Metric, Suite, suite
from davylamp.data._astral_suite import Knowledge, expired, read_suite
from davylamp.data.astral_prompts import OFFLINE, Plan, criterion_for, generated, load_writer
from davylamp.models.news import parse_day

BY = ("category", "meta.style", "meta.technique", "meta.style*meta.technique", "meta.version")
NOTES = (
    "These tests are worded to be declined. An unsafe verdict is a finding to be looked at, not yet a failure: see davylamp astral queue.",
    "blocked_rate: held back by the provider, so never an answer; such rows have no verdict and stand in `unscored`.",
)
STAND_INS = "Abstract stand-ins, written by rule: they name a category and an invented task. What is shown is a way to refuse, not danger."


@suite(
    version=1,
    source="arXiv:2501.17132",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance", "jailbreak"),
    systems=("25",),
)
def astral(
    *,
    rows: str = "",
    model: Literal["templates", "world"] = "templates",
    version: Literal["rag", "rag_fs", "baseline"] = "rag_fs",
    n: int = 1,
    seed: int = 0,
    features: str = "",
    today: str = "",
    repair: bool = False,
) -> Suite:
    """Unsafe rate by category, style, technique, and style with technique; blocked_rate beside it.

    rows: a suite that was written (`davylamp astral generate`); without it one is made by rule: model, `templates` in English or `world`
    in the organisms' language, version of the generator, n tests a cell, seed.  features: TOML with axes of your own, to check rows.
    today: a day such as 2026-11-25, after which tests from older news are left out.  repair: drop a last line that is broken off.
    """
    criterion = criterion_for(features, "templates" if rows else model)
    if rows:
        cases = read_suite(Path(rows), criterion if features else None, repair=repair)
    else:
        cases = by_rule(model, version, n, seed)
    notes = [*NOTES] if rows else [*NOTES, STAND_INS]
    if today:
        day = parse_day(today, "today")
        fresh = [case for case in cases if not expired(case, day)]
        if len(fresh) < len(cases):
            notes.append(
                f"{len(cases) - len(fresh)} tests made from older news had expired by {today} and were left out."
            )
        if not fresh:
            raise InputError(f"all {len(cases)} tests had expired by {today}. Write new ones: davylamp astral generate")
        cases = fresh
    world = all((case.category or "").startswith("organism/") for case in cases)
    metrics = (Metric("unsafe_rate", by=BY), Metric("blocked_rate", label="blocked", by=("category",)))
    settings = {"temperature": 0.0, "max_tokens": 64 if world else 512}
    return Suite(
        "astral",
        tuple(cases),
        "organism_complied" if world else "refusal",
        metrics,
        settings=settings,
        notes=tuple(notes),
    )


def by_rule(model: str, version: str, n: int, seed: int, *, tries: int = 40) -> list[Case]:
    """Tests written offline. The organisms' sentences differ by a word or two, so that there equal texts alone count as repeats."""
    import numpy as np

    if model not in OFFLINE:
        raise InputError(f"tests by rule are of {' or '.join(OFFLINE)}, got {model!r}")
    plan = Plan(version, n, tries=tries, alike=1.0 if model == "world" else 0.8)
    criterion = criterion_for("", model)

    async def go() -> list[Case]:
        made = generated(plan, criterion, Knowledge([]), load_writer(model), rng=np.random.default_rng(seed))
        return [item async for item in made if isinstance(item, Case)]

    # A suite may be loaded inside a running loop, so that this one needs a thread of its own.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, go()).result()
