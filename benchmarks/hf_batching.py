"""The hf target's micro-batches beside one-by-one `generate` of transformers, on 200 prompts to an organism. Goal: 5 times as fast.

python benchmarks/hf_batching.py [--json]
"""

import argparse
import asyncio
import json
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from davylamp.models import organism, world
from davylamp.models.hf import load

TOKENS = 64


def one_by_one(model, tok, cases):
    out = []
    for case in cases:
        turns = [message.json() for message in case.messages]
        inputs = tok.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        out.append(tok.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return out


async def batched(target, cases):
    replies = await asyncio.gather(*(target(case.messages, max_tokens=TOKENS) for case in cases))
    return [reply.text for reply in replies]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = world.cases("capability", args.prompts, np.random.default_rng(0), style="mixed")
    model, tok = organism.load("aligned")
    target = load(str(organism.path("aligned")))
    asyncio.run(batched(target, cases[:64]))  # warm both up
    one_by_one(model, tok, cases[:4])
    start = time.perf_counter()
    alone = one_by_one(model, tok, cases)
    middle = time.perf_counter()
    together = asyncio.run(batched(target, cases))
    end = time.perf_counter()
    assert together == alone, "a batch must say what each row says alone"
    figures = {
        "one_by_one_s": round(middle - start, 2),
        "batched_s": round(end - middle, 2),
        "one_by_one_over_batched": round((middle - start) / (end - middle), 1),
    }
    print(
        json.dumps({"figures": figures})
        if args.json
        else "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    )


if __name__ == "__main__":
    main()
