"""Ask again, and again with noise: plain repetition, the control of every other attack, and best-of-n.
Source: best-of-n jailbreaking, arXiv:2412.03556, section 2 (scrambled, capitalised, noised letters, drawn anew until a reply passes)."""

from __future__ import annotations

from numpy.random import Generator

from davylamp.attacks._ask import Asking, draw_seed
from davylamp.core import Case, Finding, InputError, Judge, Target, attack


@attack(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("jailbreak",),
    systems=("03", "34"),
)
async def repeat(
    target: Target, case: Case, judge: Judge, *, budget: int, rng: Generator, temperature: float = 1.0
) -> Finding:
    """The plain request, asked again with another seed each time: the control that every other attack must beat.

    temperature: of the target's sampling, > 0; at 0 a deterministic target would say the same each time.
    """
    _positive(temperature, "repeat")
    asking = Asking(target, case, judge, budget)
    while not asking.done:
        await asking.ask(case.messages, seed=draw_seed(rng), temperature=temperature)
    return asking.finding()


@attack(
    version=1,
    source="arXiv:2412.03556",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("jailbreak",),
    systems=("03",),
)
async def best_of_n(
    target: Target,
    case: Case,
    judge: Judge,
    *,
    budget: int,
    rng: Generator,
    temperature: float = 1.0,
    strength: float = 0.4,
) -> Finding:
    """The request with its letters scrambled, capitalised and noised anew each time, until one reply passes.

    temperature: of the target's sampling, > 0.  strength: sigma of the paper, in [0, 1]: the share of words and letters that change.
    """
    _positive(temperature, "best_of_n")
    if not 0 <= strength <= 1:
        raise InputError(f"strength of best_of_n must be in [0, 1], got {strength}")
    asking = Asking(target, case, judge, budget)
    while not asking.done:
        await asking.ask(
            asking.saying(noised(asking.request, rng, strength)), seed=draw_seed(rng), temperature=temperature
        )
    return asking.finding()


def noised(text: str, rng: Generator, strength: float) -> str:
    """The text with three sorts of noise, as in the paper: middles of words shuffled (share sqrt(strength) of the words over three
    letters), letters capitalised (share sqrt(strength)), and characters moved by one code point (share strength cubed).

    >>> import numpy as np
    >>> noised("how are you", np.random.default_rng(0), 0.0)
    'how are you'
    >>> sorted(noised("abcdefgh", np.random.default_rng(1), 0.5).lower()) != []
    True
    """
    words = []
    for word in text.split(" "):
        if len(word) > 3 and rng.random() < strength**0.5:
            middle = list(word[1:-1])
            rng.shuffle(middle)
            word = word[0] + "".join(middle) + word[-1]
        words.append(word)
    letters = []
    for letter in " ".join(words):
        if rng.random() < strength**0.5:
            letter = letter.upper() if rng.random() < 0.5 else letter.lower()
        if 32 < ord(letter) < 126 and rng.random() < strength**3:
            letter = chr(ord(letter) + (1 if rng.random() < 0.5 else -1))
        letters.append(letter)
    return "".join(letters)


def _positive(temperature: float, who: str) -> None:
    if not temperature > 0:
        raise InputError(f"temperature of {who} must be above 0, got {temperature}: it draws a new reply each time")
