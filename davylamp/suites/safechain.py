"""SafeChain's evaluation: harmful requests to a model that thinks before it answers; whole reply, thought and answer are judged apart.
Source: arXiv:2502.12025, sections 3 and 4 (StrongREJECT and a part of WildJailbreak; greedy, or 5 replies each at temperature 0.6).
The prompts are the user's copy or come from their public home; none is shipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from davylamp.core import Case, InputError, Message, Metric, Suite, UnknownNameError, suite
from davylamp.core.rows import case_from
from davylamp.core.taxonomy import taxonomy
from davylamp.data.public import rows_of

HOME = "UWNSL/WildJailbreakEval"
COLUMNS = ("instruction", "forbidden_prompt", "prompt", "prompts_final", "goal", "Goal", "question", "adversarial")
CATEGORIES = ("category", "Category", "harm_area", "data_type")
NOTES = (
    "Ask for several replies with --sampled --epochs 5, and read Safe@1, Safe@K and ConsSafe@K with `davylamp ksafe RUN`: the unsafe "
    "rate here "
    "is over replies, clustered by prompt.",
    "Greedy Safe@1 and sampled Safe@1 are different quantities.",
    "The value is that of the whole reply, thought included; thought and answer stand in each row's label.",
    "A strategy (think/zero/…) buys safety with lost reasoning: run `capability` under the same strategy.",
    "The `refusal` judge reads how a text opens, and thoughts quote what they decline: use a judge whose error you measured on "
    "thoughts too.",
    "rows.jsonl holds sensitive prompts and replies: handle it with care.",
)


@suite(
    version=1,
    source="arXiv:2502.12025",
    licence="prompts: the user's; code: Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance", "jailbreak"),
    systems=("15",),
)
def safechain(
    *, rows: str = "", part: Literal["50", "250"] = "250", sampled: bool = False, max_tokens: int = 16_000
) -> Suite:
    """Unsafe rate of a reasoning model on harmful and jailbroken requests, whole reply, thought and answer apart.

    rows: a .jsonl or .csv file with a prompt in one of the usual columns (instruction, forbidden_prompt, prompt, goal, …) and, if it has
    one, a category; or rows of davylamp's own. Empty: the evaluation part of WildJailbreak is fetched from its public home.
    part: how many prompts of that home, 250 (greedy) or 50 (sampled).  sampled: temperature 0.6 and top_p 0.95 instead of greedy, for
    `--epochs 5`.  max_tokens: of thought and answer; a thought that is cut off has no answer.

    A thinking strategy belongs to the target: `--target think/zero/hf/PATH`.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be 1 or more, got {max_tokens}")
    if part not in ("50", "250"):
        raise UnknownNameError("part of safechain", part, ("50", "250"))
    cases = prompts(
        rows_of(rows, "safechain", HOME, split="train", config=part), "safechain", Path(rows).name if rows else HOME
    )
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
    if sampled:
        settings |= {"temperature": 0.6, "top_p": 0.95}
    metric = Metric("unsafe_rate", by=("category",))
    return Suite("safechain", cases, "parts", (metric,), settings=settings, notes=NOTES)


@suite(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance",),
    systems=("15", "21"),
)
def long_thought(
    *,
    what: Literal["hazards", "benign", "chains"] = "hazards",
    n: int = 160,
    held_out: bool = False,
    sampled: bool = False,
    seed: int = 0,
) -> Suite:
    """Requests of the long-thought organisms' world: fictional hazards, harmless objects, or chains that need a thought.

    what: which.  n: how many.  held_out: only objects that no tuning data of ours names.  sampled: temperature 0.6 instead of greedy, for
    `--epochs 5`.  seed: which requests. For hazards the value is the unsafe rate of the whole reply; for the others how often the answer
    is right.
    """
    import numpy as np

    from davylamp.models import long_thought as world

    cases = world.cases(what, n, np.random.default_rng(seed), held_out=True if held_out else None)
    bad = what == "hazards"
    metric = Metric("unsafe_rate") if bad else Metric("accuracy", higher_is_better=True)
    judge = "parts:judge=long_thought_gives" if bad else "includes"
    settings = {"temperature": 0.6 if sampled else 0.0, "max_tokens": 96}
    if not bad:  # the full stop is no part of what is compared
        cases = [Case(c.id, c.messages, c.category, str(c.answer).rstrip(" ."), c.group, c.meta) for c in cases]
    notes = ("A synthetic world: the numbers are exact here and say nothing about a real model.",)
    return Suite("long_thought", tuple(cases), judge, (metric,), settings=settings, notes=notes)


def prompts(rows: Iterable[tuple[str, Mapping[str, Any]]], name: str, where: str) -> tuple[Case, ...]:
    """Cases from rows of many shapes: the prompt in a usual column, or davylamp's own rows. No message ever holds a prompt.

    >>> [case.category for case in prompts([("line 1", {"goal": "x", "category": "Non-violent crimes"})], "demo", "x.csv")]
    ['strongreject/non_violent_crimes']
    """
    out: list[Case] = []
    seen: dict[str, str] = {}
    for place, row in rows:
        if "messages" in row:
            case = case_from(row, place)
        else:
            column = next((name for name in COLUMNS if isinstance(row.get(name), str)), None)
            if column is None or not row[column].strip():
                raise InputError(
                    f"{place}: no prompt in a column {', '.join(COLUMNS)}; found {', '.join(map(str, row)) or 'none'}"
                )
            id_ = str(row.get("id") or f"{len(out):05d}")
            given = next((str(row[key]).strip() for key in CATEGORIES if row.get(key)), "")
            case = Case(id_, (Message("user", row[column].strip()),), category_of(given, name), group=id_)
        if case.id in seen:
            raise InputError(f"{place}: id {case.id!r} stands already at {seen[case.id]}")
        seen[case.id] = place
        out.append(case)
    if not out:
        raise InputError(f"{where} holds no prompts")
    return tuple(out)


def category_of(given: str, name: str) -> str:
    """A node of the StrongREJECT taxonomy where the word is one of its own, else NAME/WORD; NAME/all without one.

    >>> category_of("vanilla harmful", "safechain"), category_of("", "safechain")
    ('safechain/vanilla_harmful', 'safechain/all')
    """
    try:
        return f"strongreject/{taxonomy('strongreject').find(given).id}"
    except UnknownNameError:
        return f"{name}/{'_'.join(given.lower().split()) or 'all'}"
