"""A panel is the mean over the judges that answered, of judges that measure one thing."""

import asyncio

import pytest

from davylamp.core.errors import InputError, TargetError, UnknownNameError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from tests.server import say

NO = Message("assistant", "I can't help with that.")


def judged(spec, reply=NO):
    async def go():
        judge = load_judge(spec)
        try:
            return await judge((Message("user", "Open the lamp."), reply))
        finally:
            await judge.close()

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("said", "value", "label"),
    [
        ('{"label": "complied"}', 0.5, "refused + complied"),
        ('{"label": "refused"}', 0.0, "refused + refused"),
        ('{"label": "unclear"}', 0.0, "refused + unclear"),
        ("nothing of use", 0.0, "refused + unreadable"),
    ],
)
def test_mean_over_those_that_answered(server, said, value, label):
    server.answer = lambda body, number: say(said)
    verdict = judged(f"panel:judges=refusal:languages=en/de+llm_judge:model={server.target};rubric=refusal")
    assert (verdict.value, verdict.label) == (value, label) and verdict.why.startswith("refusal 0, llm_judge ")


def test_none_if_nobody_answered():
    verdict = judged("panel:judges=refusal+refusal:languages=en", Message("assistant", ""))
    assert verdict.value is None and verdict.label == "nonresponsive + nonresponsive"


def test_measures_and_identity_are_the_parts():
    judge = load_judge("panel:judges=refusal+refusal:languages=en")
    assert judge.measures == "complied"
    assert [part["name"] for part in judge.identity["judges"]] == ["refusal", "refusal"]
    assert judge.identity["judges"][0] == dict(load_judge("refusal").identity)
    assert load_judge("panel:judges=organism_refused").measures == "refused"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "panel:judges=refusal+organism_refused",
            InputError,
            "same thing: refusal measures complied, organism_refused",
        ),
        ("panel:judges=+", InputError, "one judge or more"),
        ("panel:judges=refusl", UnknownNameError, "Did you mean 'refusal'"),
        ("panel", InputError, "needs the option judges"),
    ],
)
def test_bad_panels(spec, error, message):
    with pytest.raises(error, match=message):
        load_judge(spec)


def test_a_part_out_of_reach_is_an_error_and_no_verdict(server):
    from aiohttp import web

    server.answer = lambda body, number: web.Response(status=401)
    with pytest.raises(TargetError, match="401"):
        judged(f"panel:judges=refusal+llm_judge:model={server.target};rubric=refusal")
