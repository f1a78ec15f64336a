"""Targets behind any provider of inspect_ai: `inspect/<provider>/<model>`, and our messages in inspect's form and back."""

from __future__ import annotations

import json
import mimetypes
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from inspect_ai import __version__ as inspect_version
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    Content,
    ContentAudio,
    ContentImage,
    ContentReasoning,
    ContentText,
    ContentVideo,
    GenerateConfig,
    Model,
    ModelOutput,
    ModelUsage,
    StopReason,
    get_model,
)
from inspect_ai.tool import ToolCall

from davylamp.core.errors import InputError, TargetError, UnknownNameError
from davylamp.core.nouns import Message
from davylamp.models.thinking import split_thinking

FINISH: Mapping[str, str] = {"max_tokens": "length", "model_length": "length", "unknown": ""}  # the rest keeps its name
STOP: Mapping[str, StopReason] = {
    "stop": "stop",
    "length": "max_tokens",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}
AUDIO: Mapping[str, Literal["wav", "mp3"]] = {"wav": "wav", "x-wav": "wav", "mpeg": "mp3", "mp3": "mp3"}
VIDEO: Mapping[str, Literal["mp4", "mpeg", "mov"]] = {"mp4": "mp4", "mpeg": "mpeg", "quicktime": "mov"}
RENAMED = {"stop": "stop_seqs"}  # OpenAI's name -> inspect's


class InspectTarget:
    """`inspect/<provider>/<model>`: a model as inspect_ai knows it, with the provider's own client and keys.

    rest: `<provider>/<model>`.  model: one that inspect has loaded already, as within a task.
    Settings are the fields of inspect's GenerateConfig (temperature, max_tokens, top_p, …; `stop` is understood too). The runner
    retries and keeps the time, so inspect itself retries nothing, unless the setting `max_retries` says so or the model was given.
    """

    def __init__(self, rest: str, *, model: Model | None = None):
        own = model is None
        if own and not all(rest.partition("/")):
            raise InputError(f"an inspect target reads like inspect/<provider>/<model>, got inspect/{rest}")
        self.model = model if model is not None else _load(rest)
        self.config = GenerateConfig(max_retries=0) if own else GenerateConfig()
        self.name = f"inspect/{rest}"
        base_url = getattr(self.model.api, "base_url", None)
        self.identity: dict[str, Any] = {"name": self.name, "inspect_ai": inspect_version}
        if base_url:
            self.identity["base_url"] = str(base_url)

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        """The model's reply. Raises InputError for a setting that inspect does not know, TargetError if there is no reply."""
        config = self.config.merge(config_from({"seed": seed, **settings}))
        try:
            output = await self.model.generate([to_inspect(message) for message in messages], config=config)
        except Exception as error:  # every provider's client has errors of its own
            raise self._problem(error) from None
        if output.empty:
            raise TargetError(f"{self.name} gave no reply{f': {_brief(output.error)}' if output.error else ''}")
        return reply_from(output)

    def _problem(self, error: Exception) -> TargetError:
        try:
            decision = self.model.api.should_retry(error)
        except Exception:  # a provider may not expect an error that is not its client's
            decision = False
        after = getattr(decision, "retry_after", None)
        text = f"{self.name} failed: {type(error).__name__}: {_brief(str(error))}"
        return TargetError(text, retry=bool(decision), after=after)

    async def close(self) -> None:
        await self.model.api.aclose()


def _load(rest: str) -> Model:
    try:
        return get_model(rest, memoize=False)
    except Exception as error:  # an unknown provider, a package or a key that is missing, a model that cannot be loaded
        what = _brief(str(getattr(error, "message", "") or error))
        raise InputError(
            f"inspect cannot load {rest!r}: {what}. Expected inspect/<provider>/<model> with the provider's package and key in place"
        ) from None


def config_from(settings: Mapping[str, Any]) -> GenerateConfig:
    """Settings as inspect's GenerateConfig. Raises UnknownNameError or InputError.

    >>> config_from({"temperature": 0.0, "stop": "END"}).stop_seqs
    ['END']
    """
    given = {RENAMED.get(name, name): value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in GenerateConfig.model_fields:
            raise UnknownNameError("setting of inspect", name, GenerateConfig.model_fields)
    if isinstance(given.get("stop_seqs"), str):
        given["stop_seqs"] = [given["stop_seqs"]]
    try:
        return GenerateConfig(**given)
    except ValueError as error:
        raise InputError(f"a setting is not what inspect expects: {_brief(str(error))}") from None


def to_inspect(message: Message, *, thought: bool = False) -> ChatMessage:
    """A message in inspect's form. thought: keep the reasoning, as a log does; what is sent to a model has the answer alone.

    >>> to_inspect(Message("user", "hi")).text
    'hi'
    """
    content: str | list[Content] = whole(message.text)
    shown = message.reasoning if thought else None
    if shown is not None or message.media:
        thoughts = [] if shown is None else [ContentReasoning(reasoning=whole(shown))]
        texts = [ContentText(text=whole(message.text))] if message.text else []
        content = [*thoughts, *texts, *(_media(whole(url)) for url in message.media)]
    if message.role == "system":
        return ChatMessageSystem(content=content)
    if message.role == "user":
        return ChatMessageUser(content=content)
    if message.role == "tool":
        return ChatMessageTool(content=content, tool_call_id=message.call_id)
    calls = [_call(call) for call in message.calls]
    return ChatMessageAssistant(content=content, tool_calls=calls or None)


def from_inspect(message: ChatMessage, *, reply: bool = False) -> Message:
    """A message of inspect in ours. reply: a model wrote it, so a leading <think> block is its reasoning, where none is named.

    >>> from_inspect(ChatMessageAssistant(content="<think>hm</think>yes"), reply=True).reasoning
    'hm'
    """
    parts = message.content if isinstance(message.content, list) else []
    text = message.text
    thoughts = [_thought(part) for part in parts if isinstance(part, ContentReasoning)]
    reasoning = "\n\n".join(thought for thought in thoughts if thought) if thoughts else None
    calls: tuple[dict[str, Any], ...] = ()
    if isinstance(message, ChatMessageAssistant):
        if reply and reasoning is None and "think" in text:
            reasoning, text = split_thinking(text)
        calls = tuple(_wire(call) for call in message.tool_calls or ())
    media = tuple(url for part in parts if (url := _url(part)))
    call_id = message.tool_call_id if isinstance(message, ChatMessageTool) else None
    return Message(message.role, text, reasoning=reasoning, media=media, calls=calls, call_id=call_id)


def reply_from(output: ModelOutput) -> Message:
    """The first choice of an output, with why it stopped and the tokens it took (cached ones count as prompt)."""
    message = from_inspect(output.message, reply=True)
    usage = output.usage or ModelUsage()
    prompt = usage.input_tokens + (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
    return Message(
        "assistant",
        message.text,
        reasoning=message.reasoning,
        media=message.media,
        calls=message.calls,
        finish=FINISH.get(output.stop_reason, output.stop_reason),
        tokens=(prompt, usage.output_tokens),
    )


def output_from(message: Message, model: str) -> ModelOutput:
    """The way back: a reply as inspect's ModelOutput."""
    said = to_inspect(message, thought=True)
    assert isinstance(said, ChatMessageAssistant), f"a reply comes from the assistant, got {message.role}"
    said.source, said.model = "generate", model
    output = ModelOutput.from_message(said, STOP.get(message.finish, "unknown"))
    output.model, output.usage = model, usage_from(message)
    return output


def usage_from(message: Message) -> ModelUsage | None:
    """The tokens of a reply as inspect counts them; None if the target did not count."""
    prompt, completion = message.tokens
    if (prompt, completion) == (0, 0):
        return None
    return ModelUsage(input_tokens=prompt, output_tokens=completion, total_tokens=prompt + completion)


def whole(text: str) -> str:
    r"""The text with lone surrogates (a broken reply) as their escapes, since inspect takes valid Unicode only.

    >>> whole("a\ud800")
    'a\\ud800'
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain(value: Any, *, mask: bool = False) -> Any:
    """Plain data in valid Unicode, tuples as lists. mask: without passwords in addresses, since a log is made to be sent.

    >>> plain({"base_url": ("http://me:secret@host/v1",)}, mask=True)
    {'base_url': ['http://…@host/v1']}
    """
    if isinstance(value, str):
        return re.sub(r"://[^/@\s\"']+@", "://…@", whole(value)) if mask else whole(value)
    if isinstance(value, Mapping):
        return {whole(str(name)): plain(item, mask=mask) for name, item in value.items()}
    return [plain(item, mask=mask) for item in value] if isinstance(value, list | tuple) else value


def _media(url: str) -> Content:
    """By its type, a picture if that says nothing else: `data:audio/wav;…`, `a.mp4`."""
    kind = url[5:].split(";")[0].split(",")[0] if url.startswith("data:") else (mimetypes.guess_type(url)[0] or "")
    family, _, form = kind.partition("/")
    if family == "audio" and form in AUDIO:
        return ContentAudio(audio=url, format=AUDIO[form])
    if family == "video" and form in VIDEO:
        return ContentVideo(video=url, format=VIDEO[form])
    return ContentImage(image=url)


def _url(part: Content) -> str | None:
    if isinstance(part, ContentImage):
        return part.image
    if isinstance(part, ContentAudio):
        return part.audio
    return part.video if isinstance(part, ContentVideo) else None


def _thought(part: ContentReasoning) -> str:
    return (part.summary or "") if part.redacted else part.reasoning


def _call(call: Mapping[str, Any]) -> ToolCall:
    """A call in OpenAI's wire form. Arguments that are no JSON object stay as text, marked as inspect marks them."""
    function = call.get("function") or {}
    given, problem = function.get("arguments") or "{}", None
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
        if not isinstance(arguments, dict):
            raise ValueError("no object")
    except ValueError as error:
        arguments, problem = {"arguments": whole(str(given))}, f"arguments are no JSON object ({error})"
    name = whole(str(function.get("name", "")))
    return ToolCall(id=whole(str(call.get("id", ""))), function=name, arguments=arguments, parse_error=problem)


def _wire(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.function, "arguments": arguments}}


def _brief(text: str) -> str:
    text = " ".join(re.sub(r"\x1b\[[\d;]*m|\[/?\w*\]", "", text).split())
    return text[:200] + ("…" if len(text) > 200 else "") if text else "no message"
