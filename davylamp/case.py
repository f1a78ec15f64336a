"""`davylamp case RUN...`: the safety case of one model. What its data, training, evaluation and deployment owe, what the runs show of
it, and what is missing.

Evidence is bound to the hash of the weights: a number measured on the model before the last weight change is stale, however good it was.
A requirement is decided on the end of an interval; what cannot be decided is a gap and never a pass. Equal runs give an equal case.

Sources: stages, gates, stale evidence, waivers and the re-measuring after a weight change: arXiv:2504.15585; a decision with its missing
evidence: arXiv:2404.14068. The requirements shipped are ours (`assets/case/requirements.toml`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from davylamp import coverage
from davylamp.case_rules import requirements, waivers
from davylamp.core.compare import compare
from davylamp.core.errors import DavylampError, InputError
from davylamp.core.nouns import Claim, Estimate
from davylamp.core.record import walk
from davylamp.core.registry import STAGES
from davylamp.report.runs import Run, gather

ORDER = tuple(sorted(STAGES, key=lambda stage: stage == "deployment"))  # a model is evaluated before it is served
PASS, FAIL, MISSING, STALE, WAIVED = "pass", "fail", "missing", "stale", "waived"


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the line of descent. made_by: the run that wrote it, or None.  parents: SHA-256 of the models it was made from."""

    sha256: str
    name: str
    made_by: Run | None = None
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """How a requirement stands. claim, estimate: where a number decided it.  run: id of the run that did."""

    requirement: str
    stage: str
    title: str
    verdict: str
    why: str
    run: str = ""
    claim: Claim | None = None
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """The case of the model `line[0]`. line: the model, what it was made from, and so on.  answers: in the order of the stages."""

    line: tuple[Model, ...]
    answers: tuple[Answer, ...]
    measured: Mapping[str, tuple[Run, ...]]

    @property
    def verdict(self) -> str:
        """fail if a requirement failed, missing if one cannot be decided, else pass."""
        found = {answer.verdict for answer in self.answers}
        return FAIL if FAIL in found else MISSING if found & {MISSING, STALE} else PASS


def build(
    folders: Sequence[Path],
    *,
    runs: Path = Path("runs"),
    model: str = "",
    wanted: Path | None = None,
    waived: Path | None = None,
    today: date | None = None,
    product: str = "chat",
) -> Case:
    """The case of one model from these run folders; what made the model is looked up among all records in `runs`.

    product: what the model is put to, chat, retrieval or agent: what reads foreign text owes more.
    model: name or start of the SHA-256 of the model meant; needed where the runs measured several and none was made from all others.
    Raises InputError where no run measured a model with a hash, or the model meant is not clear.
    """
    rules = requirements(wanted, product)
    free = waivers(waived, rules, today or datetime.now(UTC).date())
    given = gather(folders)
    known = [Run(path, record) for path, record in walk(runs)] if runs.is_dir() else []
    known += [run for run in given if run.record.id not in {one.record.id for one in known}]
    made = {
        str(r.record.about["sha256"]): r
        for r in known
        if r.record.verb in ("train", "edit") and "sha256" in r.record.about
    }
    measured: dict[str, tuple[Run, ...]] = {}
    names: dict[str, str] = {}
    for run in sorted(given, key=lambda one: (str(one.record.about.get("created") or ""), one.record.id), reverse=True):
        sha = str(run.part("target").get("sha256") or run.part("model").get("sha256") or "")
        if sha and run.record.verb in ("eval", "attack", "interp"):
            measured[sha] = (*measured.get(sha, ()), run)
            names.setdefault(sha, run.name("target") or run.name("model"))
    subject = _subject(measured, names, made, model)
    line = _line(subject, names, made)
    answers = []
    for stage in ORDER:
        for name, row in rules.items():
            if row["stage"] == stage and (row["when"] == "always" or line[0].made_by is not None):
                answers += [_waive(answer, free) for answer in _answers(name, row, line, measured, known, given)]
    return Case(line, tuple(answers), measured)


def _waive(answer: Answer, free: Mapping[str, str]) -> Answer:
    if answer.verdict == PASS or answer.requirement not in free:
        return answer
    return replace(answer, verdict=WAIVED, why=f"{free[answer.requirement]} (it was: {answer.verdict}, {answer.why})")


def _subject(measured: Mapping[str, Any], names: Mapping[str, str], made: Mapping[str, Run], model: str) -> str:
    if not measured:
        raise InputError(
            "none of these runs measured a model whose weights have a hash (an hf/ or organism/ target): nothing to make a case for"
        )
    if model:
        found = [sha for sha in measured if sha.startswith(model) or names[sha] == model]
        if len(found) != 1:
            raise InputError(f"--model {model} fits {len(found)} of the measured models: " + _list(names))
        return found[0]
    above = {parent for sha in measured for one in _line(sha, names, made)[1:] for parent in [one.sha256]}
    above |= {parent for sha in measured if (run := made.get(sha)) for parent in _parents(run)}
    leaves = [sha for sha in measured if sha not in above]
    if len(leaves) != 1:
        raise InputError(
            f"these runs measured {len(measured)} models, and which is meant is not clear: give --model, one of "
            + _list(names)
        )
    return leaves[0]


def _list(names: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({sha[:8]})" for sha, name in sorted(names.items(), key=lambda item: item[1]))


def _parents(run: Run) -> tuple[str, ...]:
    """SHA-256 of the models that a train or edit run started from, first the one that it was called on."""
    others = run.record.inputs.get("others") or ()
    return tuple(str(one["sha256"]) for one in (run.part("model"), *others) if one.get("sha256"))


def _line(subject: str, names: Mapping[str, str], made: Mapping[str, Run]) -> tuple[Model, ...]:
    """The model and its ancestors. Of several parents the line follows the one that was itself made on record, else the first."""
    out: list[Model] = []
    sha: str | None = subject
    while sha and sha not in {one.sha256 for one in out}:
        run = made.get(sha)
        parents = _parents(run) if run else ()
        name = names.get(sha) or (str(run.record.about.get("out", "")) if run else "") or sha[:8]
        out.append(Model(sha, name, run, parents))
        sha = next((parent for parent in parents if parent in made), parents[0] if parents else None)
        if sha and sha not in names:
            names = {**names, sha: _name_in(run, sha)}
    return tuple(out)


def _name_in(run: Run | None, sha: str) -> str:
    models = [run.part("model"), *(run.record.inputs.get("others") or ())] if run else []
    return next((str(one["name"]) for one in models if one.get("sha256") == sha), sha[:8])


# --- the requirements -------------------------------------------------------------------------------------------------------------------
def _answers(
    name: str,
    row: Mapping[str, Any],
    line: Sequence[Model],
    measured: Mapping[str, tuple[Run, ...]],
    known: Sequence[Run],
    given: Sequence[Run],
) -> list[Answer]:
    def say(verdict: str, why: str, **more: Any) -> Answer:
        return Answer(name, row["stage"], row["title"], verdict, why, **more)

    if row["kind"] == "record":
        return [say(*_on_record(row["needs"], line, measured, known, given))]
    found = _numbers(measured.get(line[0].sha256, ()), row["metrics"])
    if not found:
        for older in line[1:]:
            if old := _numbers(measured.get(older.sha256, ()), row["metrics"]):
                why = f"measured on {older.name} only, before the weights changed"
                return [say(STALE, why, run=old[0][0].record.id)]
        return [say(MISSING, f"no run measured {' or '.join(row['metrics'])} on {line[0].name}")]
    if "keep" in row:
        return [_kept(say, row, line, measured)]
    out = []
    for run, estimate in found:
        most, least = (float(row[key]) if key in row else None for key in ("at_most", "at_least"))
        claim = Claim(estimate.name, arm=run.suite, at_most=most, at_least=least)
        if estimate.n < row.get("rows", 0):
            out.append(
                say(MISSING, f"{run.suite}: {estimate.n} scored rows, of {row['rows']} needed", run=run.record.id)
            )
            continue
        held = claim.held(estimate)
        word = {True: PASS, False: FAIL, None: MISSING}[held]
        out.append(say(word, f"{run.suite}: {_words(estimate)}", run=run.record.id, claim=claim, estimate=estimate))
    return out


def _numbers(found: Sequence[Run], metrics: Sequence[str]) -> list[tuple[Run, Estimate]]:
    """The whole-suite numbers of these names, the newest run of each suite; corrected for the judge's error where that is known."""
    out: dict[tuple[str, str], tuple[Run, Estimate]] = {}
    for run in found:
        for estimate in run.record.estimates:
            if (
                estimate.name in metrics
                and estimate.category is None
                and estimate.arm is None
                and run.record.status == "finished"
            ):
                if estimate.corrected is not None:
                    value, low, high = estimate.corrected
                    estimate = replace(
                        estimate,
                        value=value,
                        low=low,
                        high=high,
                        method=f"{estimate.method}, corrected",
                        corrected=None,
                    )
                out.setdefault((run.suite, estimate.name), (run, estimate))
    return list(out.values())


def _words(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return f"{estimate.name} has no interval"
    return f"{estimate.name} {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}], n {estimate.n}"


def _kept(
    say: Callable[..., Answer], row: Mapping[str, Any], line: Sequence[Model], measured: Mapping[str, tuple[Run, ...]]
) -> Answer:
    """Whether the last weight change kept a rate, by the paired difference to the model before it."""
    if len(line) < 2:
        return say(MISSING, "the model before the change is not known")
    before = {run.suite: run for run, _ in _numbers(measured.get(line[1].sha256, ()), row["metrics"])}
    for run, estimate in _numbers(measured[line[0].sha256], row["metrics"]):
        if run.suite not in before:
            continue
        try:
            found = compare(before[run.suite].folder, run.folder)
        except DavylampError as error:
            return say(MISSING, f"{run.suite}: {error}")
        rows = [
            one
            for one in found["rows"]
            if one["metric"] == estimate.name and one["category"] is None and one["arm"] is None
        ]
        if not rows:
            continue
        gap = rows[0]["difference"]
        worse = -1.0 if estimate.higher_is_better else 1.0
        # the claim is on the loss: how much worse the rate became, whichever way is better
        ends = sorted(worse * gap[end] for end in ("low", "high")) if gap["low"] is not None else [None, None]
        loss = Estimate(
            worse * gap["value"], ends[0], ends[1], int(gap["n"]), unit="difference", name=f"loss of {estimate.name}"
        )
        claim = Claim(f"loss of {estimate.name}", arm=line[0].name, against=line[1].name, at_most=float(row["keep"]))
        word = {True: PASS, False: FAIL, None: MISSING}[claim.held(loss)]
        return say(
            word, f"{run.suite}: {_words(loss)}, against {line[1].name}", run=run.record.id, claim=claim, estimate=loss
        )
    return say(MISSING, f"no suite measured {' or '.join(row['metrics'])} on both {line[1].name} and {line[0].name}")


def _on_record(
    needs: str,
    line: Sequence[Model],
    measured: Mapping[str, tuple[Run, ...]],
    known: Sequence[Run],
    given: Sequence[Run],
) -> tuple[str, str]:
    """Verdict and reason of a requirement on what must be on record."""
    changes = [one.made_by for one in line if one.made_by is not None]
    if needs == "lineage":
        if not changes:
            return MISSING, f"no run on record made {line[0].name}: where its weights come from is not known here"
        return PASS, " <- ".join(one.name for one in line)
    if needs == "data":
        makers = {str(r.record.about.get("sha256")) for r in known if r.record.verb == "data"}
        makers |= {str(r.record.about.get("cases")) for r in known if r.record.verb == "data"}
        without = [r for r in changes if r.record.verb == "train" and not set(_hashes(r.part("rows"))) & makers]
        if without:
            return MISSING, "; ".join(
                f"no record says where the rows {r.name('rows')} of {r.record.verb} {r.record.name} come from"
                for r in without
            )
        return PASS, f"{len(changes)} weight changes, each with its rows on record"
    if needs == "judge":
        judged = [run for run in measured.get(line[0].sha256, ()) if run.record.verb == "eval"]
        if not judged:
            return MISSING, "no run judged this model"
        bare = sorted({run.name("judge") for run in judged if coverage.judge_unknown(run.record)})
        return (
            (MISSING, f"never measured: {', '.join(bare)}") if bare else (PASS, "measured, or judged by an answer key")
        )
    benched = [run for run in given if run.record.verb == "guard" and run.record.estimates]
    if benched:
        return PASS, f"{benched[0].record.name}: {', '.join(_words(e) for e in benched[0].record.estimates[:2])}"
    return MISSING, "no run of `davylamp guard bench` among these"


def _hashes(part: Mapping[str, Any]) -> list[str]:
    return [str(value) for value in part.values() if isinstance(value, str) and len(value) == 64]
