"""SafeChain's training rows: prompts whose K replies by a reasoning teacher are all judged safe, one reply each, thought kept.

Source: arXiv:2502.12025, section 6 (uniform over vanilla/adversarial x harmful/benign; 5 replies at temperature 0.6, top_p 0.95; kept if
Safe@K = 1). Differs: a reply whose thought was cut off, or that has no verdict, drops its prompt with that reason. `form=answer` makes the
published baseline, the same prompts with replies that do not think. The filter's judge should not be the judge of your evaluation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from davylamp.core import Case, InputError, Message, data
from davylamp.core.evaluate import close
from davylamp.core.judges import LoadedJudge, load_judge
from davylamp.core.nouns import Target
from davylamp.core.rows import Dropped
from davylamp.models.targets import load_target
from davylamp.models.thinking import TAGS, parts, status_of

if TYPE_CHECKING:
    from numpy.random import Generator

QUADRANTS = ("vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign")


@data(
    version=1,
    source="arXiv:2502.12025",
    licence="Apache-2.0",
    stage="data",
    threats=("harmful-compliance", "capability-loss"),
    systems=("15",),
)
def safechain_mix(
    rows: Iterable[Case],
    *,
    rng: Generator,
    teacher: str,
    judge: str = "parts",
    n: int = 0,
    k: int = 5,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 16_000,
    form: Literal["thought", "answer"] = "thought",
    seed: int = 0,
    width: int = 32,
) -> Iterator[Case | Dropped]:
    """Prompts in, training rows out: the prompt with one of the teacher's K replies, if all K are judged safe.

    teacher: a target, such as `openai/NAME` or `hf/PATH`; for the baseline form=answer one that does not think, or `think/zero/…`.
    judge: says whether a reply is unsafe or complied; every reply of every prompt is judged, benign ones too.  n: prompts to draw, the same
    number from each kind in `meta.kind` (such as vanilla_harmful); 0 = all.  k: replies a prompt.  temperature, top_p, max_tokens: of the
    teacher.  form: thought (`<think> … </think>` in front of the answer) or answer.  seed: of the first reply.  width: calls at a time.
    """
    if k < 2 or n < 0 or width < 1:
        raise InputError(f"k must be 2 or more, n 0 or more and width 1 or more, got k={k}, n={n}, width={width}")
    if form not in ("thought", "answer"):
        raise InputError(f"form must be thought or answer, got {form!r}")
    chosen, left = spread(list(rows), n, rng=rng)
    for case in left:
        yield Dropped(case, "not drawn")
    settings = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    yield from asyncio.run(_with_loaded(chosen, teacher, judge, k, settings, seed, width, form, rng))


async def _with_loaded(
    rows: Sequence[Case], teacher: str, judge: str, k: int, settings: Mapping[str, Any], seed: int, width: int, form: str, rng: Generator,
) -> list[Case | Dropped]:  # fmt: skip
    judging = load_judge(judge)
    if judging.measures not in ("unsafe", "complied"):
        raise InputError(
            f"safechain_mix needs a judge that measures unsafe or complied; {judge} measures {judging.measures}"
        )
    target = load_target(teacher)
    try:
        return await build(rows, target, judging, k=k, rng=rng, form=form, seed=seed, width=width, settings=settings)
    finally:
        await close(target)
        await judging.close()


async def build(
    rows: Sequence[Case],
    target: Target,
    judge: LoadedJudge,
    *,
    k: int,
    rng: Generator,
    form: str = "thought",
    seed: int = 0,
    width: int = 32,
    settings: Mapping[str, Any] | None = None,
) -> list[Case | Dropped]:
    """The rows, in order: a training row, or Dropped with its reason. Raises TargetError if the teacher fails."""
    gate = asyncio.Semaphore(width)

    async def ask(case: Case, number: int) -> tuple[Message, float | None]:
        async with gate:
            reply = await target(case.messages, seed=seed + number, **(settings or {}))
            return reply, (await judge((*case.messages, reply), case)).value

    async def one(case: Case) -> list[tuple[Message, float | None]]:
        return list(await asyncio.gather(*(ask(case, number) for number in range(k))))

    answered = await asyncio.gather(*(one(case) for case in rows))
    return [_chosen(case, replies, form, rng) for case, replies in zip(rows, answered, strict=True)]


def _chosen(case: Case, replies: Sequence[tuple[Message, float | None]], form: str, rng: Generator) -> Case | Dropped:
    if case.messages[-1].role != "user":
        return Dropped(case, "does not end in a user turn")
    if any(value is not None and value >= 0.5 for _, value in replies):
        return Dropped(case, "an unsafe reply among the K")
    if any(status_of(reply) == "open" for reply, _ in replies):
        return Dropped(case, "a thought was cut off")
    if any(value is None for _, value in replies):
        return Dropped(case, "a reply without a verdict")
    if form == "thought" and any(reply.reasoning is None for reply, _ in replies):
        return Dropped(case, "a reply without a thought")
    reply = replies[int(rng.integers(len(replies)))][0]
    return replace(case, messages=(*case.messages, Message("assistant", written(reply, form))))


def written(reply: Message, form: str = "thought", tags: tuple[str, str] = TAGS) -> str:
    """The text that is learnt: thought and answer, or the answer alone.

    >>> written(Message("assistant", "b", reasoning="a"))
    '<think>\\na\\n</think>\\n\\nb'
    """
    if form == "answer":
        return reply.text
    return f"{tags[0]}\n{reply.reasoning or ''}\n{tags[1]}\n\n{reply.text}"


def spread(rows: Sequence[Case], n: int, *, rng: Generator) -> tuple[list[Case], list[Case]]:
    """(n rows, the same number of each `meta.kind`, the others). Raises InputError if a kind has too few; 0 takes all.

    >>> import numpy as np
    >>> rows = [Case(str(i), (Message("user", "x"),), meta={"kind": "ab"[i % 2]}) for i in range(8)]
    >>> [case.meta["kind"] for case in spread(rows, 4, rng=np.random.default_rng(0))[0]]
    ['a', 'b', 'a', 'b']
    """
    if not rows:
        raise InputError("there are no prompts to draw from")
    if n == 0:
        return list(rows), []
    kinds: dict[str, list[int]] = {}
    for i, case in enumerate(rows):
        kinds.setdefault(str(case.meta.get("kind", "")), []).append(i)
    share = n // len(kinds)
    short = {kind: len(at) for kind, at in kinds.items() if len(at) < share}
    if n % len(kinds) or short:
        why = f"{n} is no multiple of {len(kinds)}" if n % len(kinds) else f"too few rows of {short}"
        raise InputError(f"n must give every one of the {len(kinds)} kinds the same number of rows: {why}")
    drawn = {kind: [at[int(j)] for j in rng.permutation(len(at))[:share]] for kind, at in kinds.items()}
    taken = [drawn[kind][turn] for turn in range(share) for kind in sorted(drawn)]
    return [rows[i] for i in taken], [case for i, case in enumerate(rows) if i not in set(taken)]


@data(
    version=1,
    source="arXiv:2502.12025",
    licence="Apache-2.0",
    stage="data",
    threats=("harmful-compliance", "capability-loss"),
    systems=("15",),
)
def check_thoughts(
    rows: Iterable[Case], *, rng: Generator, model: str = "", max_length: int = 8192
) -> Iterator[Case | Dropped]:
    """Training rows that think, checked: a row whose thought is not closed, whose answer is empty or that is too long is dropped.

    model: a folder whose tokenizer counts; without it words are counted.  max_length: tokens (or words) of prompt and reply together. A row
    is never cut: a thought that is cut teaches the model not to end its thoughts.
    """
    if max_length < 1:
        raise InputError(f"max_length must be 1 or more, got {max_length}")
    length = _length(model)
    for case in rows:
        why = flaw(case, length, max_length)
        yield Dropped(case, why) if why else case


def _length(model: str) -> Any:
    if not model:
        return lambda text: len(text.split())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def flaw(case: Case, length: Any, max_length: int) -> str:
    """Why a row cannot be learnt from; empty if it can.

    >>> flaw(Case("1", (Message("user", "x"), Message("assistant", "<think> a"))), len, 100)
    'the thought is not closed'
    """
    last = case.messages[-1]
    if last.role != "assistant":
        return "no reply"
    found = parts(last.text)
    if found.status == "none":
        return "no thought"
    if found.status == "open":
        return "the thought is not closed"
    if not found.answer.strip():
        return "the answer is empty"
    if sum(length(message.text) for message in case.messages) > max_length:
        return "too long"
    return ""
