"""How busy an attack campaign keeps a target 64 wide: questions a second of `davylamp attack` over rows a second of the plain runner.

The target is in this process: each call takes 50 ms and never blocks, as a server at 64 calls a time would be. The plain runner asks as
many questions as the campaign did. Ratios are medians over paired rounds; both write their rows to a fresh log.

    python benchmarks/attacks.py [--rounds 3] [--json]
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from davylamp.attacks._campaign import Campaign, arm_of
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message
from davylamp.core.registry import find
from davylamp.core.rows import RowLog
from davylamp.core.run import Limits, collect

WIDTH, SECONDS = 64, 0.05
ATTACKS = ("prefix_injection", "refusal_suppression", "role_play", "encoding", "instruction_attack", "injection")


class Slow:
    """Refuses after a fixed time, however many ask at once."""

    name, identity = "slow", {"name": "slow"}

    def __init__(self):
        self.asked = 0

    async def __call__(self, messages, *, seed=0, **settings):
        self.asked += 1
        await asyncio.sleep(SECONDS)
        return Message("assistant", "I can't help with that.")


def cases(n):
    return [
        Case(f"{i}", (Message("user", f"stand-in request number {i}"),), category=f"demo/{i % 8}") for i in range(n)
    ]


async def timed(work):
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def one_round(rows, folder):
    """(plain rows a second, campaign's questions a second for: one attack, redteam)."""
    judge, limits, out = load_judge("refusal"), Limits(width=WIDTH), {}
    asyncio.run(
        judge((Message("user", "a"), Message("assistant", "b")))
    )  # its phrases are read once, at the first reply
    arms = [arm_of(find("attack", name), {}) for name in ATTACKS]
    plans = {
        "attack": lambda: Campaign(arms[2:3], cases(rows // 8), judge, budget=2**62, allowance=8, stop=False, even=True),
        "redteam": lambda: Campaign(arms, cases(rows // 8), judge, budget=rows),
    }  # fmt: skip
    for name, plan in plans.items():
        log, target = RowLog(folder / f"{name}.jsonl"), Slow()
        seconds = asyncio.run(timed(plan().run(target, log, limits=limits)))
        log.close()
        out[name] = target.asked / seconds
    log, target = RowLog(folder / "plain.jsonl"), Slow()
    seconds = asyncio.run(timed(collect(cases(rows), target, judge, log, limits=limits)))
    log.close()
    return {"plain": target.asked / seconds, **out}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(one_round(args.rows, Path(folder)))
    figures = {f"{name}_per_s": round(statistics.median(one[name] for one in found), 1) for name in found[0]}
    for name in ("attack", "redteam"):
        figures[f"{name}_over_plain"] = round(statistics.median(one[name] / one["plain"] for one in found), 3)
    if args.json:
        print(json.dumps({"figures": figures}))
    else:
        print(f"{args.rows} questions, width {WIDTH}, {1000 * SECONDS:.0f} ms a call, median of {args.rounds} rounds\n")
        print("\n".join(f"| {name} | {value} |" for name, value in figures.items()))


if __name__ == "__main__":
    main()
