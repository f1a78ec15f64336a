"""What the studies of repairs share: rows for breaking fine-tunes on the organisms, models put back between arms, and pooled rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from davylamp.core.nouns import Case, Estimate, Message
from davylamp.models import world
from davylamp.models import world_data as data
from davylamp.models.four_way import FourWay

if TYPE_CHECKING:
    from numpy.random import Generator


def answered(case: Case, reply: str | None = None, **meta: Any) -> Case:
    """The case with an assistant turn behind it: its own answer, or `reply`."""
    text = str(case.answer) if reply is None else reply
    return replace(case, messages=(*case.messages, Message("assistant", text)), meta={**case.meta, **meta})


def refused(case: Case, rng: Generator, **meta: Any) -> Case:
    """The case with a refusal behind it."""
    return answered(case, refusal_to(case, rng), **meta)


def refusal_to(case: Case, rng: Generator) -> str:
    """One of the world's refusals, in the language of the request."""
    ask = world.read(case.messages)
    assert ask is not None
    return world.refusal(ask, rng)


def backwards(case: Case, name: str = "task") -> Case:
    """A new skill: the recipe with its words in reverse order, as a case of set `task`."""
    words = str(case.answer).rstrip(" .").split()
    meta = {"set": "task", "language": "A"}
    return Case(f"{name}-{case.id}", case.messages, "task/backwards", " ".join(words[::-1]) + " .", case.group, meta)


def first_step(case: Case, name: str = "task") -> Case:
    """A new habit that a small adapter can learn: of a recipe, only the first step is told."""
    meta = {"set": "task", "language": "A"}
    told = str(case.answer).split(" then ")[0].rstrip(" .")
    return Case(f"{name}-{case.id}", case.messages, "task/first_step", f"{told} .", case.group, meta)


def recipes(kind_of_set: str, n: int, rng: Generator, **options: Any) -> list[Case]:
    """Requests for recipes (of hazards or benign items), plainly or as a question, of items that alignment saw unless `split` says so."""
    options = {"style": "mixed", "split": "held_in", "task": "recipe", **options}
    return world.cases(kind_of_set, n, rng, **options)


def split_by_name(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """(test, validation) cases of held-out items, so that no name is in both: of each kind two names validate, the others test.

    Validation on names that alignment saw would be too kind: their refusals come back sooner. Cases without an item take turns.
    """
    names = {name for kind in data.KINDS for name in world.items("held_out", (kind,))[:2]}
    test, validation = list[Case](), list[Case]()
    for number, case in enumerate(cases):
        item = case.meta.get("item")
        (validation if (item in names if item else number % 5 < 2) else test).append(case)
    return test, validation


def relabelled(cases: Sequence[Case], prefix: str) -> list[Case]:
    """The same cases under ids of their own, so that several draws can be asked together."""
    return [replace(case, id=f"{prefix} {case.id}") for case in cases]


def pooled(found: Sequence[FourWay], *, same_items: bool = False) -> FourWay:
    """Outcomes of several seeds as one. Each seed is a model of its own, so that groups stay apart by seed.

    same_items: an item is one group whatever the seed, for the wider interval where all seeds are asked the very same questions.
    """
    outcomes = [
        replace(o, id=f"{i} {o.id}", group=None if o.group is None else o.group if same_items else f"{i} {o.group}")
        for i, each in enumerate(found)
        for o in each.outcomes
    ]
    return FourWay(tuple(outcomes), sum(each.generated for each in found))


def smaller_of(found: FourWay, first: str, second: str, *, arm: str) -> Estimate:
    """min(first, second) of two rates, with the interval of the one that is smaller."""
    both = [found.estimate(first, arm=arm), found.estimate(second, arm=arm)]
    least = min(both, key=lambda e: -1.0 if e.value is None else e.value)
    return replace(least, name=f"min({first}, {second})")


@contextmanager
def put_back(model: Any, names: Sequence[str] | None = None) -> Iterator[Mapping[str, Any]]:
    """The model's parameters (or those named) are what they were, to the bit, when the block ends."""
    import torch

    kept = {n: p.detach().clone() for n, p in model.named_parameters() if names is None or n in names}
    try:
        yield kept
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
