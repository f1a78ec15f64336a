"""`davylamp attack` and `davylamp redteam`: attacks on a target, planned, resumable, reported, and written out as rows to ask again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.attacks._campaign import Arm, Campaign, Found, Live, arm_of, findings
from davylamp.campaign_view import attack_results, redteam_results
from davylamp.check import speaks_the_organisms_language
from davylamp.core.errors import DavylampError, InputError
from davylamp.core.evaluate import LoadedSuite, close, load_suite
from davylamp.core.judges import LoadedJudge, load_judge
from davylamp.core.nouns import Case, Message, Metric, Record, Target, Verdict
from davylamp.core.record import folder_for, load, new_record, save
from davylamp.core.registry import find
from davylamp.core.rows import RowLog, canonical, read_run, write_cases
from davylamp.core.run import Limits, collect, progress_on_stderr, row_keys
from davylamp.core.tally import metric_json
from davylamp.models.defended import defend
from davylamp.models.targets import load_target

CONTROL = "repeat"
#: What red-teaming tries when nothing is named: attacks that need no model of their own.
DEFAULT = ("repeat", "best_of_n", "prefix_injection", "refusal_suppression", "role_play", "many_shot", "encoding",
           "instruction_attack", "injection")  # fmt: skip
BY_TRANSLATOR, BY_ATTACKER = ("translate", "code_mix"), ("pair", "tap")
HELPERS = ("attacker", "translator")  # options that name a target, loaded once for a whole run
METRIC = Metric("attack_success_rate")
PLAIN = ("world", "")


@dataclass(frozen=True, slots=True)
class Setup:
    """What both commands begin with: a target (behind defences), the suite's cases, a judge that can tell success."""

    target: Target
    suite: LoadedSuite
    judge: LoadedJudge
    cases: tuple[Case, ...]


def _setup(stack: AsyncExitStack, suite: str, target: str, judge: str | None, defences: Sequence[str], limit: int | None,
           options: Mapping[str, Any] | None = None) -> Setup:  # fmt: skip
    loaded = load_suite(suite, options, limit=limit)
    judging = load_judge(judge or loaded.suite.judge)
    stack.push_async_callback(close, judging)
    if judging.measures not in ("complied", "unsafe"):
        raise InputError(
            f"{loaded.suite.name} is judged by {judging.name}, which measures {judging.measures}: an attack needs complied or unsafe"
        )
    asked: Any = load_target(target)
    stack.push_async_callback(close, asked)
    for spec in defences:
        asked = defend(asked, spec)
    return Setup(asked, loaded, judging, tuple(loaded.suite.cases))


def _arm(stack: AsyncExitStack, name: str, options: Mapping[str, Any]) -> Arm:
    """An attack with its options; a target that it names is loaded here, once, and closed at the end."""
    entry = find("attack", name)
    filled, helpers = entry.options(options), {}
    for helper in HELPERS:
        spec = filled.get(helper)
        if isinstance(spec, str) and spec not in PLAIN and not spec.endswith(".json"):
            helpers[helper] = load_target(spec)
            stack.push_async_callback(close, helpers[helper])
    if "attacker" in filled and not filled["attacker"]:
        raise InputError(f"{name} needs an attacker model: --attacker openai/MODEL@URL or another target's name")
    if "translator" in filled and not filled["translator"]:
        raise InputError(f"{name} needs --translator: a target's name, a .json word list, or world for the organisms")
    return arm_of(entry, options, helpers=helpers)


def run_attack(
    name: str,
    suite: str,
    target: str,
    *,
    budget: int = 10,
    options: Mapping[str, Any] | None = None,
    judge: str | None = None,
    defences: Sequence[str] = (),
    control: bool = True,
    limit: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    runs: Path = Path("runs"),
    quiet: bool = False,
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Attack every case of a suite with one attack, `budget` questions a case, beside plain repetition with as many.

    Writes rows.jsonl, findings.jsonl and the record; the same call goes on with what is missing.
    """

    _at_least_one(budget=budget)

    async def go() -> tuple[Path, Record]:
        async with AsyncExitStack() as stack:
            own = _arm(stack, name, options or {})
            setup = _setup(stack, suite, target, judge, defences, limit)
            arms = [own] + ([_arm(stack, CONTROL, {})] if control and name != CONTROL else [])
            asked = {**setup.suite.suite.settings, **(settings or {})}
            inputs = {"attacks": [dict(arm.identity) for arm in arms], "budget": budget, **_inputs(setup, asked, seed)}
            campaign = Campaign(
                arms,
                setup.cases,
                setup.judge,
                budget=2**62,
                allowance=budget,
                rounds=1,
                stop=False,
                even=True,
                seed=seed,
            )
            record = _begin("attack", own.name, inputs, command)

            async def after(folder: Path, log: RowLog, record: Record, whole: bool) -> Record:
                return attack_results(record, list(read_run(log.path)), own.name, budget=budget, control=len(arms) > 1)

            return await _carry_out(record, campaign, setup, asked, limits, runs, quiet, after)

    return asyncio.run(go())


def run_redteam(
    target: str,
    *,
    suite: str = "",
    attacks: Sequence[str] = (),
    budget: int = 500,
    per_case: int = 8,
    rounds: int = 2,
    judge: str | None = None,
    attacker: str = "",
    translator: str = "",
    defences: Sequence[str] = (),
    transfer: Sequence[str] = (),
    benign: str = "",
    shorten: int = 8,
    limit: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    runs: Path = Path("runs"),
    quiet: bool = False,
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Spend `budget` questions on a target where they find most: a bandit over attacks and categories, then a report.

    defences: each is put before the target, and every finding is asked again.  transfer: the same for other targets.
    benign: a suite of harmless requests, to show what each defence costs.  shorten: questions spent to shorten the prompt of each trick,
    outside the budget (0: none).
    """
    _at_least_one(budget=budget, per_case=per_case, rounds=rounds)
    if shorten < 0:
        raise InputError(f"shorten must be 0 or more, got {shorten}")
    organism = speaks_the_organisms_language(target)
    if not suite and not organism:
        raise InputError("redteam needs requests that the target should refuse: --suite NAME or --suite ROWS.jsonl")
    suite, translator = suite or "organism_hazards", translator or ("world" if organism else "")
    names = tuple(attacks) or (
        *DEFAULT,
        *(BY_TRANSLATOR if translator else ()),
        *(BY_ATTACKER if attacker else ()),
    )

    async def go() -> tuple[Path, Record]:
        async with AsyncExitStack() as stack:
            arms = []
            for name in names:
                known = {param.name for param in find("attack", name).params}
                given = {"attacker": attacker, "translator": translator}
                arms.append(_arm(stack, name, {key: value for key, value in given.items() if key in known and value}))
            setup = _setup(stack, suite, target, judge, (), limit)
            others: dict[str, Target] = {spec: defend(setup.target, spec) for spec in dict.fromkeys(defences)}
            for spec in dict.fromkeys(transfer):
                others[spec] = load_target(spec)
                stack.push_async_callback(close, others[spec])
            harmless = load_suite(benign, limit=limit) if benign else None
            asked = {**setup.suite.suite.settings, **(settings or {})}
            inputs = {
                "attacks": [dict(arm.identity) for arm in arms],
                "budget": budget,
                "per_case": per_case,
                "rounds": rounds,
                "defences": list(defences),
                "transfer": [dict(others[spec].identity) for spec in dict.fromkeys(transfer)],
                "benign": dict(harmless.identity) if harmless else None,
                "shorten": shorten,
                **_inputs(setup, asked, seed),
            }
            campaign = Campaign(
                arms, setup.cases, setup.judge, budget=budget, allowance=per_case, rounds=rounds, seed=seed
            )
            record = _begin("redteam", setup.suite.suite.name, inputs, command)

            async def after(folder: Path, log: RowLog, record: Record, whole: bool) -> Record:
                found = findings(log, campaign.cases)
                replayed, cost, trouble = {}, {}, []
                shields = [("none", setup.target), *((spec, others[spec]) for spec in dict.fromkeys(defences))]
                for name, other in others.items() if whole else ():
                    path = folder / "replay.jsonl"
                    try:
                        await replay(found, other, setup.judge, path, settings=asked, limits=limits, seed=seed)
                    except (
                        DavylampError
                    ) as problem:  # the campaign itself is done and paid for: it is reported all the same
                        trouble.append(f"findings not all put to {name}: {problem}")
                    replayed[name] = replayed_values(found, other, path, settings=asked, seed=seed)
                for name, other in shields if whole and harmless else ():
                    assert harmless is not None
                    try:
                        cost[name] = await harmless_answered(
                            harmless, other, folder / "benign.jsonl", limits=limits, seed=seed, settings=settings
                        )
                    except DavylampError as problem:
                        trouble.append(f"harmless requests not put to {name}: {problem}")
                record = await redteam_results(
                    record, campaign, list(read_run(log.path)), found, replayed, cost, setup.target, setup.judge,
                    settings=asked, defences=defences, shorten=shorten if whole else 0, seed=seed,
                )  # fmt: skip
                return replace(record, about={**record.about, "notes": [*record.about["notes"], *trouble]})

            return await _carry_out(record, campaign, setup, asked, limits, runs, quiet, after)

    return asyncio.run(go())


def _at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name.replace('_', '-')} must be 1 or more, got {value}")


def _inputs(setup: Setup, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {
        "suite": {**setup.suite.identity, "metrics": [metric_json(METRIC)]},
        "target": dict(setup.target.identity),
        "judge": dict(setup.judge.identity),
        "settings": dict(settings),
        "seed": seed,
    }


def _begin(verb: str, name: str, inputs: Mapping[str, Any], command: Sequence[str]) -> Record:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return new_record(verb, name, inputs, command=list(command), created=created)


async def _carry_out(
    record: Record, campaign: Campaign, setup: Setup, settings: Mapping[str, Any], limits: Limits | None, runs: Path,
    quiet: bool, after: Any,
) -> tuple[Path, Record]:  # fmt: skip
    """Run the campaign into the record's folder; whatever ends it early, what it has found by then is written first."""
    folder = folder_for(runs, record)
    log = RowLog(folder / "rows.jsonl")
    progress, started, problem = Live(), time.monotonic(), None
    try:
        spent_before = load(folder).cost if (folder / "record.json").is_file() else {}
        save(folder, record)
        folder.chmod(0o700)  # what gets through is nobody else's to read
        try:
            async with progress_on_stderr(progress, f"{record.verb} {setup.target.name}", quiet=quiet):
                await campaign.run(setup.target, log, settings=settings, limits=limits, progress=progress)
        except (DavylampError, KeyboardInterrupt) as stopped:
            problem = stopped
        if isinstance(problem, InputError):
            raise problem
        record = await after(folder, log, record, problem is None)
        found = findings(log, campaign.cases)
        if found:
            write_cases(
                folder / "findings.jsonl", {one.case.id + one.attack: one.row(record.id) for one in found}.values()
            )
        failed = sum(state == "failed" for state in log.state.values())
        cost = {"calls": progress.calls, "tokens": progress.tokens, "seconds": round(time.monotonic() - started, 3)}
        status = (
            "interrupted"
            if isinstance(problem, KeyboardInterrupt)
            else "finished"
            if problem is None and not failed
            else "incomplete"
        )
        record = replace(
            record,
            counts={"rows": len(log.state), "questions": campaign.state.spent, "broken": len(campaign.state.found),
                    "cases": len(campaign.cases), "failed": failed},
            cost={name: round(spent_before.get(name, 0) + value, 3) for name, value in cost.items()},
            status=status,
        )  # fmt: skip
        save(folder, record)
    finally:
        log.close()
    if problem is not None:
        raise problem
    return folder, record


async def replay(
    found: Sequence[Found],
    target: Target,
    judge: LoadedJudge,
    path: Path,
    *,
    settings: Mapping[str, Any],
    limits: Limits | None = None,
    seed: int = 0,
) -> None:
    """Put the prompt of every finding to another target, once, into the log at `path`. What it holds already is not asked again.

    The judge sees the request of the case, as in the attack.
    """
    rows = {one.row().id: one for one in found}

    async def judged(messages: Sequence[Message], case: Case | None = None) -> Verdict:
        assert case is not None
        return await judge((*rows[case.id].case.messages, messages[-1]), rows[case.id].case)

    log = RowLog(path)
    try:
        if rows:
            asked = [one.row() for one in rows.values()]
            await collect(asked, target, judged, log, seed=seed, settings=settings, limits=limits)
    finally:
        log.close()


def replayed_values(
    found: Sequence[Found], target: Target, path: Path, *, settings: Mapping[str, Any], seed: int = 0
) -> dict[str, float | None]:
    """What `replay` has logged of this target: row's id -> the verdict's value, None where there is none."""
    key_of = row_keys(target, settings)
    keys = {key_of(canonical(one.row().json()), seed): one.row().id for one in found}
    values: dict[str, float | None] = dict.fromkeys(keys.values())
    for row in read_run(path) if keys and path.is_file() else ():
        if row["key"] in keys:
            values[keys[row["key"]]] = (row.get("verdict") or {}).get("value")
    return values


async def harmless_answered(
    suite: LoadedSuite,
    target: Target,
    path: Path,
    *,
    settings: Mapping[str, Any] | None,
    limits: Limits | None = None,
    seed: int = 0,
) -> list[float | None]:
    """For each request of a suite of harmless ones: 1.0 if it was answered, 0.0 if not, None where the judge could not tell."""
    judging = load_judge(suite.suite.judge)
    asked, values = {**suite.suite.settings, **(settings or {})}, []
    flip = judging.measures == "refused"

    async def judged(messages: Sequence[Message], case: Case | None = None) -> Verdict:
        verdict = await judging(messages, case)
        values.append(None if verdict.value is None else 1.0 - verdict.value if flip else verdict.value)
        return verdict

    path.unlink(missing_ok=True)  # cheap, and asked anew each time: its rows are counted, not kept
    log = RowLog(path)
    try:
        await collect(
            suite.suite.cases, target, judged, log, seed=seed, settings=asked, play=suite.suite.play, limits=limits
        )
    finally:
        log.close()
        await close(judging)
    return values
