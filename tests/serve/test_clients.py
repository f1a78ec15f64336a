"""The clients people use, unmodified: the official openai package, and curl."""

import json
import shutil
import subprocess

import pytest

from tests.serve import upstream as up
from tests.serve.running import Running

WORD = '[[guard]]\nuse = "JUDGES:word"\n'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}

openai = pytest.importorskip("openai")


@pytest.fixture
def pair(tmp_path):
    with up.Upstream() as behind, Running(behind.url, WORD, tmp_path) as gateway:
        yield behind, gateway


@pytest.fixture
def client(pair):
    with openai.OpenAI(base_url=pair[1].url, api_key="k", max_retries=0, timeout=20) as made:
        yield made


def ask(client, text="Hello", **more):
    return client.chat.completions.create(model="mock", messages=[{"role": "user", "content": text}], **more)


def test_openai_chat_and_blocked(client):
    assert ask(client).choices[0].message.content == "Fine."
    blocked = ask(client, "forbidden")
    assert blocked.choices[0].finish_reason == "content_filter" and blocked.usage.total_tokens == 0


def test_openai_streams(pair, client):
    text = "One loaf, two loaves. " * 30
    pair[0].answer = up.say(text)
    chunks = list(ask(client, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    chunks = list(ask(client, "forbidden", stream=True))
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_openai_tools_whole_and_streamed(pair, client):
    async def answer(seen, writer):
        assert seen.json["tools"] == TOOLS
        if not seen.json.get("stream"):
            return up.send(writer, up.whole(None, finish="tool_calls", tool_calls=[CALL]))
        up.begin(writer)
        first = {
            "role": "assistant",
            "tool_calls": [{"index": 0, **CALL, "function": {"name": "weather", "arguments": ""}}],
        }
        up.chunk(writer, up.event(first))
        for part in ('{"city"', ': "Bern"}'):
            up.chunk(writer, up.event({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}))
        up.chunk(writer, up.event({}, "tool_calls") + up.DONE)
        up.end(writer)

    pair[0].answer = answer
    call = ask(client, tools=TOOLS).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Bern"} and call.id == "call_1"
    chunks = [chunk.choices[0] for chunk in ask(client, tools=TOOLS, stream=True)]
    assert "".join(call.function.arguments for c in chunks for call in c.delta.tool_calls or ()) == '{"city": "Bern"}'
    assert chunks[-1].finish_reason == "tool_calls"


def test_openai_completions_moderations_and_models(client):
    assert client.completions.create(model="mock", prompt="Once").choices[0].text == "Fine."
    result = client.moderations.create(input=["fine", "forbidden"]).results
    assert [item.flagged for item in result] == [False, True] and result[1].categories.harassment is False
    assert client.models.list().data[0].id == "mock"


def test_openai_raises_its_own_errors(pair, client):
    async def busy(seen, writer):
        body = {"error": {"message": "slow down", "type": "rate_limit", "code": "x", "param": None}}
        up.send(writer, body, status="429 Too Many Requests", more="Retry-After: 7\r\n")

    pair[0].answer = busy
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    assert caught.value.response.headers["retry-after"] == "7" and caught.value.body["message"] == "slow down"
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="mock", messages=[])

    async def breaks(seen, writer):
        up.begin(writer)
        up.chunk(writer, b"".join(up.events("a" * 2000, 50)[:-2]))
        await writer.drain()
        writer.transport.abort()

    pair[0].answer = breaks
    with pytest.raises(openai.APIError):
        list(ask(client, stream=True))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(pair):
    behind, gateway = pair
    behind.answer = up.say("Bread and salt. " * 50)

    def curl(*words, data):
        head = ["curl", "-sS", "--noproxy", "*", "-H", "Content-Type: application/json"]
        command = [*head, *words, "-d", "@-", gateway.url + "/chat/completions"]
        return subprocess.run(command, input=data.encode(), capture_output=True, timeout=20, check=True).stdout

    messages = [{"role": "user", "content": "Hi"}]
    assert "Bread" in curl(data=json.dumps({"messages": messages})).decode()
    assert curl("-N", data=json.dumps({"messages": messages, "stream": True})).endswith(b"data: [DONE]\n\n")
    large = [{"role": "user", "content": "x" * 2**20 + " forbidden"}]  # curl asks with Expect: 100-continue
    assert b"content_filter" in curl("-H", "Expect: 100-continue", data=json.dumps({"messages": large}))
    assert b"Bread" in curl("--http1.0", data=json.dumps({"messages": messages}))
