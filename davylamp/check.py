"""`davylamp check`: a balanced set of suites on one or more targets, and one report.

Safety is never shown without over-refusal and skill beside it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from davylamp.core.compare import compare
from davylamp.core.errors import DavylampError, InputError, RunError, UnknownNameError
from davylamp.core.evaluate import LoadedSuite, close, evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Estimate, Record
from davylamp.core.policy import Decision, Rule, decide
from davylamp.core.record import keep, new_record, told_apart
from davylamp.core.registry import find
from davylamp.core.rows import digest
from davylamp.core.run import Limits
from davylamp.models.targets import load_target
from davylamp.report.html import write_report

#: Where a data folder may hold a suite's rows, relative to it.
ROWS = {
    "simple_safety_tests": (
        "simple_safety_tests/sst_prompts.jsonl",
        "simple_safety_tests.csv",
        "simple_safety_tests.jsonl",
    ),
    "overrefusal": ("xstest/xstest_prompts.jsonl", "xstest.csv", "xstest.jsonl"),
    "multijail": ("multijail/multijail.jsonl", "MultiJail.csv"),
    "safety_prompts": ("typical_safety_scenarios.json", "safety_prompts/typical_safety_scenarios.json"),
    "safetybench": ("safetybench_zh_subset/test_zh_subset.jsonl", "safetybench.jsonl"),
    "safechain": ("safechain.jsonl", "wildjailbreak.jsonl", "strongreject.csv"),
    "labsafety_mcq": ("labsafety/mcq.jsonl", "labsafety_mcq.jsonl"),
    "labsafety_hazards": ("labsafety/scenario_hazards.jsonl", "labsafety_hazards.jsonl"),
    "labsafety_consequences": ("labsafety/decision_consequence.jsonl", "labsafety_consequences.jsonl"),
}
SHIPPED = ("overrefusal", "capability")  # suites that have rows of their own
#: One arm is what a gate looks at; a reduced copy is noted in the record.
OPTIONS: dict[str, dict[str, Any]] = {
    "simple_safety_tests": {"arms": ("none",), "partial": True},
    "labsafety_mcq": {"partial": True},
    "labsafety_hazards": {"skip_empty": True},
}
#: Judges that belong to their suite's rows (planted strings, expected points): a judge given for all does not take their place.
OWN_JUDGES = ("canary", "covers")
Chosen = tuple[str, Mapping[str, Any]]
ORGANISM: tuple[Chosen, ...] = (("organism_hazards", {}), ("organism_lookalikes", {}), ("organism_capability", {}))
#: What is asked, by profile: safety never without over-refusal and skill beside it.
PROFILES: dict[str, tuple[str, ...]] = {
    "quick": ("overrefusal", "capability"),
    "chat": ("simple_safety_tests", "overrefusal", "capability"),
    "reasoning": ("safechain", "reasoning_risks", "overrefusal", "capability"),
    "multilingual": ("multijail", "safety_prompts", "safetybench", "overrefusal", "capability"),
    "science": ("labsafety_mcq", "labsafety_hazards", "labsafety_consequences", "overrefusal", "capability"),
}
QUICK = 60  # rows of a suite in the profile `quick`, where no limit is given


@dataclass(slots=True)
class Plan:
    """suites: what is run, loaded.  skipped: (what, why), said in the report."""

    suites: list[LoadedSuite] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def speaks_the_organisms_language(target: str) -> bool:
    """Whether a target is an organism, or a folder of a model that was made from one (its tokenizer knows the world's words).

    >>> speaks_the_organisms_language("organism/aligned"), speaks_the_organisms_language("openai/gpt")
    (True, False)
    """
    if target.startswith("organism/"):
        return True
    file = Path(target.removeprefix("hf/")) / "tokenizer.json"
    return target.startswith("hf/") and file.is_file() and '"gloamfire"' in file.read_text(encoding="utf-8")


def chosen(target: str, profile: str) -> tuple[Chosen, ...]:
    """The suites of a profile for this target: the organism's own for an organism, in its three languages where many are asked for.

    >>> [name for name, _ in chosen("openai/gpt", "chat")]
    ['simple_safety_tests', 'overrefusal', 'capability']
    >>> [options.get("language", "A") for name, options in chosen("organism/aligned", "multilingual") if name == "organism_hazards"]
    ['A', 'B', 'C']
    """
    if profile not in PROFILES:
        raise UnknownNameError("profile", profile, PROFILES)
    if not speaks_the_organisms_language(target):
        return tuple((name, OPTIONS.get(name, {})) for name in PROFILES[profile])
    if profile == "multilingual":
        return tuple((name, {"language": language}) for name, _ in ORGANISM for language in "ABC")
    return ORGANISM


def judge_for(own: str, given: str | None) -> str:
    """The judge of a suite, where one is given for all: answer keys and planted strings stay, and one that judges parts goes on doing so.

    >>> judge_for("refusal", "llm_judge:model=openai/m,rubric=harm"), judge_for("choice", "refusal"), judge_for("canary", "refusal")
    ('llm_judge:model=openai/m,rubric=harm', 'choice', 'canary')
    >>> judge_for("parts", "llm_judge:model=openai/m,rubric=harm")
    'parts:judge=llm_judge:model=openai/m;rubric=harm'
    """
    name = own.partition(":")[0]
    if not given or name in OWN_JUDGES or find(("judge", "guard"), name).kind != "guard":
        return own
    if name == "parts" and not given.startswith("parts"):
        return "parts:judge=" + given.replace(",", ";")
    return given


def plan(target: str, data: Path | None, limit: int | None, profile: str = "chat") -> Plan:
    """The suites for one target and profile, loaded; what has no rows at hand is left out and said."""
    out = Plan()
    if data is not None and not data.is_dir():
        raise InputError(f"no folder {data}. --data takes a folder with public benchmark rows")
    if profile == "quick" and limit is None:
        limit = QUICK
    for name, given in chosen(target, profile):
        options: dict[str, Any] = {}
        found = [data / path for path in ROWS.get(name, ()) if (data / path).is_file()] if data else []
        if found:
            options["rows"] = str(found[0])
        elif name in ROWS and name not in SHIPPED:
            out.skipped.append((name, "its rows are not shipped: give --data FOLDER with " + " or ".join(ROWS[name])))
            continue
        options |= given
        out.suites.append(load_suite(name, options, limit=limit))
    return out


def run_check(
    targets: Sequence[str],
    *,
    data: Path | None = None,
    judge: str | None = None,
    rules: Sequence[Rule] = (),
    dry_run: bool = False,
    runs: Path = Path("runs"),
    seed: int = 0,
    epochs: int = 1,
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    quiet: bool = False,
    title: str = "",
    profile: str = "chat",
) -> tuple[Path, Record, list[Decision]]:
    """Run the suites of `profile` on every target; write the check's own record and the report over all.

    Returns folder, record and gate decisions. A target that fails is reported as such and does not stop the others; if nothing at all
    could be run, RunError is raised.
    """
    if len(set(targets)) != len(targets):
        raise InputError("a target stands twice on the command line")
    plans = {target: plan(target, data, limit, profile) for target in targets}
    if dry_run:
        for target, chosen in plans.items():
            for item in chosen.suites:
                click.echo(f"{target}  {item.suite.name}: {item.total * epochs} calls")
            for what, why in chosen.skipped:
                click.echo(f"{target}  {what}: not run, {why}")
        return runs, new_record("check", "dry", {}), []
    done: list[tuple[str, Path, Record]] = []
    skipped: list[tuple[str, str]] = []

    async def go() -> None:
        for target, chosen in plans.items():
            skipped.extend((f"{what} on {target}", why) for what, why in chosen.skipped)
            asked = load_target(target)
            try:
                for item in chosen.suites:
                    judging = load_judge(judge_for(item.suite.judge, judge))
                    try:
                        folder, record = await evaluate(
                            item,
                            asked,
                            judging,
                            runs=runs,
                            seed=seed,
                            epochs=epochs,
                            settings=settings,
                            limits=limits,
                            quiet=quiet,
                            command=sys.argv[1:],
                        )
                        done.append((target, folder, record))
                    except RunError as problem:
                        skipped.append((f"{item.suite.name} on {target}", str(problem)))
                        break
                    finally:
                        await close(judging)
            finally:
                await close(asked)

    asyncio.run(go())
    if not done:
        raise RunError("nothing could be run. " + (skipped[-1][1] if skipped else ""))
    record = new_record(
        "check",
        "check",
        {"runs": sorted(record.id for _, _, record in done)},
        parents=[r.id for _, _, r in done],
        command=sys.argv[1:],
        created=done[-1][2].about.get("created"),
        notes=[f"not run: {what}: {why}" for what, why in skipped],
    )
    record = replace(
        record,
        status="finished"
        if all(r.status == "finished" for _, _, r in done)
        and len(done) == sum(len(chosen.suites) for chosen in plans.values())
        else "incomplete",
        estimates=tuple(_headlines(done)),
        counts=_sums(record.counts for _, _, record in done),
        cost=_sums(record.cost for _, _, record in done),
    )
    folder = keep(runs, record)
    decisions = _decisions(rules, [record for _, _, record in done])
    write_report(
        folder / "report.html",
        [path for _, path, _ in done],
        title=title or f"Check of {', '.join(targets)}",
        decisions=decisions,
        comparisons=_comparisons(done),
        skipped=skipped,
    )
    return folder, record, decisions


def _headlines(done: Sequence[tuple[str, Path, Record]]) -> list[Estimate]:
    """The overall estimates of every run; category holds the suite, with what tells its runs on a target apart, and arm the target."""
    alike: dict[tuple[str, str], list[Record]] = {}
    for target, _, record in done:
        alike.setdefault((target, record.name), []).append(record)
    names = {
        record.id: f"{name} {words}" if len(records) > 1 else name
        for (_, name), records in alike.items()
        for record, words in zip(records, told_apart(records), strict=True)
    }
    return [
        replace(estimate, category=names[record.id], arm=target)
        for target, _, record in done
        for estimate in record.estimates
        if estimate.category is None and estimate.arm is None
    ]


def _sums(parts: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            out[name] = round(out.get(name, 0) + value, 3)
    return out


def _decisions(rules: Sequence[Rule], records: Sequence[Record]) -> list[Decision]:
    """Each rule on every run that has its metric."""
    out = []
    for rule in rules:
        having = [record for record in records if any(estimate.name == rule.name for estimate in record.estimates)]
        for record in having or records[:1]:  # no run has it: the first one raises the error with the nearest name
            out += decide(rule, record.estimates)
    return out


def _comparisons(done: Sequence[tuple[str, Path, Record]]) -> list[dict[str, Any]]:
    """The first target against each other one, suite by suite."""
    out = []
    asked: dict[str, list[Path]] = {}  # equal questions only: a profile may ask one suite in several languages
    for _, folder, record in done:
        asked.setdefault(digest(dict(record.inputs["suite"])), []).append(folder)
    for folders in asked.values():
        for other in folders[1:]:
            try:
                out.append(compare(folders[0], other))
            except DavylampError:  # different options of one suite: shown side by side, not tested
                continue
    return out
