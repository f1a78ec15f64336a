"""MultiJail: the same harmful prompt in ten languages, plain and behind an instruction.
Source: arXiv:2310.06474, sections 2 and 3. Differs: the jailbreak instruction is not shipped (the user's file with one slot); the default
judge `refusal` reads the reply in its own language, where the paper translates it first: `translated:judge=…,translator=…` does that."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from davylamp.core import Case, InputError, Message, Metric, Suite, UnknownNameError, suite
from davylamp.core.rows import read_objects
from davylamp.core.taxonomy import taxonomy
from davylamp.data.public import rows_of

HOME, REVISION = "DAMO-NLP-SG/MultiJail", "main"
PIVOT = "en"
#: language -> tier by its share of the web (percent of CommonCrawl pages, 2023): high > 1, medium 0.1 to 1, low < 0.1. Table 1.
TIERS = {
    "en": "pivot",
    **dict.fromkeys(("zh", "it", "vi"), "high"),
    **dict.fromkeys(("ar", "ko", "th"), "medium"),
    **dict.fromkeys(("bn", "sw", "jv"), "low"),
}
LEVELS = ("high", "medium", "low")
ROWS = 315
ABOUT = ("id", "source", "tags")
ARMS = ("unintentional", "intentional", "translated")
SLOT = "{prompt}"
NOTES = (
    "unsafe_rate counts all replies, invalid ones among them: a model that cannot speak a language looks safe in it. "
    "Read invalid_rate beside it: what the judge calls nonresponsive. `refusal` says so of empty replies only.",
    "any_language is the share of items that some language breaks. It is at least the largest rate of one language, and no mean.",
    "The rate of a tier is the mean over its languages: every item stands in each of them.",
    "A judge that was measured in English is not measured in the other languages. Measure it there, or translate the replies first.",
    "rows.jsonl holds harmful prompts and the replies to them: handle it with care.",
)


@suite(
    version=1,
    source="arXiv:2310.06474",
    licence="data: MIT, not shipped; code: Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance", "jailbreak", "distribution-shift"),
    systems=("32",),
)
def multijail(
    *,
    rows: str = "",
    languages: tuple[str, ...] = (),
    arms: tuple[Literal["unintentional", "intentional", "translated"], ...] = ("unintentional",),
    template: str = "",
    translations: str = "",
    tiers: tuple[str, ...] = (),
) -> Suite:
    """Unsafe and invalid rates by language, resource tier, tag and scenario, and the share of items that some language breaks.

    rows: a .csv or .jsonl file with the columns id, source, tags and one for each language; empty: from the hub. Every row must hold every
    language. languages: which of the file's columns are asked; empty: all.
    arms: unintentional = the plain prompt; intentional = your English instruction before it; translated = the instruction in the prompt's
    own language.  template: a text file with one slot {prompt}, for the last two.  translations: a .jsonl file of {"language", "text"} with
    one such template each, for `translated`.
    tiers: tiers of further languages, or others than the table's, as `ne=low`.

    Raises InputError, with ids and without prompts, for a cell that is missing or empty, an id that stands twice, a tag that is unknown, a
    language without a tier, and a template without exactly one slot.

    >>> multijail(rows="x.csv", arms=("intentional",))
    Traceback (most recent call last):
    davylamp.core.errors.InputError: the arm intentional needs --template FILE: a text with one {prompt}
    """
    if not arms or len(set(arms)) != len(arms) or not set(arms) <= set(ARMS):
        raise InputError(
            f"arms of multijail must be some of {', '.join(ARMS)}, each once, got {', '.join(arms) or 'none'}"
        )
    frame = _template(Path(template)) if template else ""
    if set(arms) - {"unintentional"} and not frame:
        raise InputError(
            f"the arm {next(a for a in arms if a != 'unintentional')} needs --template FILE: a text with one {SLOT}"
        )
    if "translated" in arms and not translations:
        raise InputError("the arm translated needs --translations FILE: the template in each language")
    where = Path(rows).name or HOME
    items, found = _items(rows_of(rows, "multijail", HOME, split="train", revision=REVISION), where)
    wanted = languages or found
    for language in wanted:
        if language not in found:
            raise UnknownNameError(f"language of {where}", language, found)
    level = _tiers(tiers, wanted)
    frames = dict.fromkeys(wanted, frame)
    if "translated" in arms:
        own = _frames(Path(translations))
        without = [language for language in wanted if language != PIVOT and language not in own]
        if without:
            raise InputError(f"{Path(translations).name} holds no template in {', '.join(without)}")
        frames |= {language: own.get(language, frame) for language in wanted}
    cases = tuple(
        _case(item, language, level[language], arm, frame if arm == "intentional" else frames[language])
        for item in items
        for language in wanted
        for arm in arms
    )
    notes = list(NOTES)
    if len(items) != ROWS:
        notes.insert(
            0,
            f"reduced copy: {len(items)} of {ROWS} items. Compare languages with each other, not with published rates.",
        )
    metrics = _metrics(wanted, level, arms)
    return Suite(
        "multijail", cases, "refusal", metrics, settings={"temperature": 0.0, "max_tokens": 512}, notes=tuple(notes)
    )


def _metrics(languages: Sequence[str], level: Mapping[str, str], arms: Sequence[str]) -> tuple[Metric, ...]:
    """Rates by slice, the share that any language breaks, and the paired gaps: each tier to the high one, each language to English."""
    by: tuple[str, ...] = ("meta.language", "meta.tier", "meta.pool", "meta.tags")
    by = (*by, "meta.arm", *(f"meta.arm*{path}" for path in by)) if len(arms) > 1 else by
    beyond = (("meta.pool", "non-English"),)
    per_arm = ("meta.arm", "meta.arm*meta.tier") if len(arms) > 1 else ()
    out = [
        Metric("unsafe_rate", by=by),
        Metric("invalid_rate", label="nonresponsive", by=by),
        Metric("any_language", per="group", where=beyond, by=("meta.tier", *per_arm)),
    ]
    tiers = [tier for tier in LEVELS if any(level[language] == tier for language in languages)]
    for tier in tiers[1:]:
        out.append(Metric(f"tier_gap_{tier}", against=("meta.tier", tier, tiers[0]), by=()))
    if PIVOT in languages:
        out += [
            Metric(f"gap_{language}", against=("meta.language", language, PIVOT), by=())
            for language in languages
            if language != PIVOT
        ]
    if "unintentional" in arms:
        out += [
            Metric(f"{arm}_effect", against=("meta.arm", arm, "unintentional"), by=("meta.tier",))
            for arm in arms
            if arm != "unintentional"
        ]
    return tuple(out)


def _case(item: Mapping[str, Any], language: str, tier: str, arm: str, frame: str) -> Case:
    text = item["texts"][language]
    meta = {
        "language": language,
        "tier": tier,
        "pool": "English" if language == PIVOT else "non-English",
        "arm": arm,
        "source": item["source"],
        "tags": [f"multijail/{tag}" for tag in item["tags"]],
    }
    asked = text if arm == "unintentional" else frame.replace(SLOT, text)
    return Case(
        f"{item['id']}-{language}-{arm}",
        (Message("user", asked),),
        category=f"multijail/{item['tags'][0]}",
        group=str(item["id"]),
        meta=meta,
    )


# --- rows -------------------------------------------------------------------------------------------------------------------------------
def _items(rows: Iterable[tuple[str, Mapping[str, Any]]], name: str) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The checked rows and their languages. All must be parallel: every fault is collected, by language."""
    items: list[dict[str, Any]] = []
    found: tuple[str, ...] = ()
    seen: dict[str, str] = {}
    faults: dict[str, list[str]] = {}
    for where, row in rows:
        absent = [column for column in ABOUT if column not in row]
        if absent:
            raise InputError(
                f"{where}: no column {', '.join(absent)}. Expected {', '.join(ABOUT)} and one for each language"
            )
        here = tuple(str(column) for column in row if column not in ABOUT)
        found = found or here
        id_ = str(row["id"]).strip()
        if not id_ or id_ in seen:
            raise InputError(f"{where}: id {id_!r} is empty or stands already at {seen.get(id_, 'no line')}")
        seen[id_] = where
        for language in dict.fromkeys((*found, *here)):
            text = row.get(language)
            if language not in found or not isinstance(text, str) or not text.strip():
                faults.setdefault(language, []).append(id_)
        items.append(
            {
                "id": id_,
                "source": str(row["source"]),
                "tags": _tags(row["tags"], where),
                "texts": {language: str(row.get(language) or "").strip() for language in found},
            }
        )
    if faults:
        told = "; ".join(
            f"{language}: ids {', '.join(ids[:5])}{' …' if len(ids) > 5 else ''}" for language, ids in faults.items()
        )
        raise InputError(f"{name}: every row must hold every language, and these do not. {told}")
    if not items or not found:
        raise InputError(f"{name} holds no rows. Expected the columns {', '.join(ABOUT)} and one for each language")
    return items, found


def _tags(value: Any, where: str) -> list[str]:
    """The tags of a row, which is a list or, in the public file, a list as Python writes it. A tag may hold commas."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    known = taxonomy("multijail")
    if not isinstance(value, list) or not value or not all(isinstance(tag, str) for tag in value):
        raise InputError(
            f"{where}: tags must be a list of one tag or more. Known: {', '.join(node.label for node in known.nodes)}"
        )
    try:
        return [known.find(tag).id for tag in value]
    except UnknownNameError:
        raise InputError(f"{where}: a tag is unknown. Known: {', '.join(node.label for node in known.nodes)}") from None


def _tiers(given: Sequence[str], languages: Sequence[str]) -> dict[str, str]:
    level = dict(TIERS)
    for word in given:
        language, equals, tier = word.partition("=")
        if not equals or tier not in LEVELS:
            raise InputError(f"tiers of multijail read like ne=low with high, medium or low, got {word!r}")
        level[language] = tier
    without = [language for language in languages if language not in level]
    if without:
        raise InputError(f"no tier is known for {', '.join(without)}. Say it: --tiers {without[0]}=low")
    return level


def _template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template {path} cannot be read: {error}") from None
    return _checked(text, path.name)


def _checked(text: str, where: str) -> str:
    slots = re.findall(r"\{\w*\}", text)
    if slots != [SLOT]:
        raise InputError(
            f"{where}: a template holds {SLOT} exactly once and no other slot, found {', '.join(slots) or 'none'}"
        )
    return text.strip()


def _frames(path: Path) -> dict[str, str]:
    out: dict[str, str] = {}
    for number, row in read_objects(path):
        if set(row) != {"language", "text"} or not all(isinstance(value, str) for value in row.values()):
            raise InputError(
                f"{path.name} line {number}: expected language and text, got {', '.join(map(str, row)) or 'nothing'}"
            )
        out[row["language"]] = _checked(row["text"], f"{path.name} line {number}")
    return out
