"""Translators that attacks use: a model by name, a word list of yours, or the exact dictionary of the organisms' world.

All have `languages` and `async to(text, language)`, and `async back(text, language)` into the language of the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from davylamp.core import InputError, Target, TargetError
from davylamp.core.errors import UnknownNameError
from davylamp.models.translation import asking

NAMES = {"zh": "Chinese", "it": "Italian", "vi": "Vietnamese", "ar": "Arabic", "ko": "Korean", "th": "Thai", "bn": "Bengali",
         "sw": "Swahili", "jv": "Javanese", "de": "German", "fr": "French", "es": "Spanish", "zu": "Zulu", "en": "English"}  # fmt: skip


class Translator(Protocol):
    languages: tuple[str, ...]

    async def to(self, text: str, language: str) -> str: ...

    async def back(self, text: str, language: str) -> str: ...


class ByModel:
    """A model that translates."""

    def __init__(self, target: Target):
        self.target, self.languages = target, tuple(NAMES)

    async def to(self, text: str, language: str) -> str:
        return await self._ask(text, NAMES[language])

    async def back(self, text: str, language: str) -> str:
        return await self._ask(text, "English") if text.strip() else text

    async def _ask(self, text: str, name: str) -> str:
        reply = await self.target((asking(text, name),), seed=0)
        found = reply.text.strip()
        if not found:
            raise TargetError(f"the translator {self.target.name} gave no text", retry=True)
        return found


class ByWords:
    """Word by word from a dictionary {language: {word: word}}; other words stay. A toy for tests and for languages with a lexicon."""

    def __init__(self, table: Mapping[str, Mapping[str, str]]):
        self.table = {name: {ours.lower(): theirs for ours, theirs in words.items()} for name, words in table.items()}
        self.reverse = {
            name: {theirs.lower(): ours for ours, theirs in words.items()} for name, words in self.table.items()
        }
        self.languages = tuple(self.table)

    async def to(self, text: str, language: str) -> str:
        return " ".join(_swap(word, self.table[language]) for word in text.split())

    async def back(self, text: str, language: str) -> str:
        return " ".join(_swap(word, self.reverse[language]) for word in text.split())


def _swap(word: str, table: Mapping[str, str]) -> str:
    """A word by the table; punctuation at its end stays."""
    bare = word.rstrip(".,;:?!")
    return table.get(bare.lower(), bare) + word[len(bare) :]


def translator_of(given: Any, who: str) -> Translator:
    """The translator an option names: a Target, a target's name, a .json word list, or `world`. Raises InputError."""
    if given == "world":
        from davylamp.models import world_data

        return ByWords({name: table for name, table in world_data.TRANSLATIONS.items() if name != "A"})
    if isinstance(given, str) and given.endswith(".json"):
        return ByWords(read_table(Path(given)))
    if isinstance(given, str):
        if not given:
            raise InputError(
                f"{who} needs a translator: a target's name, a .json word list, or world for the organisms"
            )
        from davylamp.models.targets import load_target

        given = load_target(given)
    return ByModel(given)


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """A word list {language: {word: word}}. Raises InputError."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable word list: {error}") from None
    if not isinstance(table, dict) or not table or any(
        not isinstance(words, dict) or not words or any(not isinstance(word, str) for word in words.values())
        for words in table.values()
    ):  # fmt: skip
        raise InputError(f"{path} must hold {{language: {{word: word}}}}, with one language and one word or more")
    return table


def chosen(translator: Translator, languages: tuple[str, ...], who: str) -> tuple[str, ...]:
    """The languages asked for, or all of the translator's. Raises UnknownNameError."""
    for name in languages:
        if name not in translator.languages:
            raise UnknownNameError(f"language of {who}'s translator", name, translator.languages)
    return languages or translator.languages
