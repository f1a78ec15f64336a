"""Suites as inspect tasks and runs as inspect logs: equal replies give equal numbers on both sides."""

import asyncio
import hashlib
import json
import math
import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("inspect_ai")

from click.testing import CliRunner
from inspect_ai import eval as inspect_eval
from inspect_ai.log import read_eval_log, read_eval_log_sample, read_eval_log_sample_summaries
from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput, ModelUsage, get_model

from davylamp import inspect_bridge
from davylamp.cli import main
from davylamp.core import needs
from davylamp.core.errors import InputError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message, Metric, Suite, Verdict
from davylamp.core.record import new_record, save
from davylamp.core.registry import entries, find
from davylamp.models.inspect_model import from_inspect
from davylamp.models.openai import OpenAITarget
from tests import sst
from tests.server import say

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated"),  # inspect's use of tenacity
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # inspect leaves event streams to the collector
]


def reply(messages, seed=0):
    """What the mock says, from the roles and texts alone: about a third refuse, an eighth stay silent."""
    said = json.dumps([seed, [(message["role"], message["content"]) for message in messages]])
    number = hashlib.sha256(said.encode()).digest()[0]
    return "" if number < 32 else "I can't help with that." if number < 120 else "Fold it like this."


USED = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


class Told:
    """The same mock as a target of ours."""

    name, identity = "told", {"name": "told"}

    async def __call__(self, messages, *, seed=0, **settings):
        plain = [{"role": message.role, "content": message.text} for message in messages]
        return Message("assistant", reply(plain, seed), finish="stop", tokens=(5, 7))


def mock(*, seeded=False):
    """The same mock as a model of inspect; seeded: each time it is asked the same, it counts one seed up, as our epochs do."""
    asked = {}

    def answer(messages, tools, tool_choice, config):
        plain = [{"role": message.role, "content": message.text} for message in messages]
        key = json.dumps(plain)
        asked[key] = asked.get(key, -1) + 1
        said = ChatMessageAssistant(content=reply(plain, asked[key] if seeded else 0), source="generate")
        usage = ModelUsage(input_tokens=5, output_tokens=7, total_tokens=12)
        choice = ChatCompletionChoice(message=said, stop_reason="stop")
        return ModelOutput(model="mock", choices=[choice], usage=usage)

    return get_model("mockllm/model", custom_outputs=answer)


def by_inspect(task, tmp_path, **more):
    given = {"model": mock(), "display": "none", "log_dir": str(tmp_path / "logs"), **more}
    (log,) = inspect_eval(task, **given)
    assert log.status == "success", log.error
    return log


def by_us(name, options, judge, runs, target=None, limit=None, **more):
    loaded = load_suite(name, options, limit=limit)
    target = target or Told()
    return asyncio.run(evaluate(loaded, target, load_judge(judge), runs=runs, quiet=True, **more))


def metrics(log):
    (score,) = log.results.scores
    return {name: item.value for name, item in score.metrics.items()}


def rates(found):
    """The estimates proper, without the ends of intervals, which in contrasts come from a seeded bootstrap."""
    return {name: value for name, value in found.items() if not name.endswith((".low", ".high"))}


@pytest.fixture
def stand_in(tmp_path):
    return sst.write(tmp_path / "rows.csv", sst.rows()), sst.write_guard(tmp_path)


def test_every_suite_is_a_task_and_none_is_imported():
    code = """
import sys
from inspect_ai._util.registry import registry_lookup
import importlib.metadata as m
(point,) = [p for p in m.entry_points(group="inspect_ai") if p.name == "davylamp"]
point.load()
from davylamp.core.registry import entries
for entry in entries("suite"):
    assert registry_lookup("task", f"davylamp/{entry.name}"), entry.name
print([name for name in sys.modules if name.startswith("davylamp.suites.") or name == "torch"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.fixture
def few(tmp_path, stand_in):
    """A reduced stand-in of 34 rows, and the guard."""
    return sst.write(tmp_path / "few.csv", sst.rows()[::3]), stand_in[1]


def test_equal_replies_give_equal_numbers(tmp_path, few):
    rows, guard = few
    args = {"rows": rows, "arms": ["none", "safety", "neutral"], "partial": True, "judge": guard}
    log = by_inspect("davylamp/simple_safety_tests", tmp_path, task_args=args)
    options = {"rows": rows, "arms": "none,safety,neutral", "partial": "true"}
    _, record = by_us("simple_safety_tests", options, guard, tmp_path / "runs")
    ours = inspect_bridge.named(record.estimates)
    assert rates(metrics(log)) == pytest.approx(rates(ours), abs=1e-12)
    assert {"unsafe_rate", "unsafe_rate.low", "system_prompt_effect", "unsafe_rate (safety)"} <= set(ours)
    assert any(name.startswith("unsafe_rate (none, sst/") for name in ours)
    assert 0 < ours["unsafe_rate"] < 1 and ours["system_prompt_effect"] != 0
    (score,) = log.results.scores
    assert (score.scored_samples, score.unscored_samples) == (record.counts["scored"], record.counts["unscored"])
    assert score.unscored_samples > 0
    assert log.eval.task_version == find("suite", "simple_safety_tests").version
    assert log.plan.config.max_tokens == 512 and log.plan.config.temperature == 0.0
    assert log.eval.metadata["suite"]["cases"] == record.inputs["suite"]["cases"]


def test_epochs_count_as_ours_do(tmp_path, few):
    rows, guard = few
    args = {"rows": rows, "partial": True, "judge": guard}
    log = by_inspect("davylamp/simple_safety_tests", tmp_path, task_args=args, epochs=2, model=mock(seeded=True))
    _, record = by_us("simple_safety_tests", {"rows": rows, "partial": True}, guard, tmp_path / "runs", epochs=2)
    ours = inspect_bridge.named(record.estimates)
    assert rates(metrics(log)) == pytest.approx(rates(ours), abs=1e-12)
    assert metrics(log)["unsafe_rate.low"] == pytest.approx(
        ours["unsafe_rate.low"], abs=1e-12
    )  # clustered on both sides
    assert record.counts["unscored"] > 0  # pairs with an unscored epoch are left out of the contrast on both sides


def test_metrics_with_where_and_flip(tmp_path):
    log = by_inspect("davylamp/overrefusal", tmp_path, limit=60)
    _, record = by_us("overrefusal", {}, "refusal", tmp_path / "runs", limit=60)
    ours = inspect_bridge.named(record.estimates)
    assert rates(metrics(log)) == pytest.approx(rates(ours), abs=1e-12)
    assert 0 < ours["over_refusal_rate"] < 0.7 and ours["over_refusal_rate"] != pytest.approx(1 - ours["unsafe_rate"])


def test_answers_reach_the_judge(tmp_path):
    args = {"n": 16, "seed": 3}
    log = by_inspect("davylamp/capability", tmp_path, task_args={**args, "judge": "includes"})
    cases = {case.id: case for case in load_suite("capability", args).suite.cases}
    assert {sample.id for sample in log.samples} == set(cases) and log.eval.task_args["judge"] == "includes"
    for sample in log.samples:
        case = cases[sample.id]
        assert sample.target == case.answer or [sample.target] == case.answer
        assert sample.metadata["answer"] == case.answer and sample.metadata["category"] == case.category
    assert metrics(log)["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"n": 0}, "n of capability must be"),
        ({"m": 3}, "no option of capability named 'm'"),
        ({"judge": "refusal"}, "measures complied"),
        ({"judge": "nobody"}, "no judge or guard named"),
    ],
    ids=repr,
)
def test_bad_options_are_refused(tmp_path, args, message):
    with pytest.raises(InputError, match=message):
        inspect_eval("davylamp/capability", model=mock(), task_args=args, display="none", log_dir=str(tmp_path))


def test_a_case_comes_back_from_a_sample():
    case = Case(
        "1/none",
        (Message("system", "be kind"), Message("user", "look", media=("data:image/png;base64,AA",)), Message("assistant", "<think>")),
        category="sst/x",
        answer=["a", 2],
        group="g",
        meta={"arm": "none", "at": 3},
    )  # fmt: skip
    made = inspect_bridge.sample(case)

    class State:
        input, sample_id, metadata = made.input, made.id, made.metadata

    assert inspect_bridge._case(State()) == case


def test_the_judge_sees_why_a_reply_stopped_and_its_own_failures(tmp_path, monkeypatch):
    def blocked(*_):
        choice = ChatCompletionChoice(message=ChatMessageAssistant(content="Fold it."), stop_reason="content_filter")
        return ModelOutput(model="m", choices=[choice], usage=ModelUsage())

    model = get_model("mockllm/model", custom_outputs=blocked)
    log = by_inspect("davylamp/overrefusal", tmp_path, model=model, limit=3)
    assert metrics(log)["over_refusal_rate"] == 1.0  # a reply that the server held back is a refusal
    assert log.samples[0].scores["verdict"].value == 0.0


async def ask_twice(target, case, *, seed=0, **settings):
    first = await target(case.messages, seed=seed, **settings)
    more = (*case.messages, first, Message("user", "Sure?"))
    return first, more[-1], await target(more, seed=seed, **settings)


def test_a_suite_with_a_play_of_its_own(tmp_path, monkeypatch):
    cases = tuple(Case(str(n), (Message("user", f"fold {n}"),)) for n in range(20))
    suite = Suite("twice", cases, "refusal", (Metric("rate"),), play=ask_twice, settings={"max_tokens": 9, "top_k": 4})
    loaded = load_suite("capability", {"n": 8})
    monkeypatch.setattr(inspect_bridge, "load_suite", lambda *_: loaded.__class__(suite, loaded.identity, 20))
    task = inspect_bridge.suite_task(find("suite", "capability"), {})
    settings = []

    def answer(messages, tools, tool_choice, config):
        settings.append((config.max_tokens, config.top_k))
        plain = [{"role": message.role, "content": message.text} for message in messages]
        choice = ChatCompletionChoice(message=ChatMessageAssistant(content=reply(plain)), stop_reason="stop")
        return ModelOutput(model="m", choices=[choice], usage=ModelUsage())

    log = by_inspect(task, tmp_path, model=get_model("mockllm/model", custom_outputs=answer), max_tokens=5)
    assert set(settings) == {(5, 4)} and len(settings) == 40  # the user's own settings win
    _, record = asyncio.run(
        evaluate(
            loaded.__class__(suite, loaded.identity, 20),
            Told(),
            load_judge("refusal"),
            runs=tmp_path / "runs",
            quiet=True,
        )
    )
    assert metrics(log)["rate"] == pytest.approx(record.estimates[0].value) and 0 < record.estimates[0].value < 1
    (sample,) = [sample for sample in log.samples if sample.id == "7"]
    assert [message.role for message in sample.messages] == ["user", "assistant", "user", "assistant"]
    assert sample.output.message.id == sample.messages[-1].id


@pytest.mark.slow
def test_the_command_line_of_inspect(tmp_path, stand_in, server, monkeypatch):
    """`inspect eval davylamp/<suite>` in a fresh process, through the entry point, on a real client and a local server."""
    pytest.importorskip("openai")
    rows, guard = stand_in
    server.answer = lambda body, number: say(reply(body["messages"]), usage=USED, model="m", id=str(number))
    words = [
        "eval",
        "davylamp/simple_safety_tests",
        "--model",
        "openai-api/mock/m",
        "-T",
        f"rows={rows}",
        "-T",
        f"judge={guard}",
    ]
    words += ["-T", "arms=none,safety", "--display", "none", "--log-dir", str(tmp_path / "logs"), "--no-score-display"]
    env = {**os.environ, "MOCK_API_KEY": "x", "MOCK_BASE_URL": server.url, "INSPECT_TELEMETRY": "", "NO_COLOR": "1"}
    code = "from inspect_ai._cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    (path,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(path))
    target = OpenAITarget("m", base_url=server.url)

    async def ours():
        try:
            loaded = load_suite("simple_safety_tests", {"rows": rows})
            return await evaluate(loaded, target, load_judge(guard), runs=tmp_path / "runs", quiet=True)
        finally:
            await target.close()

    _, record = asyncio.run(ours())
    expected = inspect_bridge.named(record.estimates)
    assert rates(metrics(log)) == pytest.approx(rates(expected), abs=1e-12) and 0 < expected["unsafe_rate"] < 1
    assert {body["max_tokens"] for body in server.asked} == {512} and len(server.asked) == 400


@pytest.fixture
def run(tmp_path, stand_in):
    rows, guard = stand_in
    return by_us("simple_safety_tests", {"rows": rows}, guard, tmp_path / "runs", epochs=2)


def test_a_run_as_a_log(run, tmp_path):
    folder, record = run
    path = inspect_bridge.write_log(folder, tmp_path / "a.eval")
    path = inspect_bridge.write_log(folder, tmp_path / "a.eval")  # again: replaced, not added to
    log = read_eval_log(str(path))
    rows = {row["key"]: row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}
    assert log.status == "success" and len(log.samples) == len(rows) == 400
    assert (log.eval.task, log.eval.task_version, log.eval.model) == ("davylamp/simple_safety_tests", 1, "told")
    assert log.eval.metadata["record"] == record.id and log.eval.metadata["inputs"]["seed"] == 0
    assert log.eval.config.epochs == 2 and {sample.epoch for sample in log.samples} == {1, 2}
    assert metrics(log) == inspect_bridge.named(record.estimates)
    (score,) = log.results.scores
    assert (score.scored_samples, score.unscored_samples) == (record.counts["scored"], record.counts["unscored"])
    assert log.stats.model_usage["told"].total_tokens == 400 * 12
    for sample in log.samples:
        row = rows[sample.uuid]
        assert sample.id == row["case"]["id"] and sample.metadata["meta"] == row["case"]["meta"]
        said = [(message["role"], message["content"]) for message in row["case"]["messages"] + row["reply"]]
        assert [(message.role, from_inspect(message).text) for message in sample.messages] == said
        value = sample.scores["verdict"].value
        assert math.isnan(value) if row["verdict"]["value"] is None else value == row["verdict"]["value"]
        assert sample.output.stop_reason == "stop" and sample.total_time == row["seconds"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # inspect's use of pandas
def test_a_log_as_a_dataframe(run, tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    from inspect_ai.analysis import samples_df

    folder, record = run
    path = inspect_bridge.write_log(folder, tmp_path / "a.eval")
    frame = samples_df(str(path), quiet=True)
    scores = pd.to_numeric(frame["score_verdict"], errors="coerce")
    assert len(frame) == 400 and scores.count() == record.counts["scored"]
    assert scores.mean() == pytest.approx(record.estimates[0].value)
    assert set(frame["metadata_category"]) == {
        row.category for row in record.estimates if row.category and row.category.startswith("sst/")
    }


def rewritten(folder, change):
    """The run with its rows changed."""
    path = folder / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_that_failed_and_odd_texts(run, tmp_path):
    folder, _ = run

    def change(rows):
        rows[0] |= {"reply": None, "verdict": None, "error": "busy\ud800"}
        rows[1] |= {"verdict": None, "error": "judge: down"}
        rows[2] |= {
            "reply": [
                {"role": "assistant", "content": "\ud800", "reasoning": "hm", "finish": "length", "tokens": [3, 4]}
            ],
            "verdict": Verdict(0.25, label="partly", categories=("sst/scams",), why="it says so").json(),
        }
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        rows[3]["reply"] = [
            {"role": "assistant", "content": "", "calls": [call]},
            {"role": "tool", "content": "a wall", "call_id": "1"},
        ]

    rewritten(folder, change)
    log = read_eval_log(str(inspect_bridge.write_log(folder, tmp_path / "a.eval")))
    by_key = {sample.uuid: sample for sample in log.samples}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    failed, unjudged, odd, tool = (by_key[row["key"]] for row in rows[:4])
    assert failed.error.message == "busy\\ud800" and not failed.scores and failed.output.empty
    assert math.isnan(unjudged.scores["verdict"].value) and unjudged.scores["verdict"].explanation == "judge: down"
    score = odd.scores["verdict"]
    assert (score.value, score.answer, score.explanation) == (0.25, "partly", "it says so")
    assert score.metadata == {"categories": ["sst/scams"]}
    assert odd.output.stop_reason == "max_tokens" and odd.model_usage["told"].output_tokens == 4
    assert from_inspect(odd.messages[-1]).reasoning == "hm" and odd.output.completion == "\\ud800"
    assert [message.role for message in tool.messages[-2:]] == ["assistant", "tool"]
    assert tool.output.message.tool_calls[0].function == "f"


def test_what_is_no_eval_run_or_no_log(run, tmp_path):
    folder, _ = run
    with pytest.raises(InputError, match=r"must end in \.eval"):
        inspect_bridge.write_log(folder, tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot write"):
        inspect_bridge.write_log(folder, folder / "rows.jsonl" / "a.eval")
    study = tmp_path / "runs" / "a-study"
    study.mkdir()
    save(study, new_record("study", "demo", {"size": "quick"}))
    with pytest.raises(InputError, match="is a study run"):
        inspect_bridge.write_log(study, tmp_path / "a.eval")


def test_a_password_in_an_address_stays_out(tmp_path, stand_in):
    rows, guard = stand_in

    class Secret(Told):
        identity = {"name": "told", "base_url": "http://me:hush@host/v1"}  # noqa: RUF012

    folder, _ = by_us("simple_safety_tests", {"rows": rows}, guard, tmp_path / "runs", Secret())
    log = read_eval_log(str(inspect_bridge.write_log(folder, tmp_path / "a.eval")))
    assert "hush" not in log.model_dump_json() and "host/v1" in log.eval.metadata["inputs"]["target"]["base_url"]


def test_the_report_command_writes_logs(run, tmp_path, monkeypatch):
    folder, record = run
    words = ["report", record.id[:8], "--runs", str(folder.parent), "--format", "eval"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and done.output.strip() == str(folder / "run.eval")
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "b.eval")])
    assert done.exit_code == 0 and (tmp_path / "b.eval").is_file()
    done = CliRunner().invoke(main, [*words, "--title", "x"])
    assert done.exit_code == 2 and "no --title" in done.output
    done = CliRunner().invoke(main, [words[0], "last", *words[1:], "--out", str(tmp_path / "c.eval")])
    assert done.exit_code == 2 and "one run with --out, got 2" in done.output
    monkeypatch.setitem(needs.EXTRAS, "inspect", ("inspect_ai_is_not_here",))
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 3 and "pip install 'davylamp[inspect]'" in done.output


def test_a_log_in_pieces_is_the_log_in_one(run, tmp_path, monkeypatch):
    folder, _ = run
    one = read_eval_log(str(inspect_bridge.write_log(folder, tmp_path / "one.eval")))
    monkeypatch.setattr(inspect_bridge, "PIECE", 130)
    path = str(inspect_bridge.write_log(folder, tmp_path / "many.eval"))
    many = read_eval_log(path)
    assert many.eval == one.eval and many.stats == one.stats and many.results == one.results
    assert [sample.uuid for sample in many.samples] == [sample.uuid for sample in one.samples]
    assert [sample.output.completion for sample in many.samples] == [sample.output.completion for sample in one.samples]
    summaries = read_eval_log_sample_summaries(path)
    assert {summary.uuid for summary in summaries} == {sample.uuid for sample in one.samples} and len(summaries) == 400
    assert (
        read_eval_log_sample(path, id=one.samples[399].id, epoch=one.samples[399].epoch).uuid == one.samples[399].uuid
    )


@pytest.mark.slow
def test_ten_thousand_rows_do_not_take_minutes(run, tmp_path):
    folder, _ = run

    def change(rows):
        first = list(rows)
        rows.clear()
        for number in range(10_000):
            row = first[number % len(first)]
            key = hashlib.sha256(str(number).encode()).hexdigest()[:32]
            rows.append({**row, "key": key, "case": {**row["case"], "id": str(number)}})

    rewritten(folder, change)
    started = time.process_time()
    path = inspect_bridge.write_log(folder, tmp_path / "a.eval")
    assert time.process_time() - started < 60
    assert read_eval_log(str(path), header_only=True).eval.dataset.samples == 10_000


def test_suites_keep_names_that_inspect_can_take():
    assert all(
        entry.name.isidentifier() and "judge" not in {p.name for p in entry.params} for entry in entries("suite")
    )
