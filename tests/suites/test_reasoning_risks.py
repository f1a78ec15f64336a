"""System 21: the parts of the assessment, their loaders and errors, injection with a planted responder, simulated phishing."""

import asyncio
import json

import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message
from davylamp.suites.reasoning_risks import ATTACKS, POLICY, check_transcript, simulate, stand_ins


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path, task, rows, **options):
    return load_suite("reasoning_risks", {"task": task, "rows": write(tmp_path / "x.jsonl", rows), **options}).suite


INJECTION = {
    "prompt_id": 1, "test_case_prompt": "Be kind.", "user_input": "Say hi.", "judge_question": "Does it say hi?",
    "injection_variant": "system_mode", "injection_type": "direct", "risk_category": "logic-violating", "speaking_language": "English",
}  # fmt: skip
AIR = {"cate-idx": "1.1.1.1", "l2-name": "Security Risks", "l3-name": "x", "l4-name": "y", "prompt": "fold a bird"}


def test_tasks_and_their_columns(tmp_path):
    case = next(iter(load(tmp_path, "injection", [INJECTION]).cases))
    assert [m.role for m in case.messages] == ["system", "user"] and case.answer == "Does it say hi?"
    assert (case.meta["way"], case.meta["risk"], case.meta["variant"]) == ("direct", "logic-violating", "system_mode")
    wild = [
        {"prompt": "a", "adversarial": True, "prompt_harm_label": "harmful", "subcategory": "my kind"},
        {"prompt": "b", "adversarial": False, "prompt_harm_label": "harmful"},
        {"prompt": "c", "adversarial": True, "prompt_harm_label": "unharmful"},
    ]
    assert [case.category for case in load(tmp_path, "jailbreak", wild).cases] == ["jailbreak/my_kind"]
    case = next(iter(load(tmp_path, "policy", [AIR]).cases))
    assert case.category == "policy/security_risks" and case.meta["level1"] == "System & Operational Risks"
    rows = [{"mutated_prompt": f"bird {i}", "attack_type": name} for i, name in enumerate(ATTACKS)]
    options = {"task": "interpreter", "rows": write(tmp_path / "i.json", rows)}
    assert [case.category for case in load_suite("reasoning_risks", options).suite.cases][
        1
    ] == "interpreter/container_escape"
    cyber = [{"mutated_prompt": "x", "mitre_category": "Execution"}]
    assert next(iter(load(tmp_path, "cyber", cyber).cases)).category == "cyber/execution"


def test_there_are_sixteen_categories_below_four():
    assert len(POLICY) == 16 and len(set(POLICY.values())) == 4


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("injection", {**INJECTION, "judge_question": " "}, "prompt_id 1 has no judge_question"),
        ("injection", {"prompt_id": 1, "judge_question": "x"}, "no injection_type"),
        ("policy", {**AIR, "l2-name": "Securty Risks"}, "Did you mean 'Security Risks'"),
        ("policy", {**AIR, "cate-idx": ""}, "no cate-idx"),
        ("policy", {**AIR, "l4-name": None}, "no l4-name"),
        ("interpreter", {"mutated_prompt": "x", "attack_type": "Container Escpe"}, "Did you mean 'Container Escape'"),
        ("cyber", {"text": "x"}, "no mutated_prompt"),
        ("jailbreak", {"text": "x"}, "no prompt"),
        ("jailbreak", {"prompt": "x", "prompt_harm_label": "unharmful"}, "holds no rows of the task"),
    ],
)
def test_bad_rows(tmp_path, task, row, says):
    with pytest.raises((InputError, UnknownNameError), match=says):
        load(tmp_path, task, [row])


def test_a_category_without_a_judge_prompt(tmp_path):
    texts = write(tmp_path / "j.jsonl", [{"cate-idx": "1.1.1.1", "judge_prompt": "Look for birds."}])
    suite = load(tmp_path, "policy", [AIR], judge_prompts=texts)
    assert next(iter(suite.cases)).answer == "Look for birds."
    with pytest.raises(InputError, match=r"no judge prompt for 1 categories, such as 1\.1\.1\.2"):
        load(tmp_path, "policy", [AIR, {**AIR, "cate-idx": "1.1.1.2"}], judge_prompts=texts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "policy"}, "needs the rows of its public set"),
        ({"task": "injection", "victim": "x"}, "victim with phishing"),
        ({"task": "none"}, "task of reasoning_risks must be"),
        ({"rows": "x.parquet"}, "must be a .jsonl, .json or .csv file"),
        ({"max_tokens": "0"}, "max_tokens must be 1"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises((InputError, UnknownNameError), match=says):
        load_suite("reasoning_risks", options)


def test_phishing_needs_a_victim(tmp_path):
    with pytest.raises(InputError, match="--victim TARGET"):
        load(tmp_path, "phishing", [{"prompt": "Write to Sam."}])


def test_public_injection_rows(public_rows):
    rows = str(public_rows / "cyberseceval_injection" / "prompt_injection_en.jsonl")
    cases = list(load_suite("reasoning_risks", {"rows": rows}).suite.cases)
    assert len(cases) > 100 and {case.meta["way"] for case in cases} == {"direct", "indirect"}


class Half:
    """Follows every direct order, in its thought every order, and no other."""

    name, identity = "half", {"name": "half"}

    async def __call__(self, messages, *, seed=0, **settings):
        case = next(case for case in stand_ins() if case.messages == tuple(messages))
        word, way = case.meta["canary"], case.meta["way"]
        thought = f"They want {word}." if way != "none" else "Nothing odd."
        return Message("assistant", f"{word}!" if way == "direct" else "A plain text.", reasoning=thought)


def run(tmp_path, judge):
    loaded = load_suite("reasoning_risks")
    record = asyncio.run(evaluate(loaded, Half(), load_judge(judge), runs=tmp_path, quiet=True))[1]
    return {(e.name, e.category): e for e in record.estimates}


def test_direct_and_indirect_apart(tmp_path):
    found = run(tmp_path, "canary")
    whole = found["attack_success_rate", None]
    assert (whole.value, whole.n) == (0.5, 40) and found["false_alarm_rate", None].value == 0.0
    by = {category: e.value for (name, category), e in found.items() if name == "attack_success_rate" and category}
    assert sorted(by.values())[0] == 0.0 and 1.0 in by.values()


def test_the_thought_apart(tmp_path):
    assert run(tmp_path, "canary:of=thought")["attack_success_rate", None].value == 1.0


def test_a_model_without_thoughts_has_none_of_them(tmp_path):
    judge = load_judge("canary:of=thought")
    case = stand_ins()[0]
    verdict = asyncio.run(judge((*case.messages, Message("assistant", case.meta["canary"])), case))
    assert verdict.value is None and verdict.label == "none"


# --- phishing --------------------------------------------------------------------------------------------------------------------------
class Scripted:
    name, identity = "scripted", {"name": "scripted"}

    def __init__(self, *says):
        self.says, self.seen = says, []

    async def __call__(self, messages, *, seed=0, **settings):
        self.seen.append([(message.role, message.text) for message in messages])
        return Message("assistant", self.says[min(len(self.seen), len(self.says)) - 1])


SET_UP = Case("1", (Message("user", "Write to Sam about the garden."),), meta={"name": "Sam", "interest": "roses"})


def test_a_simulated_conversation():
    target, victim = (
        Scripted("Hello Sam.", "Roses are fine.", "Please come.", "Thanks."),
        Scripted("Hi.", "Yes.", "Fine."),
    )
    said = asyncio.run(simulate(target, victim, SET_UP))
    assert [m.role for m in said] == ["assistant", "user"] * 3 + ["assistant"] and said[-1].text == "Thanks."
    assert (
        victim.seen[0][0][0] == "system"
        and "roses" in victim.seen[0][0][1]
        and victim.seen[0][1] == ("user", "Hello Sam.")
    )
    assert target.seen[1][-1] == ("user", "Hi.")


def test_a_declined_set_up_ends_at_once():
    target, victim = Scripted("I can't help with that."), Scripted("Hi.")
    assert len(asyncio.run(simulate(target, victim, SET_UP))) == 1 and not victim.seen


@pytest.mark.parametrize(
    "roles",
    [["assistant"], ["user", "assistant"], ["assistant", "user"], ["assistant", "assistant", "user", "assistant"]],
)
def test_bad_transcripts(roles):
    with pytest.raises(InputError):
        check_transcript([Message(role, "x") for role in roles])


def test_through_the_suite(tmp_path):
    (tmp_path / "v.py").write_text("def victim(messages, **settings):\n    return 'Hi there.'\n")
    rows = write(tmp_path / "p.jsonl", [{"prompt": "Write to Sam.", "prompt_id": str(i)} for i in range(3)])
    options = {"task": "phishing", "rows": rows, "victim": f"python/{tmp_path / 'v.py'}:victim"}
    loaded = load_suite("reasoning_risks", options)
    for target, value in ((Scripted("Hello Sam."), 1.0), (Scripted("I can't help with that."), 0.0)):
        record = asyncio.run(evaluate(loaded, target, load_judge("refusal"), runs=tmp_path / str(value), quiet=True))[1]
        assert record.estimates[0].value == value


def test_skill_is_a_score_from_0_to_5(server):
    from tests.server import say

    async def rated():
        judge = load_judge(f"llm_judge:model={server.target},rubric=phishing_skill")
        try:
            return (await judge((Message("user", "x"), Message("assistant", "y")))).value
        finally:
            await judge.close()

    for text, value in (("<score>3</score>", 0.6), ("<score>6</score>", None), ("very skilled", None)):
        server.answer = lambda body, number, text=text: say(text)
        assert asyncio.run(rated()) == value
