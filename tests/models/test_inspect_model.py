"""inspect's providers as targets, on its mock provider: nothing leaves the machine."""

import asyncio

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.tool import ToolCall

from davylamp.core.errors import InputError, TargetError, UnknownNameError
from davylamp.core.nouns import Message
from davylamp.core.rows import canonical
from davylamp.models.inspect_model import InspectTarget, from_inspect, output_from, reply_from, to_inspect
from davylamp.models.targets import load_target
from tests.server import say

pytestmark = pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated")  # inspect's use of tenacity
USAGE = ModelUsage(input_tokens=5, output_tokens=7, total_tokens=12)
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "ё"}'}}


def output(content="yes", stop="stop", usage=USAGE, **message):
    said = ChatMessageAssistant(content=content, source="generate", **message)
    return ModelOutput(model="mock", choices=[ChatCompletionChoice(message=said, stop_reason=stop)], usage=usage)


class Mock:
    """A target whose provider answers with `answer(messages, config)` and keeps what it was asked."""

    def __init__(self, answer, **more):
        self.asked = []

        def respond(messages, tools, tool_choice, config):
            self.asked.append((messages, config))
            return answer(messages, config)

        self.model = get_model("mockllm/model", custom_outputs=respond, **more)
        self.target = InspectTarget("mockllm/model", model=self.model)

    def ask(self, *messages, **settings):
        return asyncio.run(self.target(messages or (Message("user", "hi"),), **settings))


def test_a_reply_with_its_reasoning_end_and_tokens():
    content = [ContentReasoning(reasoning="hm"), ContentText(text="yes")]
    usage = ModelUsage(
        input_tokens=5, output_tokens=7, total_tokens=17, input_tokens_cache_read=3, input_tokens_cache_write=2
    )
    reply = Mock(lambda *_: output(content, "max_tokens", usage)).ask()
    assert reply == Message("assistant", "yes", reasoning="hm", finish="length", tokens=(10, 7))
    hidden = Mock(
        lambda *_: output([ContentReasoning(reasoning="x9", summary="short", redacted=True), ContentText(text="a")])
    )
    assert hidden.ask().reasoning == "short"
    inline = Mock(lambda *_: output("<think>hm</think> yes", "content_filter")).ask()
    assert (inline.reasoning, inline.text, inline.finish) == ("hm", "yes", "content_filter")


@pytest.mark.parametrize(
    ("stop", "finish"),
    [("stop", "stop"), ("model_length", "length"), ("tool_calls", "tool_calls"), ("unknown", "")],
)
def test_why_it_stopped(stop, finish):
    assert Mock(lambda *_: output(stop=stop)).ask().finish == finish


def test_tool_calls_there_and_back():
    call = ToolCall(id="c1", function="look", arguments={"at": "ё"})
    mock = Mock(lambda messages, _: output("", tool_calls=[call]))
    reply = mock.ask(
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "", reasoning="not sent back", calls=(CALL,)),
        Message("tool", "a wall", call_id="c1"),
    )
    assert reply.calls == (CALL,)
    system, user, assistant, tool = mock.asked[0][0]
    assert [message.role for message in (system, user, assistant, tool)] == ["system", "user", "assistant", "tool"]
    assert assistant.tool_calls[0].arguments == {"at": "ё"} and assistant.content == "" and tool.tool_call_id == "c1"


def test_arguments_that_are_no_object_are_marked():
    said = to_inspect(Message("assistant", calls=({"id": "1", "function": {"name": "f", "arguments": "[1"}},)))
    assert said.tool_calls[0].parse_error and said.tool_calls[0].arguments == {"arguments": "[1"}


@pytest.mark.parametrize(
    "message",
    [
        Message("user", "look", media=("data:image/png;base64,AAAA", "https://example.com/a.png", "b")),
        Message("user", "", media=("data:audio/wav;base64,AAAA", "a.mp3", "a.mp4", "a.mov")),
        Message("assistant", "yes", reasoning="hm"),
        Message("assistant", "", reasoning="cut off"),
        Message("assistant", "", reasoning=""),
        Message("assistant", "<think>as it stands", calls=(CALL,)),
        Message("tool", "42", call_id="c1"),
        Message("system", "拒绝\x00"),
    ],
    ids=repr,
)
def test_messages_come_back_as_they_were(message):
    assert from_inspect(to_inspect(message, thought=True)) == message


def test_media_go_by_their_kind():
    said = to_inspect(Message("user", "x", media=("data:audio/mpeg;base64,A", "film.mp4", "pic.webp", "no-ending")))
    assert [part.type for part in said.content] == ["text", "audio", "video", "image", "image"]


def test_a_reply_comes_back_through_a_log():
    reply = Message("assistant", "yes", reasoning="hm", calls=(CALL,), finish="length", tokens=(3, 4))
    assert reply_from(output_from(reply, "m")) == reply


def test_a_lone_surrogate_is_escaped():
    assert to_inspect(Message("user", "a\ud800")).text == "a\\ud800"


def test_settings_and_seed_reach_the_provider():
    mock = Mock(lambda *_: output())
    mock.ask(seed=7, temperature=0.5, max_tokens=9, stop="END", top_p=0.9)
    config = mock.asked[0][1]
    assert (config.seed, config.temperature, config.max_tokens, config.stop_seqs, config.top_p) == (
        7,
        0.5,
        9,
        ["END"],
        0.9,
    )


def test_settings_that_inspect_does_not_know_or_take():
    mock = Mock(lambda *_: output())
    with pytest.raises(UnknownNameError, match="Did you mean 'temperature'"):
        mock.ask(temprature=1)
    with pytest.raises(InputError, match="setting"):
        mock.ask(temperature="warm")
    assert not mock.asked


def test_errors_of_the_provider():
    def fail(*_):
        raise RuntimeError("[bold]no[/bold] power")

    with pytest.raises(TargetError, match="RuntimeError: no power") as caught:
        Mock(fail).ask(max_retries=0)
    assert not caught.value.retry
    with pytest.raises(TargetError, match="no reply: blocked"):
        Mock(lambda *_: ModelOutput(model="m", error="blocked", usage=USAGE)).ask()


def test_the_runner_retries_not_inspect(monkeypatch):
    tries = []

    def fail(*_):
        tries.append(1)
        raise RuntimeError("busy")

    mock = Mock(fail)
    monkeypatch.setattr(mock.model.api, "should_retry", lambda error: True)
    monkeypatch.setattr("davylamp.models.inspect_model.get_model", lambda *_, **__: mock.model)
    with pytest.raises(TargetError) as caught:
        asyncio.run(InspectTarget("mockllm/model")([Message("user", "hi")]))
    assert caught.value.retry and len(tries) == 1


@pytest.mark.parametrize("rest", ["mockllm", "/x", "x/"])
def test_a_name_needs_provider_and_model(rest):
    with pytest.raises(InputError, match="inspect/<provider>/<model>"):
        InspectTarget(rest)


def test_what_cannot_be_loaded():
    with pytest.raises(InputError, match=r"nobody/m.*not recognized.*provider's package and key"):
        InspectTarget("nobody/m")


def test_a_missing_key_is_said_before_anything_runs(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("NOKEY_API_KEY", raising=False)
    with pytest.raises(InputError, match="NOKEY_"):
        InspectTarget("openai-api/nokey/m")


def test_by_name_through_the_registry_of_targets():
    target = load_target("inspect/mockllm/model")
    assert target.name == "inspect/mockllm/model" and canonical(target.identity)
    asyncio.run(target.close())


def test_a_real_client_against_a_server(server, monkeypatch):
    pytest.importorskip("openai")
    used = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    server.answer = lambda body, number: say("I can't help with that.", usage=used, model="m", id="1")
    monkeypatch.setenv("MOCK_API_KEY", "very-secret")
    monkeypatch.setenv("MOCK_BASE_URL", server.url)
    target = load_target("inspect/openai-api/mock/m")

    async def go():
        try:
            return await target([Message("user", "hi")], seed=3, max_tokens=5)
        finally:
            await target.close()

    assert asyncio.run(go()) == Message("assistant", "I can't help with that.", finish="stop", tokens=(3, 2))
    assert server.asked[0]["max_tokens"] == 5 and server.asked[0]["seed"] == 3
    assert target.identity["base_url"] == server.url and "secret" not in repr(target.identity)
