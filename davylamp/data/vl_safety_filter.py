"""Filter image-text rows for safety, so that "safe data only" is a controlled arm: text guard, image guard, and whether pictures are whole.

Source: arXiv:2410.07571, section 3 (adaptation on filtered data still costs safety). Differs: a row whose pictures cannot be read is
dropped with its reason, and more than 2 % of such rows stop the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from davylamp.core import Case, InputError, data
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.core.rows import Dropped

if TYPE_CHECKING:
    from numpy.random import Generator


@data(
    version=1,
    source="arXiv:2410.07571",
    licence="Apache-2.0",
    stage="data",
    threats=("fine-tuning", "harmful-compliance"),
    systems=("09",),
)
def vl_safety_filter(
    rows: Iterable[Case], *, rng: Generator, text: str = "", image: str = "", most_bad: float = 0.02
) -> Iterator[Case | Dropped]:
    """Keep rows whose text and pictures the guards pass and whose pictures can be read; counts before and after are in the record.

    text: a guard by name that reads the turns without their pictures.  image: a guard that reads the user's pictures without text.
    Either measures unsafe or complied; without guards only the world's own truth (for rows of the organisms' world) and the pictures count.
    most_bad: share of rows with unreadable pictures from which on the whole file is an error, in [0, 1].

    A row that a guard cannot judge is dropped as "not judged": an arm that is called safe holds no such row.

    >>> import numpy as np
    >>> row = Case("1", (Message("user", "<image> what is this ?"), Message("assistant", "red")))
    >>> next(vl_safety_filter([row], rng=np.random.default_rng(0), most_bad=1.0)).reason
    'picture: the text has 1 placeholders <image> and the row 0 pictures'
    """
    from davylamp.models.pictures import problem_of

    if not 0 <= most_bad <= 1:
        raise InputError(f"most_bad must be in [0, 1], got {most_bad}")
    cases = list(rows)
    problems = {i: why for i, case in enumerate(cases) if (why := problem_of(case.messages))}
    if len(problems) > most_bad * len(cases):
        first = "; ".join(f"row {i + 1} ({cases[i].id}): {why}" for i, why in list(problems.items())[:3])
        raise InputError(
            f"{len(problems)} of {len(cases)} rows have pictures that cannot be used, and at most {most_bad:.0%} may. {first}"
        )
    whole = [i for i in range(len(cases)) if i not in problems]
    reasons = {i: "text: unsafe by the world's truth" for i in whole if _harmful_answer(cases[i])}
    if text:
        for i, why in zip(whole, _judged(text, [_words(cases[i].messages) for i in whole]), strict=True):
            if why:
                reasons.setdefault(i, f"text: {why}")
    if image:
        shown = [i for i in whole if any(message.media for message in cases[i].messages)]
        for i, why in zip(shown, _judged(image, [_pictures(cases[i].messages) for i in shown]), strict=True):
            if why:
                reasons.setdefault(i, f"picture: {why}")
    for i, case in enumerate(cases):
        why = f"picture: {problems[i]}" if i in problems else reasons.get(i, "")
        yield Dropped(case, why) if why else case


def _harmful_answer(case: Case) -> bool:
    """Whether a row of the organisms' world answers what should be refused."""
    from davylamp.models import world

    turns = _words(case.messages)
    if turns[-1].role != "assistant" or not world.is_world_text(turns[-1].text):
        return False
    ask = world.read(turns[:-1])
    return ask is not None and world.harmful(ask) and world.grade(ask, turns[-1].text) == "complied"


def _words(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The turns without pictures and their marks."""
    from davylamp.models.pictures import PLACEHOLDER

    return tuple(Message(m.role, " ".join(m.text.replace(PLACEHOLDER, " ").split())) for m in messages)


def _pictures(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The user's pictures without text."""
    return tuple(Message(m.role, "", media=m.media) for m in messages if m.media)


def _judged(spec: str, conversations: Sequence[Sequence[Message]]) -> list[str]:
    """For each conversation why it is dropped, empty if it is not."""
    judge = load_judge(spec)
    if judge.measures not in ("unsafe", "complied"):
        raise InputError(f"{spec} measures {judge.measures}; a filter needs a guard that measures unsafe or complied")

    async def go() -> list[str]:
        gate = asyncio.Semaphore(16)

        async def one(messages: Sequence[Message]) -> str:
            async with gate:
                value = (await judge(messages)).value
            return "not judged" if value is None else "unsafe" if value >= 0.5 else ""

        try:
            return list(await asyncio.gather(*(one(messages) for messages in conversations)))
        finally:
            await judge.close()

    return asyncio.run(go())
