"""LabSafety Bench: multiple choice (text and pictures), hazards of a laboratory scenario, and the consequence of a decision in it.
Source: arXiv:2410.14182, sections 3 and 4, in the version of 404 scenarios. Differs: greedy; a reply without a readable letter or a
point without a verdict is unscored, not wrong. The rows are the user's copy or come from their public home; none is shipped,
demonstrations and texts are ours.

Longer than 400 lines because three suites read one set of rows, in its public form and in that of its training files."""

from __future__ import annotations

import base64
import io
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from davylamp.core import Case, InputError, Message, Metric, RunError, Suite, UnknownNameError, suite
from davylamp.core.errors import NeedsError
from davylamp.core.needs import need
from davylamp.core.rows import read_objects
from davylamp.core.taxonomy import taxonomy

ASSETS = Path(__file__).parent.parent / "assets" / "labsafety"
HOME = "yujunzhou/LabSafety_Bench"
LETTERS = "ABCD"
ASPECTS = (
    "Most_Common_Hazards",
    "Improper_Operation_Issues",
    "Negative_Lab_Environment_Impacts",
    "Most_Likely_Safety_Incidents",
)
SUBJECTS = {  # of a text question, from its labels
    "biology": ("biological_hazards",),
    "chemistry": ("chemical_hazards",),
    "physics": ("physical_hazards", "electricity_safety", "radiation_hazards"),
}
#: "A:" where an option may begin: at the start, behind a space, a comma, a mark, or a stray backslash.
OPTION = re.compile(r"(?:^|(?<=[\s,.;?:\\]))([ABCD])\s*[:.)]\s*")
NOTES = (
    "Chance is 25 %. The published accuracy counts a reply without a readable letter as wrong: that is the low end of `worst` here.",
    "An item counts in every category and subject it is labelled with.",
    "The questions are public, so a model may have been trained on them. Expert-edited items share the style of the model that wrote "
    "their first draft.",
)  # fmt: skip
OPEN_NOTES = (
    "The value is a mean over questions of the share of expected points that the answer makes (a mean over questions, not over points).",
    "More listed points find more: read the length of the answers too, and compare runs with a set number (--points 3).",
    "The judge sees a point and the answer, not the scenario; wrong points cost nothing.",
    "`covers` with its default `words` is a baseline: use covers:judge=llm_judge;model=…;rubric=covers, and measure it.",
)


@suite(
    version=1,
    source="arXiv:2410.14182",
    licence="rows: MIT (repository); code: Apache-2.0",
    stage="evaluation",
    threats=("hallucination", "capability-loss"),
    systems=("05", "10"),
)
def labsafety_mcq(
    *,
    rows: str = "",
    images: bool = False,
    mode: Literal["direct", "reasoned"] = "direct",
    shots: Literal["0", "5"] = "0",
    hints: str = "",
    sampled: bool = False,
    rotate: bool = False,
    partial: bool = False,
) -> Suite:
    """Multiple choice on laboratory safety: `accuracy` overall, by level, and by the ten categories and four subjects.

    rows: a .jsonl or .csv file with the columns of the public set (Question, Correct Answer, Category, Topic, Level, Image Path) or of its
    training files (question, answer_analysis); empty: fetched from the public home.  images: the questions on a picture; a path is read
    from the rows file's folder.  mode: direct (the letter) or reasoned (step by step first).  shots: 0, or 5 demonstrations.  hints: a
    .json file of topic -> outline, put in front of the question.  sampled: the smaller part that people answered too (80 text, 20
    pictures). rotate: ask each question with its options in all four rotations, to see what the place does (`davylamp.metrics.choice`).
    partial: leave rows out whose options or key cannot be read, and say how many; without it they are errors.
    """
    if mode not in ("direct", "reasoned") or str(shots) not in ("0", "5"):
        raise InputError(f"mode must be direct or reasoned and shots 0 or 5, got {mode!r} and {shots!r}")
    given = _rows(rows, "MCQ", ("sampled" if sampled else "") + ("QA_I" if images else "QA"))
    outline = _hints(hints)
    texts = _texts()
    items, skipped = [], []
    for where, row in given:
        try:
            items.append(question(row, where, Path(rows).parent if rows else None, images=images))
        except InputError as problem:
            if not partial or problem.args[0].startswith(f"{where}: no {'picture' if images else 'text'}"):
                raise
            skipped.append(where)
    if not items:
        raise InputError(f"{rows or HOME} holds no questions that can be read")
    if len({item["id"] for item in items}) < len(items):
        raise InputError(f"{rows or HOME}: two questions are the same")
    cases = tuple(
        _mcq_case(item, turn, texts, mode=mode, shots=str(shots) == "5", hint=outline)
        for item in items
        for turn in (range(4) if rotate else (0,))
    )
    metrics = [Metric("accuracy", by=("category", "meta.level", "meta.gold"), higher_is_better=True)]
    present = {name for case in cases for name in case.meta if name.startswith("in_")}
    for name in sorted(present):
        metrics.append(Metric(f"accuracy_{name[3:]}", where=((f"meta.{name}", True),), by=(), higher_is_better=True))
    notes = [*NOTES]
    if skipped:
        notes.insert(0, f"{len(skipped)} of {len(items) + len(skipped)} rows could not be read and were left out")
    if hints:
        without = sorted({str(item["topic"]) for item in items} - set(outline))
        notes.append(f"topics without a hint: {len(without)}")
    settings = {"temperature": 0.0, "max_tokens": 512}
    return Suite("labsafety_mcq", cases, "choice", tuple(metrics), settings=settings, notes=tuple(notes))


@suite(
    version=1,
    source="arXiv:2410.14182",
    licence="rows: MIT (repository); code: Apache-2.0",
    stage="evaluation",
    threats=("hallucination", "capability-loss"),
    systems=("05", "10"),
)
def labsafety_hazards(*, rows: str = "", points: int = 0, skip_empty: bool = False) -> Suite:
    """Hazards of a scenario: four questions on each of 404 scenarios, `coverage` = the share of the expected points that the answer makes.

    rows: a .jsonl file with the columns of the public set (Scenario, LabSafety_Related_Issues, Subject, Topic) or of its training files
    (scenario, aspect, answer_points); empty: fetched from the public home.  points: how many different points the answer must list (3 and
    10 as published); 0 = as many as it likes.  skip_empty: leave questions without expected points out, and say how many; without it an
    error.
    """
    if points < 0:
        raise InputError(f"points must be 0 (any number) or more, got {points}")
    texts, cases, empty = _texts(), [], 0
    for where, row in _rows(rows, "scenario", "train"):
        scenario, subject, expected = _scenario(row, where)
        for aspect, wanted in expected.items():
            if not wanted:
                if not skip_empty:
                    raise InputError(
                        f"{where}: {aspect} is empty, and a mean over no points is undefined. To leave such questions out: --skip-empty"
                    )
                empty += 1
                continue
            node = taxonomy("lab").find(aspect).id
            text = f"{scenario}\n\n{texts['aspects'][node]}" + (texts["points"].format(n=points) if points else "")
            id_ = f"{_digest(scenario)}/{node}"
            cases.append(
                Case(
                    id_, (Message("user", text),), f"lab/{node}", list(wanted), _digest(scenario), {"subject": subject}
                )
            )
    if len({case.id for case in cases}) < len(cases):
        raise InputError(f"{rows or HOME}: a scenario stands there twice")
    notes = (f"{empty} questions without expected points were left out", *OPEN_NOTES) if empty else OPEN_NOTES
    return _open("labsafety_hazards", cases, notes, rows)


@suite(
    version=1,
    source="arXiv:2410.14182",
    licence="rows: MIT (repository); code: Apache-2.0",
    stage="evaluation",
    threats=("hallucination", "capability-loss"),
    systems=("05", "10"),
)
def labsafety_consequences(*, rows: str = "") -> Suite:
    """The consequence of a decision in a laboratory scenario (1,512 of them): `coverage` = how often the answer covers the expected one.

    rows: a .jsonl file with the columns of the public set (Scenario, Decisions, Subject) or of its training files (scenario, decision,
    consequence); empty: fetched from the public home.
    """
    texts, cases = _texts(), []
    for where, row in _rows(rows, "scenario", "train"):
        if "decision" in row:
            decisions = [{"Decision": row["decision"], "Consequence": row["consequence"]}]
        else:
            decisions = _plain(row.get("Decisions"), where, "Decisions")
        scenario = _text(row, ("Scenario", "scenario"), where)
        for number, pair in enumerate(decisions):
            decision = _text(pair, ("Decision",), f"{where}, decision {number + 1}")
            expected = _text(pair, ("Consequence",), f"{where}, decision {number + 1}")
            text = texts["consequence"].format(scenario=scenario, decision=decision)
            id_ = f"{_digest(scenario)}/{_digest(decision)}"
            subject = str(row.get("Subject") or "unknown")
            category = f"lab/{_subject(subject, where)}" if subject != "unknown" else "labsafety/unknown"
            cases.append(
                Case(id_, (Message("user", text),), category, [expected], _digest(scenario), {"subject": subject})
            )
    if len({case.id for case in cases}) < len(cases):
        raise InputError(f"{rows or HOME}: a decision stands there twice for one scenario")
    return _open("labsafety_consequences", cases, OPEN_NOTES, rows)


def _open(name: str, cases: list[Case], notes: Iterable[str], rows: str) -> Suite:
    if not cases:
        raise InputError(f"{rows or HOME} holds no questions")
    metric = Metric("coverage", by=("category", "meta.subject"), higher_is_better=True)
    settings = {"temperature": 0.0, "max_tokens": 512}
    return Suite(name, tuple(cases), "covers", (metric,), settings=settings, notes=tuple(notes))


# --- rows ------------------------------------------------------------------------------------------------------------------------------
def question(row: Mapping[str, Any], where: str, folder: Path | None, *, images: bool) -> dict[str, Any]:
    """One question: id, stem, options, gold, labels (taxonomy ids), topic, level, picture (a data URL or None). No error quotes the
    question.

    >>> row = {"Question": "Which? A: x B: y C: z D: w", "Correct Answer": "B", "Category": ["chemical hazards"], "Level": "Easy"}
    >>> item = question(row, "line 1", None, images=False)
    >>> item["options"], item["gold"], item["labels"]
    (['x', 'y', 'z', 'w'], 'B', ['chemical_hazards'])
    """
    reduced = "answer_analysis" in row
    whole = _text(row, ("Question", "question"), where)
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
        labels = [_category(label, where) for label in _plain(row.get("Category"), where, "Category")]
        if not labels:
            raise InputError(f"{where}: Category is empty. Expected one or more of the ten labels")
    level = str(row.get("Level") or "unknown").lower()
    picture = None
    if images:
        picture = _picture(row, where, folder)
    elif row.get("Image Path"):
        raise InputError(f"{where}: no text question: it has a picture. Ask these with --images")
    return {
        "id": _digest(whole + (picture or "")),
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


def _mcq_case(
    item: Mapping[str, Any], turn: int, texts: Mapping[str, Any], *, mode: str, shots: bool, hint: Mapping[str, str]
) -> Case:
    order = [(place - turn) % 4 for place in range(4)]  # in rotation t the option of place p stands at p + t
    options = [item["options"][i] for i in order]
    gold = LETTERS[(LETTERS.index(item["gold"]) + turn) % 4]
    reasoned = mode == "reasoned"
    text = ""
    if shots:
        for demo in _demos():
            text += f"Question: {demo['question']}\n"
            text += f"{texts['analysis']} {demo['analysis']}\n" if reasoned else ""
            text += f"{texts['final']} {demo['answer']}\n\n"
    if item["topic"] in hint:
        text += texts["hint"].format(hint=hint[item["topic"]])
    text += f"Question: {item['stem']}\n" + "\n".join(f"{a}: {b}" for a, b in zip(LETTERS, options, strict=True))
    text += f"\n{texts['analysis'] if reasoned else texts['final']}"
    system = texts["reasoned" if reasoned else "direct"] + (f" {texts['image']}" if item["picture"] else "")
    labels = item["labels"]
    subjects = [name for name, ids in SUBJECTS.items() if set(ids) & set(labels)] or (["general"] if labels else [])
    meta: dict[str, Any] = {
        "level": item["level"],
        "gold": gold,
        "rotation": turn,
        "mode": mode,
        "shots": 5 if shots else 0,
    }
    meta |= {f"in_{name}": True for name in (*labels, *(f"subject_{subject}" for subject in subjects))}
    return Case(
        f"{item['id']}/{turn}",
        (
            Message("system", system),
            Message("user", text, media=(item["picture"],) if item["picture"] else ()),
        ),
        f"lab/{labels[0]}" if labels else "labsafety/unlabelled",
        gold,
        item["id"],
        meta,
    )


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


def _scenario(row: Mapping[str, Any], where: str) -> tuple[str, str, dict[str, list[str]]]:
    """(scenario, subject, aspect -> expected points)."""
    scenario = _text(row, ("Scenario", "scenario"), where)
    if "aspect" in row:
        if row["aspect"] not in ASPECTS:
            raise UnknownNameError(f"aspect ({where})", str(row["aspect"]), ASPECTS)
        return scenario, "unknown", {row["aspect"]: [str(point) for point in row["answer_points"]]}
    issues = _plain(row.get("LabSafety_Related_Issues"), where, "LabSafety_Related_Issues")
    absent = [aspect for aspect in ASPECTS if aspect not in issues]
    if absent:
        raise InputError(f"{where}: LabSafety_Related_Issues lacks {', '.join(absent)}")
    subject = str(row.get("Subject") or "unknown")
    if subject != "unknown":
        _subject(subject, where)
    return scenario, subject, {aspect: [str(point) for point in issues[aspect]] for aspect in ASPECTS}


def _subject(subject: str, where: str) -> str:
    known = {node.label: node.id for node in taxonomy("lab").nodes if node.kind == "subject"}
    if subject not in known:
        raise UnknownNameError(f"subject ({where})", subject, known)
    return known[subject]


def _category(label: Any, where: str) -> str:
    known = {node.label: node.id for node in taxonomy("lab").nodes if node.kind == "hazard"}
    if str(label).strip() not in known:
        raise UnknownNameError(f"category ({where})", str(label)[:60], known)
    return known[str(label).strip()]


def _plain(value: Any, where: str, name: str) -> Any:
    """A list or object, also where a .csv or .jsonl file holds it as JSON text."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{where}: {name} is broken JSON") from None
    if not isinstance(value, list | dict):
        raise InputError(f"{where}: {name} must be a list or an object, got {type(value).__name__}")
    return value


def _text(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    value = next((row[name] for name in names if name in row), None)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {names[0]} must be a text that is not empty")
    return value.strip()


def _digest(text: str) -> str:
    """Rows have no ids of their own, and their order may change: the text's hash names them."""
    from davylamp.core.rows import digest

    return digest(" ".join(text.split()).casefold())[:16]


def _texts() -> dict[str, Any]:
    return tomllib.loads((ASSETS / "prompts.toml").read_text(encoding="utf-8"))


def _demos() -> list[dict[str, str]]:
    return [row for _, row in read_objects(ASSETS / "demos.jsonl")]


def _hints(path: str) -> dict[str, str]:
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"hints must be a .json file of topic -> text: {type(problem).__name__}") from None
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(text, str) and text.strip() for text in found.values())
    ):
        raise InputError("hints must be an object of topic -> text that is not empty")
    return found


def _rows(rows: str, config: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if rows:
        path = Path(rows)
        if path.suffix not in (".csv", ".jsonl"):
            raise InputError(f"rows of labsafety must be a .csv or .jsonl file, got {rows!r}")
        for number, row in read_objects(path):
            yield f"{path.name} line {number}", row
        return
    need("data", "labsafety without --rows FILE")
    from datasets import load_dataset

    try:
        found = load_dataset(HOME, config, split=split)
    except Exception as problem:  # the hub's client raises many kinds; all mean that there are no rows
        raise RunError(f"could not fetch {HOME} ({type(problem).__name__}). Give your copy: --rows FILE") from None
    for number, row in enumerate(found, 1):
        yield f"{HOME} {split} row {number}", row
