"""Targets behind any OpenAI-compatible server, and the one HTTP client of the project (aiohttp)."""

from __future__ import annotations

import email.utils
import json
import os
import time
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from davylamp.core.errors import InputError, TargetError
from davylamp.core.nouns import Message
from davylamp.core.rows import canonical

DEFAULT_URL = "https://api.openai.com/v1"
REASONING_FIELDS = ("reasoning_content", "reasoning")  # DeepSeek and vLLM; newer vLLM and OpenRouter
RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
BODY_LIMIT = 64 * 2**20  # bytes of a reply that are read at most


def session() -> aiohttp.ClientSession:
    """A session for many calls to few servers. Close it when done. The runner limits the width and the time, not the session."""
    # trust_env looks at the environment at every call, so it is switched on only where a proxy is set at all.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, connect=30),
        trust_env=bool(urllib.request.getproxies_environment()),
    )


async def post_json(
    http: aiohttp.ClientSession, url: str, body: Mapping[str, Any], headers: Mapping[str, str], *, who: str
) -> dict[str, Any]:
    """POST a JSON object and return the JSON object that came back. Raises TargetError; what the server sent is quoted briefly."""
    try:
        data = canonical(body).encode("utf-8", "backslashreplace")
        async with http.post(url, data=data, headers={"Content-Type": "application/json", **headers}) as response:
            payload = (
                await response.content.read(BODY_LIMIT) if response.content_length is None else await response.read()
            )
            status = response.status
            if status != 200:
                raise TargetError(
                    f"{who} answered {status}: {_brief(payload)}",
                    retry=status in RETRY_STATUS,
                    after=_retry_after(response.headers) if status in (429, 503) else None,
                )
    except (aiohttp.ClientConnectorError, ConnectionRefusedError) as error:
        raise TargetError(
            f"{who} cannot be reached at {url} ({error.__class__.__name__})", retry=True, down=True
        ) from None
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
        raise InputError(f"{url} is not a usable URL. Expected one like http://127.0.0.1:8000/v1") from None
    except (aiohttp.ClientError, OSError) as error:
        raise TargetError(f"{who} broke off: {error.__class__.__name__}", retry=True) from None
    try:
        answer = json.loads(payload)
    except ValueError:
        raise TargetError(f"{who} did not answer with JSON: {_brief(payload)}", retry=True) from None
    if not isinstance(answer, dict):
        raise TargetError(f"{who} must answer with a JSON object, got {type(answer).__name__}", retry=True)
    return answer


class OpenAITarget:
    """`openai/<model>`: chat completions of a server. Its own reasoning field, or a <think> block, becomes `Message.reasoning`.

    settings are sent as they are (temperature, max_tokens, top_p, stop, …), so that a server's own extensions work too. But for prefill, a
    text that the reply begins with: it is sent as the last turn with continue_final_message, as vLLM and SGLang take it, and the reply
    holds it. A server that refuses this raises a TargetError that says so.
    """

    prefills = True

    def __init__(self, model: str, *, base_url: str | None = None, api_key: str | None = None):
        self.model = model
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"the base URL must start with http:// or https://, got {self.base_url!r}")
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.name = f"openai/{model}"
        self.identity = {"name": self.name, "base_url": self.base_url}
        self.url = f"{self.base_url}/chat/completions"
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        if self._session is None:
            self._session = session()
        prefill = settings.pop("prefill", "") or ""
        body = {"model": self.model, "messages": [wire(message) for message in messages], "seed": seed, **settings}
        if not prefill:
            return reply_from(await post_json(self._session, self.url, body, self.headers, who=self.name), self.name)
        body["messages"].append({"role": "assistant", "content": prefill})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
        try:
            answer = await post_json(self._session, self.url, body, self.headers, who=self.name)
        except TargetError as problem:
            if problem.retry or problem.down:
                raise
            raise TargetError(
                f"{self.name} did not take a reply that was begun for it (prefill), so it supports the thinking strategy default only. "
                f"The server said: {problem}"
            ) from None
        return reply_from(answer, self.name, prefill)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def wire(message: Message) -> dict[str, Any]:
    """A message in the form the API takes. Reasoning is not sent back: servers want the answer alone.

    >>> wire(Message("user", "hi"))
    {'role': 'user', 'content': 'hi'}
    """
    content: Any = message.text
    if message.media:
        content = [
            {"type": "text", "text": message.text},
            *({"type": "image_url", "image_url": {"url": url}} for url in message.media),
        ]
    out: dict[str, Any] = {"role": message.role, "content": content}
    if message.calls:
        out["tool_calls"] = [dict(call) for call in message.calls]
    if message.call_id is not None:
        out["tool_call_id"] = message.call_id
    return out


def reply_from(answer: Mapping[str, Any], who: str, prefill: str = "") -> Message:
    """The assistant's message of a chat completion, behind the `prefill` it went on from. Raises TargetError where the server's answer
    has no message.

    >>> reply_from({"choices": [{"message": {"content": "<think>hm</think>yes"}, "finish_reason": "stop"}]}, "demo").reasoning
    'hm'
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text, reasoning = message.get("content") or message.get("refusal") or "", None
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TargetError(
            f"{who} answered without a message: {_brief(canonical(answer).encode('utf-8', 'backslashreplace'))}"
        ) from None
    if not isinstance(text, str):
        raise TargetError(f"{who} answered with content that is no text: {type(text).__name__}")
    if prefill:
        from davylamp.models.thinking import OPEN, parts

        begun = parts(prefill)
        thinks = any(message.get(name) for name in REASONING_FIELDS) or OPEN.match(text)
        if thinks and begun.status != "open":
            raise TargetError(
                f"{who} thought of its own behind the thought that was closed for it. Either the server does not go on from a begun reply "
                "(continue_final_message), or its reasoning parser is on: then no thinking strategy but default can run on it"
            )
    text = prefill + text
    for name in REASONING_FIELDS:
        if isinstance(message.get(name), str) and message[name]:
            reasoning = message[name]
            if prefill:  # the server's parser took the rest of the thought out, behind the part that was begun
                reasoning, text = f"{begun.thought}\n{reasoning}".strip(), text.removeprefix(prefill)
            break
    else:
        if "think" in text:
            from davylamp.models.thinking import split_thinking

            reasoning, text = split_thinking(text)
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    tokens = tuple(int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    calls = tuple(call for call in message.get("tool_calls") or () if isinstance(call, dict))
    return Message(
        "assistant",
        text,
        reasoning=reasoning,
        calls=calls,
        finish=str(choice.get("finish_reason") or ""),
        tokens=(tokens[0], tokens[1]),
    )


def _brief(payload: bytes) -> str:
    text = " ".join(payload[:2000].decode("utf-8", "replace").split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text[:160] + ("…" if len(text) > 160 else "") if text else "nothing"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a Retry-After header (a number or an HTTP date); None if it has none that can be read."""
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
