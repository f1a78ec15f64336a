"""One request on its way: judged, asked, judged again, answered. The order of things is the promise:

input guards before the upstream is asked; output guards before a character is sent; the audit line before the client has its answer.

Longer than 400 lines because one exchange, streamed or not, is read from top to bottom.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from davylamp.core.nouns import Message
from davylamp.core.policy import ALLOWED, Ruling, regenerate, strongest
from davylamp.serve import wire
from davylamp.serve.audit import AuditLog
from davylamp.serve.headers import Whole, downward, fields
from davylamp.serve.judging import Guard, Guards, Judged, ask
from davylamp.serve.metrics import Metrics
from davylamp.serve.stream import Chunk, Events, Hold, Malformed
from davylamp.serve.upstream import Answer, Pool, UpstreamError

PATHS = {"chat": b"/chat/completions", "completion": b"/completions"}
TEXT_SHOWN = 400  # characters of a message on the page, where texts are shown at all


class Unavailable(Exception):
    """A guard gave no verdict and its policy says that nothing may pass then."""


class Turn:
    """A chat or text completion. `run` gives the response, or raises BadRequest, UpstreamError, Unavailable or AuditError.

    outcome: allowed | blocked | unavailable | upstream_error, or empty as long as nothing is decided.
    """

    def __init__(
        self,
        id: str,
        endpoint: str,
        request: web.BaseRequest,
        guards: Guards,
        pool: Pool,
        metrics: Metrics,
        audit: AuditLog,
    ):
        self.id, self.endpoint, self.request = id, endpoint, request
        self.guards, self.pool, self.metrics, self.audit, self.policy = guards, pool, metrics, audit, guards.policy
        self.start = time.perf_counter()
        self.body: dict[str, Any] = {}
        self.raw = b""
        self.conversations: list[tuple[Message, ...]] = []
        self.judged: list[Judged] = []
        self.outcome, self.rounds, self.status = "", 0, 0
        self.response: web.StreamResponse | None = None
        self.started = False  # bytes of a reply are on their way to the client
        self.written = False  # the last audit line is
        self.warned = False
        self.like: dict[str, Any] | None = None
        self.hash: Any = None  # of the reply, for the log
        self.chars, self.texts = 0, list[str]()  # of the reply, for the log

    async def run(self, raw: bytes, headers: bytes) -> web.StreamResponse:
        """headers: the lines that go to the upstream."""
        self.raw = raw
        self.body = wire.read_body(raw)
        for name in self.policy.limits.deny_fields:
            if name in self.body:
                raise wire.BadRequest(f"the field {name} is not allowed here", code="denied_field")
        if self.endpoint == "chat":
            self.conversations = [wire.chat(self.body, self.policy.limits.messages)]
        elif self.guards.input or self.guards.output:
            self.conversations = [(Message("user", prompt),) for prompt in wire.prompts(self.body)]
        ruling = await self._judge_input()
        if ruling.action in ("regenerate", "block"):  # a question cannot be generated again
            return self._withheld(ruling)
        return await self._ask(headers)

    # Input

    async def _judge_input(self) -> Ruling:
        jobs: list[Any] = []
        for messages in self.conversations:
            for guard in self.guards.input:
                for end in _judged_ends(messages, guard):
                    jobs.append(
                        self._job(guard, messages[:end] if end < len(messages) else messages, "input", len(jobs))
                    )
        return self._rule(await ask(jobs)) if jobs else ALLOWED

    def _job(self, guard: Guard, messages: tuple[Message, ...], side: str, number: int) -> Any:
        return guard.judge_one(messages, f"{self.id}.{guard.name}.{len(self.judged) + number}", side)

    def _rule(self, judged: Sequence[Judged], text: str = "") -> Ruling:
        if self.policy.page.texts and not text and self.conversations:
            text = self.conversations[0][-1].text
        for item in judged:
            self.metrics.note(item, text[:TEXT_SHOWN] if self.policy.page.texts else "")
            self.warned = self.warned or item.ruling.action == "warn"
        self.judged += judged
        return judged[0].ruling if len(judged) == 1 else strongest([item.ruling for item in judged])

    # The upstream

    async def _ask(self, headers: bytes) -> web.StreamResponse:
        settings, path = self.policy.regenerate, PATHS[self.endpoint]
        query = self.request.rel_url.raw_query_string
        if query:
            path += b"?" + query.encode("ascii")

        async def generate(number: int) -> Answer:
            self.rounds = number + 1
            return await self.pool.ask(b"POST", path, headers, self.raw if number == 0 else self._again(number))

        async def judge(answer: Answer) -> Ruling:
            async with answer:
                return await self._take(answer, self.guards.output)

        result = await regenerate(generate, judge, rounds=settings.rounds, after=settings.after)
        if self.rounds > 1:
            ending = "unfiltered" if result.unfiltered else "passed" if result.reply is not None else "refused"
            self.metrics.count("regenerations", ending)
        if result.unfiltered and result.reply is not None:
            async with result.reply:
                await self._take(result.reply, ())
        elif result.reply is None and not self.started:
            return self._withheld(result.ruling)
        assert self.response is not None
        return self.response

    def _again(self, number: int) -> bytes:
        """The body of a further round: another seed, and the hint if there is one."""
        seed = self.body.get("seed")
        body = {**self.body, "seed": (seed if type(seed) is int else 0) + number}
        if self.policy.regenerate.hint and self.endpoint == "chat":
            body["messages"] = [{"role": "system", "content": self.policy.regenerate.hint}, *self.body["messages"]]
        return json.dumps(body).encode()

    async def _take(self, answer: Answer, guards: Sequence[Guard]) -> Ruling:
        """Judge an answer and make `response` of it, or give the ruling that holds it back."""
        self.like = None
        if self.audit.on:
            self.hash, self.chars, self.texts = self.audit.hasher(), 0, []
        if not 200 <= answer.status < 300:
            if 300 <= answer.status < 400:
                raise UpstreamError("the upstream wants to send us elsewhere (a redirect)", kind="malformed")
            data = await answer.read(self.policy.limits.reply_bytes)
            self.metrics.count("upstream_errors", f"status_{answer.status // 100}xx")
            self.outcome = "upstream_error"
            self._finish(answer.status)
            self.response = Whole(answer.status, self.lines(answer), data)
            return ALLOWED
        if answer.kind == "text/event-stream":
            return await self._stream(answer, guards)
        return await self._whole(answer, guards)

    async def _whole(self, answer: Answer, guards: Sequence[Guard]) -> Ruling:
        data = await answer.read(self.policy.limits.reply_bytes)
        rulings: list[Ruling] = []
        if guards or self.audit.on:
            try:
                reply = json.loads(data.decode("utf-8"))
                choices = reply["choices"]
                if type(choices) is not list or not choices:
                    raise ValueError("no choices")
                messages = [wire.reply(choice) for choice in choices]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UpstreamError(
                    "the upstream's reply is no completion that guards can read", kind="malformed"
                ) from None
            self.like = reply
            for message in messages:
                self._heard(message.text)
            for choice, message in zip(choices, messages, strict=True):
                index = choice.get("index", 0)
                rulings.append(await self._judge_output(message, index if type(index) is int else 0, guards))
        ruling = strongest(rulings)
        if ruling.action in ("regenerate", "block"):
            some_pass = any(item.action in ("allow", "warn") for item in rulings)
            if ruling.action == "regenerate" or ruling.outcome == "unavailable" or not some_pass:
                return ruling
            for place, item in enumerate(rulings):  # of several choices, only those that were blocked are replaced
                if item.action == "block":
                    choices[place] = wire.blocked_choice(
                        self.endpoint, choices[place].get("index", 0), self.policy.reply.blocked
                    )
            data, self.outcome = json.dumps(reply).encode(), "blocked"
        self.outcome = self.outcome or "allowed"
        self._finish(answer.status)
        self.response = Whole(answer.status, self.lines(answer), data)
        return ALLOWED

    async def _judge_output(self, message: Message, choice: int, guards: Sequence[Guard]) -> Ruling:
        if not guards or not (message.text or message.media or message.calls):
            return ALLOWED
        messages = (*self._conversation(choice), message)
        return self._rule(
            await ask([self._job(guard, messages, "output", i) for i, guard in enumerate(guards)]), message.text
        )

    def _conversation(self, choice: int) -> tuple[Message, ...]:
        if len(self.conversations) == 1:
            return self.conversations[0]
        each = self.body.get("n")
        place = choice // each if type(each) is int and each > 0 else choice
        return self.conversations[min(max(place, 0), len(self.conversations) - 1)]

    # Streams

    async def _stream(self, answer: Answer, guards: Sequence[Guard]) -> Ruling:
        settings, limits = self.policy.stream, self.policy.limits
        events = Events(limits.event_bytes, read=bool(guards) or self.audit.on)
        hold = Hold(settings.window, settings.holdback, whole=settings.whole)
        waiting = b""  # released before the first character: not sent yet, so that the reply can still be replaced
        done = False
        try:
            while data := await answer.piece():
                for event, chunk in events.feed(data):
                    self._push(hold, event, chunk, guards)
                    if done := chunk.done:
                        break
                if hold.held_bytes > limits.reply_bytes:
                    raise UpstreamError(
                        f"more than {limits.reply_bytes} bytes of a stream are held back", kind="malformed"
                    )
                if done:
                    break
                ruling = await self._judge_due(hold, guards)
                if ruling.action in ("regenerate", "block"):
                    return await self._cut(hold, ruling)
                waiting += hold.release()
                if waiting and (hold.sent or self.started or not guards):
                    await self._send(answer, waiting)
                    waiting = b""
            if not done:
                for event, chunk in events.end():
                    self._push(hold, event, chunk, guards)
        except Malformed as error:
            trouble: UpstreamError | None = UpstreamError(str(error), kind="malformed")
        except UpstreamError as error:
            trouble = error
        else:
            trouble = None
        if trouble is not None and not self.started:  # the client can still be told by a status
            raise trouble
        hold.end()
        ruling = await self._judge_due(hold, guards)
        if ruling.action in ("regenerate", "block"):
            return await self._cut(hold, ruling)
        waiting += hold.release()
        if trouble is not None:
            self.metrics.count("upstream_errors", trouble.kind)
            self.outcome = "upstream_error"
            waiting += wire.event(wire.error(str(trouble), kind="upstream_error", code=trouble.kind))
        answer.said_all = done
        await self._last(answer, waiting)
        return ALLOWED

    def _push(self, hold: Hold, event: bytes, chunk: Chunk, guards: Sequence[Guard]) -> None:
        if self.like is None and chunk.data is not None:
            self.like = chunk.data
        if self.audit.on:
            for piece in chunk.pieces:
                self._heard(piece.text)
        hold.push(event, chunk.pieces if guards else (), chunk.ends)

    async def _judge_due(self, hold: Hold, guards: Sequence[Guard]) -> Ruling:
        """Let the guards see what is due; the first ruling that holds it back, or ALLOWED."""
        for number, view in enumerate(hold.due()):
            if number % 16 == 15:
                await asyncio.sleep(0)  # one huge event must not keep the others waiting
            ruling = await self._judge_output(Message("assistant", view.text), view.choice, guards)
            if ruling.action in ("regenerate", "block"):
                return ruling
        hold.allow()
        return ALLOWED

    async def _cut(self, hold: Hold, ruling: Ruling) -> Ruling:
        """End a stream that may not go on. Before anything was sent the caller decides; after it there is no other round."""
        if not self.started:
            return ruling
        if ruling.outcome == "unavailable":
            self.outcome = "unavailable"
            last = wire.event(unavailable())
        else:
            self.outcome = "blocked"
            last = wire.blocked_events(
                self.endpoint, hold.open_choices, id=self.id, model=self._model(), text="", like=self.like
            )
        await self._last(None, last)
        return Ruling(ruling.outcome, "block", ruling.level)

    async def _send(self, answer: Answer | None, data: bytes) -> None:
        """Bytes for the client; the first of them open the response, and the audit log says so."""
        if not self.started:
            if self.audit.on and not self.written:  # a short stream is one write, and one line
                self.audit.write(self._row("started", "streaming"))
            self.status = answer.status if answer is not None else 200
            self.response = web.StreamResponse(status=self.status, headers=fields(self.lines(answer)))
            self.started = True
            await self.response.prepare(self.request)
        assert self.response is not None
        await self.response.write(data)

    async def _last(self, answer: Answer | None, data: bytes) -> None:
        """The end of a stream, after its audit line. One of which nothing was sent yet goes out in one piece."""
        self.outcome = self.outcome or "allowed"
        if not self.started:
            assert answer is not None
            self._finish(answer.status)
            self.response = Whole(answer.status, self.lines(answer), data)
            return
        self._finish(self.status)
        assert self.response is not None
        if data:
            await self.response.write(data)
        await self.response.write_eof()

    # What is said instead

    def _withheld(self, ruling: Ruling) -> web.StreamResponse:
        if ruling.outcome == "unavailable":
            self.outcome = "unavailable"
            raise Unavailable
        self.outcome = "blocked"
        text = self.policy.reply.blocked
        self._finish(200)
        if self.body.get("stream") is True:
            data = wire.blocked_events(self.endpoint, [0], id=self.id, model=self._model(), text=text, like=self.like)
            kind = b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
        else:
            data = wire.blocked(self.endpoint, id=self.id, model=self._model(), text=text, like=self.like)
            kind = b"Content-Type: application/json\r\n"
        self.response = Whole(200, kind + self.lines(None), data)
        return self.response

    def _model(self) -> str:
        model = self.body.get("model")
        return model if type(model) is str else "unknown"

    def lines(self, answer: Answer | None) -> bytes:
        """The head the client reads: the upstream's own lines, and ours."""
        ours = f"X-Davylamp-Id: {self.id}\r\nX-Davylamp-Outcome: {self.outcome or 'streaming'}\r\n"
        if self.warned:
            warned = [f"{item.guard}={item.ruling.level}" for item in self.judged if item.ruling.action == "warn"]
            ours += f"X-Davylamp-Warning: {', '.join(dict.fromkeys(warned))}\r\n"
        if self.guards.learning and (ids := [item.id for item in self.judged if item.guard in self.guards.learning]):
            ours += f"X-Davylamp-Verdicts: {', '.join(ids)}\r\n"
        return (downward(answer.head.raw_headers) if answer is not None else b"") + ours.encode("ascii", "replace")

    # The log

    def _heard(self, text: str) -> None:
        if self.audit.on:
            self.hash.update(text.encode("utf-8", "surrogatepass"))
            self.chars += len(text)
            if self.audit.texts:
                self.texts.append(text)

    def _finish(self, status: int) -> None:
        """Write the last audit line of this request, once. Raises AuditError."""
        self.status = status
        if self.audit.on and not self.written:
            self.written = True
            self.audit.write(self._row("request", self.outcome))

    def leave(self, outcome: str, status: int) -> None:
        """The request ended otherwise: refused, broken off, or without its client."""
        self.outcome = outcome
        self._finish(status)

    def _row(self, event: str, outcome: str) -> dict[str, Any]:
        row: dict[str, Any] = {"time": round(time.time(), 3), "id": self.id, "event": event, "endpoint": self.endpoint}
        row |= {"model": self._model()[:200], "outcome": outcome, "status": self.status, "rounds": self.rounds}
        row |= self.audit.said("prompt", "\n".join(messages[-1].text for messages in self.conversations))
        row["request_sha256"] = self.audit.digest(self.raw)
        if self.audit.texts:
            row["request"] = self.raw.decode("utf-8", "replace")
            row["reply"] = "".join(self.texts)
        if event == "request":
            row |= {"reply_chars": self.chars, "reply_sha256": (self.hash or self.audit.hasher()).hexdigest()}
        row["verdicts"] = [item.json(self.audit.texts) for item in self.judged]
        row["seconds"] = round(time.perf_counter() - self.start, 6)
        return row


def _judged_ends(messages: tuple[Message, ...], guard: Guard) -> list[int]:
    """How far the conversation goes for each judgement on the input side: one for every message that is new to the model.

    New are those after the last assistant turn; a last message that is itself the assistant's (a prefill, which the client wrote) counts.
    """
    settings = guard.settings
    first = 0
    if settings.turns == "last":
        for i in range(len(messages) - 2, -1, -1):
            if messages[i].role == "assistant":
                first = i + 1
                break
    roles = settings.roles
    return [
        i + 1
        for i in range(first, len(messages))
        if messages[i].role in roles and (messages[i].text or messages[i].media or messages[i].calls)
    ]


def unavailable() -> bytes:
    """The error that stands for a verdict nobody gave."""
    return wire.error(
        "a safety guard is not available, so nothing may pass", kind="guard_unavailable", code="unavailable"
    )
