"""One evaluation from end to end: a suite, a target and a judge become a run folder with rows and a record."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.core.errors import DavylampError, InputError, TargetError
from davylamp.core.judges import LoadedJudge, load_judge, split_spec
from davylamp.core.nouns import Case, Message, Metric, Record, Suite, Target
from davylamp.core.record import folder_for, keep, load, new_record, save
from davylamp.core.registry import find
from davylamp.core.rows import CaseFile, RowLog, canonical, conversation, digest, read_run
from davylamp.core.run import Limits, Progress, collect, progress_on_stderr
from davylamp.core.tally import Tally, metric_from, metric_json

#: What a rows file without a suite is scored by, from what its judge measures.
PLAIN_METRICS = {
    "complied": Metric("compliance_rate"),
    "refused": Metric("refusal_rate"),
    "unsafe": Metric("unsafe_rate"),
    "correct": Metric("accuracy", higher_is_better=True),
    "safety": Metric("safety_score", higher_is_better=True),
}
#: Judges of these stand in for each other: to comply with a harmful request is unsafe.
ALIKE = frozenset({"complied", "unsafe"})


@dataclass(frozen=True, slots=True)
class LoadedSuite:
    """A suite and the identity that records name: name, version, options, hash of its cases, metrics."""

    suite: Suite
    identity: Mapping[str, Any]
    total: int


def load_suite(name: str, options: Mapping[str, Any] | None = None, *, limit: int | None = None) -> LoadedSuite:
    """A suite by name, or a `.jsonl` file of rows. Every row is read and checked here, before anything is asked.

    limit: take the first so many cases. Raises InputError for bad rows (with line numbers) and unknown options.
    """
    if name.endswith(".jsonl"):
        if options:
            raise InputError(f"a rows file takes no options, got {', '.join(options)}")
        cases = CaseFile(name)
        first = next(iter(cases))
        suite = Suite(
            name=cases.path.stem, cases=cases, judge="refusal" if first.answer is None else "includes", metrics=()
        )
        identity: dict[str, Any] = {"name": suite.name, "version": 1, "options": {}}
    else:
        entry = find("suite", name)
        given = entry.options(options or {})
        suite = entry.load()(**given)
        identity = {"name": entry.name, "version": entry.version, "options": given}
    if limit is not None:
        if limit < 1:
            raise InputError(f"limit must be 1 or more, got {limit}")
        suite = replace(suite, cases=_First(suite.cases, limit))
    state, total = hashlib.sha256(), 0
    for case in suite.cases:
        state.update(canonical(case.json()).encode("utf-8", "backslashreplace") + b"\n")
        total += 1
    if total == 0:
        raise InputError(f"suite {suite.name} has no cases with these options")
    return LoadedSuite(suite, {**identity, "cases": state.hexdigest(), "limit": limit}, total)


class _First:
    """The first `limit` cases, as often as they are walked."""

    def __init__(self, cases: Iterable[Case], limit: int):
        self.cases, self.limit = cases, limit

    def __iter__(self) -> Iterator[Case]:
        return itertools.islice(iter(self.cases), self.limit)


def metrics_of(suite: Suite, judge: LoadedJudge) -> tuple[Metric, ...]:
    """The suite's metrics, where the judge measures what they are made for. Raises InputError where it does not."""
    if not suite.metrics:
        return (PLAIN_METRICS.get(judge.measures, Metric(judge.measures)),)
    own = find(("judge", "guard"), split_spec(suite.judge)[0])
    return _metrics_for(suite.metrics, own.measures, judge, suite.name)


def _metrics_for(metrics: tuple[Metric, ...], wanted: str, judge: LoadedJudge, suite: str) -> tuple[Metric, ...]:
    if judge.measures == wanted or {judge.measures, wanted} <= ALIKE:
        return metrics
    if (
        judge.measures == "safety" and wanted in ALIKE
    ):  # three levels: not 1 - unsafe rate, so it gets a name of its own
        return (replace(PLAIN_METRICS["safety"], by=metrics[0].by),)
    raise InputError(f"{suite} is scored by a judge that measures {wanted}; {judge.name} measures {judge.measures}")


async def evaluate(
    loaded: LoadedSuite,
    target: Target,
    judge: LoadedJudge,
    *,
    runs: Path,
    seed: int = 0,
    epochs: int = 1,
    settings: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    quiet: bool = False,
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Run (or go on with) the evaluation and return its folder and record.

    Whatever ends it early (budget, target down, full disk, Ctrl-C), the record is written first with status `incomplete` or
    `interrupted`; the same call goes on from there.
    """
    suite, limits = loaded.suite, limits or Limits()
    asked = {**suite.settings, **(settings or {})}
    metrics = metrics_of(suite, judge)
    if epochs < 1:
        raise InputError(f"epochs must be 1 or more, got {epochs}")
    inputs = {
        "suite": {**loaded.identity, "metrics": [metric_json(metric) for metric in metrics]},
        "target": dict(target.identity),
        "judge": dict(judge.identity),
        "settings": asked,
        "seed": seed,
        "epochs": epochs,
    }
    record = new_record("eval", suite.name, inputs, command=list(command), created=_now(), notes=list(suite.notes))
    folder = folder_for(runs, record)
    log = RowLog(folder / "rows.jsonl")
    started, problem = time.monotonic(), None
    progress = Progress(total=loaded.total * epochs)
    try:
        record = _continued(folder, record)
        save(folder, record)
        try:
            async with progress_on_stderr(progress, f"{suite.name} {target.name}", quiet=quiet):
                await collect(
                    suite.cases,
                    target,
                    judge,
                    log,
                    seed=seed,
                    epochs=epochs,
                    settings=asked,
                    play=suite.play,
                    limits=limits,
                    progress=progress,
                )
        except (DavylampError, KeyboardInterrupt) as stopped:
            problem = stopped
        record = finish(
            folder,
            record,
            metrics,
            epochs=epochs,
            runs=runs,
            expected=loaded.total * epochs,
            interrupted=isinstance(problem, KeyboardInterrupt),
            cost={"calls": progress.calls, "tokens": progress.tokens, "seconds": round(time.monotonic() - started, 3)},
        )
    finally:
        log.close()
    if problem is not None:
        raise problem
    return folder, record


def finish(
    folder: Path,
    record: Record,
    metrics: Sequence[Metric],
    *,
    epochs: int,
    runs: Path,
    expected: int | None = None,
    interrupted: bool = False,
    cost: Mapping[str, float] | None = None,
) -> Record:
    """Count the rows of the folder, set estimates, counts, cost and status, and write the record."""
    tally = Tally(metrics, epochs=epochs)
    for row in read_run(folder / "rows.jsonl"):
        tally.add(row)
    error = judge_error(runs, record.inputs["judge"])
    spent = {name: round(record.cost.get(name, 0) + value, 3) for name, value in (cost or {}).items()}
    missing = 0 if expected is None else max(0, expected - tally.counts["rows"])
    whole = not interrupted and not missing and not tally.counts["failed"]
    record = replace(
        record,
        estimates=tally.estimates(seed=int(record.id[:8], 16), error=error and error["counts"]),
        counts={**tally.counts, "missing": missing},
        cost=spent or record.cost,
        status="interrupted" if interrupted else "finished" if whole else "incomplete",
        about={**record.about, **({"judge_error": error} if error else {})},
    )
    save(folder, record)
    return record


def _continued(folder: Path, record: Record) -> Record:
    """Keep what an earlier start of the same run has spent and when it began."""
    if not (folder / "record.json").is_file():
        return record
    earlier = load(folder)
    return replace(
        record, cost=earlier.cost, about={**record.about, "created": earlier.about.get("created"), "continued": _now()}
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def judge_error(runs: Path, judge: Mapping[str, Any]) -> dict[str, Any] | None:
    """The measured error of exactly this judge: the newest `judge bench` in `runs`, else the one shipped with davylamp, else None."""
    wanted = digest(dict(judge))
    for folder in sorted(runs.glob(f"*-judge-{judge['name']}-*"), reverse=True):
        if (folder / "record.json").is_file():
            record = load(folder)
            if digest(dict(record.inputs["judge"])) == wanted and record.about.get("confusion"):
                return {"from": record.id, "rows": record.inputs["rows"]["name"], "counts": record.about["confusion"]}
    shipped = Path(__file__).parent.parent / "assets" / str(judge["name"]) / "measured.json"
    if shipped.is_file():
        row = json.loads(shipped.read_text(encoding="utf-8"))
        if digest(row["judge"]) == wanted:
            names = ("true_hits", "positives", "true_passes", "negatives")
            return {
                "from": "shipped",
                "rows": "davylamp's own labelled replies",
                "counts": {name: row[name] for name in names},
            }
    return None


async def rejudge(
    folder: Path,
    judge: LoadedJudge,
    *,
    runs: Path,
    limits: Limits | None = None,
    quiet: bool = False,
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Judge the replies of a run again, asking the target nothing. The new record's id is that of an evaluation by this judge."""
    old = load(folder)
    if old.verb != "eval":
        raise InputError(f"{folder.name} is a {old.verb} run: only an eval run can be judged again")
    metrics = tuple(metric_from(row) for row in old.inputs["suite"]["metrics"])
    measured = str(old.inputs["judge"].get("measures", ""))
    if metrics == (PLAIN_METRICS.get(measured, Metric(measured)),):
        metrics = (PLAIN_METRICS.get(judge.measures, Metric(judge.measures)),)
    else:
        metrics = _metrics_for(metrics, measured, judge, old.name)
    suite = {**old.inputs["suite"], "metrics": [metric_json(metric) for metric in metrics]}
    record = new_record(
        "eval",
        old.name,
        {**old.inputs, "suite": suite, "judge": dict(judge.identity)},
        parents=(old.id,),
        command=list(command),
        created=_now(),
        notes=list(old.about.get("notes", ())),
    )
    new = folder_for(runs, record)
    if new.resolve() == folder.resolve():
        raise InputError(f"{folder.name} was judged by exactly this judge already: nothing to do")
    log = RowLog(new / "rows.jsonl")
    try:
        for row in read_run(folder / "rows.jsonl"):  # the replies first, as rows that only lack a verdict
            if row["key"] not in log.state:
                rest = canonical(
                    {**{name: row[name] for name in ("case", "seed", "seconds", "reply")}, "verdict": None}
                )
                log.append(f'{{"key":"{row["key"]}",{rest[1:]}')
        save(new, record)
    finally:
        log.close()
    log = RowLog(new / "rows.jsonl")
    seed, epochs = old.inputs["seed"], old.inputs["epochs"]
    try:
        progress = Progress(total=old.counts["rows"])
        async with progress_on_stderr(progress, f"rejudge {old.name}", quiet=quiet):
            await collect(
                _RowCases(folder / "rows.jsonl", seed),
                _Replay(old.inputs["target"]),
                judge,
                log,
                seed=seed,
                epochs=epochs,
                settings=old.inputs["settings"],
                limits=replace(limits or Limits(), tries=1, give_up=2**31),
                progress=progress,
            )
    finally:
        record = finish(
            new, record, metrics, epochs=epochs, runs=runs, expected=old.counts["rows"] + old.counts.get("missing", 0)
        )
        log.close()
    return new, record


class _RowCases:
    """The cases of a run's rows, each once."""

    def __init__(self, path: Path, seed: int):
        self.path, self.seed = path, seed

    def __iter__(self) -> Iterator[Case]:
        return (conversation({**row, "reply": None})[0] for row in read_run(self.path) if row["seed"] == self.seed)


class _Replay:
    """Stands for the target of an earlier run; all it said is in the rows, so being asked means it gave no reply then."""

    def __init__(self, identity: Mapping[str, Any]):
        self.name, self.identity = str(identity["name"]), identity

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        raise TargetError("no reply in the run that is judged again")


async def bench_judge(spec: str, rows: Path, *, runs: Path, command: Sequence[str] = ()) -> tuple[Path, Record]:
    """Measure a judge on labelled rows: conversations that end in a reply, `answer` 1 or 0 in the judge's own sense.

    Estimates: sensitivity, specificity, accuracy, balanced accuracy's parts, by category; stored for the correction of later rates.
    """
    judge = load_judge(spec)
    cases = CaseFile(rows)
    counts = {"true_hits": 0, "positives": 0, "true_passes": 0, "negatives": 0}
    metrics = (
        Metric("sensitivity", where=(("answer", 1),), higher_is_better=True),
        Metric("specificity", where=(("answer", 0),), flip=True, higher_is_better=True),
        Metric("agreement", higher_is_better=True),
    )
    sums = [Tally((metric,)) for metric in metrics]
    unscored, state = 0, hashlib.sha256()
    try:
        for case in cases:
            state.update(canonical(case.json()).encode("utf-8", "backslashreplace") + b"\n")
            label = label_of(case)
            if case.messages[-1].role != "assistant":
                raise InputError(f"{rows.name}: row {case.id} must end in the assistant's reply that is judged")
            verdict = await judge(case.messages, case)
            hit = None if verdict.value is None else verdict.value >= 0.5
            unscored += hit is None
            if hit is not None:
                counts["positives" if label else "negatives"] += 1
                counts["true_hits" if label else "true_passes"] += hit == bool(label)
            plain = {"id": case.id, "answer": label, "category": case.category, "group": case.group}
            value = None if hit is None else float(hit)
            sums[0].add({"case": plain, "verdict": {"value": value}})
            sums[1].add({"case": plain, "verdict": {"value": value}})
            sums[2].add({"case": plain, "verdict": {"value": None if hit is None else float(hit == bool(label))}})
    finally:
        await judge.close()
    inputs = {"judge": dict(judge.identity), "rows": {"name": rows.stem, "cases": state.hexdigest()}}
    record = new_record("judge", judge.name, inputs, command=list(command), created=_now(), confusion=counts)
    estimates = tuple(estimate for tally in sums for estimate in tally.estimates())
    total = sums[2].counts["rows"]
    record = replace(
        record,
        status="finished",
        estimates=estimates,
        cost={},
        counts={"rows": total, "scored": total - unscored, "unscored": unscored, "failed": 0},
    )
    folder = keep(runs, record)
    return folder, record


def label_of(case: Case) -> int:
    """The 0/1 label in `answer`; true/false and their texts are accepted. Raises InputError on anything else."""
    table = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}
    label = table.get(str(case.answer).lower())
    if label is None:
        raise InputError(f"row {case.id}: a labelled row needs answer 1 or 0, got {case.answer!r}")
    return label


async def close(thing: Any) -> None:
    """Close a target or judge that holds something open."""
    closing = getattr(thing, "close", None)
    if closing is not None:
        result = closing()
        if inspect.isawaitable(result):
            await result
