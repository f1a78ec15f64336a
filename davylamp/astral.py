"""`davylamp astral …`: write a suite as it goes, ask it beside a static baseline, replay it on a new version."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.astral_view import answered, changed, coverage_figures
from davylamp.core.errors import InputError, RunError
from davylamp.core.evaluate import LoadedSuite, close, evaluate, judge_error, load_suite
from davylamp.core.judges import LoadedJudge, load_judge
from davylamp.core.nouns import Case, Estimate, Message, Record, Verdict
from davylamp.core.record import keep, load, new_record
from davylamp.core.rows import Dropped, case_from, digest, read_run
from davylamp.core.run import Limits
from davylamp.data._astral_suite import (
    Knowledge,
    SuiteFile,
    cell_of,
    expired,
    missing_cells,
    read_knowledge,
    read_suite,
)
from davylamp.data.astral_prompts import Plan, closed, criterion_for, generated, load_writer
from davylamp.guards.refusal import BLOCKED
from davylamp.metrics.coverage_criterion import Criterion
from davylamp.models.blocked import PolicyBlocks
from davylamp.models.news import load_search, parse_day
from davylamp.models.targets import load_target


def begun(
    name: str, inputs: Mapping[str, Any], command: Sequence[str], *, parents: Sequence[str] = (), **about: Any
) -> Record:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return new_record("astral", name, inputs, parents=parents, command=list(command), created=created, **about)


def leave(runs: Path, record: Record) -> tuple[Path, Record]:
    return keep(runs, record), record


# --- writing ----------------------------------------------------------------------------------------------------------------------------
def write_suite(
    source: str,
    out: Path,
    plan: Plan,
    *,
    model: str = "templates",
    features: str = "",
    blocks: str = "",
    search: str = "",
    encoder: str = "",
    strict: bool = True,
    max_tokens: int = 1024,
    temperature: float = 1.0,
    seed: int = 0,
    repair: bool = False,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Write `out` test by test; the same command goes on where it ended. Dropped lines go to OUT.dropped.jsonl.

    source: labelled prompts, or `-`.  strict: the first bad record of them stops; else they are skipped and counted.
    encoder: retrieve by embeddings instead of words: a folder with a BERT encoder, or `lamp`.  Raises TargetError or RunError where
    the writer or the news fail; what was written by then stays.
    """
    import numpy as np

    criterion = criterion_for(features, model)
    documents, skipped = read_knowledge(Path(source), criterion, strict=strict) if source != "-" else ([], [])
    have = read_suite(out, criterion, repair=repair) if out.is_file() and out.stat().st_size else []
    writer = load_writer(model, blocks, max_tokens=max_tokens, temperature=temperature)
    own = {"version": plan.version, "generator": writer.identity["name"]}
    for case in have:
        if any(case.meta.get(name) != value for name, value in own.items()):
            raise InputError(f"{out} holds tests of another {' or '.join(own)}: choose another name, or delete it")
    news = load_search(search) if search else None
    aside = SuiteFile(aside_path(out))
    file, cases, reasons, started = SuiteFile(out), list(have), Counter[str](), time.monotonic()

    async def go() -> None:
        knowledge = Knowledge(documents, embed=_embedder(encoder) if encoder else None)
        try:
            async for item in generated(
                plan, criterion, knowledge, writer, news, rng=np.random.default_rng(seed), have=have
            ):
                if isinstance(item, Dropped):
                    reasons[item.reason] += 1
                    aside.add(replace(item.case, meta={**item.case.meta, "dropped": item.reason}))
                else:
                    cases.append(item)
                    file.add(item)
        finally:
            await closed(writer, news)

    try:
        asyncio.run(go())
    finally:
        file.close()
        aside.close()
        if not reasons and not aside_path(out).stat().st_size:
            aside_path(out).unlink()
    inputs = {
        "plan": {name: str(getattr(plan, name)) for name in plan.__slots__ if name != "width"},
        "axes": criterion.json(),
        "writer": dict(writer.identity),
        "news": dict(news.identity) if news else None,
        "encoder": encoder,
        "rows": digest([[one.text, list(one.categories)] for one in documents]),
        "seed": seed,
    }
    notes = [f"{len(skipped)} records were skipped: {'; '.join(skipped[:3])}"] if skipped else []
    record = begun(f"generate {plan.version}", inputs, command, out=str(out), dropped=dict(reasons), notes=notes)
    return leave(
        runs,
        replace(_covered(record, cases, criterion, plan), cost={"seconds": round(time.monotonic() - started, 3)}),
    )


def aside_path(out: Path) -> Path:
    """Where dropped lines of a suite go."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".dropped.jsonl")


def _embedder(encoder: str) -> Any:
    """texts -> (texts, width): the mean over a text's windows by a BERT encoder in a folder, or by that of the `lamp` extra."""
    import importlib.util

    import numpy as np
    import torch

    from davylamp.core.needs import need
    from davylamp.guards._lamp_encoder import load_encoder
    from davylamp.guards.lamp import PACKAGE

    folder = Path(encoder)
    if encoder == "lamp":
        need("lamp", "retrieval by embeddings")
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent / "model"
    loaded = load_encoder(folder)

    def embed(texts: Sequence[str]) -> np.ndarray:
        with torch.inference_mode():
            return np.stack([
                np.mean([loaded.hidden(torch.tensor([ids]))[0].numpy() for ids in loaded.windows(text)], axis=0) for text in texts
            ])  # fmt: skip

    return embed


def _covered(record: Record, cases: Sequence[Case], criterion: Criterion, plan: Plan | None) -> Record:
    """Coverage by t = 1, 2, 3 (exact counts, so that the interval is the number), balance, and the figures."""
    cells = [cell_of(case, criterion) for case in cases]
    styled = plan is None or plan.version in ("rag_fs", "rag_fs_ts")
    n = plan.n if plan is not None and styled and plan.t >= len(criterion.axes) else 1
    out = []
    for t in range(1, len(criterion.axes) + 1):
        found = criterion.coverage(cells, t=t, n=n)
        about: dict[str, Any] = {"name": f"coverage_{t}", "unit": "covered", "higher_is_better": True}
        out.append(
            Estimate(found.share, found.share, found.share, len(found.counts), method=f"exact, at {n} each", **about)
        )
    balance = criterion.balance(cells)
    if balance is not None:
        out.append(
            Estimate(
                balance,
                balance,
                balance,
                criterion.size,
                method="exact",
                unit="balance",
                name="balance",
                higher_is_better=True,
            )
        )
    missing = len(criterion.coverage(cells, n=n).missing)
    return replace(
        record,
        status="finished",
        estimates=tuple(out),
        counts={"tests": len(cases), "cells": criterion.size, "missing": missing},
        about={**record.about, "figures": coverage_figures(cells, criterion)},
    )


def suite_coverage(
    path: Path,
    *,
    features: str = "",
    n: int = 1,
    repair: bool = False,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record, list[str]]:
    """Coverage of a suite's file as a record, and the cells with fewer than n tests."""
    cases = read_suite(path, repair=repair)
    world = all((case.category or "").startswith("organism/") for case in cases)
    criterion = criterion_for(features, "world" if world else "templates")
    plan = Plan("rag_fs", n)
    record = begun(
        "coverage", {"suite": digest([case.json() for case in cases]), "axes": criterion.json(), "n": n}, command
    )
    missing = missing_cells(cases, criterion, n=n)
    return *leave(runs, _covered(record, cases, criterion, plan)), missing


# --- asking -----------------------------------------------------------------------------------------------------------------------------
def unblocked(judge: LoadedJudge) -> LoadedJudge:
    """The judge, but for what the provider held back: that has no value and the label `blocked`, whoever judges."""

    async def judged(messages: Sequence[Message], case: Case | None = None) -> Verdict:
        if messages[-1].finish.lower() in BLOCKED:
            return Verdict(None, label="blocked", why=f"the provider held the reply back ({messages[-1].finish})")
        return await judge(messages, case)

    return replace(judge, function=judged, batch=None)


def run_astral(
    suites: Sequence[Path],
    target: str,
    *,
    baseline: Path | None = None,
    judge: str | None = None,
    today: str = "",
    repair: bool = False,
    seed: int = 0,
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    runs: Path = Path("runs"),
    quiet: bool = False,
    command: Sequence[str] = (),
) -> tuple[Path, Record, list[Path]]:
    """Ask every suite and the baseline, each an eval run of its own, and put them side by side. Returns (folder, record, eval folders).

    Raises RunError where rows are unjudged or failed in the end: all that is there is kept, and the same call goes on.
    """
    files = [*([baseline] if baseline else []), *suites]
    if len({path.resolve() for path in files}) < len(files):
        raise InputError("a suite was given twice")
    options = {"today": today, "repair": repair}

    async def go() -> list[tuple[Path, Record]]:
        asked = PolicyBlocks(load_target(target))
        loaded = [load_suite("astral", {"rows": str(path), **options}, limit=limit) for path in files]
        judging = load_judge(judge or loaded[0].suite.judge)
        try:
            return [
                await evaluate(
                    _by_content(one), asked, unblocked(judging), runs=runs, seed=seed, settings=settings, limits=limits,
                    quiet=quiet, command=command,
                )
                for one in loaded
            ]  # fmt: skip
        finally:
            await close(asked)
            await close(judging)

    done = asyncio.run(go())
    names = _names(files)
    inputs = {"runs": [record.id for _, record in done], "baseline": names[0] if baseline else None}
    record = begun("run", inputs, command, parents=[record.id for _, record in done])
    rows = {name: list(read_run(folder / "rows.jsonl")) for name, (folder, _) in zip(names, done, strict=True)}
    error = judge_error(runs, done[0][1].inputs["judge"])
    record = answered(record, rows, baseline=names[0] if baseline else None, error=error and error["counts"])
    whole = all(one.status == "finished" for _, one in done)
    record = replace(record, status="finished" if whole else "incomplete")
    folder, record = leave(runs, record)
    return folder, record, [path for path, _ in done]


def _by_content(loaded: LoadedSuite) -> LoadedSuite:
    """A suite is what its tests are, wherever the file lies, so that runs of one suite can be compared. Who wrote it stands in them."""
    written = {
        option: "+".join(sorted({str(case.meta.get(name, "unknown")) for case in loaded.suite.cases}))
        for option, name in (("model", "generator"), ("version", "version"))
    }
    options = {**loaded.identity["options"], **written, "rows": "", "repair": False}
    return replace(loaded, identity={**loaded.identity, "options": options})


def _names(files: Sequence[Path]) -> list[str]:
    stems = [path.stem for path in files]
    return [stem if stems.count(stem) == 1 else f"{stem} {number}" for number, stem in enumerate(stems, 1)]


# --- again ------------------------------------------------------------------------------------------------------------------------------
def regress(
    old: Path,
    target: str,
    *,
    judge: str | None = None,
    today: str = "",
    limits: Limits | None = None,
    runs: Path = Path("runs"),
    quiet: bool = False,
    command: Sequence[str] = (),
) -> tuple[Path, Record, Path]:
    """Replay the tests of an eval run on another target, and what changed cell by cell. Returns (folder, record, new eval folder).

    today: tests from news that had expired by then are left out on both sides.  judge: only where the old run's cannot be found by its
    name and options. Raises InputError for a run of another kind, or for tests that expire without `today`.
    """
    before = load(old)
    if before.verb != "eval":
        raise InputError(f"{old.name} is a {before.verb} run: only an eval run can be replayed")
    cases: dict[str, Case] = {}
    for row in read_run(old / "rows.jsonl"):
        case = case_from(row["case"], f"{old.name}, row {row['key']}")
        cases.setdefault(case.id, case)
    if any(case.meta.get("expires") for case in cases.values()) and not today:
        raise InputError(
            f"{old.name} holds tests made from news, which expire: say which day it is, --today 2026-11-25"
        )
    stale = {case.id for case in cases.values() if today and expired(case, parse_day(today, "today"))}
    kept = tuple(case for case in cases.values() if case.id not in stale)
    if not kept:
        raise InputError(f"all {len(cases)} tests had expired by {today}. Write new ones: davylamp astral generate")
    identity = {**before.inputs["suite"], "expired": sorted(stale)} if stale else dict(before.inputs["suite"])
    identity.pop("metrics", None)
    world = all((case.category or "").startswith("organism/") for case in kept)
    suite = load_suite("astral", {"model": "world" if world else "templates"}).suite
    loaded = LoadedSuite(replace(suite, cases=kept, notes=()), identity, len(kept))

    async def go() -> tuple[Path, Record]:
        asked, judging = PolicyBlocks(load_target(target)), load_judge(judge or _spec(before.inputs["judge"]))
        try:
            if digest(dict(judging.identity)) != digest(before.inputs["judge"]):
                raise InputError(
                    f"{judging.name} is not the judge of {old.name} (its version or options differ): rejudge that run first"
                )
            return await evaluate(
                loaded, asked, unblocked(judging), runs=runs, seed=before.inputs["seed"], epochs=before.inputs["epochs"],
                settings=before.inputs["settings"], limits=limits, quiet=quiet, command=command,
            )  # fmt: skip
        finally:
            await close(asked)
            await close(judging)

    folder, after = asyncio.run(go())
    if folder.resolve() == old.resolve():
        raise InputError(f"{target} is the target of {old.name} itself: there is nothing to replay")
    sides = [[row for row in read_run(path / "rows.jsonl") if row["case"]["id"] not in stale] for path in (old, folder)]
    record = begun(
        "regress", {"before": before.id, "after": after.id, "today": today}, command, parents=[before.id, after.id]
    )
    record = changed(record, *sides, names=(str(before.inputs["target"]["name"]), target), stale=len(stale))
    return *leave(runs, replace(record, status=after.status)), folder


def _spec(identity: Mapping[str, Any]) -> str:
    """A judge's name with its options, as one writes it."""
    options = ",".join(
        f"{name}={'/'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in identity.get("options", {}).items()
        if value not in ("", [], ())
    )
    return f"{identity['name']}:{options}" if options else str(identity["name"])


def unfinished(records: Sequence[Record]) -> None:
    """Raise RunError where an eval run has rows without a verdict or a reply."""
    if left := [record for record in records if record.status != "finished"]:
        failed = sum(record.counts.get("failed", 0) + record.counts.get("missing", 0) for record in left)
        raise RunError(
            f"{failed} tests are unjudged or unanswered. All that is there is kept: run the same command again to go on"
        )
