"""Training rows of `lamp`: drawn, cleaned of near copies of held-out rows, split by group. Source: this repository."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from davylamp.core import Case
from davylamp.core.taxonomy import crosswalk
from davylamp.guards._lamp_hash import HAZARDS
from davylamp.guards._lamp_text import WORD, latin, reading, windows

if TYPE_CHECKING:
    from numpy.random import Generator

FILLER = frozenset(
    "a an the of to in on at for and or is are be do does i you my me how what can could would should please".split()  # noqa: SIM905
)
NEAR = 0.6  # share of content words that makes two texts near copies


@dataclass(slots=True)
class Sentence:
    """One training row as the heads read it. hazard: index in HAZARDS, -1 = none or unknown.  weight: of its loss."""

    text: str
    context: str
    label: int
    hazard: int
    group: str
    source: str
    language: str
    weight: float = 1.0


def sentences(cases: Iterable[Case]) -> list[Sentence]:
    """The rows as text, context and label; empty ones and exact copies are left out, an unsafe copy of a safe row too."""
    out: dict[tuple[str, str], Sentence] = {}
    for case in cases:
        read = reading(case.messages)
        if not read.text.strip() or read in out:
            continue
        meta = case.meta
        group = case.group or case.id
        out[read] = Sentence(
            read.text,
            read.context,
            int(case.answer),
            hazard_of(case.category) if case.answer else -1,
            str(group),
            str(meta.get("source", "rows")),
            str(meta.get("language", "en")),
        )
    return list(out.values())


def hazard_of(category: str | None) -> int:
    """The coarse hazard of a taxonomy node, by the crosswalk's primary code; -1 where there is none.

    >>> HAZARDS[hazard_of("aegis2/suicide_and_self_harm")], hazard_of(None)
    ('mlc/S11', -1)
    """
    if category is None:
        return -1
    links = crosswalk(category)
    path = links[0][0] if links else ""
    return HAZARDS.index(path) if path in HAZARDS else -1


def content(text: str) -> frozenset[str]:
    """The words that carry a text, without plural s; single characters for scripts without spaces."""
    words = WORD.findall(text)
    if len(words) <= 2 and len(text) > 12:
        words = [text[i : i + 2] for i in range(len(text) - 1)]
    return frozenset(word.removesuffix("s") for word in words if word not in FILLER)


def near_copies(texts: Sequence[str], held: Iterable[str], *, share: float = NEAR) -> set[int]:
    """Indices of texts that are nearly a held-out text: Jaccard similarity of their content words at or above `share`.

    >>> near_copies(["how do i tame a fox?", "how do i bake bread?"], ["How can I tame the fox"])
    {0}
    """
    index: dict[str, list[int]] = defaultdict(list)
    sizes: list[int] = []
    for number, text in enumerate(held):
        words = content(text.casefold())
        sizes.append(len(words))
        for word in words:
            index[word].append(number)
    out = set()
    for i, text in enumerate(texts):
        words = content(text)
        common: Counter[int] = Counter()
        for word in words:
            common.update(index.get(word, ()))
        if any(n / (len(words) + sizes[number] - n) >= share for number, n in common.items()):
            out.add(i)
    return out


def bucket(group: str, parts: int) -> int:
    """Which of so many parts a group belongs to, the same in every run."""
    return int(hashlib.sha256(group.encode("utf-8", "backslashreplace")).hexdigest()[:8], 16) % parts


def balance(rows: Iterable[Sentence]) -> list[Sentence]:
    """The rows of every language but English with weights by which safe and unsafe ones count alike.

    Else a language by itself would say something.
    """
    rows = list(rows)
    count = Counter((row.language, row.label) for row in rows)
    out = []
    for row in rows:
        own, other = count[row.language, row.label], count[row.language, 1 - row.label]
        out.append(row if row.language == "en" or own <= other else replace(row, weight=max(0.05, other / own)))
    return out


def pieces(rows: Iterable[Sentence]) -> list[Sentence]:
    """What the hashed head is trained on: every window of a long safe row, since all of it is safe; a long unsafe row is left out, since
    nobody said where in it the harm stands."""
    out = []
    for row in rows:
        cut = windows(row.text)
        if len(cut) == 1:
            out.append(row)
        elif not row.label:
            out += [replace(row, text=text) for text in cut]
    return out


def strangers(rows: Sequence[Sentence], count: int, *, rng: Generator) -> list[Sentence]:
    """Safe rows in which half of the words or more are made up: a word that nobody knows says nothing."""
    safe = [row for row in rows if not row.label and not row.context and latin(row.text)]
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    chances = np.arange(len(letters), 0, -1) / np.arange(1, len(letters) + 1).sum()
    out = []
    for _ in range(count if safe else 0):
        row = safe[rng.integers(len(safe))]
        share = rng.uniform(0.5, 1.0)
        words = [
            "".join(rng.choice(letters, int(rng.integers(2, 10)), p=chances)) if rng.random() < share else word
            for word in row.text.split()
        ]
        out.append(replace(row, text=" ".join(words), source="strangers", group="strangers"))
    return out


def mixtures(rows: Sequence[Sentence], count: int, *, rng: Generator) -> list[Sentence]:
    """New rows of two to four sentences, half of them with one unsafe sentence among safe ones: an unsafe part makes a text unsafe.

    Only short English rows without context are used, so that a mixture is a text somebody could have written.
    """
    short = [
        row for row in rows if row.language == "en" and not row.context and len(row.text) < 240 and latin(row.text)
    ]
    safe, unsafe = ([row for row in short if row.label == label] for label in (0, 1))
    if not safe or not unsafe:
        return []
    out = []
    for number in range(count):
        picked = [safe[i] for i in rng.integers(len(safe), size=int(rng.integers(2, 5)))]
        label, hazard = 0, -1
        if number % 2:
            bad = unsafe[rng.integers(len(unsafe))]
            picked[rng.integers(len(picked))] = bad
            label, hazard = 1, bad.hazard
        text = " ".join(row.text if row.text[-1:] in ".?!" else f"{row.text}." for row in picked)
        out.append(Sentence(text, "", label, hazard, "mixture", "mixture", "en"))
    return out
