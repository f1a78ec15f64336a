"""A server behind the gateway that answers as it is told, byte for byte, also badly. Raw asyncio, in a thread of its own."""

import asyncio
import contextlib
import json
import threading
from dataclasses import dataclass, field


@dataclass
class Seen:
    """A request as the upstream got it. gone: its connection was closed by the other side before we had answered."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self):
        return json.loads(self.body)

    def header(self, name):
        return [value for key, value in self.headers if key.lower() == name.lower()]


def whole(text="Fine.", *, n=1, finish="stop", usage=True, **message):
    """A chat completion."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
        for i in range(n)
    ]
    out = {"id": "chatcmpl-up", "object": "chat.completion", "created": 7, "model": "mock", "choices": choices}
    return {**out, "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}} if usage else out


def event(delta, finish=None, index=0, **more):
    """One event of a streamed chat completion."""
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 7, "model": "mock"}
    return b"data: " + json.dumps({**head, "choices": [choice], **more}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def events(text, size=5):
    """All events of a streamed reply, cut into pieces of `size` characters."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    return [
        event({"role": "assistant", "content": ""}),
        *(event({"content": p}) for p in pieces),
        event({}, "stop"),
        DONE,
    ]


class Upstream:
    """`answer` is an async function (seen, writer): it writes the whole HTTP answer. The default says `Fine.`, streamed if asked."""

    def __init__(self, answer=None):
        self.answer = answer or say("Fine.")
        self.seen, self.port = [], 0
        self._ready = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _serve(self):
        self.loop, self._end, self._open = asyncio.get_running_loop(), asyncio.Event(), set()
        server = await asyncio.start_server(self._talk, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _talk(self, reader, writer):
        task = asyncio.current_task()
        self._open.add(task)
        try:
            while (seen := await self._read(reader)) is not None:
                self.seen.append(seen)
                watch = asyncio.ensure_future(self._watch(reader, seen))
                try:
                    await self.answer(seen, writer)
                    await writer.drain()
                finally:
                    watch.cancel()
                    await asyncio.gather(watch, return_exceptions=True)
                if writer.is_closing():
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _watch(self, reader, seen):
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.01)
        seen.gone.set()

    async def _read(self, reader):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = [tuple(part.strip() for part in line.split(":", 1)) for line in lines]
        length = [int(value) for name, value in headers if name.lower() == "content-length"]
        body = await reader.readexactly(length[0]) if length else b""
        method, path, _ = first.split(" ")
        return Seen(method, path, headers, body)


def send(writer, body, *, status="200 OK", kind="application/json", more=""):
    """A whole answer with its length."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode("latin-1") + data)


def begin(writer, kind="text/event-stream", more=""):
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{more}Transfer-Encoding: chunked\r\n\r\n".encode())


def chunk(writer, data):
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def end(writer):
    writer.write(b"0\r\n\r\n")


def say(text, *, size=5, pause=0.0, **more):
    """An answer that says `text` (or the next of a list of texts), streamed in pieces of `size` characters if asked to."""
    texts = iter(text) if isinstance(text, list) else None

    async def answer(seen, writer):
        if seen.path.endswith("/models"):
            return send(writer, {"object": "list", "data": [{"id": "mock", "object": "model"}]})
        now = next(texts) if texts is not None else text
        if seen.json.get("stream"):
            begin(writer)
            for data in events(now, size):
                chunk(writer, data)
                if pause:
                    await writer.drain()
                    await asyncio.sleep(pause)
            return end(writer)
        if seen.path.endswith("/chat/completions"):
            return send(writer, whole(now, **more))
        choice = {"index": 0, "text": now, "finish_reason": "stop", "logprobs": None}
        return send(
            writer, {"id": "cmpl-up", "object": "text_completion", "created": 7, "model": "mock", "choices": [choice]}
        )

    return answer
