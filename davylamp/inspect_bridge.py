"""The bridge to inspect_ai: every suite as one of its tasks, and a run of ours as one of its `.eval` logs.

`inspect eval davylamp/<suite> --model <provider>/<model> -T option=value` finds the tasks by inspect's entry point. A suite's file is
imported when its task is made, not before. Asking, judging and counting are ours, so that equal replies give equal numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import inspect_ai
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import (
    EvalConfig,
    EvalDataset,
    EvalError,
    EvalLog,
    EvalMetric,
    EvalResults,
    EvalSample,
    EvalScore,
    EvalSpec,
    EvalStats,
    EvalStatus,
    write_eval_log,
)
from inspect_ai.model import GenerateConfig, ModelUsage, get_model
from inspect_ai.scorer import Metric as InspectMetric
from inspect_ai.scorer import SampleScore, Score, Scorer, mean, metric, scorer, stderr
from inspect_ai.scorer import Target as Answer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from davylamp import __version__
from davylamp.core.errors import InputError, TargetError
from davylamp.core.evaluate import load_suite, metrics_of
from davylamp.core.judges import LoadedJudge, load_judge
from davylamp.core.nouns import Case, Estimate, Message, Record, Suite, Verdict, ask_once
from davylamp.core.record import load
from davylamp.core.registry import Entry, entries
from davylamp.core.rows import conversation, read_run, verdict_from
from davylamp.core.tally import Tally, metric_from, metric_json
from davylamp.models.inspect_model import (
    InspectTarget,
    config_from,
    from_inspect,
    output_from,
    plain,
    reply_from,
    to_inspect,
    usage_from,
    whole,
)

ABOUT = ("category", "group", "answer", "meta")  # what a sample's metadata keep of its case
UNSCORED = float("nan")  # inspect's mark of a score that is kept, counted, and left out of every metric
STATUS: Mapping[str, EvalStatus] = {"finished": "success", "interrupted": "cancelled", "running": "started"}
KNOWN = GenerateConfig.model_fields
PIECE = 500  # samples that are held and written at a time


def suite_task(entry: Entry, options: Mapping[str, Any], judge: str = "") -> Task:
    """A suite as an inspect task, with its cases, settings, metrics and judge (or the one named).

    options: as inspect parsed them from -T; they mean what the same words mean after `davylamp eval`. Raises InputError.
    """
    loaded = load_suite(entry.name, {name: _word(value) for name, value in options.items() if value is not None})
    suite = loaded.suite
    scoring = verdict(judge=judge or suite.judge)
    assert isinstance(scoring, _Scoring)
    metrics = [metric_json(item) for item in metrics_of(suite, scoring.judging)]
    about = {"suite": dict(loaded.identity), "judge": dict(scoring.judging.identity), "notes": list(suite.notes)}
    return Task(
        dataset=MemoryDataset([sample(case) for case in suite.cases], name=suite.name),
        solver=generate() if suite.play is ask_once else play(suite),
        scorer=scoring,
        metrics=[estimates(metrics=metrics)],
        config=config_from(suite.settings),
        version=entry.version,
        metadata={"davylamp": __version__, **plain(about, mask=True)},
    )


def _word(value: Any) -> Any:
    """What inspect made of a -T value, as the text that was typed: our own reading of it counts.

    >>> _word(["none", "safety"]), _word(True), _word(40)
    ('none,safety', 'true', '40')
    """
    if isinstance(value, list | tuple):
        return ",".join(str(_word(item)) for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _register(entry: Entry) -> None:
    def make(*, judge: Any = "", **options: Any) -> Task:
        return suite_task(entry, options, str(_word(judge)))

    word = inspect.Parameter.KEYWORD_ONLY
    defaults = {
        item.name: list(item.default) if isinstance(item.default, tuple) else item.default for item in entry.params
    }
    make.__name__ = make.__qualname__ = entry.name
    make.__doc__ = f"{entry.doc}\n\njudge: the judge or guard to use instead of the suite's own."
    make.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(inspect.Parameter(name, word, default=default) for name, default in defaults.items()),
            inspect.Parameter("judge", word, default=""),
            inspect.Parameter(
                "unknown", inspect.Parameter.VAR_KEYWORD
            ),  # so that a misspelt option reaches us, and is refused
        ]
    )
    task(name=entry.name)(make)


for _entry in entries("suite"):
    _register(_entry)


def sample(case: Case) -> Sample:
    """A case as an inspect sample. `target` is the answer as text; the case itself stands in the metadata."""
    answer = case.answer if isinstance(case.answer, list) else [case.answer]
    target = [whole(str(item)) for item in answer if item is not None]
    return Sample(
        id=whole(case.id),
        input=[to_inspect(message) for message in case.messages],
        target=target if len(target) > 1 else "".join(target),
        metadata=_about(case),
    )


def _about(case: Case) -> dict[str, Any]:
    row = case.json()
    return {name: plain(row.get(name)) for name in ABOUT}


def _case(state: TaskState) -> Case:
    """The case again, from what inspect keeps of it."""
    given = state.input if isinstance(state.input, list) else []
    messages = tuple(from_inspect(message) for message in given) or (Message("user", state.input_text),)
    about = {name: state.metadata.get(name) for name in ("category", "group", "answer")}
    return Case(str(state.sample_id), messages, meta=state.metadata.get("meta") or {}, **about)


@solver
def play(suite: Suite) -> Solver:
    """Steps the suite's own world: its `play` puts questions to the model under evaluation until it is done."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        target = _Asked(InspectTarget(str(state.model), model=get_model()), suite.settings)
        followed = await suite.play(target, _case(state), seed=state.epoch - 1, **suite.settings)
        messages = [to_inspect(message, thought=True) for message in followed]
        for index, message in enumerate(followed):
            if message.role == "assistant":
                state.output = output_from(message, str(state.model))
                messages[index] = state.output.message
        state.messages += messages
        return state

    return solve


class _Asked:
    """inspect's model as our target. The suite's settings stand in the task's config already, where the user's flags win over them."""

    def __init__(self, target: InspectTarget, settings: Mapping[str, Any]):
        self.target, self.settings = target, settings
        self.name, self.identity = target.name, target.identity

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        own = {name: value for name, value in settings.items() if self.settings.get(name) != value}
        return await self.target(messages, seed=seed, **own)


class _Scoring:
    """The judge as inspect calls it."""

    def __init__(self, judging: LoadedJudge):
        self.judging = judging

    async def __call__(self, state: TaskState, target: Answer) -> Score:
        case = _case(state)
        before = len(case.messages)
        said = [from_inspect(message, reply=index >= before) for index, message in enumerate(state.messages)]
        if len(said) <= before or said[-1].role != "assistant":
            return Score(value=UNSCORED, answer="nonresponsive", explanation="the conversation does not end in a reply")
        if not state.output.empty:  # only the output knows why the reply stopped
            last = reply_from(state.output)
            said[-1] = dataclasses.replace(said[-1], finish=last.finish, tokens=last.tokens)
        try:
            return score_from(await self.judging(said, case))
        except TargetError as problem:  # the judge's own model failed
            return Score(value=UNSCORED, explanation=f"judge: {problem}")


@scorer(metrics=[mean(), stderr()])
def verdict(judge: str) -> Scorer:
    """What the judge says of the reply, in [0, 1]; NaN, which inspect counts and leaves out of its metrics, where it could not tell."""
    return _Scoring(load_judge(judge))


def score_from(found: Verdict) -> Score:
    """A verdict as inspect's score: `answer` is the label."""
    return Score(
        value=UNSCORED if found.value is None else found.value,
        answer=None if found.label is None else whole(found.label),
        explanation=whole(found.why) or None,
        metadata={"categories": [whole(item) for item in found.categories]} if found.categories else None,
    )


@metric(name="estimates", scores="unreduced")
def estimates(metrics: list[dict[str, Any]]) -> InspectMetric:
    """All metrics of a suite, by the tally of our own runs: `unsafe_rate`, the ends of its interval, `unsafe_rate (slice)`."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        seen = Counter(item.sample_id for item in scores)
        epochs = max(seen.values(), default=1)
        tally = Tally((metric_from(row) for row in metrics), epochs=epochs)
        for item in scores:
            about = item.sample_metadata or {}
            case = {"id": str(item.sample_id), **{name: about[name] for name in ABOUT if about.get(name) is not None}}
            tally.add({"case": case, "verdict": {"value": item.score.as_float()}})
            while seen[item.sample_id] < epochs:  # inspect drops unscored epochs, but a contrast must know of them
                seen[item.sample_id] += 1
                tally.add({"case": case, "verdict": {"value": None}})
        return named(tally.estimates())

    return compute


def named(found: Sequence[Estimate]) -> dict[str, float]:
    """Estimates by name; the overall ones with the ends of their interval. One without a value is left out.

    >>> named([Estimate(0.5, 0.2, 0.8, 9, name="unsafe_rate"), Estimate(0.1, 0.0, 0.3, 5, name="unsafe_rate", category="sst/scams")])
    {'unsafe_rate': 0.5, 'unsafe_rate.low': 0.2, 'unsafe_rate.high': 0.8, 'unsafe_rate (sst/scams)': 0.1}
    """
    out: dict[str, float] = {}
    for item in found:
        arm = None if item.unit == "difference" else item.arm  # a contrast's arms are its definition, not a slice
        where = ", ".join(part for part in (arm, item.category) if part)
        ends = {} if where else {".low": item.low, ".high": item.high}
        for end, value in {"": item.value, **ends}.items():
            if value is not None:
                out[f"{item.name}{f' ({where})' if where else ''}{end}"] = value
    return out


def write_log(folder: Path, out: Path) -> Path:
    """Write an eval run as inspect's log, for `inspect view` and its dataframes. Returns `out`.

    folder: a run folder.  out: a path that ends in .eval; an older file there is replaced.
    Each row is a sample with its conversation, score, tokens and seconds; the metrics are those of the record, whose id stands in
    the log's metadata as `record`. Raises InputError for a run of another verb, another ending, or a place that cannot be written.
    """
    if out.suffix != ".eval":
        raise InputError(f"an inspect log must end in .eval, got {out.name}")
    record = load(folder)
    if record.verb != "eval":
        raise InputError(f"{folder.name} is a {record.verb} run: only an eval run can be written as an inspect log")
    path = folder / "rows.jsonl"
    if not path.is_file():
        raise InputError(f"no rows.jsonl in {folder}: the run has no rows to write")
    model = str(record.inputs["target"]["name"]).removeprefix("inspect/")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".eval-") as scratch:
            pieces = _pieces((_logged(row, record, model) for row in read_run(path)), record, model, Path(scratch))
            (pieces[0] if len(pieces) == 1 else _merged(pieces, Path(scratch) / "all.eval")).replace(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}. Choose another place with --out") from None
    return out


def _pieces(samples: Iterator[EvalSample], record: Record, model: str, scratch: Path) -> list[Path]:
    """Logs of up to PIECE samples each; the header of the last tells of all. inspect's writer slows with the square of the samples."""
    pieces: list[Path] = []
    ids: set[int | str] = set()
    usage: ModelUsage | None = None
    while (batch := list(islice(samples, PIECE))) or not pieces:
        ids.update(sample.id for sample in batch)
        usage = _sum([usage, *(sample.model_usage.get(model) for sample in batch)])
        pieces.append(scratch / f"{len(pieces)}.eval")
        write_eval_log(_log(record, model, batch, len(ids), usage), str(pieces[-1]))
    return pieces


def _merged(pieces: Sequence[Path], out: Path) -> Path:
    """One log of several: a zip with the samples of all, their summaries in one list, and the rest of the last."""
    summaries: list[Any] = []
    with ZipFile(out, "w", ZIP_DEFLATED) as merged:
        for path in pieces:
            with ZipFile(path) as piece:
                for name in piece.namelist():
                    if name == "summaries.json":
                        summaries += json.loads(piece.read(name))
                    elif name.startswith("samples/") or (path == pieces[-1] and "summaries" not in name):
                        merged.writestr(name, piece.read(name))
        merged.writestr("summaries.json", json.dumps(summaries))
    return out


def _logged(row: Mapping[str, Any], record: Record, model: str) -> EvalSample:
    """A row as a sample. A row without a reply has an error, one without a verdict an unscored score."""
    case, said = conversation(row)
    followed, found = said[len(case.messages) :], verdict_from(row["verdict"])
    replies = [message for message in followed if message.role == "assistant"]
    asked, error = sample(case), whole(row.get("error", ""))
    usage = _sum(usage_from(message) for message in replies)
    out = EvalSample(
        id=whole(case.id),
        epoch=row["seed"] - record.inputs["seed"] + 1,
        input=[to_inspect(message, thought=True) for message in case.messages],
        target=asked.target,
        messages=[to_inspect(message, thought=True) for message in said],
        metadata={**_about(case), "key": row["key"], "seed": row["seed"]},
        model_usage={model: usage} if usage else {},
        total_time=row["seconds"],
        uuid=row["key"],
    )
    if replies:
        out.output = output_from(replies[-1], model)
        if followed[-1] is replies[-1]:
            out.messages[-1] = out.output.message
    if found is not None:
        out.scores = {"verdict": score_from(found)}
    elif row["reply"] is not None:
        out.scores = {"verdict": Score(value=UNSCORED, explanation=error or None)}
    else:
        out.error = EvalError(message=error or "no reply", traceback="", traceback_ansi="")
    return out


def _log(record: Record, model: str, samples: list[EvalSample], cases: int, usage: ModelUsage | None) -> EvalLog:
    inputs, suite, counts = record.inputs, record.inputs["suite"], record.counts
    created = record.about.get("created") or datetime.now(UTC).isoformat(timespec="seconds")
    problem = ", ".join(f"{counts[name]} {name}" for name in ("failed", "missing") if counts.get(name)) or "unknown"
    error = EvalError(message=f"rows without a result: {problem}", traceback="", traceback_ansi="")
    score = EvalScore(
        name="verdict",
        scorer="verdict",
        params={"judge": inputs["judge"]["name"]},
        scored_samples=counts.get("scored"),
        unscored_samples=counts.get("unscored"),
        metrics={name: EvalMetric(name=name, value=value) for name, value in named(record.estimates).items()},
    )
    return EvalLog(
        status=STATUS.get(record.status, "error"),
        error=error if record.status == "incomplete" else None,
        eval=EvalSpec(
            eval_id=record.id[:22],
            run_id=record.id[:22],
            task_id=record.id[:22],
            created=created,
            task=f"davylamp/{record.name}",
            task_registry_name=f"davylamp/{suite['name']}",
            task_version=suite["version"],
            task_args=plain(suite["options"], mask=True),
            dataset=EvalDataset(name=record.name, samples=cases),
            model=model,
            model_generate_config=config_from(
                {name: value for name, value in inputs["settings"].items() if name in KNOWN}
            ),
            config=EvalConfig(epochs=inputs["epochs"], limit=suite.get("limit")),
            packages={"davylamp": str(record.about.get("davylamp", __version__)), "inspect_ai": inspect_ai.__version__},
            metadata={
                "record": record.id,
                "inputs": plain(inputs, mask=True),
                "notes": plain(record.about.get("notes", [])),
            },
        ),
        results=EvalResults(
            total_samples=counts.get("rows", 0) + counts.get("missing", 0),
            completed_samples=counts.get("rows", 0) - counts.get("failed", 0),
            scores=[score],
        ),
        stats=EvalStats(started_at=created, model_usage={model: usage} if usage else {}),
        samples=samples,
    )


def _sum(parts: Iterable[ModelUsage | None]) -> ModelUsage | None:
    total: ModelUsage | None = None
    for part in parts:
        total = part if total is None or part is None else total + part
    return total
