"""SimpleSafetyTests: 100 short prompts that almost any assistant should refuse, with and without a safety system prompt.
Source: arXiv:2311.08370, sections 2 and 3. Differs: a neutral system text of equal length can be run as a third arm, as a control.
The prompts are the user's copy or come from their public home; none is shipped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from davylamp.core import Case, InputError, Message, Metric, Suite, suite
from davylamp.core.taxonomy import taxonomy
from davylamp.data.public import rows_of

ASSETS = Path(__file__).parent.parent / "assets" / "simple_safety_tests"
HOME, REVISION = "Bertievidgen/SimpleSafetyTests", "98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5"
ARMS = ("none", "safety", "neutral")
KINDS = {"information": "advice", "instructions": "action"}  # node of the prompt's form -> meta.kind
CELL = 10  # rows in each of 5 areas x 2 kinds
PAPER = {"Physical Harm": "physical_harm"}  # spellings of the paper that the taxonomy lacks
COLUMNS = ("id", "harm_area", "category")
NOTES = (
    "0 % is not safe: for 0 of 100 the upper end is 3.7 %, for 0 of 20 (one area) 16.1 %. Never rank targets by one or two points.",
    "Refusing everything scores perfectly here: read it beside overrefusal.",
    "The prompts have been public since 2023, so a model may have been trained on them.",
    "The final answer is judged; a reasoning model's thought is not.",
    "rows.jsonl holds sensitive prompts and replies: handle it with care.",
)


@suite(
    version=1,
    source="arXiv:2311.08370",
    licence="data: CC-BY-4.0 (repository), cc-by-2.0 (card on the hub); code: Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance",),
    systems=("08",),
)
def simple_safety_tests(
    *,
    rows: str = "",
    arms: tuple[Literal["none", "safety", "neutral"], ...] = ("none", "safety"),
    partial: bool = False,
    system: str = "",
    system_as: Literal["system", "user"] = "system",
) -> Suite:
    """Unsafe rate on 100 critical prompts, by harm area, kind and arm, and what the safety system prompt changes.

    rows: a .csv or .jsonl file with the columns id, harm_area, category, prompts_final (or prompt); empty: fetched from the hub at a
    pinned revision. It must hold 10 rows in each of 5 areas x 2 kinds; with `partial` a reduced copy is let through, and noted.
    arms: none = the bare prompt, safety = with the safety system prompt, neutral = with a harmless text of equal length (the control).
    system: a text file to use as safety system prompt instead of ours.  system_as: `user` puts it into the user's turn behind a
    SYSTEM: mark, for models without a system role.

    The metrics are `unsafe_rate` and, with both arms, `system_prompt_effect` = rate(none) - rate(safety) over pairs (exact McNemar p;
    pairs with an unscored side are left out and counted). The default judge is the cheap `refusal`; prefer
    `llm_judge:model=…,rubric=harm` or one whose error is measured.

    >>> simple_safety_tests(rows="my_copy.csv", arms=("none", "polite"))
    Traceback (most recent call last):
    davylamp.core.errors.InputError: arms of simple_safety_tests must be some of none, safety, neutral, each once, got none, polite
    """
    if not arms or len(set(arms)) != len(arms) or not set(arms) <= set(ARMS):
        given = ", ".join(arms) or "none at all"
        raise InputError(f"arms of simple_safety_tests must be some of {', '.join(ARMS)}, each once, got {given}")
    items, skipped = _items(_rows(rows), Path(rows).name or HOME, partial)
    texts = {
        "safety": _text(Path(system) if system else ASSETS / "system_safety.txt"),
        "neutral": _text(ASSETS / "system_neutral.txt"),
    }
    cases = tuple(_case(item, arm, texts.get(arm), system_as) for item in items for arm in arms)
    metrics = [
        Metric("unsafe_rate", by=("category", "meta.kind", "meta.arm", "meta.arm*category", "meta.arm*meta.kind"))
    ]
    for arm, name in (("safety", "system_prompt_effect"), ("neutral", "neutral_prompt_effect")):
        if "none" in arms and arm in arms:
            metrics.append(Metric(name, against=("meta.arm", "none", arm), higher_is_better=arm == "safety"))
    notes = list(NOTES)
    if len(items) != 10 * CELL:
        reduced = f"reduced copy: {len(items)} of 100 rows, {_summary(items)}"
        notes.insert(0, f"{reduced}. Compare arms with each other, not with published rates.")
    if skipped:
        notes.append(f"columns not read: {', '.join(skipped)}")
    if system and "neutral" in arms and len(texts["neutral"]) != len(texts["safety"]):
        notes.append(
            f"the neutral text has {len(texts['neutral'])} characters and your safety text {len(texts['safety'])}: "
            "the control is not of equal length"
        )
    if system_as == "user" and arms != ("none",):
        notes.append("the system text stands in the user's turn, behind SYSTEM: and USER: marks")
    settings = {"temperature": 0.0, "max_tokens": 512}
    return Suite("simple_safety_tests", cases, "refusal", tuple(metrics), settings=settings, notes=tuple(notes))


def _rows(rows: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(place, row) of the user's file or of the public home."""
    try:
        yield from rows_of(rows, "simple_safety_tests", HOME, split="test", revision=REVISION)
    except InputError as problem:
        raise InputError(f"{problem}. {EXPECTED}") from None


EXPECTED = f"Expected a UTF-8 file with the columns {', '.join(COLUMNS)}, prompts_final and {CELL} rows in each of 5 areas x 2 kinds"


def _items(
    rows: Iterable[tuple[str, Mapping[str, Any]]], name: str, partial: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The checked rows, and the columns that were not read. No message ever holds a prompt."""
    items: list[dict[str, Any]] = []
    ids: dict[str, str] = {}
    prompts: dict[str, str] = {}
    skipped: dict[str, None] = {}
    for where, row in rows:
        column = next((column for column in ("prompts_final", "prompt") if column in row), None)
        absent = [column for column in COLUMNS if column not in row] + ([] if column else ["prompts_final"])
        if column is None or absent:
            raise InputError(
                f"{where}: no column {', '.join(absent)}; found {', '.join(map(str, row)) or 'none'}. {EXPECTED}"
            )
        skipped |= dict.fromkeys(str(key) for key in row if key not in (*COLUMNS, column, "counter"))
        id_, prompt = str(row["id"]).strip(), str(row[column]).strip()
        if not id_ or not prompt:
            raise InputError(f"{where}: id and {column} must not be empty")
        for seen, key, what in ((ids, id_, f"id {id_!r}"), (prompts, _words(prompt) or prompt, "this prompt")):
            if key in seen:
                raise InputError(f"{where}: {what} stands already at {seen[key]}")
            seen[key] = where
        items.append(
            {
                "id": id_,
                "prompt": prompt,
                "area": _node(row["harm_area"], "hazard", "harm area", where),
                "kind": KINDS[_node(row["category"], "form", "category", where)],
                "counter": str(row.get("counter") or ""),
            }
        )
    cells = Counter((item["area"], item["kind"]) for item in items)
    whole = len(cells) == 10 and set(cells.values()) == {CELL}
    if not items or not (whole or partial) or max(cells.values()) > CELL:
        hint = "" if partial else "\nIs it a reduced copy? Then say --partial"
        expected = f"{CELL} rows in each of 5 areas x 2 kinds (100 rows)"
        raise InputError(f"{name}: expected {expected}, found {len(items)} rows:\n{_table(cells)}{hint}")
    return items, list(skipped)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _plain(text: str) -> str:
    """Spelling apart from capitals, punctuation and `and`."""
    return " ".join(word for word in _words(text).split() if word != "and")


def _node(given: Any, kind: str, what: str, where: str) -> str:
    """The taxonomy id of a harm area or category in any of its spellings."""
    spellings = {
        spelling: node.id
        for node in taxonomy("sst").nodes
        if node.kind == kind
        for spelling in (node.label, *node.aliases)
    }
    spellings |= PAPER if kind == "hazard" else {}
    for spelling, id_ in spellings.items():
        if _plain(str(given)) == _plain(spelling):
            return id_
    raise InputError(f"{where}: no {what} {str(given)[:60]!r}. Accepted: {'; '.join(spellings)}")


def _table(cells: Mapping[tuple[str, str], int]) -> str:
    """Found rows by area and kind, each beside what was expected."""
    lines = [f"  {'':16}" + "".join(f"{kind:>16}" for kind in KINDS.values())]
    for node in taxonomy("sst").nodes:
        if node.kind == "hazard":
            counts = [cells.get((node.id, kind), 0) for kind in KINDS.values()]
            lines.append(f"  {node.id:16}" + "".join(f"{f'{count} of {CELL}':>16}" for count in counts))
    return "\n".join(lines)


def _summary(items: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{area} {count}" for area, count in sorted(Counter(item["area"] for item in items).items()))


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} is not a readable text file: {problem}") from None
    if not text:
        raise InputError(f"{path} is empty: a system prompt must say something")
    return text


def _case(item: Mapping[str, Any], arm: str, system: str | None, system_as: str) -> Case:
    meta: dict[str, Any] = {"arm": arm, "kind": item["kind"]}
    if item["counter"]:
        meta["counter"] = item["counter"]
    head = f"SYSTEM: {system}\n\nUSER: " if system and system_as == "user" else ""
    messages: tuple[Message, ...] = (Message("user", head + item["prompt"]),)
    if head:
        meta["request_at"] = len(head)  # where the prompt begins, so that annotators stay blind to the arm
    elif system:
        messages = (Message("system", system), *messages)
    return Case(f"{item['id']}/{arm}", messages, category=f"sst/{item['area']}", group=item["id"], meta=meta)
