"""What an audit costs, before it is run: rows, steps, calls and tokens are counted, seconds are measured on a small part and scaled up."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from davylamp.core.nouns import Case

if TYPE_CHECKING:
    from davylamp.audit import Planned, Probes

CURVE = 100  # hazard probes asked on the way


def marks(steps: int) -> list[int]:
    """The steps at which hazards are asked on the way: a quarter, half and three quarters of them.

    >>> marks(100), marks(1)
    ([25, 50, 75], [])
    """
    return sorted({round(steps * share) for share in (0.25, 0.5, 0.75)} - {0, steps})


def costs(
    model: Any, tokenizer: Any, rows: Sequence[Case], questions: Probes, planned: Planned, ask: Any
) -> dict[str, Any]:
    """Rows, steps, calls, tokens, and seconds. The seconds are measured: two steps of training and 16 probes, and scaled up.

    train_tokens: of rows, prompts included.  prompt_tokens: of the probes; replies come on top, up to `reply_tokens_at_most`.
    """
    from davylamp.models.fit import encode, fit
    from davylamp.models.hf import prompt_ids
    from davylamp.models.turns import usable

    kept, dropped = usable(rows)
    encoded, _ = encode(model, tokenizer, kept, None)
    length = sum(len(prompt) + len(answer) for prompt, answer in encoded) / len(encoded)
    whole, steps = planned.steps(len(kept))
    hazards = min(CURVE, sum(case.meta["set"] == "hazards" for case in questions.cases))
    calls = len(questions.cases) * (1 + planned.repeats) + hazards * len(marks(steps)) * planned.repeats
    sample = questions.cases[:: max(1, len(questions.cases) // 16)][:16]
    began = time.perf_counter()
    ask(model, sample)
    per_call = (time.perf_counter() - began) / len(sample)
    per_step = _seconds_of_a_step(model, tokenizer, kept, planned, fit)
    asked = sum(len(prompt_ids(tokenizer, case.messages)) for case in questions.cases) / len(questions.cases)
    return {
        "rows": len(rows),
        "dropped_rows": len(dropped),
        "planned_steps": whole,
        "steps": steps * planned.repeats,
        "calls": calls,
        "train_tokens": round(steps * planned.repeats * planned.batch * length),
        "prompt_tokens": round(calls * asked),
        "reply_tokens_at_most": calls * questions.max_tokens,
        "seconds": round(calls * per_call + steps * planned.repeats * per_step, 3),
        "seconds_per_step": round(per_step, 5),
        "seconds_per_call": round(per_call, 5),
    }


def _seconds_of_a_step(model: Any, tokenizer: Any, rows: Sequence[Case], planned: Planned, fit: Any) -> float:
    """Of the second and third step of a fine-tune that is thrown away; the first one also pays for what is set up once."""
    from numpy.random import default_rng

    from davylamp.models.adapters import take_off

    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    own = model if planned.method == "lora" else copy.deepcopy(model)
    at: list[float] = []
    found = fit(
        own, rows, tokenizer=tokenizer, rng=default_rng(0), method=planned.method, lora=planned.lora, lr=planned.rate,
        batch=planned.batch, steps=3, at=(1, 3), watch=lambda step, _: at.append(time.perf_counter()),
        keep_adapter=planned.method == "lora",
    )  # fmt: skip
    if planned.method == "lora":
        take_off(found.model, asked)
    return (at[1] - at[0]) / 2


def shown(cost: Mapping[str, Any]) -> list[str]:
    """The costs as `--dry-run` prints them.

    >>> shown({"rows": 100, "seconds": 3.5})
    ['rows: 100', 'seconds: 3.5']
    """
    return [f"{name.replace('_', ' ')}: {value:,}" for name, value in cost.items()]


def report_costs(cost: Mapping[str, Any]) -> None:
    for line in shown(cost):
        click.echo(line)
