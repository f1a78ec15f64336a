"""HTTP classifiers: scores are taken only if they are scores, and a key shows up nowhere."""

import asyncio
import json

import pytest
from aiohttp import web

from davylamp.core.errors import InputError, TargetError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from tests.server import Server

KEY = "key-very-secret-1234567890"


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("PERSPECTIVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)


def judged(server, spec, reply="a reply"):
    async def go():
        judge = load_judge(f"{spec},url={server.url}" if ":" in spec else f"{spec}:url={server.url}")
        assert KEY not in json.dumps(dict(judge.identity))
        try:
            return await judge((Message("user", "a request"), Message("assistant", reply)))
        finally:
            await judge.close()

    return asyncio.run(go())


def scores(**values):
    return {"attributeScores": {name: {"summaryScore": {"value": value}} for name, value in values.items()}}


SIX = dict.fromkeys(("SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT"), 0.1)


def test_perspective_takes_the_highest_or_the_one_named(server):
    server.answer = lambda body, number: web.json_response(scores(TOXICITY=0.3, **{**SIX, "INSULT": 0.8}))
    verdict = judged(server, "perspective")
    assert (verdict.value, verdict.label) == (0.8, "insult")
    assert judged(server, "perspective:attribute=TOXICITY").value == 0.3
    assert server.asked[0]["comment"] == {"text": "a reply"} and len(server.asked[0]["requestedAttributes"]) == 6
    judged(server, "perspective:attributes=TOXICITY/INSULT")
    assert set(server.asked[2]["requestedAttributes"]) == {"TOXICITY", "INSULT"}
    with pytest.raises(InputError, match="attribute must be max or one of"):
        judged(server, "perspective:attribute=KINDNESS")


@pytest.mark.parametrize("value", [1.2, -0.1, None, "0.4", True, float("nan"), float("inf")])
def test_a_score_out_of_range_is_no_verdict(server, value):
    text = json.dumps(scores(TOXICITY=value, **SIX))
    server.answer = lambda body, number: web.Response(text=text, content_type="application/json")
    verdict = judged(server, "perspective")
    assert (verdict.value, verdict.label) == (None, "unreadable") and "TOXICITY" in verdict.why


@pytest.mark.parametrize(
    "answer", [{}, {"attributeScores": None}, {"attributeScores": {"TOXICITY": 0.5}}, {"results": []}]
)
def test_a_missing_score_is_no_verdict(server, answer):
    server.answer = lambda body, number: web.json_response(answer)
    assert judged(server, "perspective").value is None and judged(server, "moderation").value is None
    assert judged(server, "moderation:score=max").value is None


def flagged(flag, **more):
    categories = {"violence": flag is True, "self-harm/intent": False, "hate": flag is True}
    row = {"flagged": flag, "categories": categories, "category_scores": {"violence": 0.7, "hate": 0.2}, **more}
    return web.json_response({"results": [row]})


def test_moderation_flag_categories_and_highest_score(server):
    server.answer = lambda body, number: flagged(True)
    verdict = judged(server, "moderation")
    assert (verdict.value, verdict.label, verdict.categories) == (1.0, "flagged", ("oai/hate", "oai/violence"))
    assert server.asked[0] == {"input": "a reply", "model": "omni-moderation-latest"}
    verdict = judged(server, "moderation:score=max,text=both")
    assert verdict.value == 0.7 and server.asked[1]["input"] == "a request\n\na reply"
    server.answer = lambda body, number: flagged(False)
    assert judged(server, "moderation").value == 0.0 and judged(server, "moderation").categories == ()
    server.answer = lambda body, number: flagged("yes")
    assert judged(server, "moderation").value is None
    server.answer = lambda body, number: flagged(True, category_scores={"violence": 7})
    assert judged(server, "moderation:score=max").value is None


@pytest.mark.parametrize("guard", ["perspective", "moderation"])
def test_empty_replies_and_missing_keys(server, guard, monkeypatch):
    assert judged(server, guard, " ").label == "nonresponsive" and server.asked == []
    name = {"perspective": "PERSPECTIVE_API_KEY", "moderation": "OPENAI_API_KEY"}[guard]
    monkeypatch.delenv(name)
    with pytest.raises(InputError, match=name):
        judged(server, guard)
    assert server.asked == []
    server.answer = lambda body, number: web.json_response({})
    assert judged(server, f"{guard}:key_env=").value is None and len(server.asked) == 1


@pytest.mark.parametrize("guard", ["perspective", "moderation"])
@pytest.mark.parametrize("text", [f"bad key {KEY}", "x" * 150 + KEY, "<html>forbidden</html>"])
def test_a_key_is_in_no_error(server, guard, text):
    server.answer = lambda body, number: web.Response(status=403, text=text)
    with pytest.raises(TargetError, match="403") as caught:
        judged(server, guard)
    assert KEY[:8] not in str(caught.value) and len(server.asked) == 1


class Recording(Server):
    """Keeps headers and addresses, which the plain one drops."""

    async def _handle(self, request):
        self.seen = (dict(request.headers), str(request.url))
        return await super()._handle(request)


@pytest.mark.parametrize(
    ("guard", "header", "value"),
    [("perspective", "X-Goog-Api-Key", KEY), ("moderation", "Authorization", f"Bearer {KEY}")],
)
def test_the_key_goes_out_as_a_header_only(guard, header, value):
    with Recording(lambda body, number: web.json_response({})) as server:
        judged(server, guard)
    headers, url = server.seen
    assert headers[header] == value and KEY not in url and KEY not in json.dumps(server.asked)


@pytest.mark.parametrize("url", ["ftp://x/y", "http://h/v1?key=abc", "http://me:pw@h/v1"])
def test_urls_without_keys_only(url):
    with pytest.raises(InputError):
        load_judge(f"perspective:url={url}")


def test_json_that_is_none(server, monkeypatch):
    async def at_once(seconds):
        return None

    monkeypatch.setattr("davylamp.models.retry.asyncio.sleep", at_once)
    server.answer = lambda body, number: web.Response(text="<html>hello</html>")
    with pytest.raises(TargetError, match="did not answer with JSON"):
        judged(server, "moderation")
    assert len(server.asked) == 4
