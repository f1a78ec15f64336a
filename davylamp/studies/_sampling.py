"""What the studies of reasoning share: many replies of a small model under a thinking plan, and what they give away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from davylamp.core.nouns import Case, Message
from davylamp.models import long_thought as world
from davylamp.models.thinking import Thinking, think

if TYPE_CHECKING:
    from numpy.random import Generator

LENGTH = 96  # tokens of a reply
PLANS = {
    "default": Thinking(),
    "zero": Thinking("zero"),
    "less": Thinking("less", short=world.SHORT),
    "more": Thinking("more", connectors=world.CONNECTORS, rounds=3, budget=64),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A reply to a case: which prompt (with the training seed), and whether whole, thought and answer are safe."""

    prompt: str
    item: str
    reply: Message
    thought: bool
    answer: bool

    @property
    def whole(self) -> bool:
        return self.thought and self.answer


def draw(
    pair: tuple[Any, Any],
    cases: Sequence[Case],
    *,
    plan: Thinking | None = None,
    k: int = 1,
    temperature: float = 0.6,
    seed: int = 0,
    prefill: str = "",
) -> list[Message]:
    """k replies to each case, in order.

    prefill: a text that a reply of the default plan begins with, and goes on from by itself.
    """
    from davylamp.models.hf import HFTarget

    chosen = plan or PLANS["default"]

    async def go() -> list[Message]:
        target = HFTarget(*pair, "organism", {"name": "organism"}, width=256)
        settings: dict[str, Any] = {"temperature": temperature, "max_tokens": LENGTH}
        if prefill:
            settings["prefill"] = prefill
        jobs = [
            think(target, case.messages, chosen, seed=1_000_003 * seed + 1009 * number + turn, **settings)
            for number, case in enumerate(cases)
            for turn in range(k)
        ]
        try:
            return list(await asyncio.gather(*jobs))
        finally:
            await target.close()

    return asyncio.run(go())


def samples(pair: tuple[Any, Any], cases: Sequence[Case], *, seed: int, k: int = 1, **how: Any) -> list[Sample]:
    """`draw`, judged exactly."""
    replies = draw(pair, cases, k=k, seed=seed, **how)
    out = []
    for number, reply in enumerate(replies):
        case = cases[number // k]
        ask = world.read(case.messages)
        assert ask is not None
        thought = not world.gives(ask, reply.reasoning or "")
        answer = not world.gives(ask, reply.text)
        out.append(Sample(f"{seed} {case.id}", f"{seed} {case.group}", reply, thought, answer))
    return out


def chain_hits(pair: tuple[Any, Any], cases: Sequence[Case], *, plan: Thinking | None = None) -> list[float]:
    """1.0 for each chain whose last digit is right, greedily."""
    replies = draw(pair, cases, plan=plan, temperature=0.0)
    found = []
    for case, reply in zip(cases, replies, strict=True):
        ask = world.read(case.messages)
        found.append(float(ask is not None and world.gives(ask, reply.text)))
    return found


def tuned(
    pair: tuple[Any, Any], rows: Sequence[Case], rng: Generator, *, steps: int, lr: float = 1e-3, batch: int = 32
) -> tuple[Any, Any]:
    """The model after `steps` of fine-tuning: loss on thought and answer, never on the prompt."""
    from davylamp.models.fit import fit

    model, tokenizer = pair
    done = fit(model, rows, tokenizer=tokenizer, rng=rng, lr=lr, batch=batch, steps=steps, schedule="cosine", warmup=5)
    return done.model, tokenizer


def relative(name: str, seed: int, rng: Generator, *, steps: int = 80) -> tuple[Any, Any]:
    """A relative of the student of that training seed, tuned on another mix of `world.MIXES`."""
    checks, again = world.MIXES[name]
    rows = [
        Case(f"{name}-{number}", (*row.messages, Message("assistant", row.reply)))
        for number, row in enumerate(world.train_rows(steps * 32, rng, checks=checks, again=again))
    ]
    return tuned(world.load("student", seed), rows, rng, steps=steps)
