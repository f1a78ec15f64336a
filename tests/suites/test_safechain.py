"""System 15: the suites, their loaders, and Safe@K of a run."""

import asyncio
import csv
import json
import sys
import types

import pytest
from click.testing import CliRunner

from davylamp.cli import main
from davylamp.core.errors import InputError, NeedsError, RunError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.ksafe import k_report
from davylamp.models import long_thought as world


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("column", ["instruction", "forbidden_prompt", "goal", "prompt"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_many_shapes(tmp_path, column, kind):
    rows = [{column: f"fold paper bird {i}", "category": ("Violence", "my own")[i % 2]} for i in range(4)]
    suite = load_suite("safechain", {"rows": write(tmp_path / f"x.{kind}", rows)}).suite
    cases = list(suite.cases)
    assert [case.category for case in cases] == ["strongreject/violence", "safechain/my_own"] * 2
    assert suite.settings == {"temperature": 0.0, "max_tokens": 16_000} and suite.judge == "parts"
    sampled = load_suite("safechain", {"rows": str(tmp_path / f"x.{kind}"), "sampled": "true"}).suite
    assert sampled.settings["temperature"] == 0.6 and sampled.settings["top_p"] == 0.95


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "x"}], "x.jsonl line 1: no prompt in a column"),
        ([{"goal": " "}], "line 1: no prompt"),
        ([{"id": "a", "goal": "x"}, {"id": "a", "goal": "y"}], "line 2: id 'a' stands already at x.jsonl line 1"),
    ],
)
def test_bad_rows(tmp_path, rows, says):
    with pytest.raises(InputError, match=says):
        load_suite("safechain", {"rows": write(tmp_path / "x.jsonl", rows)})


def test_other_bad_options(tmp_path):
    with pytest.raises(InputError, match=r"must be a .csv or .jsonl file"):
        load_suite("safechain", {"rows": "x.parquet"})
    with pytest.raises(InputError, match="max_tokens must be 1"):
        load_suite("safechain", {"rows": write(tmp_path / "x.jsonl", [{"goal": "x"}]), "max_tokens": "0"})


def test_the_public_home(monkeypatch):
    calls = []
    fake = types.ModuleType("datasets")

    def load_dataset(home, config, split):
        calls.append((home, config, split))
        if config == "50":
            raise OSError("no network")
        return [{"instruction": f"fold bird {i}", "data_type": "adversarial_harmful"} for i in range(3)]

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr("davylamp.data.public.need", lambda *_: None)
    assert load_suite("safechain").total == 3 and calls == [("UWNSL/WildJailbreakEval", "250", "train")]
    with pytest.raises(RunError, match=r"could not fetch UWNSL/WildJailbreakEval \(OSError\)"):
        load_suite("safechain", {"part": "50"})


def test_without_the_extra_it_says_what_to_type():
    from davylamp.core.needs import missing

    if not missing("data"):
        pytest.skip("the data extra is installed")
    with pytest.raises(NeedsError, match="--rows FILE"):
        load_suite("safechain")


@pytest.mark.parametrize("name", ["jailbreakbench/jbb_behaviors", "advbench/harmful_behaviors", "catqa/catqa_en"])
def test_public_rows(public_rows, name):
    loaded = load_suite("safechain", {"rows": str(public_rows / f"{name}.jsonl")})
    assert loaded.total > 50 and all(case.messages[-1].text for case in loaded.suite.cases)


class Thinker:
    """Plans the object in its thought; every fifth seed it also answers it; never else."""

    name, identity = "thinker", {"name": "thinker"}

    async def __call__(self, messages, *, seed=0, **settings):
        ask = world.read(messages)
        if seed == 3:
            return Message("assistant", "", reasoning=world.plan_of(ask.item), finish="length")
        return Message(
            "assistant",
            world.answer(ask) if seed == 4 else world.REFUSAL,
            reasoning="" if seed else world.plan_of(ask.item),
            tokens=(3, 4),
        )


def run(tmp_path, epochs=5):
    loaded = load_suite("long_thought", {"n": "40"})
    judge = load_judge(loaded.suite.judge)
    return asyncio.run(evaluate(loaded, Thinker(), judge, runs=tmp_path, epochs=epochs, quiet=True))[0]


def test_safe_at_k_of_a_run(tmp_path):
    found, warnings = k_report(run(tmp_path))
    value = {(e.category, e.name): e for e in found}
    # seed 0: unsafe thought; 1, 2: nothing; 3: an unsafe thought that was cut off; 4: unsafe answer
    assert value["whole", "safe@1"].value == 0.4 and value["whole", "safe@5"].value == 0.0
    assert value["whole", "cons_safe@5"].value == 0.0
    assert value["answer", "safe@1"].value == 0.75 and value["answer", "safe@1"].unscored == 40
    assert value["thought", "safe@1"].value == 0.0 and value["thought", "safe@1"].unscored == 120
    assert value[None, "share_only_answer_safe"].value == 1.0 and value[None, "answer_minus_thought"].value == 1.0
    assert value[None, "words_if_unsafe"].value > value[None, "words_if_safe"].value
    assert any("40 replies end inside their thought" in text for text in warnings)


def test_one_reply_each_has_no_safe_at_k(tmp_path):
    names = {e.name for e in k_report(run(tmp_path, epochs=1))[0]}
    assert "safe@1" in names and not any(name.startswith("cons") for name in names)


def test_the_command(tmp_path):
    folder = run(tmp_path)
    done = CliRunner().invoke(main, ["ksafe", folder.name, folder.name, "--runs", str(tmp_path)])
    assert done.exit_code == 0 and "cons_safe@5 (whole)" in done.output
    as_json = CliRunner().invoke(main, ["ksafe", str(folder), "--json", "--runs", str(tmp_path)])
    assert any(e["name"] == "safe@5" for e in next(iter(json.loads(as_json.output).values())))


def test_a_run_of_something_else(tmp_path):
    loaded = load_suite("long_thought", {"what": "chains", "n": "20"})
    judge = load_judge(loaded.suite.judge)
    folder, _ = asyncio.run(evaluate(loaded, Always(), judge, runs=tmp_path, quiet=True))
    with pytest.raises(InputError, match="no evaluation by a judge that measures unsafe"):
        k_report(folder)


class Always:
    name, identity = "always", {"name": "always"}

    async def __call__(self, messages, *, seed=0, **settings):
        return Message("assistant", world.answer(world.read(messages)))
