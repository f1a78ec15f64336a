"""CPU seconds of commands that should be instant, beside an empty interpreter. Limits: --help 0.3 s, list 0.4 s.

python benchmarks/startup.py [--json]
"""

import argparse
import json
import statistics
import sys

from runner import cpu_seconds

COMMANDS = {
    "interpreter": ["-c", "pass"],
    "help": ["-m", "davylamp", "--help"],
    "list": ["-m", "davylamp", "list"],
    "show_08": ["-m", "davylamp", "show", "08"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    times = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, words in COMMANDS.items():
            times[name].append(cpu_seconds([sys.executable, *words]))
    figures = {f"{name}_cpu_s": round(statistics.median(values), 3) for name, values in times.items()}
    figures["help_over_interpreter"] = round(figures["help_cpu_s"] / figures["interpreter_cpu_s"], 2)
    print(
        json.dumps({"figures": figures})
        if args.json
        else "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    )


if __name__ == "__main__":
    main()
