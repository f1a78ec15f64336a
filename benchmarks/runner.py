"""Whole-process CPU seconds for 1,000 rows at width 64 against a loopback server that answers at once.

Ours: `davylamp eval ROWS.jsonl` with rows judged, rows, record and report written. Peers in the same run, in turn: a bare aiohttp
loop (the limit), inspect_ai where it is installed. Ratios are medians over paired rounds.

    python benchmarks/runner.py [--rounds 5] [--json]
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
INSPECT = """
import sys
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
import json
samples = [Sample(input=json.loads(line)["messages"][0]["content"], target="can't") for line in open(sys.argv[2], encoding="utf-8")]
logs = eval(Task(dataset=samples, scorer=includes()), model="openai-api/mock/mock", model_base_url=sys.argv[1], max_connections=64,
     display="none", log_dir=sys.argv[3], model_args={"api_key": "x"})
assert logs[0].status == "success", logs[0].error
"""


@contextlib.contextmanager
def mock_server():
    process = subprocess.Popen(
        [sys.executable, str(HERE / "mock_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.stdin.close()
        process.wait()


def cpu_seconds(command, **environment):
    """CPU seconds (user + system) of one whole process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, mock_server() as url:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(
            "".join(
                json.dumps(
                    {
                        "id": str(i),
                        "messages": [{"role": "user", "content": f"Question number {i}: how are you?"}],
                        "category": f"demo/{i % 5}",
                    }
                )
                + "\n"
                for i in range(args.rows)
            ),
            encoding="utf-8",
        )
        one = Path(folder) / "one.jsonl"
        one.write_text(rows.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")

        def ours(path, round_):
            return [
                sys.executable,
                "-m",
                "davylamp",
                "eval",
                str(path),
                "--target",
                f"openai/mock@{url}",
                "--judge",
                "refusal",
                "--width",
                "64",
                "--runs",
                f"{folder}/runs-{round_}-{path.stem}",
                "--quiet",
                "--json",
            ]

        plans = {
            "loop": lambda n: cpu_seconds(
                [sys.executable, str(HERE / "bare_loop.py"), url, str(rows), "64", f"{folder}/out"]
            ),
            "ours": lambda n: cpu_seconds(ours(rows, n)),
            "ours_one_row": lambda n: cpu_seconds(ours(one, n)),
        }
        if importlib.util.find_spec("inspect_ai"):
            script = Path(folder) / "peer.py"
            script.write_text(INSPECT, encoding="utf-8")
            plans["inspect"] = lambda n: cpu_seconds(
                [sys.executable, str(script), url, str(rows), f"{folder}/logs"], MOCK_API_KEY="x"
            )
        times = {name: [] for name in plans}
        for number in range(args.rounds):
            for name, plan in plans.items():
                if name != "inspect" or number < 2:  # the peer is slow and steady: two rounds tell enough
                    times[name].append(plan(number))
    middle = {name: statistics.median(values) for name, values in times.items()}
    figures = {
        "ours_over_loop": statistics.median(a / b for a, b in zip(times["ours"], times["loop"], strict=True)),
        **{f"{name}_cpu_s": value for name, value in middle.items()},
    }
    if "inspect" in middle:
        figures["inspect_over_ours"] = middle["inspect"] / middle["ours"]
    figures = {name: round(value, 3) for name, value in figures.items()}
    if args.json:
        print(json.dumps({"figures": figures}))
    else:
        print(f"{args.rows} rows, width 64, median of {args.rounds} rounds, whole-process CPU seconds\n")
        print("\n".join(f"| {name} | {value} |" for name, value in figures.items()))


if __name__ == "__main__":
    main()
