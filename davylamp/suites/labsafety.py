"""LabSafety Bench: multiple choice (text and pictures), hazards of a laboratory scenario, and the consequence of a decision in it.
Source: arXiv:2410.14182, sections 3 and 4, in the version of 404 scenarios. Differs: greedy; a reply without a readable letter or a
point without a verdict is unscored, not wrong. The rows are the user's copy or come from their public home; none is shipped,
demonstrations and texts are ours."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from davylamp.core import Case, InputError, Message, Metric, Suite, suite
from davylamp.core.rows import read_objects
from davylamp.core.taxonomy import taxonomy
from davylamp.data.labsafety_rows import (
    HOME,
    LETTERS,
    decisions_of,
    hash_of,
    public_rows,
    question,
    scenario_of,
    subject_id,
    text_of,
)

ASSETS = Path(__file__).parent.parent / "assets" / "labsafety"
SUBJECTS = {  # of a text question, from its labels
    "biology": ("biological_hazards",),
    "chemistry": ("chemical_hazards",),
    "physics": ("physical_hazards", "electricity_safety", "radiation_hazards"),
}
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
    given = public_rows(rows, "MCQ", ("sampled" if sampled else "") + ("QA_I" if images else "QA"))
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
    for where, row in public_rows(rows, "scenario", "train"):
        scenario, subject, expected = scenario_of(row, where)
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
            id_ = f"{hash_of(scenario)}/{node}"
            cases.append(
                Case(
                    id_, (Message("user", text),), f"lab/{node}", list(wanted), hash_of(scenario), {"subject": subject}
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
    for where, row in public_rows(rows, "scenario", "train"):
        scenario = text_of(row, ("Scenario", "scenario"), where)
        for decision, expected in decisions_of(row, where):
            text = texts["consequence"].format(scenario=scenario, decision=decision)
            id_ = f"{hash_of(scenario)}/{hash_of(decision)}"
            subject = str(row.get("Subject") or "unknown")
            category = f"lab/{subject_id(subject, where)}" if subject != "unknown" else "labsafety/unknown"
            cases.append(
                Case(id_, (Message("user", text),), category, [expected], hash_of(scenario), {"subject": subject})
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
