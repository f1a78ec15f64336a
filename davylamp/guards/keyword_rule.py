"""A rule on words: the cheapest expert for an ensemble, and a baseline that a split or misspelt word defeats.
Source: this repository."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from davylamp.core import Case, InputError, Message, Verdict, guard


@guard(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="deployment",
    threats=("harmful-compliance",),
    measures="unsafe",
    systems=("26",),
)
def keyword_rule(*, words: str) -> Callable[..., Awaitable[Verdict]]:
    """1.0 if the last message holds one of the words or phrases, whole and in any case, else 0.0; None if it is empty.

    words: parted by `/`; spaces in a phrase stand for any white space.

    >>> import asyncio
    >>> asyncio.run(keyword_rule(words="discount/free trial")([Message("user", "Is there a FREE  trial?")])).value
    1.0
    """
    parts = [part.strip() for part in words.split("/") if part.strip()]
    if not parts:
        raise InputError("keyword_rule needs one word or more, parted by /, got none")
    spelt = "|".join(r"\s+".join(re.escape(word) for word in part.split()) for part in parts)
    rule = re.compile(rf"(?<!\w)(?:{spelt})(?!\w)", re.IGNORECASE)

    async def judge(messages: Sequence[Message], case: Case | None = None) -> Verdict:
        text = messages[-1].text
        if not text.strip():
            return Verdict(None, label="nonresponsive", why="empty text")
        found = rule.search(text)
        return Verdict(
            float(found is not None), "unsafe" if found else "safe", why="holds a listed word" if found else ""
        )

    return judge
