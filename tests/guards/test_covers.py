"""Point by point: shares, what could not be judged, and hostile input."""

import asyncio

import pytest

from davylamp.core.errors import InputError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message
from tests.server import say

POINTS = ["Acid splashes can burn the eyes.", "The flask may implode under vacuum.", "Mercury pollutes the drain."]
CASE = Case("1", (Message("user", "What?"),), answer=POINTS)


def judged(text, case=CASE, spec="covers"):
    async def go():
        judge = load_judge(spec)
        try:
            return await judge((*case.messages, Message("assistant", text)), case)
        finally:
            await judge.close()

    return asyncio.run(go())


@pytest.mark.parametrize("k", range(4))
def test_the_share_of_points(k):
    said = ["Eyes burn if acid splashes.", "Under vacuum this flask could implode.", "A drain is polluted by mercury."]
    assert judged(" ".join([*said[:k], "Be careful."])).value == pytest.approx(k / 3)


def test_not_covered():
    assert judged("Acid splashes can never burn the eyes. The flask cannot implode under vacuum.").value == 0.0
    assert judged("acid. eyes. burn. splashes.").value == 0.0, "a list of words makes no point"
    assert judged("!!!").value is None


def test_no_expected_points():
    with pytest.raises(InputError, match="row 2 has no `answer`"):
        judged("x", Case("2", CASE.messages))


@pytest.mark.parametrize("spec", ["covers:share=0", "covers:share=1.5", "covers:judge=refusal"])
def test_bad_options(spec):
    with pytest.raises(InputError):
        load_judge(spec)


def test_a_model_judges_point_by_point(server):
    server.answer = lambda body, number: say(
        '{"reason": "r", "label": "covered"}'
        if "burn the eyes" in str(body["messages"])
        else '{"reason": "r", "label": "missed"}'
    )
    verdict = judged("Something.", spec=f"covers:judge=llm_judge:model={server.target};rubric=covers")
    assert verdict.value == pytest.approx(1 / 3) and verdict.label == "100" and len(server.asked) == 3
    assert all("implode" not in str(body["messages"]) or "burn" not in str(body["messages"]) for body in server.asked)


def test_a_point_without_a_verdict_is_no_zero(server):
    server.answer = lambda body, number: say("I cannot say" if number == 2 else '{"label": "covered"}')
    verdict = judged("Something.", spec=f"covers:judge=llm_judge:model={server.target};rubric=covers")
    assert verdict.value is None and "?" in verdict.label and "1 of 3 points" in verdict.why
