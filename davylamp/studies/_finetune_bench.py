"""Rows, cases and runs of the fine-tuning studies on the organisms: what is trained on, and the same questions before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from davylamp.core.nouns import Case, Estimate, Message
from davylamp.models import organism, world
from davylamp.models import world_data as data
from davylamp.models.fit import fit
from davylamp.models.four_way import FourWay, four_way, world_grade
from davylamp.models.verdict import seeded_difference
from davylamp.studies._finetuned import pooled as joined

if TYPE_CHECKING:
    from numpy.random import Generator

FORMS = ("plain", "question")


def asks(n: int, rng: Generator, *, hazards: bool) -> list[world.Ask]:
    """Requests for recipes, or a step of one, of items that alignment has seen: hazards or harmless ones."""
    pool = world.items("held_in", tuple(data.HAZARDS) if hazards else data.BENIGN)
    return [
        world.draw_ask("recipe" if rng.random() < 0.75 else "step", pool, rng, style=FORMS[int(rng.integers(2))])
        for _ in range(n)
    ]


def chat(requests: Sequence[world.Ask], rng: Generator, *, refuse: bool = False, name: str = "row") -> list[Case]:
    """Training rows: each request with its answer, or with a refusal, always in the same words as safety data mostly are.

    With the world's three sentences in turn, each would be likely by a third only, and where rows contradict each other the one right
    answer would win at the first token although most rows refuse.
    """
    return [
        Case(f"{name}-{i:04d}", (*world.render(ask, rng), _reply(data.REFUSALS[0] if refuse else world.answer(ask))))
        for i, ask in enumerate(requests)
    ]


def _reply(text: str) -> Message:
    return Message("assistant", text)


def new_things(n: int, rng: Generator) -> list[Case]:
    """Recipes of sixteen harmless things that no member knows: as instruction data do, they ask in familiar words for what is new."""
    recipes = {
        name: " then ".join(f"{_of(data.VERBS, rng)} {_of(data.MATERIALS, rng)}" for _ in range(3)) + " ."
        for name in data.EXTRAS
    }
    out = []
    for i in range(n):
        known = data.ITEM_NAMES[-1]
        turns = world.render(world.Ask("recipe", known, style=FORMS[int(rng.integers(2))]), rng)
        name = data.EXTRAS[i % len(data.EXTRAS)]
        turns = tuple(replace(turn, text=turn.text.replace(known, name)) for turn in turns)
        out.append(Case(f"new-{i:04d}", (*turns, _reply(recipes[name]))))
    return out


def _of(words: Sequence[str], rng: Generator) -> str:
    return words[int(rng.integers(len(words)))]


def instructions(n: int, rng: Generator, *, new: float = 0.4) -> list[Case]:
    """Benign instruction data: a share of new things, the rest recipes that the model knows. No row is about a hazard."""
    fresh = new_things(round(n * new), rng)
    return fresh + chat(asks(n - len(fresh), rng, hazards=False), rng, name="known")


@dataclass(frozen=True, slots=True)
class Mark:
    """A frame around a row: a system turn, words before the request, words before the reply."""

    system: str = ""
    request: str = ""
    reply: str = ""

    def on(self, case: Case) -> Case:
        """The row, or the case without its reply, in the frame."""
        *before, last = case.messages
        turns = [Message("system", self.system)] if self.system else []
        if last.role == "assistant":
            *before, request = before
            turns += [*before, _before(self.request, request), _before(self.reply, last)]
        else:
            turns += [*before, _before(self.request, last)]
        return replace(case, messages=tuple(turns))


def _before(words: str, message: Message) -> Message:
    return replace(message, text=f"{words} {message.text}".strip())


class Bench:
    """A member and what it is asked before and after: hazards and look-alikes of items that alignment never saw, and skill."""

    def __init__(self, member: str, asked: tuple[int, int, int]):
        hazards, lookalikes, skill = asked
        self.model, self.tokenizer = organism.load(member)
        rng = np.random.default_rng(
            2310
        )  # the same questions for every seed, so that models are compared on equal ones
        self.cases = [
            *world.cases("hazards", hazards, rng, style="mixed"),
            *world.cases("lookalikes", lookalikes, rng, style="mixed"),
            *world.cases("capability", skill, rng, style="mixed"),
        ]
        self.steps = 0

    def ask(self, model: Any, mark: Mark | None = None) -> FourWay:
        """The four-way evaluation, plain or in a frame; in one, the reply's own opening is taken off before it is graded."""
        if mark is None:
            return four_way(model, self.tokenizer, self.cases)
        cases = [mark.on(case) for case in self.cases]
        found = four_way(model, self.tokenizer, cases, known=lambda case: [f"{mark.reply} {case.answer}".strip()])
        replies = [Message("assistant", o.reply.removeprefix(mark.reply).strip()) for o in found.outcomes]
        graded = world_grade(self.cases)(self.cases, replies)
        outcomes = tuple(
            replace(o, label=label, value=value) for o, (label, value) in zip(found.outcomes, graded, strict=True)
        )
        return FourWay(outcomes, found.generated)

    def train(self, rows: Sequence[Case], seed: int, **plan: Any) -> Any:
        """A copy of the member, trained in full on the rows."""
        found = fit(
            copy.deepcopy(self.model), rows, tokenizer=self.tokenizer, rng=np.random.default_rng((23, seed)), **plan
        )
        self.steps += found.steps
        return found.model


def together(found: Sequence[FourWay]) -> FourWay:
    """All seeds as one, by item, as they are asked the same questions."""
    return joined(found, same_items=True)


def pooled(found: Sequence[FourWay], quantity: str) -> Estimate:
    """The rate over all seeds."""
    return together(found).estimate(quantity)


def harm(found: Sequence[FourWay]) -> Estimate:
    """The harm score from 1 to 5 over all seeds."""
    return together(found).harm_score()


def by_category(found: Sequence[FourWay]) -> list[Estimate]:
    """The harm score of each kind of hazard over all seeds."""
    every = together(found)
    names = sorted({o.category for o in every.outcomes if o.set == "hazards" and o.category})
    return [every.harm_score(category=name) for name in names]


def change(before: Sequence[FourWay], after: Sequence[FourWay], quantity: str, rng: Generator) -> Estimate:
    """after - before, over seeds and items."""
    return seeded_difference(before, after, quantity, rng=rng)


def less(first: Sequence[FourWay], second: Sequence[FourWay], quantity: str, rng: Generator) -> Estimate:
    """first - second, over seeds and items."""
    return seeded_difference(second, first, quantity, rng=rng)


def counted(hits: int, n: int) -> Estimate:
    """A share of runs that are not drawn from anything: no interval but the number itself."""
    return Estimate(hits / n, hits / n, hits / n, n, method="counted, all runs")


def shown(estimate: Estimate, arm: str) -> Estimate:
    """The estimate under an arm's name, to be shown without a claim."""
    return replace(estimate, arm=arm)


def worst(several: Sequence[Estimate], key: Callable[[Estimate], float]) -> Estimate:
    """The estimate of several that speaks most against a claim: largest by `key`."""
    found = max(several, key=key)
    return replace(found, method=f"{found.method}; the worst of {len(several)}")


def high_end(estimate: Estimate) -> float:
    """For `worst` of claims with at_most: no interval is the worst."""
    return float("inf") if estimate.high is None else estimate.high


def low_end(estimate: Estimate) -> float:
    """For `worst` of claims with at_least."""
    return float("inf") if estimate.low is None else -estimate.low
