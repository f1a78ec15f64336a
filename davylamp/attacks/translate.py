"""Attacks by language: the request translated, or mixed word by word with its translation.
Source: MultiJail, arXiv:2310.06474, sections 2 and 3 (a request is broken if any language breaks it); code-mixing: arXiv:2406.15481."""

from __future__ import annotations

from functools import partial

from numpy.random import Generator

from davylamp.attacks._ask import Asking, draw_seed, shuffled
from davylamp.attacks._translators import chosen, translator_of
from davylamp.core import Case, Finding, InputError, Judge, Target, attack


@attack(
    version=1,
    source="arXiv:2310.06474",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("jailbreak",),
    systems=("32",),
)
async def translate(
    target: Target,
    case: Case,
    judge: Judge,
    *,
    budget: int,
    rng: Generator,
    translator: str = "",
    languages: tuple[str, ...] = (),
    instruction: str = "",
) -> Finding:
    """Asks in one language after another; the reply is translated back before it is judged.

    translator: a target's name, a .json word list {language: {word: word}}, or world for the organisms.  languages: empty = all it knows.
    instruction: an English text with one {request} in it, around the translated request (the paper's intentional scenario).
    """
    speaks = translator_of(translator, "translate")
    if instruction and instruction.count("{request}") != 1:
        raise InputError(f"instruction of translate must hold one {{request}}, got {instruction.count('{request}')}")
    asking = Asking(target, case, judge, budget)
    names = shuffled(chosen(speaks, languages, "translate"), rng)
    said = dict.fromkeys(names, "")
    while (
        not asking.done
    ):  # a second round asks the same again: with a sampling target that is best-of-n in each language
        for name in names:
            said[name] = said[name] or await speaks.to(asking.request, name)
            text = instruction.replace("{request}", said[name]) if instruction else said[name]
            if await asking.ask(asking.saying(text), seed=draw_seed(rng), read=partial(speaks.back, language=name)):
                break
    return asking.finding()


@attack(
    version=1,
    source="arXiv:2406.15481",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("jailbreak",),
    systems=("32",),
)
async def code_mix(
    target: Target,
    case: Case,
    judge: Judge,
    *,
    budget: int,
    rng: Generator,
    translator: str = "",
    languages: tuple[str, ...] = (),
    share: float = 0.5,
) -> Finding:
    """Swaps a share of the request's words for their translation, other words and another language each time.

    translator, languages: as in translate.  share: of the words that are swapped, in (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share of code_mix must be in (0, 1], got {share}")
    speaks = translator_of(translator, "code_mix")
    names = chosen(speaks, languages, "code_mix")
    asking = Asking(target, case, judge, budget)
    words = asking.request.split()
    known: dict[tuple[str, str], str] = {}  # each word is translated once in each language
    while not asking.done:
        name = names[int(rng.integers(len(names)))]
        picked = set(rng.choice(len(words), size=max(1, round(share * len(words))), replace=False).tolist())
        for i in picked:
            if (name, words[i]) not in known:
                known[name, words[i]] = await speaks.to(words[i], name)
        text = " ".join(known[name, word] if i in picked else word for i, word in enumerate(words))
        await asking.ask(asking.saying(text), seed=draw_seed(rng), read=partial(speaks.back, language=name))
    return asking.finding()
