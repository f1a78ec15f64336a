"""Held load on the gateway: 80 % of its capacity, whole and streamed answers, each checked against its question; memory watched.

Exit code 1 if an answer is lost, cut or another's.

    python benchmarks/gateway_hold.py [--seconds 600] [--share 0.8] [--guard SPEC] [--json]
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy
from gateway import ends, ours
from gateway_ends import Plan, load

HERE = Path(__file__).parent
MIB = 2**20
WIDTH = 32  # connections for whole answers, and as many for streams


async def both(port, **how):
    """Whole and streamed answers at once; their plans when they are done."""
    plans = [Plan(stream=stream, **how) for stream in (False, True)]
    await asyncio.gather(*(load(port, plan, concurrency=WIDTH) for plan in plans))
    return plans


async def hold(gateway, seconds, share):
    found = await both(gateway.port, seconds=4.0)
    capacity = sum(plan.counts["good"] for plan in found) / 4.0
    memory, end = [], time.perf_counter() + seconds
    work = asyncio.create_task(both(gateway.port, seconds=seconds, rate=share * capacity / 2))
    while not work.done():
        await asyncio.wait([work], timeout=1.0)
        if time.perf_counter() < end:
            memory.append(gateway.memory())
    return capacity, await work, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the requests a second that it took at most")
    parser.add_argument("--guard", default=str(HERE / "word_guard.py"), help="a spec, as davylamp serve takes it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ends() as far:
        gateway = ours(f"http://127.0.0.1:{far.port}/v1", Path(folder), args.guard)
        try:
            capacity, plans, memory = asyncio.run(hold(gateway, args.seconds, args.share))
        finally:
            gateway.end()
    early, late = (numpy.median(part) for part in (memory[: len(memory) // 5 or 1], memory[-(len(memory) // 5 or 1) :]))
    asked = sum(plan.number for plan in plans)
    figures = {name: sum(plan.counts[name] for plan in plans) for name in ("lost", "refused", "mixed_up", "cut")}
    bad = sum(figures.values())
    figures |= {"answered": sum(plan.counts["good"] for plan in plans), "per_s": asked / args.seconds}
    figures |= {"capacity_per_s": capacity, "memory_mib": late / MIB, "memory_late_over_early": late / early}
    for name, plan in zip(("whole", "streamed"), plans, strict=True):
        figures |= {f"{name}_p{p}_ms": 1e3 * numpy.percentile(plan.seconds, p) for p in (50, 99)}
    figures = {name: round(float(value), 3) if value % 1 else int(value) for name, value in figures.items()}
    if args.json:
        print(json.dumps({"figures": figures}))
    else:
        print("\n".join(f"| {name} | {value:,} |" for name, value in figures.items()))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
