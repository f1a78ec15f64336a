"""The files of system 25: labelled prompts to retrieve from, and suites of tests, with all that can be wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case
from davylamp.core.rows import canonical, case_from, read_objects
from davylamp.metrics.coverage_criterion import Cell, Criterion, astral
from davylamp.models.news import parse_day
from davylamp.models.retrieval import BM25, Embed, Embedded, Index, nearest

SCHEMA = 1  # of meta in a suite's rows; raise it where their meaning changes
TEXT_FIELDS = ("Prompt", "prompt", "text")
CATEGORY_FIELDS = ("category", "categories")


# --- knowledge --------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Document:
    """A prompt with its categories; none for one without a label, which can be found by its words alone."""

    text: str
    categories: tuple[str, ...] = ()


class Knowledge:
    """Labelled prompts and an index over them."""

    def __init__(self, documents: Sequence[Document], *, embed: Embed | None = None):
        self.documents = list(documents)
        texts = [document.text for document in self.documents]
        self.index: Index = Embedded(texts, embed) if embed is not None and texts else BM25(texts)

    def examples(self, category: str, k: int, *, query: str = "") -> list[str]:
        """At most k texts of a category, near-duplicates left out: labelled ones first, then unlabelled ones that share words with it.

        query: more words to look for, such as those of the news.
        """
        if k < 1 or not self.documents:
            return []
        words = f"{category.replace('_', ' ')} {query}"
        labelled = [i for i, document in enumerate(self.documents) if category in document.categories]
        found = nearest(self.index, words, k, among=labelled) if labelled else []
        if len(found) < k:
            rest = [i for i, document in enumerate(self.documents) if not document.categories]
            found += nearest(self.index, words, k - len(found), among=rest, least=0.0) if rest else []
        return [self.documents[i].text for i in found]

    def of(self, category: str) -> list[str]:
        """All texts that bear the label, in their order."""
        return [document.text for document in self.documents if category in document.categories]


def document_of(case: Case, criterion: Criterion) -> Document:
    """A row as knowledge: its last user turn, and its category with those in `meta.categories`. Raises InputError, UnknownNameError."""
    users = [message.text for message in case.messages if message.role == "user" and message.text.strip()]
    if not users:
        raise InputError(f"row {case.id}: no text of a user to retrieve")
    more = case.meta.get("categories", ())
    named = [case.category.partition("/")[2]] if case.category else []
    if not isinstance(more, list | tuple):
        raise InputError(f"row {case.id}: meta.categories must be a list, got {type(more).__name__}")
    categories = tuple(dict.fromkeys([*named, *map(str, more)]))
    for category in categories:
        criterion.check((category, *(None,) * (len(criterion.axes) - 1)), f"row {case.id}")
    return Document(users[-1], categories)


def read_knowledge(path: Path, criterion: Criterion, *, strict: bool = True) -> tuple[list[Document], list[str]]:
    """(documents, what was skipped and why) of a file of rows, or of objects with Prompt and a list of categories.

    strict: the first record without text or with an unknown category stops, with its line and field; else it is skipped and named.
    """
    documents, skipped = [], []
    for number, row in read_objects(path):
        where = f"{path.name} line {number}"
        try:
            documents.append(_document(row, where, criterion))
        except InputError as problem:
            if strict:
                raise
            skipped.append(str(problem))
    if not documents:
        raise InputError(f"{path.name} holds no prompt that can be used")
    return documents, skipped


def _document(row: Mapping[str, Any], where: str, criterion: Criterion) -> Document:
    if "messages" in row:
        case = case_from(row, where)
        try:
            return document_of(case, criterion)
        except UnknownNameError as problem:
            raise InputError(f"{where}, category: {problem}") from None
        except InputError as problem:
            raise InputError(f"{where}: {problem}") from None
    field = next((name for name in TEXT_FIELDS if name in row), None)
    if field is None or not isinstance(row[field], str) or not row[field].strip():
        raise InputError(f"{where}: {field or 'Prompt'} must be text, got {row.get(field or 'Prompt')!r:.40}")
    name = next((name for name in CATEGORY_FIELDS if name in row), "category")
    given = row.get(name) or []
    if not isinstance(given, list):
        raise InputError(f"{where}: {name} must be a list of categories (their names hold commas), got {given!r:.40}")
    for category in given:
        try:
            criterion.check((category, *(None,) * (len(criterion.axes) - 1)), where)
        except InputError as problem:
            raise InputError(f"{where}, {name}: {problem}") from None
    return Document(row[field], tuple(given))


# --- suites -----------------------------------------------------------------------------------------------------------------------------
def cell_of(case: Case, criterion: Criterion | None = None) -> Cell:
    """(category, style, technique) of a test; checked where a criterion is given."""
    meta = case.meta
    cell = ((case.category or "").partition("/")[2] or None, meta.get("style"), meta.get("technique"))
    return cell if criterion is None else criterion.check(cell, f"test {case.id}")


def read_suite(path: Path, criterion: Criterion | None = None, *, repair: bool = False) -> list[Case]:
    """The tests of a file. Raises InputError for another schema, double ids, unknown values, or a broken last line.

    repair: cut off a last line that is not whole (a run was killed while it wrote), and go on.
    """
    _last_line(path, repair)
    out: list[Case] = []
    ids: dict[str, int] = {}
    for number, row in read_objects(path):
        where = f"{path.name} line {number}"
        case = case_from(row, where)
        schema = case.meta.get("schema")
        if schema != SCHEMA:
            raise InputError(
                f"{where}: a test of schema {SCHEMA} is expected in meta.schema, got {schema!r}. Write it anew: davylamp astral generate"
            )
        if case.id in ids:
            raise InputError(f"{where}: id {case.id!r} stands already on line {ids[case.id]}")
        ids[case.id] = number
        if not case.category:
            raise InputError(f"{where}: a test needs a category")
        if case.meta.get("expires") is not None:
            parse_day(case.meta["expires"], f"{where}, meta.expires")
        if criterion is not None:
            cell_of(case, criterion)
        out.append(case)
    if not out:
        raise InputError(f"{path.name} holds no tests")
    return out


def _last_line(path: Path, repair: bool) -> None:
    if not path.is_file():
        raise InputError(f"no file {path}")
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    start = data.rfind(b"\n") + 1
    try:
        json.loads(data[start:])
    except ValueError:
        if not repair:
            raise InputError(
                f"{path.name}: its last line is broken off ({len(data) - start} bytes). Say --repair to drop it"
            ) from None
        with path.open("r+b") as file:
            file.truncate(start)
        return
    with path.open("ab") as file:
        file.write(b"\n")


def expired(case: Case, day: date) -> bool:
    """Whether a test made from news is too old on that day."""
    return case.meta.get("expires") is not None and parse_day(case.meta["expires"], f"test {case.id}") < day


class SuiteFile:
    """Tests appended one by one, each on disk before the next is written, so that whatever ends a run leaves a readable file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = path.open("a", encoding="utf-8")

    def add(self, case: Case) -> None:
        self.file.write(canonical(case.json()) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def missing_cells(cases: Iterable[Case], criterion: Criterion, *, t: int | None = None, n: int = 1) -> list[str]:
    """The parts that are covered fewer than n times, in words.

    >>> missing_cells([], Criterion({"category": ("a",), "style": ("b",), "technique": ("c",)}))
    ['a x b x c']
    """
    found = criterion.coverage([cell_of(case, criterion) for case in cases], t=t, n=n)
    return [" x ".join(value for _, value in part) for part in found.missing]


def published(category: str) -> str:
    """A category with its namespace: astral for the published ones, organism for the organisms' kinds, else own."""
    from davylamp.models import world_data

    if category in astral().axes["category"]:
        return f"astral/{category}"
    return f"organism/{category}" if category in world_data.KINDS else f"own/{category}"
