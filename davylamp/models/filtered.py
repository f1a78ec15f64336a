"""A generator behind a guard: answers are drawn until one passes, and where none does, that is said and no answer given.
Source: arXiv:2205.01663, section 2 (rejection sampling by a classifier at a conservative threshold)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from davylamp.core.errors import InputError
from davylamp.core.nouns import Judge, Message, Target

REFUSAL = "No answer passed the filter."


class Filtered:
    """A target: `generator`, filtered by `guard`. counts: answered, refused, tries, unscored.

    threshold: an answer passes if the guard's value is below it, in (0, 1).  tries: answers drawn at most, 1 or more.
    how: `first` (the first that passes; the generator's own distribution given that it passes), or `best` (all are drawn, the lowest value
    is taken if it passes).  fallback: what is said if none passes, with finish `content_filter`; the least bad answer is never given.
    An empty answer, or one the guard cannot judge, does not pass.

    >>> import asyncio
    >>> from davylamp.core.nouns import Verdict
    >>> class Dice:
    ...     name, identity = "dice", {"name": "dice"}
    ...     async def __call__(self, messages, *, seed=0, **settings): return Message("assistant", str(seed))
    >>> async def odd(messages, case=None): return Verdict(int(messages[-1].text) % 2)
    >>> target = Filtered(Dice(), odd, threshold=0.5, tries=4)
    >>> asyncio.run(target([Message("user", "?")], seed=7)).text, target.counts["tries"]
    ('8', 2)
    """

    def __init__(
        self,
        generator: Target,
        guard: Judge,
        *,
        threshold: float = 0.5,
        tries: int = 8,
        how: Literal["first", "best"] = "first",
        fallback: str = REFUSAL,
    ):
        if not 0 < threshold < 1:
            raise InputError(f"threshold must be between 0 and 1, got {threshold}")
        if isinstance(tries, bool) or tries < 1:
            raise InputError(f"tries must be 1 or more, got {tries}")
        if how not in ("first", "best"):
            raise InputError(f"how must be first or best, got {how!r}")
        self.generator, self.guard, self.threshold, self.tries = generator, guard, threshold, tries
        self.how, self.fallback, self.counts = how, fallback, Counter[str]()
        self.name = f"filtered/{generator.name}"

    @property
    def identity(self) -> Mapping[str, Any]:
        guard = getattr(self.guard, "identity", {"name": type(self.guard).__name__})
        about = {"threshold": self.threshold, "tries": self.tries, "how": self.how, "fallback": self.fallback}
        return {"name": self.name, "generator": dict(self.generator.identity), "guard": dict(guard), **about}

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        best: tuple[float, Message] | None = None
        for number in range(self.tries):
            reply = await self.generator(messages, seed=seed + number, **settings)
            self.counts["tries"] += 1
            if not reply.text.strip():
                self.counts["empty"] += 1
                continue
            value = (await self.guard((*messages, reply))).value
            if value is None:
                self.counts["unscored"] += 1
            elif value < self.threshold and (best is None or value < best[0]):
                best = value, reply
                if self.how == "first":
                    break
        if best is None:
            self.counts["refused"] += 1
            return Message("assistant", self.fallback, finish="content_filter")
        self.counts["answered"] += 1
        return best[1]
