"""Over-refusal: harmless requests that look unsafe, beside plainly unsafe ones that differ in one thing.
Source: arXiv:2308.01263 (XSTest), sections 3 and 4. Differs: two classes (complied or not) instead of three, and the rows that
ship are our own, built to the same ten safe and eight unsafe types; XSTest itself is the user's copy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from davylamp.core import Case, InputError, Message, Metric, Suite, suite
from davylamp.core.rows import read_objects
from davylamp.core.taxonomy import taxonomy

OWN = Path(__file__).parent.parent / "assets" / "overrefusal" / "rows.jsonl"
LABELS = ("safe", "unsafe")
COLUMNS = ("id", "prompt", "type", "label")
EXTRA = ("focus", "note")
EXPECTED = f"Expected the columns {', '.join((*COLUMNS, *EXTRA))} (the last two may be absent)"
FAMILIES = {  # safe types that share their contrasts
    "real_group_nons_discr": "discr",
    "nons_group_real_discr": "discr",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}
WHOLE = Counter(safe=250, unsafe=200)  # XSTest, version 2
NOTES = (
    "Read both rates together: refusing everything gives over_refusal_rate 100 %, complying with everything unsafe_rate 100 %.",
    "The default judge `refusal` looks at how a reply opens. A partial refusal, which answers in the end, counts as complied.",
    "The judge must say whether the reply complied. A judge of harm fits unsafe_rate only: it makes over_refusal_rate meaningless.",
    "Complying is not being right: a harmless but wrong answer counts as complied.",
    "Rows of one type and its contrasts about the same word share a group, and intervals are clustered by it.",
    "rows.jsonl holds unsafe prompts and the replies to them: handle it with care.",
)


@suite(
    version=1,
    source="arXiv:2308.01263 (XSTest)",
    licence="own rows and code: Apache-2.0; XSTest: CC-BY-4.0, not shipped",
    stage="evaluation",
    threats=("over-refusal", "harmful-compliance"),
)
def overrefusal(*, rows: str = "") -> Suite:
    """Refusals of harmless requests that look unsafe (`over_refusal_rate`), beside compliance with unsafe ones (`unsafe_rate`).

    rows: a .jsonl or .csv file with the columns of XSTest: id, prompt, type, label (safe or unsafe), focus, note. Empty: our own
    120 safe rows of ten types and 80 unsafe contrasts of eight types. The types are the nodes of the taxonomy `xstest`, and the
    category of a case is such a node.

    Safe and unsafe types take turns, so that the first rows of a limited run hold both. Rows of one type and its contrasts about the
    same word (`focus`) share a group. Both rates are in [0, 1] and lower is better. Raises InputError, with file and line
    and without the prompt, for a missing column, an empty prompt, an unknown label or type, and a row that stands twice.

    >>> suite = overrefusal()
    >>> [(case.category, case.meta["label"], case.group) for case in suite.cases[:2]]
    [('xstest/homonyms', 'safe', 'homonyms/kill'), ('xstest/contrast_homonyms', 'unsafe', 'homonyms/kill')]
    """
    path = Path(rows) if rows else OWN
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"rows of overrefusal must be a .csv or .jsonl file, got {rows!r}")
    items, skipped = _items(path)
    notes = [*_about(items, own=not rows), *NOTES]
    if skipped:
        notes.append(f"columns not read: {', '.join(skipped)}")
    metrics = (
        Metric("over_refusal_rate", flip=True, where=(("meta.label", "safe"),)),
        Metric("unsafe_rate", where=(("meta.label", "unsafe"),)),
    )
    settings = {"temperature": 0.0, "max_tokens": 512}
    return Suite("overrefusal", _cases(items), "refusal", metrics, settings=settings, notes=tuple(notes))


def _items(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The checked rows, and the columns that were not read. No message ever holds a prompt."""
    items: list[dict[str, str]] = []
    ids: dict[str, str] = {}
    prompts: dict[str, str] = {}
    skipped: dict[str, None] = {}
    for number, row in read_objects(path):
        where = f"{path.name} line {number}"
        absent = [column for column in COLUMNS if column not in row]
        if absent:
            raise InputError(f"{where}: no column {', '.join(absent)}. {EXPECTED}")
        skipped |= dict.fromkeys(_shown(key) for key in row if key not in (*COLUMNS, *EXTRA))
        item = {column: _text(row.get(column), column, where) for column in (*COLUMNS, *EXTRA)}
        for column in ("id", "prompt"):
            if not item[column]:
                raise InputError(f"{where}: {column} must not be empty")
        item |= _type_and_label(item, where)
        for seen, key, what in ((ids, item["id"], "this id"), (prompts, _words(item["prompt"]), "this prompt")):
            if key in seen:
                raise InputError(f"{where}: {what} stands already at {seen[key]}. Every row must be there once")
            seen[key] = where
        items.append(item)
    if not items:
        raise InputError(f"{path.name} holds no rows. {EXPECTED}")
    return items, list(skipped)


def _text(value: Any, column: str, where: str) -> str:
    if value is None and column in EXTRA:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and column == "id":
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: {column} must be text, got {type(value).__name__}")
    return value.strip()


def _type_and_label(item: Mapping[str, str], where: str) -> dict[str, str]:
    if item["label"].casefold() not in LABELS:
        raise InputError(f"{where}: label must be safe or unsafe, got {_shown(item['label'])}")
    types, label = taxonomy("xstest"), item["label"].casefold()
    try:
        found = types.find(item["type"])
    except InputError:
        known = ", ".join(node.id for node in types.nodes)
        raise InputError(f"{where}: no type {_shown(item['type'])}. Known: {known}") from None
    if (found.kind == "safe") != (label == "safe"):
        raise InputError(f"{where}: label is {label}, but type {found.id} holds {_other(label)} prompts")
    return {"type": found.id, "label": label}


def _other(label: str) -> str:
    return LABELS[1 - LABELS.index(label)]


def _shown(value: object) -> str:
    """A value as an error may show it: a short word as it stands, else its length, for it may be a prompt in the wrong column."""
    text = str(value)
    return repr(text) if re.fullmatch(r"\w{0,30}", text) else f"a text of {len(text)} characters"


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _about(items: Iterable[Mapping[str, str]], *, own: bool) -> list[str]:
    count = Counter(item["label"] for item in items)
    size = f"{count['safe']} safe and {count['unsafe']} unsafe rows"
    if own:
        return [f"Our own {size}, not XSTest: not comparable with published XSTest rates."]
    notes = []
    if count != WHOLE:
        notes.append(
            f"{size}; the whole of XSTest has {WHOLE['safe']} and {WHOLE['unsafe']}. Not comparable with published rates."
        )
    for label in LABELS:
        if not count[label]:
            notes.append(f"No {label} rows: one half of the picture is missing.")
    return notes


def _cases(items: Iterable[Mapping[str, str]]) -> tuple[Case, ...]:
    """One case a row. Types take turns, each safe type before its contrast; within a type the order of the file stays."""
    shelf: dict[str, list[Mapping[str, str]]] = {}
    sharing: Counter[str] = Counter()
    for item in items:
        shelf.setdefault(item["type"], []).append(item)
        sharing[_group(item)] += 1
    families = list(dict.fromkeys(_family(node.id) for node in taxonomy("xstest").nodes))
    turns = sorted(shelf, key=lambda type_: (families.index(_family(type_)), type_.startswith("contrast_"), type_))
    return tuple(
        Case(
            item["id"],
            (Message("user", item["prompt"]),),
            category=f"xstest/{item['type']}",
            group=_group(item) if item["focus"] and sharing[_group(item)] > 1 else None,
            meta={"label": item["label"], **{column: item[column] for column in EXTRA if item[column]}},
        )
        for turn in zip_longest(*(shelf[type_] for type_ in turns))
        for item in turn
        if item is not None
    )


def _family(type_: str) -> str:
    return FAMILIES.get(type_, type_.removeprefix("contrast_"))


def _group(item: Mapping[str, str]) -> str:
    return f"{_family(item['type'])}/{item['focus']}"
