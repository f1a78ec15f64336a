"""A writer of prompts for system 34's generator: a character model counted from the seeds, with the faults that real writers have."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.random import Generator

END = "\n"
ORDER = 3  # characters that the next one is drawn by


class Writer:
    """Goes on with a numbered list: characters drawn by what followed the last three in the seeds, or by fewer; where much could follow,
    now and then by the two before the last alone, which is where new things come from.

    It opens each line as one of the seeds shown opens. A share `repeats` of its lines copies one word for word.
    skips: how often it looks past the last character.  fan: different continuations that count as much.

    >>> import asyncio, numpy as np
    >>> writer = Writer(["一二三四五"], np.random.default_rng(0))
    >>> asyncio.run(writer("1. 一二三四五\\n4.")).splitlines()[0]
    '4. 一二三四五'
    """

    def __init__(self, seeds: Sequence[str], rng: Generator, *, repeats: float = 0.1, skips: float = 0.9, fan: int = 4):
        self.rng, self.repeats, self.skips, self.fan = rng, repeats, skips, fan
        self.after: dict[str, Counter[str]] = defaultdict(Counter)
        self.beyond: dict[str, Counter[str]] = defaultdict(Counter)
        for text in seeds:
            for i in range(3, len(text)):
                self.beyond[text[i - 3 : i - 1]][text[i]] += 1
            for i, character in enumerate(text + END):
                for order in range(1, ORDER + 1):
                    self.after[text[max(0, i - order) : i]][character] += 1

    async def __call__(self, prompt: str) -> str:
        shown = [line.partition(". ")[2] for line in prompt.splitlines() if ". " in line]
        lines = [f"{number}. {self._line(shown[int(self.rng.integers(len(shown)))])}" for number in range(4, 11)]
        return "\n".join(lines)

    def _line(self, seed: str) -> str:
        if self.rng.random() < self.repeats:
            return seed
        text = seed[:2]
        while len(text) < 60:
            whole, beyond = self.after.get(text[-ORDER:]), self.beyond.get(text[-3:-1])
            skips = whole is not None and len(whole) >= self.fan and self.rng.random() < self.skips
            seen = (beyond or whole) if skips else (whole or self.after.get(text[-2:]) or beyond)
            following = seen or self.after.get(text[-1:]) or Counter(END)
            names, counts = list(following), list(following.values())
            at = int(self.rng.choice(len(names), p=[count / sum(counts) for count in counts]))
            if names[at] == END:
                break
            text += names[at]
        return text
