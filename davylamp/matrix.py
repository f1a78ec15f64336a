"""`davylamp matrix [RUN...]`: families of models x types of attack, attacks and defences apart. What is catalogued, in place, and was run.

`davylamp coverage` asks what stands against a threat at a stage of life; this asks, for a family of models, which published kinds of attack
and defence have something here that executes them. A cell without such a thing is catalogued only, and is not passed off as more.

Source: arXiv:2502.05206, its organisation of attacks and defences; words and links to the registry are ours.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.registry import FOLDERS, Entry, entries
from davylamp.report.runs import gather

FILE = Path(__file__).parent / "assets" / "matrix" / "cells.toml"
ROLES, ACCESS = ("attack", "defence"), ("white", "gray", "black")
FIELDS = ("family", "type", "role", "access", "categories", "things")
STATES = ("catalogued", "in place", "executed", "executed with defence")
REF_KEYS = ("title", "year", "cell")


@dataclass(frozen=True, slots=True)
class Cell:
    """One family, type and role. things: "kind name" in the registry.  runs: ids of runs of these.  refs: (title, year) of works given."""

    id: str
    family: str
    type: str
    role: str
    access: tuple[str, ...]
    categories: tuple[str, ...]
    things: tuple[str, ...]
    state: str
    runs: tuple[str, ...] = ()
    refs: tuple[tuple[str, str], ...] = ()

    def json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in
                ((name, getattr(self, name)) for name in ("id", *FIELDS, "state", "runs", "refs"))}  # fmt: skip


def read(path: Path = FILE, *, known: Iterable[Entry] | None = None) -> dict[str, dict[str, Any]]:
    """The rows of a matrix by id, checked against the closed lists and the registry. Raises InputError that names row and field."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: a matrix is a TOML file with one table a cell ({error})") from None
    names = {f"{entry.kind} {entry.name}" for entry in (entries() if known is None else known)}
    for name, row in rows.items():
        where = f"[{name}] ({path.name})"
        if not isinstance(row, Mapping):
            raise InputError(f"{where} must be a table, got {row!r}")
        for key in (*row, *FIELDS):
            if key not in FIELDS:
                raise UnknownNameError(f"field of {where}", key, FIELDS)
            if key not in row:
                raise InputError(f"{where} needs {key}")
        if row["role"] not in ROLES:
            raise UnknownNameError(f"role of {where}", str(row["role"]), ROLES)
        for key in ("access", "categories", "things"):
            if not isinstance(row[key], list) or not all(isinstance(one, str) for one in row[key]):
                raise InputError(f"{where} {key} must be a list of texts, got {row[key]!r}")
        for key, allowed in (("access", ACCESS), ("things", names)):
            for one in row[key]:
                if one not in allowed:
                    raise UnknownNameError(f"{key} of {where}", one, sorted(allowed))
    return rows


def matrix(
    folders: Sequence[Path] = (), *, refs: Path | None = None, path: Path = FILE, known: Iterable[Entry] | None = None
) -> list[Cell]:
    """Every cell with its state. refs: a .bib file or a .json list of works that go to cells.

    catalogued: nothing here executes it. in place: something does. executed: one of these runs used it. executed with defence: and one used
    a defence of the same family and type.
    """
    known = list(entries() if known is None else known)
    rows = read(path, known=known)
    works = references(refs, rows) if refs else {}
    used: dict[str, list[str]] = {}
    for run in gather(folders) if folders else []:
        for kind in FOLDERS:
            if name := run.name(kind):
                used.setdefault(f"{kind} {name}", []).append(run.record.id)
    ran = {
        name: tuple(dict.fromkeys(i for thing in row["things"] for i in used.get(thing, ())))
        for name, row in rows.items()
    }
    defended = {(row["family"], row["type"]) for name, row in rows.items() if row["role"] == "defence" and ran[name]}
    out = []
    for name, row in rows.items():
        state = STATES[0 if not row["things"] else 1 if not ran[name] else 2]
        if state == "executed" and row["role"] == "attack" and (row["family"], row["type"]) in defended:
            state = STATES[3]
        lists = {key: tuple(row[key]) for key in ("access", "categories", "things")}
        out.append(
            Cell(
                name,
                row["family"],
                row["type"],
                row["role"],
                **lists,
                state=state,
                runs=ran[name],
                refs=tuple(works.get(name, ())),
            )
        )
    return out


def references(path: Path, cells: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """cell -> (title, year) of the works of a .json list ({title, year, cell}) or .bib file (the cell's id among its keywords).

    Raises InputError for a work without title, year or cell, UnknownNameError for a cell that is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        works = _bib(text) if path.suffix == ".bib" else json.loads(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: works are a .bib file or a .json list ({error})") from None
    if not isinstance(works, list):
        raise InputError(f"{path}: expected a list of works, got {type(works).__name__}")
    known = list(cells)
    out: dict[str, list[tuple[str, str]]] = {}
    for number, work in enumerate(works, 1):
        where = f"work {number} ({path.name})"
        if not isinstance(work, Mapping) or not all(str(work.get(key) or "").strip() for key in REF_KEYS):
            raise InputError(f"{where} needs title, year and cell")
        named = [part.strip() for part in re.split("[,;]", str(work["cell"]))]
        here = [name for name in named if name in known]
        if not here:
            raise UnknownNameError(f"cell of {where}", named[0], known)
        for name in here:
            out.setdefault(name, []).append((" ".join(str(work["title"]).split()), str(work["year"]).strip()))
    return out


def _bib(text: str) -> list[dict[str, str]]:
    """The fields that are wanted of each BibTeX entry; values in braces or quotes, braces inside dropped.

    >>> _bib('@article{a, title={A {B} c}, year = "2024", keywords={llm-jailbreak-attack}}')
    [{'title': 'A B c', 'year': '2024', 'cell': 'llm-jailbreak-attack'}]
    """
    out = []
    for entry in re.split(r"(?m)^\s*@(?=\w+\s*\{)", text)[1:]:
        if entry.lower().startswith(("comment", "string", "preamble")):
            continue
        fields = {}
        for match in re.finditer(r"\b(title|year|keywords)\s*=\s*", entry, re.IGNORECASE):
            if match[1].lower() not in fields:
                fields[match[1].lower()] = _value(entry[match.end() :])
        out.append(
            {"title": fields.get("title", ""), "year": fields.get("year", ""), "cell": fields.get("keywords", "")}
        )
    return out


def _value(text: str) -> str:
    """A BibTeX value at the start of a text: to its own closing brace or quote, else to the next comma, brace or line's end."""
    if text[:1] == '"':
        return text[1:].partition('"')[0].replace("{", "").replace("}", "")
    if text[:1] != "{":
        return re.split(r"[,}\n]", text, maxsplit=1)[0].strip()
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:at].replace("{", "").replace("}", "")
    raise ValueError("a brace is not closed")


def chosen(found: Iterable[Cell], **wanted: str) -> list[Cell]:
    """The cells with these fields (family, type, role, state, access); an empty text asks for nothing. Unknown values are errors."""
    out = list(found)
    for key, value in wanted.items():
        if not value:
            continue
        have = [getattr(cell, key) for cell in found]
        allowed = (
            STATES
            if key == "state"
            else sorted({one for item in have for one in (item if isinstance(item, tuple) else (item,))})
        )
        if value not in allowed:
            raise UnknownNameError(key, value, allowed)
        out = [cell for cell in out if value == getattr(cell, key) or (key == "access" and value in cell.access)]
    return out


def as_csv(found: Iterable[Cell]) -> str:
    """One line a cell, lists joined by `; `."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("id", *FIELDS, "state", "runs", "refs"))
    for cell in found:
        row = cell.json()
        writer.writerow("; ".join(map(_word, value)) if isinstance(value, list) else value for value in row.values())
    return out.getvalue()


def _word(value: Any) -> str:
    return f"{value[0]} ({value[1]})" if isinstance(value, tuple | list) else str(value)


def text(found: Sequence[Cell]) -> str:
    """The cells for a terminal, by family, and how many are in which state."""
    out: list[str] = []
    family = ""
    for cell in found:
        if cell.family != family:
            family = cell.family
            out += [*([""] if out else []), family]
        things = ", ".join(thing.partition(" ")[2] for thing in cell.things)
        refs = f"  [{len(cell.refs)} works]" if cell.refs else ""
        out.append(
            f"  {cell.role:8} {cell.type:20} {cell.state:12} {things or 'nothing here: ' + ', '.join(cell.categories)}{refs}"
        )
    counts = Counter(cell.state for cell in found)
    out += ["", ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])]
    return "\n".join(out)
