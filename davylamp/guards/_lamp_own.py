"""The project's own training rows for `lamp`: short test sentences drawn from templates in `assets/lamp/own/`.

A template file holds sections. `[label category kind rows language?]` opens one: label 1 = unsafe, category a node or `safe`, `kind` the
section's name, `rows` how many are drawn. Each further line is a template: `{name}` draws from the list of that name in `slots.txt`,
`(a|b|)` chooses in place, also nothing; ` || ` parts the turns of a conversation, which begins with the user. Source: this repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from davylamp.core import Case, InputError, Message, UnknownNameError

if TYPE_CHECKING:
    from numpy.random import Generator

FOLDER = Path(__file__).parent.parent / "assets" / "lamp" / "own"
HEAD = re.compile(r"\[([01]) (\S+) (\S+) (\d+)(?: (\S+))?\]")
SLOT = re.compile(r"\{(\w+)\}")
CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
TURN = " || "


@dataclass(frozen=True, slots=True)
class Section:
    """Templates of one label. category: a taxonomy node, None for safe rows."""

    label: int
    category: str | None
    kind: str
    rows: int
    language: str
    templates: tuple[str, ...]


def slots(path: Path = FOLDER / "slots.txt") -> dict[str, tuple[str, ...]]:
    """The lists that templates draw from, by name."""
    out = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, values = line.partition(" = ")
            out[name] = tuple(value.strip() for value in values.split(" | "))
    return out


def sections(path: Path) -> list[Section]:
    """The sections of one template file. Raises InputError that names the line."""
    out: list[Section] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if found := HEAD.fullmatch(line):
            label, category, kind, rows, language = found.groups()
            out.append(
                Section(int(label), None if category == "safe" else category, kind, int(rows), language or "en", ())
            )
        elif out and not line.startswith("["):
            last = out[-1]
            out[-1] = Section(last.label, last.category, last.kind, last.rows, last.language, (*last.templates, line))
        else:
            raise InputError(f"{path.name} line {number}: expected [label category kind rows], got {line[:40]!r}")
    return out


def fill(template: str, lists: Mapping[str, Sequence[str]], rng: Generator) -> str:
    """One sentence of a template.

    >>> import numpy as np
    >>> fill("(Boil|Boil) the {thing}", {"thing": ["egg"]}, np.random.default_rng(0))
    'Boil the egg'
    """
    template = template.replace(TURN, "\n")
    while found := CHOICE.search(template):
        options = found[1].split("|")
        template = template[: found.start()] + options[rng.integers(len(options))] + template[found.end() :]
    while found := SLOT.search(template):
        if found[1] not in lists:
            raise UnknownNameError("list of the own templates", found[1], lists)
        options = list(lists[found[1]])
        template = template[: found.start()] + options[rng.integers(len(options))] + template[found.end() :]
    turns = (re.sub(r"\s+([,.!?])", r"\1", " ".join(turn.split())) for turn in template.split("\n"))
    return TURN.join(turn[:1].upper() + turn[1:] for turn in turns)


def own_rows(*, rng: Generator, scale: float = 1.0, folder: Path = FOLDER) -> Iterator[Case]:
    """The own rows, no two alike: `scale` times the number that each section asks for, fewer where its templates give no more.

    A row's `group` is its template, so that a split by group keeps all sentences of one template on one side. meta: source, kind,
    language.
    """
    lists, seen = slots(folder / "slots.txt"), set()
    for path in sorted(folder.glob("*.txt")):
        for section in [] if path.name == "slots.txt" else sections(path):
            wanted, made = round(scale * section.rows), 0
            for index in range(8 * wanted):
                if made == wanted:
                    break
                where = index % len(section.templates)
                text = fill(section.templates[where], lists, rng)
                if text.casefold() in seen:
                    continue
                seen.add(text.casefold())
                made += 1
                turns = text.split(TURN)
                yield Case(
                    f"own-{section.label}-{section.kind}-{section.language}-{made}",
                    tuple(Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)),
                    category=section.category,
                    answer=section.label,
                    group=f"own-{section.kind}-{section.language}-t{where}",
                    meta={"source": "own", "kind": section.kind, "language": section.language},
                )
