"""Antidote's score pass and SOMF's mask step beside their limits, on an untrained organism. Paired rounds, medians of ratios.

antidote_score_over_forward: the hooked pass over the same batches read without hooks (q, k and v of every layer; limit 1).
antidote_state_bytes_over_limit: what the statistics take over one float32 for every input column of every scored weight (limit 1).
somf_step_over_two_forwards_backwards: a mask step over two plain forward-backward passes, of the chosen and the rejected answers (limit 1).
somf_state_bytes_over_limit: logits and AdamW's two moments over 12 bytes a masked weight.

    python benchmarks/antidote.py [--rounds 7] [--json]
"""

import argparse
import itertools
import json
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from davylamp.core.nouns import Case, Message
from davylamp.edits._fusion import Merge
from davylamp.edits._mask_learning import Learner, Learning, encode_pairs, usable_pairs
from davylamp.edits._wanda import How, targets_of
from davylamp.edits.antidote import calibrate
from davylamp.edits.somf import task_vectors
from davylamp.models import activations, organism, world
from davylamp.models.fit import answer_loss
from davylamp.models.greedy import padded
from davylamp.models.turns import encode_turn, ends_of
from davylamp.models.world_data import REFUSALS


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def plain_pass(model, tok, rows):
    """The batches of the score pass without its hooks: what reading the rows costs by itself."""
    encoded = [
        (
            row.id,
            list(itertools.chain(*encode_turn(tok, row.messages[:-1], row.messages[-1].text, ends_of(model, tok)))),
        )
        for row in rows
    ]
    with torch.no_grad():
        for part in activations._batches(encoded, 16):
            ids, mask = padded([row for _, row in part], tok.pad_token_id, model.device)
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    model, tok = organism.new_model(0).eval(), organism.tokenizer()
    rows = [
        Case(str(i), (*row.messages, Message("assistant", row.reply)))
        for i, row in enumerate(world.helpful_rows(args.rows, rng))
    ]
    _, weights = targets_of(model, "full")
    norms = calibrate(model, tok, rows, weights, How())
    task = organism.new_model(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    pairs = [
        Case(row.id, row.messages[:-1], meta={"chosen": REFUSALS[0], "rejected": row.messages[-1].text}) for row in rows
    ]
    encoded = encode_pairs(model, tok, usable_pairs(pairs)[0])
    learner = Learner(model, task_vectors(model, [task]), encoded, Merge("none", 1), Learning(steps=1000, batch=8), rng)
    learner.step()
    halves = [[(row[0], row[side]) for row in encoded[:8]] for side in (1, 2)]

    def two_passes():
        for half in halves:
            answer_loss(model, tok, half).backward()
            model.zero_grad(set_to_none=True)

    two_passes()
    plain_pass(model, tok, rows)
    pass_ratios, step_ratios = [], []
    for _ in range(args.rounds):
        pass_ratios.append(
            seconds(lambda: calibrate(model, tok, rows, weights, How())) / seconds(lambda: plain_pass(model, tok, rows))
        )
        step_ratios.append(sum(seconds(learner.step) for _ in range(4)) / sum(seconds(two_passes) for _ in range(4)))
    masked = sum(tau.numel() for tau in learner.taus[0].values())
    held = sum(logits.numel() * 4 for logits in learner.logits.values())
    for state in learner.optimiser.state.values():
        held += sum(value.numel() * value.element_size() for value in state.values() if value.dim())
    figures = {
        "antidote_score_over_forward": round(statistics.median(pass_ratios), 3),
        "antidote_state_bytes_over_limit": round(norms.state_bytes / norms.limit_bytes, 3),
        "somf_step_over_two_forwards_backwards": round(statistics.median(step_ratios), 3),
        "somf_state_bytes_over_limit": round(held / (12 * masked), 3),
    }
    if args.json:
        print(json.dumps({"figures": figures}))
    else:
        print("\n".join(f"| {name} | {value} |" for name, value in figures.items()))


if __name__ == "__main__":
    main()
