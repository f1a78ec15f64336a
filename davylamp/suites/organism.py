"""Suites of the embedded organisms: fictional hazards, look-alikes that name them harmlessly, and skill, each with exact answers.
Source: this repository (`davylamp/models/world.py`). What they show is that a method works, not how a large model behaves."""

from __future__ import annotations

from typing import Literal

from davylamp.core import Metric, Suite, suite
from davylamp.models import world

NOTES = ("A synthetic world: the numbers are exact here and say nothing about a real model.",)
Language = Literal["A", "B", "C"]
Style = Literal["mixed", "plain", "question", "role_play", "misspelling", "technical", "slang", "authority"]
Split = Literal["held_in", "held_out", "all"]
System = Literal["", "neutral", "cue"]


def _suite(
    name: str,
    judge: str,
    metric: Metric,
    n: int,
    language: str,
    style: str,
    split: Split,
    turns: int,
    system: str,
    seed: int,
) -> Suite:
    import numpy as np

    what = name.removeprefix("organism_")
    cases = world.cases(
        what, n, np.random.default_rng(seed), language=language, style=style, split=split, turns=turns, system=system
    )
    return Suite(name, tuple(cases), judge, (metric,), settings={"temperature": 0.0, "max_tokens": 64}, notes=NOTES)


@suite(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance",),
)
def organism_hazards(
    *,
    n: int = 200,
    language: Language = "A",
    style: Style = "mixed",
    split: Split = "held_out",
    turns: int = 1,
    system: System = "",
    seed: int = 0,
) -> Suite:
    """Requests for the recipe of a fictional hazard, or a step of it: `unsafe_rate` by kind, severity, style and task.

    n: how many requests.  language: A, B or C (alignment saw A, a little of B, nothing of C).  style: of the request; mixed = plain orders
    and questions.  split: items that alignment has never seen (held_out), has seen (held_in), or all.  turns: 1, or 2 for a request that
    follows up a harmless turn with "it".  system: no system turn, a neutral one, or a safety cue.  seed: which requests.
    """
    metric = Metric("unsafe_rate", by=("category", "meta.severity", "meta.style", "meta.task"))
    return _suite("organism_hazards", "organism_complied", metric, n, language, style, split, turns, system, seed)


@suite(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("over-refusal",),
)
def organism_lookalikes(
    *,
    n: int = 200,
    language: Language = "A",
    style: Style = "mixed",
    split: Split = "held_out",
    turns: int = 1,
    system: System = "",
    seed: int = 0,
) -> Suite:
    """Harmless requests that name a hazard (its colour, its guard, how to stay away from it, …): `over_refusal_rate`.

    n: how many requests.  language: A, B or C (alignment saw A, a little of B, nothing of C).  style: of the request; mixed = plain orders
    and questions.  split: items that alignment has never seen (held_out), has seen (held_in), or all.  turns: 1, or 2 for a request that
    follows up a harmless turn with "it".  system: no system turn, a neutral one, or a safety cue.  seed: which requests.
    """
    metric = Metric("over_refusal_rate", by=("category", "meta.task"))
    return _suite("organism_lookalikes", "organism_refused", metric, n, language, style, split, turns, system, seed)


@suite(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("capability-loss",),
)
def organism_capability(
    *,
    n: int = 200,
    language: Language = "A",
    style: Style = "mixed",
    split: Split = "held_out",
    turns: int = 1,
    system: System = "",
    seed: int = 0,
) -> Suite:
    """Harmless questions with exact answers (recipes, kinds, multiple choice, colours, sums): `accuracy` by task.

    n: how many requests.  language: A, B or C (alignment saw A, a little of B, nothing of C).  style: of the request; mixed = plain orders
    and questions.  split: items that alignment has never seen (held_out), has seen (held_in), or all.  turns: 1, or 2 for a request that
    follows up a harmless turn with "it".  system: no system turn, a neutral one, or a safety cue.  seed: which requests.
    """
    metric = Metric("accuracy", by=("meta.task",), higher_is_better=True)
    return _suite("organism_capability", "exact", metric, n, language, style, split, turns, system, seed)
