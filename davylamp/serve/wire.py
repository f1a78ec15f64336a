"""The OpenAI wire format: requests to conversations that guards can judge, and what is said instead of a reply.

Nothing here changes what is passed on: bodies travel as the bytes that came. Everything in them is untrusted.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import ROLES, Message, Verdict
from davylamp.core.taxonomy import crosswalk, node, taxonomy
from davylamp.serve.stream import strings

ROLE_OF = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}
PLAIN = frozenset({"role", "content"})
QUIET = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning"})
NAME = re.compile(r"[\w.-]{1,64}")  # a participant's name in this form says nothing; a longer one is read as text


class BadRequest(Exception):
    """The request is refused before any guard saw it. status: HTTP.  code: one word for clients and counts."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request"):
        super().__init__(message)
        self.status, self.code = status, code


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise BadRequest("an object in the body names a key twice, so two readers may read it differently")
    return out


def _no_constant(name: str) -> Any:
    raise BadRequest(f"the body is no JSON: {name} is no number")


_DECODE = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant).decode


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises BadRequest where it is none, is not UTF-8, is nested too deep, or names a key twice.

    >>> read_body(b'{"messages": [], "messages": [1]}')
    Traceback (most recent call last):
    davylamp.serve.wire.BadRequest: an object in the body names a key twice, so two readers may read it differently
    """
    try:
        body = _DECODE(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None
    except RecursionError:
        raise BadRequest("the body is nested too deep") from None
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {str(error)[:80]}") from None
    if type(body) is not dict:
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def chat(body: Mapping[str, Any], limit: int) -> tuple[Message, ...]:
    """The conversation of a chat request. Raises BadRequest.

    >>> chat({"messages": [{"role": "user", "content": "hi"}]}, 10)[0].text
    'hi'
    """
    rows = body.get("messages")
    if type(rows) is not list or not rows:
        raise BadRequest("`messages` must be a non-empty list")
    if len(rows) > limit:
        raise BadRequest(f"`messages` holds {len(rows)} messages, the limit is {limit}")
    return tuple([message(row) for row in rows])


def message(row: Any) -> Message:
    """One message as guards see it. Text a guard could miss is put into `text`: content parts, tool calls, fields nobody knows.

    Roles: developer is read as system, function as tool; any other unknown role as user, since the client wrote it. Raises BadRequest.
    """
    if type(row) is not dict:
        raise BadRequest("a message must be an object with role and content")
    given = row.get("role")
    if type(given) is not str:
        raise BadRequest("a message needs a role")
    role, content = ROLE_OF.get(given, "user"), row.get("content")
    if type(content) is str and row.keys() <= PLAIN:
        return Message(role, content)
    texts: list[str] = []
    media: list[str] = []
    if type(content) is str:
        texts.append(content)
    elif type(content) is list:
        for part in content:
            _part(part, texts, media)
    elif content is not None:
        texts += [text for _, text in strings(content)]
    name = row.get("name")
    if name is not None and not (type(name) is str and NAME.fullmatch(name)):
        texts += [text for _, text in strings(name)]
    for key, value in row.items():
        if key not in QUIET and type(value) in (str, list, dict):
            texts += [text for _, text in strings(value)]
    calls = row.get("tool_calls")
    calls = [call for call in calls if type(call) is dict] if type(calls) is list else []
    texts += [said(call) for call in calls]
    reasoning = row.get("reasoning_content") or row.get("reasoning")
    call_id = row.get("tool_call_id")
    return Message(
        role,
        "\n".join(texts),
        reasoning=reasoning if type(reasoning) is str else None,
        media=tuple(media),
        calls=tuple(calls),
        call_id=call_id if type(call_id) is str else None,
    )


def _part(part: Any, texts: list[str], media: list[str]) -> None:
    if type(part) is not dict:
        texts += [text for _, text in strings(part)]
        return
    kind = part.get("type")
    if kind == "text" and type(part.get("text")) is str:
        texts.append(part["text"])
        part = {key: value for key, value in part.items() if key not in ("text", "cache_control")}
    elif kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if type(image) is dict else image
        if type(url) is str:
            media.append(url)
            part = {key: value for key, value in part.items() if key != "image_url"}
    elif kind == "input_audio" and type(part.get("input_audio")) is dict:
        audio = part["input_audio"]
        media.append(f"data:audio/{audio.get('format', 'wav')};base64,{audio.get('data', '')}")
        part = {key: value for key, value in part.items() if key != "input_audio"}
    texts += [text for _, text in strings(part)]


def said(call: Mapping[str, Any]) -> str:
    """A tool call in words, for guards that read text alone.

    >>> said({"id": "1", "type": "function", "function": {"name": "rm", "arguments": '{"path": "/"}'}})
    'rm({"path": "/"})'
    """
    function = call.get("function")
    if type(function) is dict and type(function.get("name")) is str and type(function.get("arguments")) is str:
        return f"{function['name']}({function['arguments']})"
    return "\n".join(text for _, text in strings(call))


def prompts(body: Mapping[str, Any]) -> list[str]:
    """The prompts of a text completion. Raises BadRequest where they are token numbers, which no guard can read.

    >>> prompts({"prompt": ["a", "b"]})
    ['a', 'b']
    """
    given = body.get("prompt")
    texts = [given] if type(given) is str else given
    if type(texts) is not list or not texts or not all(type(text) is str for text in texts):
        raise BadRequest("`prompt` must be text or a list of texts: guards cannot read token numbers")
    suffix = body.get("suffix")
    return [f"{text}\n{suffix}" for text in texts] if type(suffix) is str and suffix else list(texts)


def reply(choice: Any) -> Message:
    """The assistant's message of one choice, chat or text, as guards see it. Raises ValueError where it has none.

    >>> reply({"message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}).text
    'Yes.'
    """
    if type(choice) is not dict:
        raise ValueError("a choice is no object")
    given, finish = choice.get("message"), choice.get("finish_reason")
    finish = finish if type(finish) is str else ""
    if type(given) is dict:
        if type(given.get("content")) is str and given.keys() <= PLAIN:
            return Message("assistant", given["content"], finish=finish)
        try:
            out = message({**given, "role": "assistant"})
        except BadRequest as error:
            raise ValueError(str(error)) from None
        text, reasoning = out.text, out.reasoning
        more = [value for key in ("reasoning_content", "reasoning") if type(value := given.get(key)) is str and value]
        if more:  # what a client can read is judged, a thought too
            text = "\n".join([*more, text])
        return Message("assistant", text, reasoning=reasoning, media=out.media, calls=out.calls, finish=finish)
    if type(choice.get("text")) is str:
        return Message("assistant", choice["text"], finish=finish)
    raise ValueError("a choice has neither message nor text")


# What is said instead of a reply


def error(message: str, *, kind: str, code: str) -> bytes:
    """An error in OpenAI's form."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def blocked(endpoint: str, *, id: str, model: str, text: str, like: Mapping[str, Any] | None = None) -> bytes:
    """A whole reply that says it was withheld. like: the upstream's reply, whose id, model and usage stay.

    >>> json.loads(blocked("chat", id="1", model="m", text="withheld"))["choices"][0]["finish_reason"]
    'content_filter'
    """
    is_chat = endpoint == "chat"
    out = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        **{key: like[key] for key in ("id", "created", "model", "system_fingerprint", "usage") if like and key in like},
        "choices": [blocked_choice(endpoint, 0, text)],
    }
    out.setdefault("usage", {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
    return json.dumps(out).encode()


def blocked_choice(endpoint: str, index: int, text: str) -> dict[str, Any]:
    """One choice of a whole reply that was withheld."""
    body = {"message": {"role": "assistant", "content": text}} if endpoint == "chat" else {"text": text}
    return {"index": index, **body, "logprobs": None, "finish_reason": "content_filter"}


def blocked_events(
    endpoint: str, choices: Iterable[int], *, id: str, model: str, text: str, like: Mapping[str, Any] | None = None
) -> bytes:
    """The end of a stream that was blocked: a final event for each choice, then [DONE]. text: empty if something was sent already."""
    is_chat = endpoint == "chat"
    head = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{id}",
        "object": "chat.completion.chunk" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        **{key: like[key] for key in ("id", "created", "model", "system_fingerprint") if like and key in like},
    }
    out = []
    for index in choices:
        if is_chat:
            if text:
                first = {"index": index, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
                out.append(event({**head, "choices": [first]}))
            out.append(event({**head, "choices": [{"index": index, "delta": {}, "finish_reason": "content_filter"}]}))
        else:
            last = {"index": index, "text": text, "logprobs": None, "finish_reason": "content_filter"}
            out.append(event({**head, "choices": [last]}))
    return b"".join(out) + b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (data if type(data) is bytes else json.dumps(data).encode()) + b"\n\n"


# Moderations


def moderation_inputs(body: Mapping[str, Any]) -> list[Message]:
    """What a moderation request asks about: a text, a list of texts, or one list of content parts. Raises BadRequest.

    >>> [message.text for message in moderation_inputs({"input": ["a", "b"]})]
    ['a', 'b']
    """
    given = body.get("input")
    if type(given) is str:
        return [Message("user", given)]
    if type(given) is list and given and all(type(item) is str for item in given):
        return [Message("user", text) for text in given]
    if type(given) is list and given and all(type(item) is dict for item in given):
        return [message({"role": "user", "content": given})]
    raise BadRequest("`input` must be text, a list of texts, or a list of content parts")


def moderation_result(verdicts: Sequence[tuple[Verdict, float, bool]], applied: Sequence[str]) -> dict[str, Any]:
    """One result in OpenAI's form. verdicts: (verdict, danger in [0, 1], flagged) of each guard.  applied: text, image.

    Categories are OpenAI's thirteen, found by the crosswalk where a guard has its own names, and the guards' own beside them.
    """
    names = [item.id for item in taxonomy("oai").nodes]
    scores = dict.fromkeys(names, 0.0)
    flags = dict.fromkeys(names, False)
    for verdict, danger, flagged in verdicts:
        for path in verdict.categories:
            for name in _oai(path):
                scores[name] = max(scores.get(name, 0.0), danger)
                flags[name] = flags.get(name, False) or flagged
    return {
        "flagged": any(flagged for _, _, flagged in verdicts),
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": {name: list(applied) for name in flags},
    }


def _oai(path: str) -> list[str]:
    """OpenAI's name for a guard's category, if the crosswalk has one, and the category itself.

    >>> _oai("aegis2/S3"), _oai("oai/hate"), _oai("mine")
    (['aegis2/criminal_planning_confessions'], ['hate'], ['mine'])
    """
    try:
        found = node(path)
        if found.namespace == "oai":
            return [found.id]
        out = [found.path]
        for code, _ in crosswalk(found.path)[:1]:
            out += [other.partition("/")[2] for other, _ in crosswalk(code, to="oai")]
        return out
    except (UnknownNameError, InputError):
        return [path]
