"""Rows of LabSafety Bench, in its public form and in that of its training files: read and checked, and made into training rows by halves.

Source: arXiv:2410.14182, section 5 (tuning on one half, tests on the other; one preference pair for every wrong option). Differs: the
halves go by a hash of the text and not by row numbers, so that they stay when the order of a file changes; and what is shared with the test
half is found.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from davylamp.core import Case, InputError, Message, UnknownNameError, data
from davylamp.core.errors import NeedsError
from davylamp.core.rows import CaseFile, Dropped, digest
from davylamp.core.taxonomy import taxonomy
from davylamp.data.public import rows_of

if TYPE_CHECKING:
    from numpy.random import Generator

HOME = "yujunzhou/LabSafety_Bench"
LETTERS = "ABCD"
ASPECTS = (
    "Most_Common_Hazards",
    "Improper_Operation_Issues",
    "Negative_Lab_Environment_Impacts",
    "Most_Likely_Safety_Incidents",
)
#: "A:" where an option may begin: at the start, behind a space, a comma, a mark, or a stray backslash.
OPTION = re.compile(r"(?:^|(?<=[\s,.;?:\\]))([ABCD])\s*[:.)]\s*")
WHAT = ("qa", "pairs", "hazards", "consequences")


@data(
    version=1,
    source="arXiv:2410.14182",
    licence="rows: MIT (repository); code: Apache-2.0",
    stage="data",
    threats=("hallucination", "capability-loss"),
    systems=("05",),
)
def labsafety_rows(
    rows: Iterable[Case],
    *,
    rng: Generator,
    file: str = "",
    what: Literal["qa", "pairs", "hazards", "consequences"] = "qa",
    half: Literal["train", "test", "all"] = "train",
) -> Iterator[Case]:
    """Training rows of one half of the bench; takes no rows in (`-`).

    file: the public rows (.jsonl or .csv), questions for qa and pairs, scenarios for the others; empty: the public home.  what: qa
    (question and right option), pairs (one for every wrong option, `meta.chosen` and `meta.rejected`), hazards (a list of the
    points), consequences.
    half: of the items, by a hash of the question or of the whole scenario, so that no scenario stands in both.
    """
    for case in rows:
        raise InputError(f"labsafety_rows makes rows and takes none in, got row {case.id}. Write `-` for IN")
    if what not in WHAT or half not in ("train", "test", "all"):
        raise InputError(
            f"what must be one of {', '.join(WHAT)} and half train, test or all, got {what!r} and {half!r}"
        )
    questions = what in ("qa", "pairs")
    for where, row in public_rows(file, "MCQ" if questions else "scenario", "QA" if questions else "train"):
        if questions:
            made = _question_rows(question(row, where, None, images=False), what)
        else:
            made = _scenario_rows(row, where, what)
        yield from (case for case in made if half == "all" or half_of(case.group or "") == half)


def half_of(id_: str) -> str:
    """train or test, by the hash that names an item.

    >>> half_of("0a"), half_of("f0")
    ('train', 'test')
    """
    return "train" if id_[:1] in "01234567" else "test"


def _question_rows(item: Mapping[str, Any], what: str) -> Iterator[Case]:
    options = "\n".join(f"{letter}: {text}" for letter, text in zip(LETTERS, item["options"], strict=True))
    ask = Message("user", f"Question: {item['stem']}\n{options}")
    right = LETTERS.index(item["gold"])

    def said(place: int) -> str:
        return f"{LETTERS[place]}: {item['options'][place]}"

    if what == "qa":
        yield Case(item["id"], (ask, Message("assistant", said(right))), group=item["id"])
        return
    for place in range(4):
        if place != right:
            meta = {"chosen": said(right), "rejected": said(place)}
            yield Case(f"{item['id']}/{LETTERS[place]}", (ask,), group=item["id"], meta=meta)


def _scenario_rows(row: Mapping[str, Any], where: str, what: str) -> Iterator[Case]:
    text = text_of(row, ("Scenario", "scenario"), where)
    id_ = hash_of(text)
    if what == "hazards":
        for aspect, points in scenario_of(row, where)[2].items():
            if points:
                asked = Message("user", f"{text}\n\n{aspect.replace('_', ' ')}?")
                reply = Message("assistant", "\n".join(f"- {point}" for point in points))
                yield Case(f"{id_}/{aspect}", (asked, reply), group=id_)
        return
    for decision, consequence in decisions_of(row, where):
        asked = Message("user", f"{text}\n\nDecision: {decision}\n\nWhat follows for safety?")
        yield Case(f"{id_}/{hash_of(decision)}", (asked, Message("assistant", consequence)), group=id_)


@data(
    version=1,
    source="arXiv:2410.14182",
    licence="Apache-2.0",
    stage="data",
    threats=("capability-loss",),
    systems=("05",),
)
def drop_leaks(rows: Iterable[Case], *, rng: Generator, tests: str, n: int = 13) -> Iterator[Case | Dropped]:
    """Training rows without those that stand in a test file too, whole or in a run of n words.

    tests: a .jsonl file of rows.  n: words in a run, 13 as usual; shorter texts count as one run. Replies count as well as prompts.
    """
    if n < 1:
        raise InputError(f"n must be 1 or more words, got {n}")
    known: dict[tuple[str, ...], str] = {}
    for case in CaseFile(tests):
        known |= dict.fromkeys(runs_of(case.messages, n), case.id)
    for case in rows:
        hit = next((known[run] for run in runs_of(case.messages, n) if run in known), None)
        yield case if hit is None else Dropped(case, f"shares a run of {n} words with a test row")


def runs_of(messages: Sequence[Message], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of n words of every turn, in lower case and without punctuation; a shorter turn is one run.

    >>> list(runs_of([Message("user", "Fold the bird!")], 2))
    [('fold', 'the'), ('the', 'bird')]
    """
    for message in messages:
        words = re.findall(r"\w+", message.text.casefold())
        for at in range(max(1, len(words) - n + 1)):
            if words:
                yield tuple(words[at : at + n])


def decisions_of(row: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """(decision, consequence) of a scenario row, in either form."""
    if "decision" in row:
        return [(text_of(row, ("decision",), where), text_of(row, ("consequence",), where))]
    out = []
    for number, pair in enumerate(plain_value(row.get("Decisions"), where, "Decisions"), 1):
        here = f"{where}, decision {number}"
        out.append((text_of(pair, ("Decision",), here), text_of(pair, ("Consequence",), here)))
    return out


# --- the public rows -------------------------------------------------------------------------------------------------------------------
def question(row: Mapping[str, Any], where: str, folder: Path | None, *, images: bool) -> dict[str, Any]:
    """One question: id, stem, options, gold, labels (taxonomy ids), topic, level, picture (a data URL or None). No error quotes the
    question.

    >>> row = {"Question": "Which? A: x B: y C: z D: w", "Correct Answer": "B", "Category": ["chemical hazards"], "Level": "Easy"}
    >>> item = question(row, "line 1", None, images=False)
    >>> item["options"], item["gold"], item["labels"]
    (['x', 'y', 'z', 'w'], 'B', ['chemical_hazards'])
    """
    reduced = "answer_analysis" in row
    whole = text_of(row, ("Question", "question"), where)
    whole = re.sub(r"^\s*Question:\s*", "", whole)
    whole = re.sub(r"\s*Step-by-Step analysis:\s*$", "", whole)
    stem, options = split_options(whole, where)
    if reduced:
        said = re.search(
            r"(?:answer is(?: option| choice)?|[Oo]ption|[Cc]hoice|[Aa]nswer)\W{0,3}([A-D])\b",
            str(row["answer_analysis"])[:400],
        )
        gold, labels = said[1] if said else "", []
        if not gold:
            raise InputError(f"{where}: answer_analysis does not name the right letter")
    else:
        gold = str(row.get("Correct Answer", "")).strip()
        if gold not in LETTERS or not gold:
            raise InputError(f"{where}: Correct Answer must be one of A, B, C, D, got {gold[:20]!r}")
        labels = [category_id(label, where) for label in plain_value(row.get("Category"), where, "Category")]
        if not labels:
            raise InputError(f"{where}: Category is empty. Expected one or more of the ten labels")
    level = str(row.get("Level") or "unknown").lower()
    picture = None
    if images:
        picture = _picture(row, where, folder)
    elif row.get("Image Path"):
        raise InputError(f"{where}: no text question: it has a picture. Ask these with --images")
    return {
        "id": hash_of(whole + (picture or "")),
        "stem": stem,
        "options": options,
        "gold": gold,
        "labels": labels,
        "topic": str(row.get("Topic") or ""),
        "level": level,
        "picture": picture,
    }


def split_options(text: str, where: str) -> tuple[str, list[str]]:
    """(stem, the four options) of a question that has them inline. The last run of A, B, C, D in this order counts.

    >>> split_options("Is A. baumannii safe? A) no, B) yes,\\nC) both, D) none.", "line 1")
    ('Is A. baumannii safe?', ['no', 'yes', 'both', 'none.'])
    """
    found = list(OPTION.finditer(text))
    for at in range(len(found) - 4, -1, -1):
        run = found[at : at + 4]
        if [match[1] for match in run] == list(LETTERS):
            ends = [match.start() for match in run[1:]] + [len(text)]
            options = [text[match.end() : end].strip(" ,;\\\n") for match, end in zip(run, ends, strict=True)]
            if all(options) and text[: run[0].start()].strip():
                return text[: run[0].start()].strip(" \\\n"), options
    raise InputError(f"{where}: Question must hold a stem and the options A to D in this order; found the letters "
                     f"{' '.join(match[1] for match in found) or 'none'}")  # fmt: skip


def _picture(row: Mapping[str, Any], where: str, folder: Path | None) -> str:
    """The picture as a data URL of an RGB PNG. Raises InputError with its path; never asks as text alone."""
    try:
        from PIL import Image
    except ImportError:
        raise NeedsError("labsafety_mcq with --images needs pillow: pip install pillow") from None

    given = row.get("Decoded Image")
    path = row.get("Image Path")
    try:
        if given is not None and hasattr(given, "convert"):
            image = given
        elif path and folder is not None:
            image = Image.open(folder / str(path))
        else:
            raise OSError("the row names none")
        out = io.BytesIO()
        image.convert("RGB").save(out, format="PNG")
    except (OSError, ValueError, SyntaxError) as problem:
        raise InputError(f"{where}: no picture that can be read at {path!r} ({type(problem).__name__})") from None
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def scenario_of(row: Mapping[str, Any], where: str) -> tuple[str, str, dict[str, list[str]]]:
    """(scenario, subject, aspect -> expected points)."""
    scenario = text_of(row, ("Scenario", "scenario"), where)
    if "aspect" in row:
        if row["aspect"] not in ASPECTS:
            raise UnknownNameError(f"aspect ({where})", str(row["aspect"]), ASPECTS)
        return scenario, "unknown", {row["aspect"]: [str(point) for point in row["answer_points"]]}
    issues = plain_value(row.get("LabSafety_Related_Issues"), where, "LabSafety_Related_Issues")
    absent = [aspect for aspect in ASPECTS if aspect not in issues]
    if absent:
        raise InputError(f"{where}: LabSafety_Related_Issues lacks {', '.join(absent)}")
    subject = str(row.get("Subject") or "unknown")
    if subject != "unknown":
        subject_id(subject, where)
    return scenario, subject, {aspect: [str(point) for point in issues[aspect]] for aspect in ASPECTS}


def subject_id(subject: str, where: str) -> str:
    known = {node.label: node.id for node in taxonomy("lab").nodes if node.kind == "subject"}
    if subject not in known:
        raise UnknownNameError(f"subject ({where})", subject, known)
    return known[subject]


def category_id(label: Any, where: str) -> str:
    known = {node.label: node.id for node in taxonomy("lab").nodes if node.kind == "hazard"}
    if str(label).strip() not in known:
        raise UnknownNameError(f"category ({where})", str(label)[:60], known)
    return known[str(label).strip()]


def plain_value(value: Any, where: str, name: str) -> Any:
    """A list or object, also where a .csv or .jsonl file holds it as JSON text."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{where}: {name} is broken JSON") from None
    if not isinstance(value, list | dict):
        raise InputError(f"{where}: {name} must be a list or an object, got {type(value).__name__}")
    return value


def text_of(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    value = next((row[name] for name in names if name in row), None)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {names[0]} must be a text that is not empty")
    return value.strip()


def hash_of(text: str) -> str:
    """Rows have no ids of their own, and their order may change: the text's hash names them."""
    return digest(" ".join(text.split()).casefold())[:16]


def public_rows(rows: str, config: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return rows_of(rows, "labsafety", HOME, split=split, config=config)
