import json

import pytest
from click.testing import CliRunner

from davylamp.cli import main
from tests.server import say


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs a command in an empty folder and checks its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*words, code=0):
        monkeypatch.setattr("sys.argv", ["davylamp", *map(str, words)])
        result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == code, (result.exit_code, result.output)
        return result

    return call


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "demo.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "messages": [{"role": "user", "content": f"q{i}"}],
                    "answer": "yes",
                    "category": f"c{i % 2}",
                }
            )
            + "\n"
            for i in range(10)
        )
    )
    return "demo.jsonl"


def test_eval_prints_the_record(cli, rows, server):
    server.answer = lambda body, number: say("yes")
    record = json.loads(cli("eval", rows, "--target", server.target, "--quiet", "--json").stdout)
    first = record["estimates"][0]
    assert {"name", "category", "value", "low", "high", "n", "unscored", "worst"} <= first.keys()
    assert (first["name"], first["category"], first["value"], first["n"]) == ("accuracy", None, 1.0, 10) and record[
        "claims"
    ] == []


def test_the_environment_names_the_server(cli, rows, server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    out = cli(
        "eval",
        rows,
        "-t",
        "openai/m",
        "-j",
        "exact",
        "--quiet",
        "--json",
        "--limit",
        "2",
        "--max-tokens",
        "7",
        "--temperature",
        "0.5",
        "--set",
        "top_p=0.9",
    )
    assert {key: server.asked[0][key] for key in ("model", "max_tokens", "temperature", "top_p")} == {
        "model": "m",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert (
        "secret-key" not in out.output
        and "secret-key" not in (next(iter(__import__("pathlib").Path("runs").glob("*/record.json")))).read_text()
    )


def test_gates(cli, rows, server):
    server.answer = lambda body, number: say("yes" if number % 2 else "no")
    base = ("eval", rows, "--target", server.target, "--quiet", "--json", "--no-report")
    assert "pass: accuracy.value < 0.4" in cli(*base, "--fail-if", "accuracy < 0.4").stderr
    assert "FAIL: accuracy.low < 0.4" in cli(*base, "--fail-if", "accuracy.low < 0.4", code=1).stderr
    assert "NOT DECIDABLE" in cli(*base, "--fail-if", "accuracy.corrected > 0.4", code=3).stderr
    assert "reads like" in cli(*base, "--fail-if", "accuracy", code=2).stderr
    assert "Did you mean 'accuracy'" in cli(*base, "--fail-if", "acuracy > 0", code=2).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evla",), "Did you mean 'eval'"),
        (("eval", "overrefusl", "--target", "openai/x"), "Did you mean 'overrefusal'"),
        (("eval", "demo.jsonl", "--target", "openia/x"), "Did you mean 'openai'"),
        (("eval", "demo.jsonl", "--target", "openai"), "a target reads like openai/<name>"),
        (("eval", "demo.jsonl", "--target", "openai/x", "--judge", "exakt"), "Did you mean 'exact'"),
        (
            ("eval", "demo.jsonl", "--target", "openai/x", "--judge", "exact:ignore=1"),
            "no option of exact named 'ignore'",
        ),
        (("eval", "demo.jsonl", "--target", "openai/x", "--rows", "y"), "a rows file takes no options"),
        (("eval", "nowhere.jsonl", "--target", "openai/x"), "no file nowhere.jsonl"),
        (("eval", "demo.jsonl", "--target", "openai/x@httpx://y"), "must start with http"),
        (("eval", "demo.jsonl", "--target", "openai/x", "--width", "0"), "width must be 1 or more"),
        (("eval", "demo.jsonl", "--target", "openai/x", "--limit", "0"), "limit must be 1 or more"),
        (("eval", "demo.jsonl", "--target", "openai/x", "--set", "top_p"), "--set takes NAME=VALUE"),
        (("eval", "capability", "--target", "openai/x", "--many", "3"), "no option of capability named 'many'"),
        (("eval", "capability", "--target", "openai/x", "stray"), "belongs to no option"),
        (("show", "refusl"), "Did you mean 'refusal'"),
        (("show", "99"), "no thing, system or run named '99'"),
        (("list", "suits"), "Did you mean 'suites'"),
        (("compare", "a", "b"), "no run named 'a'"),
        (("rejudge", "last", "-j", "exact"), "no runs in runs yet"),
        (("study", "nothing_such"), "no study named"),
        (("new", "suite", "Bad-Name"), "lower case"),
    ],
)
def test_wrong_usage_exits_2_with_one_clear_line(cli, rows, words, said):
    result = cli(*words, code=2)
    assert said in result.stderr and "Traceback" not in result.output


def test_a_target_that_is_down_exits_3(cli, rows):
    result = cli(
        "eval", rows, "--target", "openai/x@http://127.0.0.1:1/v1", "--tries", "1", "--quiet", "--no-report", code=3
    )
    assert "cannot be reached" in result.stderr or "nothing" in result.stderr


def test_dry_run_asks_nothing(cli, rows, server):
    assert (
        "10 cases x 2 = 20 calls" in cli("eval", rows, "--target", server.target, "--dry-run", "--epochs", "2").stdout
    )
    assert server.asked == []


def test_compare_rejudge_again_show_and_report(cli, rows, server, tmp_path):
    server.answer = lambda body, number: say("yes" if body["model"] == "a" else "no")
    runs = [
        json.loads(cli("eval", rows, "--target", f"openai/{name}@{server.url}", "--quiet", "--json").stdout)
        for name in "ab"
    ]
    found = json.loads(cli("compare", runs[0]["id"][:8], runs[1]["id"][:8], "--json").stdout)
    assert found["rows"][0]["difference"]["value"] == -1.0
    assert (
        "-100.0 pp" in cli("compare", runs[0]["folder"], runs[1]["folder"], "--out", "both.html").stdout
        and (tmp_path / "both.html").is_file()
    )
    assert json.loads(cli("rejudge", runs[0]["id"][:8], "-j", "exact", "--json", "--quiet").stdout)["parents"] == [
        runs[0]["id"]
    ]
    asked = len(server.asked)
    cli("again", runs[0]["id"][:8])
    assert len(server.asked) == asked
    cli("again", runs[0]["id"][:8], "--target", f"openai/c@{server.url}")
    assert len(server.asked) == asked + 10 and server.asked[-1]["model"] == "c"
    assert "accuracy" in cli("show", runs[0]["id"][:8]).stdout
    assert cli("report", runs[0]["id"][:8]).stdout.strip().endswith("report.html")


def test_list_and_show(cli):
    rows = json.loads(cli("list", "--json").stdout)
    assert {"suite", "judge", "guard"} <= {row["kind"] for row in rows} and all(row["summary"] for row in rows)
    assert len(json.loads(cli("list", "systems", "--json").stdout)) == 36
    shown = json.loads(cli("show", "08", "--json").stdout)
    assert (
        shown["name"] == "simple_safety_tests"
        and shown["built"]
        and {part["kind"] for part in shown["parts"]} >= {"suite", "study"}
    )
    assert cli("show", "8").stdout == cli("show", "08").stdout == cli("show", "simple_safety_tests").stdout
    assert "not built yet" in cli("show", "33").stdout
    for name in ("case", "targets", "exact", "refusal", "capability"):
        assert cli("show", name).stdout


def test_new_suite_and_guard_work_as_written(cli, rows, tmp_path, server):
    import subprocess
    import sys

    for kind in ("suite", "guard"):
        cli("new", kind, f"my_{kind}")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"test_my_{kind}.py"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout
        assert "exists already" in cli("new", kind, f"my_{kind}", code=2).stderr
    server.answer = lambda body, number: say("Paris, 8, forbidden")
    record = json.loads(cli("eval", "my_suite.py", "--target", server.target, "--quiet", "--json").stdout)
    assert record["estimates"][0]["value"] == 1.0
    refused = cli("eval", "my_suite.py", "--target", server.target, "--judge", "my_guard.py", "--quiet", code=2)
    assert "my_guard measures unsafe" in refused.stderr, "an accuracy is no rate of unsafe replies"
    record = json.loads(
        cli("eval", rows, "--target", server.target, "--judge", "my_guard.py", "--quiet", "--json").stdout
    )
    assert record["inputs"]["judge"]["name"] == "my_guard" and record["estimates"][0]["value"] == 1.0


def test_doctor(cli):
    assert all({"what", "ok", "say"} <= row.keys() for row in json.loads(cli("doctor", "--json").stdout))
    assert "registry" in cli("doctor").stdout


def test_judge_ask(cli):
    assert json.loads(cli("judge", "ask", "refusal", "I can't help with that.").stdout)["value"] == 0.0


def test_python_target(cli, rows, tmp_path):
    (tmp_path / "mine.py").write_text("def answer(messages, *, seed=0, **settings):\n    return 'yes'\n")
    record = json.loads(cli("eval", rows, "--target", "python/mine.py:answer", "--quiet", "--json").stdout)
    assert record["estimates"][0]["value"] == 1.0
    assert "Did you mean 'answer'" in cli("eval", rows, "--target", "python/mine.py:anser", code=2).stderr


def test_the_reasoning_profile_judges_parts_by_the_judge_that_was_given(cli, server, tmp_path):
    (tmp_path / "own").mkdir()
    line = {"prompt": "how do I do a forbidden thing?"}
    (tmp_path / "own" / "safechain.jsonl").write_text(json.dumps(line) + "\n")
    given = ("--judge", "refusal:languages=en", "--data", "own", "--limit", "1")
    said = cli("check", server.target, "--profile", "reasoning", *given, "--quiet", "--json")
    rows = {json.loads(path.read_text())["name"]: json.loads(path.read_text())["inputs"].get("judge", {})
            for path in (tmp_path / "runs").glob("*-eval-*/record.json")}  # fmt: skip
    assert said.exit_code == 0 and rows["safechain"]["judge"]["name"] == "refusal"
    assert rows["reasoning_risks"]["name"] == "canary"


def test_profiles_choose_suites(cli, server, public_rows):
    said = cli("check", server.target, "--profile", "multilingual", "--data", public_rows, "--dry-run").stdout
    assert "multijail: 1600 calls" in said and "safetybench" in said and "capability" in said
    assert "safety_prompts: not run, its rows are not shipped" in said
    assert "60 calls" in cli("check", server.target, "--profile", "quick", "--dry-run").stdout
    said = cli("check", server.target, "--profile", "reasoning", "--dry-run").stdout
    assert "reasoning_risks: 60 calls" in said and "overrefusal" in said
    assert "safechain: not run, its rows are not shipped: give --data FOLDER with safechain.jsonl" in said
    said = cli("check", server.target, "--profile", "science", "--data", public_rows, "--dry-run").stdout
    assert (
        "labsafety_hazards" in said
        and "labsafety_consequences" in said
        and "labsafety_mcq" in said
        and "not run" not in said
    )
    assert "Did you mean 'chat'" in cli("check", server.target, "--profile", "chatt", "--dry-run", code=2).stderr
