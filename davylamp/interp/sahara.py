"""Sahara: a greedy search for the group of attention heads whose joint ablation turns the hidden states of harmful prompts the furthest.
Source: arXiv:2410.13708, section 3.4 (algorithm 1). Differs: given benign prompts, their angle is taken off the score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from davylamp.core.errors import InputError, RunError
from davylamp.core.nouns import Case, Estimate
from davylamp.core.record import write_atomic
from davylamp.core.registry import interp
from davylamp.core.rows import digest
from davylamp.interp._effect import Replies, Speaker, rise
from davylamp.interp._prompts import encode, split
from davylamp.interp._scores import ranked, score_heads
from davylamp.interp.ships import _plain, heatmap
from davylamp.models.hooks import COMPONENTS, Head, anatomy, head_name, parse_heads

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@interp(
    version=1,
    source="arXiv:2410.13708",
    licence="Apache-2.0",
    stage="post-training",
    threats=("jailbreak", "harmful-compliance", "misalignment"),
    needs="hf",
    systems=("27",),
)
def sahara(
    model: PreTrainedModel,
    rows: Sequence[Case],
    *,
    tokenizer: PreTrainedTokenizerBase,
    rng: Generator,
    size: int = 3,
    contrast: str = "",
    component: Literal["q", "k", "v"] = "q",
    kind: Literal["scale", "mean"] = "scale",
    epsilon: float = 1e-5,
    r_main: int = 1,
    wrapper: str = "",
    judge: str = "",
    top_k: int = 0,
    new_tokens: int = 128,
    state: str = "",
    tokens_at_once: int = 0,
) -> dict[str, Any]:
    """Find a group of heads, one by one, whose ablation moves harmful prompts most, and with a judge what ablating it does to the answers.

    rows: harmful requests; benign ones as for ships, told by meta.label or meta.set, or from the file `contrast`. Where there are two
    or more, a head's score is its angle on harmful prompts minus that on benign ones; else the paper's angle alone.
    size: heads in the group; the paper goes to 5 and sees the most at about 3.  component, kind, epsilon, r_main, wrapper: as for ships.
    judge: a judge or guard that measures complied, unsafe or refused; then the rows are answered with 0, 1, … heads ablated.
    top_k: 0 = greedy answers, k = drawn among the k likeliest tokens (the paper also takes 5).  new_tokens: of an answer.
    state: a file that keeps each finished step, so that the same search goes on after a crash.
    tokens_at_once: tokens that go through a layer together; 0 = as suits the machine.
    """
    found = anatomy(model)
    layers, many = len(found.layers), found.count(component)
    if not 1 <= size <= layers * many:
        raise InputError(f"size must be from 1 to the {layers * many} heads of the model, got {size}")
    harmful, benign = split(rows, contrast)
    prompts, harmless = encode(model, tokenizer, harmful, wrapper), encode(model, tokenizer, benign, wrapper)
    if len(prompts) < 2 or not 1 <= r_main <= len(prompts):
        raise InputError(
            f"sahara needs two prompts or more and r_main from 1 to their number, got {len(prompts)} and {r_main}"
        )
    how: dict[str, Any] = {"component": component, "kind": kind, "epsilon": epsilon}
    notes = [f"with {len(prompts)} prompts the angles are noise; give 8 or more"] if len(prompts) < 8 else []
    named = {"r_main": r_main, **how, "prompts": prompts, "harmless": harmless, "weights": _print_of(model)}
    memory = _State(Path(state) if state else None, digest(named))
    search = _Search(
        model,
        prompts,
        harmless,
        [row.id for row in harmful],
        {**how, "r_main": r_main, "tokens_at_once": tokens_at_once},
    )
    steps = memory.steps[:size]
    while len(steps) < size:
        steps.append(search.step(parse_heads([step["head"] for step in steps])))
        memory.save(steps)
    group = parse_heads([step["head"] for step in steps])
    out: dict[str, Any] = {
        "heads": {"layers": layers, "heads": many, "of": COMPONENTS[component]},
        "ablation": how,
        "prompts": {"harmful": len(harmful), "benign": len(benign)},
        "scored_by": "angle on harmful minus angle on benign prompts"
        if len(harmless) > 1
        else "angle on harmful prompts",
        "group": [head_name(head) for head in group],
        "steps": steps,
        "forward_passes": round(sum(step["forward_passes"] for step in steps), 1),
    }
    estimates = [
        Estimate(step["degrees"], None, None, len(prompts), method="angle between main directions", unit="degrees",
                 name="generalized_ships", arm=f"{i} heads ablated: {', '.join(out['group'][:i])}")
        for i, step in enumerate(steps, 1)
    ]  # fmt: skip
    figures = [
        heatmap(
            f"Sahara, step {i}: score of each head", step["board"], "degrees",
            f"Head {step['head']} joins the group" + (f" after {', '.join(out['group'][: i - 1])}." if i > 1 else "."),
        )
        for i, step in enumerate(steps, 1)
    ]  # fmt: skip
    if judge:
        speaker = Speaker(model, tokenizer, judge, new_tokens=new_tokens, top_k=top_k, **how)
        effects, drawn = _effect(speaker, harmful, benign, group, rng)
        estimates += effects
        figures.append(drawn)
    else:
        notes.append("no judge was given, so that no answer was looked at: a large angle is not yet a lost refusal")
    return {**out, "estimates": estimates, "figures": figures, "notes": notes}


class _Search:
    """One search: what stays the same over its steps is kept."""

    def __init__(
        self, model: Any, prompts: list[list[int]], harmless: list[list[int]], names: list[str], how: dict[str, Any]
    ):
        self.model, self.sets, self.names, self.how = (
            model,
            [prompts] + ([harmless] if len(harmless) > 1 else []),
            names,
            how,
        )
        self.plain: list[Any] = []

    def step(self, group: Sequence[Head]) -> dict[str, Any]:
        """The next head: every head outside the group is scored together with it, against the model as it is."""
        angles, passes = [], 0.0
        if group and not self.plain:  # a search that goes on after a crash
            for prompts in self.sets:
                self.plain.append(
                    score_heads(self.model, prompts, heads=[], ships=False, names=self.names, **self.how).states
                )
        for i, prompts in enumerate(self.sets):
            against = self.plain[i] if group else None
            names = self.names if i == 0 else ()
            scored = score_heads(
                self.model, prompts, group=group, ships=False, against=against, names=names, **self.how
            )
            if not group:
                self.plain.append(scored.states)
            angles.append(scored.angles)
            passes += scored.passes
        board = angles[0] - angles[1] if len(angles) > 1 else angles[0]
        if np.isinf(board).any():
            raise RunError("an angle is not finite; nothing was ranked")
        best = ranked(board)[0]
        return {
            "head": head_name(best),
            "degrees": float(angles[0][best]),
            "benign_degrees": float(angles[1][best]) if len(angles) > 1 else None,
            "board": _plain(board),
            "forward_passes": round(passes, 1),
        }


class _State:
    """The finished steps, in a file that names the search it belongs to."""

    def __init__(self, path: Path | None, key: str):
        self.path, self.key = path, key
        self.steps: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                same = kept["key"] == key
                self.steps = list(kept["steps"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path} is no state of a sahara search: move it away or name another file") from None
            if not same:
                raise InputError(
                    f"{path} belongs to another search (model, prompts or options differ): name another file"
                )

    def save(self, steps: list[dict[str, Any]]) -> None:
        if self.path is not None:
            write_atomic(self.path, json.dumps({"key": self.key, "steps": steps}) + "\n")


def _print_of(model: Any) -> list[str]:
    """Sums over every weight: equal for equal weights, and different for all that a user could mistake for them."""
    return [float(parameter.detach().double().abs().sum()).hex() for parameter in model.parameters()]


def _effect(
    speaker: Speaker, harmful: Sequence[Case], benign: Sequence[Case], group: Sequence[Head], rng: Generator
) -> tuple[list[Estimate], dict[str, Any]]:
    """Compliance and, where benign rows have answers, right answers with 0, 1, … heads of the group ablated; and the curve."""
    seed, skilled = int(rng.integers(2**31)), any(row.answer is not None for row in benign)
    freed: list[Replies] = []
    right: list[Replies] = []
    for many in range(len(group) + 1):
        freed.append(speaker.comply(harmful, group[:many], seed))
        if skilled:
            right.append(speaker.answer(benign, group[:many]))
    arms = [f"{many} heads ablated" for many in range(len(group) + 1)]
    estimates, series = [], []
    for name, all_of_them, better in (("compliance", freed, False), ("accuracy", right, True)):
        found = [replies.estimate(name, arm, better=better) for arm, replies in zip(arms, all_of_them, strict=False)]
        estimates += found
        if found:
            x = list(range(len(found)))
            lines = {
                key: [getattr(one, field) for one in found]
                for key, field in (("y", "value"), ("low", "low"), ("high", "high"))
            }
            series.append(
                {"name": f"{name} on {'harmful' if name == 'compliance' else 'benign'} prompts", "x": x, **lines}
            )
        estimates += [
            rise(all_of_them[0], replies, rng=rng, name=f"{name}_rise", arm=arm)
            for arm, replies in list(zip(arms, all_of_them, strict=False))[1:]
        ]
    figure = {
        "kind": "curves",
        "title": "Answers with the group's heads ablated, one after another",
        "x_label": "heads ablated",
        "y_label": "share of prompts",
        "y_unit": "rate",
        "series": series,
        "note": f"Judged by {speaker.judge.name}. An answer that the whole model finds incoherent is unscored, and no success.",
    }
    return estimates, figure
