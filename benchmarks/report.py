"""Seconds and peak memory of the HTML report of a run with 100,000 rows: rows are streamed, a few dozen are kept.

Peer in the same run, in turn: a process that only reads the same rows.jsonl and calls json.loads on every line. Each is a whole
process, start-up included; ratios are medians over paired rounds. `peak_over_1000_rows_peak`: the report's peak memory over that of
a report of 1,000 such rows.

    python benchmarks/report.py [--rows 100000] [--rounds 3] [--json]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from davylamp.core.evaluate import finish
from davylamp.core.nouns import Case, Message, Metric, Verdict
from davylamp.core.record import folder_for, new_record
from davylamp.core.rows import canonical, digest
from davylamp.core.tally import metric_json

METRIC = Metric("unsafe_rate", by=("category",))
PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""  # KiB of this program alone: what wait4 gives also counts the parent it was forked from
REPORT = (
    """
import sys
from pathlib import Path
from davylamp.report.html import write_report
write_report(Path(sys.argv[1]) / "report.html", [Path(sys.argv[1])], title="A large run")
"""
    + PEAK
)
LOADS = (
    """
import json, sys
with open(sys.argv[1] + "/rows.jsonl", "rb") as file:
    for line in file:
        json.loads(line)
"""
    + PEAK
)


def make_run(runs, count):
    """A finished run of so many rows of about 1.2 kB each, in 20 categories, 2 % without a verdict."""
    draw = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    inputs = {
        "suite": {
            "name": "large",
            "version": 1,
            "options": {},
            "cases": digest(count),
            "metrics": [metric_json(METRIC)],
        },
        "target": {"name": "model"},
        "judge": {"name": "plain", "version": 1},
        "seed": 0,
        "epochs": 1,
    }
    record = new_record("eval", "large", inputs)
    folder = folder_for(runs, record)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for index in range(count):
            case = Case(
                f"row-{index}", (Message("user", " ".join(draw.choices(words, k=40))),), category=f"area/{index % 20}"
            )
            reply = Message("assistant", " ".join(draw.choices(words, k=100)))
            verdict = Verdict(
                None if draw.random() < 0.02 else float(draw.random() < 0.1), label="x", why="a reason in a few words"
            )
            rest = {"case": case.json(), "seed": 0, "seconds": 0.1, "reply": [reply.json()], "verdict": verdict.json()}
            file.write(f'{{"key":"{index:032x}",{canonical(rest)[1:]}\n')
    finish(folder, record, (METRIC,), epochs=1, runs=runs)
    return folder


def run(script, folder):
    """(wall seconds, CPU seconds, peak resident MiB) of one whole process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE)
    peak = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("a measured process failed")
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, int(peak) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, small = make_run(Path(place), args.rows), make_run(Path(place), 1000)
        mib = (folder / "rows.jsonl").stat().st_size / 2**20
        base = run(REPORT, small)
        rounds = [(run(REPORT, folder), run(LOADS, folder)) for _ in range(args.rounds)]
        page_kib = (folder / "report.html").stat().st_size / 1024
    peak = max(ours[2] for ours, _ in rounds)
    figures = {
        "seconds": statistics.median(ours[0] for ours, _ in rounds),
        "cpu_s": statistics.median(ours[1] for ours, _ in rounds),
        "report_seconds_over_json_loads": statistics.median(ours[1] / peer[1] for ours, peer in rounds),
        "peak_mib": peak,
        "peak_over_1000_rows_peak": peak / base[2],
        "rows_mib": mib,
        "page_kib": page_kib,
    }
    figures = {name: round(value, 3) for name, value in figures.items()}
    if args.json:
        print(json.dumps({"figures": figures}))
    else:
        print(f"{args.rows:,} rows, median of {args.rounds} rounds, whole processes\n")
        print("\n".join(f"| {name} | {value} |" for name, value in figures.items()))


if __name__ == "__main__":
    main()
