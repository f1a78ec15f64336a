"""System 05: the three suites, their loaders and errors, and a random target at chance."""

import asyncio
import base64
import io
import json
import sys
import types

import numpy as np
import pytest

from davylamp.core.errors import InputError, RunError, UnknownNameError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.data.labsafety_rows import ASPECTS, OPTION, question, split_options
from davylamp.suites.labsafety import SUBJECTS

LABELS = ("chemical hazards", "biological hazards", "personal protective equipment (PPE)", "electricity safety")


def mcq(n=40, **more):
    return [
        {
            "Question": f"Which paper bird number {i} is right? A: red {i} B: blue {i} C: green {i} D: white {i}",
            "Explanation": "x",
            "Correct Answer": "ABCD"[i % 4],
            "Category": [LABELS[i % 4], *(["emergency response"] if i % 2 else [])],
            "Topic": f"topic {i % 3}",
            "Level": ("Easy", "Hard")[i % 2],
            **more,
        }
        for i in range(n)
    ]


def scenarios(n=6):
    return [
        {
            "Scenario": f"Folding paper bird {i}.",
            "LabSafety_Related_Issues": {aspect: [f"{aspect} one {i}", f"two {i}"] for aspect in ASPECTS},
            "Topic": "paper",
            "Subject": ("Biology", "Cryogenic_Liquids")[i % 2],
            "Decisions": [{"Decision": f"fold {k}", "Consequence": f"The paper bends {k}."} for k in range(3)],
        }
        for i in range(n)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_questions(tmp_path):
    suite = load_suite("labsafety_mcq", {"rows": write(tmp_path / "q.jsonl", mcq())}).suite
    cases = list(suite.cases)
    assert len(cases) == 40 and [case.answer for case in cases[:4]] == list("ABCD")
    assert cases[0].category == "lab/chemical_hazards" and cases[1].meta["in_emergency_response"]
    names = {metric.name for metric in suite.metrics}
    assert {"accuracy", "accuracy_emergency_response", "accuracy_subject_physics", "accuracy_subject_general"} <= names
    assert cases[0].messages[0].role == "system" and cases[0].messages[1].text.endswith("Final choice:")


def test_subjects_are_those_of_the_source():
    assert SUBJECTS["physics"] == ("physical_hazards", "electricity_safety", "radiation_hazards")


def test_modes_shots_and_hints(tmp_path):
    rows, hints = write(tmp_path / "q.jsonl", mcq()), tmp_path / "hints.json"
    hints.write_text(json.dumps({"topic 0": "Birds are paper."}))
    options = {"rows": rows, "mode": "reasoned", "shots": "5", "hints": str(hints)}
    suite = load_suite("labsafety_mcq", options).suite
    texts = [case.messages[1].text for case in suite.cases]
    assert all(text.count("Final choice:") == 5 and text.endswith("Step-by-step analysis:") for text in texts)
    assert "Birds are paper." in texts[0] and "Birds are paper." not in texts[1]
    assert "topics without a hint: 2" in suite.notes


def test_rotations_move_the_right_option(tmp_path):
    suite = load_suite("labsafety_mcq", {"rows": write(tmp_path / "q.jsonl", mcq(4)), "rotate": "true"}).suite
    cases = list(suite.cases)
    assert len(cases) == 16 and [case.answer for case in cases[:4]] == list("ABCD")
    for case in cases:
        shown = dict(
            line.split(": ", 1)
            for line in case.messages[1].text.splitlines()
            if line[:3] in ("A: ", "B: ", "C: ", "D: ")
        )
        right = {"0": "red", "1": "blue", "2": "green", "3": "white"}[case.messages[1].text.split("number ")[1][0]]
        assert shown[case.answer].startswith(right)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"Correct Answer": "E"}, "q.jsonl line 2: Correct Answer must be one of A, B, C, D, got 'E'"),
        ({"Correct Answer": ""}, "Correct Answer"),
        ({"Question": "Which? A: x B: y C: z"}, "options A to D in this order; found the letters A B C"),
        ({"Question": " "}, "Question must be a text"),
        ({"Category": []}, "Category is empty"),
        ({"Category": ["chemical hazard"]}, "'chemical hazard'. Did you mean 'chemical hazards'"),
        ({"Category": "[broken"}, "Category is broken JSON"),
        ({"Image Path": "x.png"}, "Ask these with --images"),
    ],
)
def test_bad_questions(tmp_path, change, says):
    rows = mcq(3)
    rows[1] |= change
    with pytest.raises((InputError, UnknownNameError)) as problem:
        load_suite("labsafety_mcq", {"rows": write(tmp_path / "q.jsonl", rows)})
    assert says in str(problem.value) and "paper bird" not in str(problem.value)


def test_a_part_that_cannot_be_read_is_counted(tmp_path):
    rows = [*mcq(5), {"question": "Which? A: x", "answer_analysis": "B"}]
    suite = load_suite("labsafety_mcq", {"rows": write(tmp_path / "q.jsonl", rows), "partial": "true"}).suite
    assert len(list(suite.cases)) == 5 and "1 of 6 rows could not be read" in suite.notes[0]


def picture(folder, name="a.png", mode="RGBA"):
    from PIL import Image

    Image.new(mode, (4, 3), 7).save(folder / name)
    return name


def test_pictures_are_decoded_to_rgb(tmp_path):
    from PIL import Image

    rows = mcq(3, **{"Image Path": picture(tmp_path)})
    case = next(
        iter(load_suite("labsafety_mcq", {"rows": write(tmp_path / "q.jsonl", rows), "images": "true"}).suite.cases)
    )
    url = case.messages[1].media[0]
    assert url.startswith("data:image/png;base64,") and "picture" in case.messages[0].text
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))
    assert (image.mode, image.size) == ("RGB", (4, 3))


@pytest.mark.parametrize("path", [None, "nowhere.png", "broken.png"])
def test_a_picture_that_is_not_there_is_an_error_even_with_partial(tmp_path, path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = write(tmp_path / "q.jsonl", mcq(3, **{"Image Path": path}))
    with pytest.raises(InputError, match="line 1: no picture that can be read"):
        load_suite("labsafety_mcq", {"rows": rows, "images": "true", "partial": "true"})


class Random:
    """Picks a letter by chance."""

    name, identity = "random", {"name": "random"}

    async def __call__(self, messages, *, seed=0, **settings):
        text = messages[-1].text.encode() + str(seed).encode()
        return Message("assistant", "ABCD"[int(np.random.default_rng(list(text)).integers(4))])


def run(name, options, target, judge=None, runs=None, epochs=1):
    loaded = load_suite(name, options)
    judging = load_judge(judge or loaded.suite.judge)
    return asyncio.run(evaluate(loaded, target, judging, runs=runs, epochs=epochs, quiet=True))[1]


def test_a_random_target_is_at_chance(tmp_path):
    """Three seeds; each interval must hold 25 %, and the control, a target that reads the key, must not."""
    rows = write(tmp_path / "q.jsonl", mcq(120))
    for seed in range(3):
        loaded = load_suite("labsafety_mcq", {"rows": rows, "rotate": "true"})
        record = asyncio.run(
            evaluate(loaded, Random(), load_judge("choice"), runs=tmp_path / f"r{seed}", seed=seed, quiet=True)
        )[1]
        overall = next(e for e in record.estimates if e.name == "accuracy" and e.category is None)
        assert overall.low <= 0.25 <= overall.high and overall.n == 480
    keys = {case.messages[1].text: case.answer for case in loaded.suite.cases}

    class Knows(Random):
        name, identity = "knows", {"name": "knows"}

        async def __call__(self, messages, *, seed=0, **settings):
            return Message("assistant", f"The answer is {keys[messages[-1].text]}.")

    record = asyncio.run(evaluate(loaded, Knows(), load_judge("choice"), runs=tmp_path, quiet=True))[1]
    assert next(e for e in record.estimates if e.name == "accuracy").low > 0.9


def test_an_item_counts_in_every_label(tmp_path):
    class A(Random):
        async def __call__(self, messages, *, seed=0, **settings):
            return Message("assistant", "A")

    record = run("labsafety_mcq", {"rows": write(tmp_path / "q.jsonl", mcq(40))}, A(), runs=tmp_path)
    found = {e.name: e for e in record.estimates if e.category is None}
    assert found["accuracy_chemical_hazards"].value == 1.0 and found["accuracy_chemical_hazards"].n == 10
    assert found["accuracy_emergency_response"].value == 0.0 and found["accuracy_emergency_response"].n == 20


def test_hazards(tmp_path):
    rows = write(tmp_path / "s.jsonl", scenarios())
    suite = load_suite("labsafety_hazards", {"rows": rows, "points": "3"}).suite
    cases = list(suite.cases)
    assert len(cases) == 24 and len({case.group for case in cases}) == 6
    assert "exactly 3 different points" in cases[0].messages[0].text
    assert {case.category for case in cases} == {f"lab/{aspect.lower()}" for aspect in ASPECTS}

    class Says(Random):
        async def __call__(self, messages, *, seed=0, **settings):
            number = messages[-1].text.split("bird ")[1][0]
            return Message("assistant", f"most common hazards one {number}")

    record = run("labsafety_hazards", {"rows": rows}, Says(), runs=tmp_path)
    by = {e.category: e for e in record.estimates if e.name == "coverage"}
    assert by["lab/most_common_hazards"].value > by["lab/improper_operation_issues"].value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"LabSafety_Related_Issues": {"Most_Common_Hazards": ["x"]}}, "lacks Improper_Operation_Issues"),
        ({"Subject": "Chemstry"}, "Did you mean 'Chemistry'"),
        ({"Scenario": ""}, "Scenario must be a text"),
    ],
)
def test_bad_scenarios(tmp_path, change, says):
    rows = scenarios(2)
    rows[1] |= change
    with pytest.raises(InputError, match=says):
        load_suite("labsafety_hazards", {"rows": write(tmp_path / "s.jsonl", rows)})


def test_empty_points(tmp_path):
    rows = scenarios(6)
    rows[0]["LabSafety_Related_Issues"]["Most_Common_Hazards"] = []
    path = write(tmp_path / "s.jsonl", rows)
    with pytest.raises(InputError, match="Most_Common_Hazards is empty"):
        load_suite("labsafety_hazards", {"rows": path})
    suite = load_suite("labsafety_hazards", {"rows": path, "skip_empty": "true"}).suite
    assert len(list(suite.cases)) == 23 and "1 questions without expected points" in suite.notes[0]


def test_consequences(tmp_path):
    suite = load_suite("labsafety_consequences", {"rows": write(tmp_path / "s.jsonl", scenarios())}).suite
    cases = list(suite.cases)
    assert len(cases) == 18 and cases[0].answer == ["The paper bends 0."] and cases[0].category == "lab/biology"
    assert "The paper bends" not in cases[0].messages[0].text


def test_the_public_home(monkeypatch):
    calls = []
    fake = types.ModuleType("datasets")

    def load_dataset(home, config, split):
        calls.append((home, config, split))
        if config == "scenario":
            raise OSError
        return mcq(4)

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr("davylamp.data.public.need", lambda *_: None)
    assert load_suite("labsafety_mcq", {"sampled": "true"}).total == 4
    assert calls == [("yujunzhou/LabSafety_Bench", "MCQ", "sampledQA")]
    with pytest.raises(RunError, match="could not fetch yujunzhou/LabSafety_Bench"):
        load_suite("labsafety_hazards")


def test_public_rows(public_rows):
    folder = public_rows / "labsafety"
    loaded = load_suite("labsafety_mcq", {"rows": str(folder / "mcq.jsonl"), "partial": "true"})
    assert loaded.total > 100 and {case.answer for case in loaded.suite.cases} == set("ABCD")
    assert load_suite("labsafety_hazards", {"rows": str(folder / "scenario_hazards.jsonl")}).total > 380
    assert load_suite("labsafety_consequences", {"rows": str(folder / "decision_consequence.jsonl")}).total > 380


@pytest.mark.parametrize(
    "text",
    [
        "Q? A. x B. y C. z D. w",
        "Q? A) x, B) y,C) z, D) w.",
        "Q?\nA: x\nB: y\nC: z\nD: w",
        "Is A: x? A: x B: y C: z D: w",
        "Q? A : x B : y C : z D : w",
    ],
)
def test_inline_options(text):
    assert [option.rstrip(".") for option in split_options(text, "here")[1]] == ["x", "y", "z", "w"]
    assert OPTION.search(text)


def test_the_training_form():
    row = {
        "question": "Question: Q? A: x B: y C: z D: w\nStep-by-Step analysis:",
        "answer_analysis": "1. Option C is right, as A is not.",
    }
    assert question(row, "here", None, images=False)["gold"] == "C"
