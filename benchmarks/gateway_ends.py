"""Both ends of the gateway's measurements, as cheap as asyncio can make them, and the bare proxies it is measured beside.

    python benchmarks/gateway_ends.py upstream | aiohttp URL | bare URL

Each prints its port and serves until its standard input closes, bound to loopback. The upstream answers at once, whole or streamed, and
repeats the marker of the question (`<123>`) in its reply; `load` asks and checks that each reply bears the marker of its own question.
"""

import asyncio
import json
import socket
import sys
import time
from collections import Counter, deque
from urllib.parse import urlsplit

WORDS = ("bread", "rises", "in", "a", "warm", "place,", "so", "wait", "an", "hour", "and", "bake", "it.")
EVENTS = 80  # of a streamed reply, each with one word: about 450 characters, more than a window of the default policy
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
STREAMED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def whole(text):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 12, "completion_tokens": 40, "total_tokens": 52}
    head = {"id": "chatcmpl-x", "object": "chat.completion", "created": 0, "model": "mock"}
    return json.dumps({**head, "choices": [choice], "usage": usage}).encode()


def event(delta, finish=None):
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    head = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 0, "model": "mock"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


class Upstream(asyncio.Protocol):
    """pieces: writes that a streamed reply is made of."""

    pieces = 8
    reply = whole("MARK " + " ".join(WORDS[i % len(WORDS)] for i in range(40)))
    first = event({"role": "assistant", "content": "MARK"})
    rest = tuple(event({"content": " " + WORDS[i % len(WORDS)]}) for i in range(EVENTS - 1))
    rest = (*rest, event({}, "stop") + b"data: [DONE]\n\n")

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport, self.buffer, self.loop = transport, b"", asyncio.get_running_loop()

    def data_received(self, data):
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            if at < 0 and b"chunked" in head:  # a pass-through may send on a body that has no length
                stop = self.buffer.find(b"0\r\n\r\n", end)
                if stop < 0:
                    return
                size = stop + 5 - end - 4
            else:
                size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + size:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + size], self.buffer[end + 4 + size :]
            mark = b"<" + body.rpartition(b"<")[2].partition(b">")[0] + b">"
            if b'"stream": true' in body or b'"stream":true' in body:
                per = -(-(EVENTS + 1) // self.pieces)
                events = [self.first.replace(b"MARK", mark), *self.rest]
                self.next([b"".join(events[i : i + per]) for i in range(0, len(events), per)], STREAMED)
            else:
                reply = self.reply.replace(b"MARK", mark)
                self.transport.write(HEAD % (len(reply), reply))

    def next(self, pieces, before=b""):
        piece, *rest = pieces
        end = b"" if rest else b"0\r\n\r\n"
        self.transport.write(b"%b%x\r\n%b\r\n%b" % (before, len(piece), piece, end))
        if rest:
            self.loop.call_soon(self.next, rest)


async def passthrough(url):
    """What a pass-through in aiohttp looks like: its server, its client, nothing in between."""
    from aiohttp import ClientSession, TCPConnector, web

    session = ClientSession(connector=TCPConnector(limit=0), auto_decompress=False)

    async def handle(request):
        body = await request.read()
        headers = {"Content-Type": request.headers["Content-Type"]}
        async with session.post(url + request.path.removeprefix("/v1"), data=body, headers=headers) as answer:
            kind = answer.headers["Content-Type"]
            if not kind.startswith("text/event-stream"):
                return web.Response(body=await answer.read(), status=answer.status, headers={"Content-Type": kind})
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": kind})
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner.addresses[0][1]


class Bare(asyncio.Protocol):
    """Bytes from one socket to another: the limit that no proxy reads HTTP at."""

    address = ("", 0)

    def connection_made(self, transport):
        self.transport, self.waiting, self.other = transport, [], None
        asyncio.get_running_loop().create_task(self.connect())

    async def connect(self):
        far = Bare.Far()
        far.near = self.transport
        self.other, _ = await asyncio.get_running_loop().create_connection(lambda: far, *self.address)
        self.other.writelines(self.waiting)

    def data_received(self, data):
        if self.other is None:
            self.waiting.append(data)
        else:
            self.other.write(data)

    def connection_lost(self, error):
        if self.other is not None:
            self.other.close()

    class Far(asyncio.Protocol):
        def data_received(self, data):
            self.near.write(data)

        def connection_lost(self, error):
            self.near.close()


async def serve(kind, words):
    loop = asyncio.get_running_loop()
    if kind == "aiohttp":
        port = await passthrough(words[0])
    else:
        if kind == "bare":
            parts = urlsplit(words[0])
            Bare.address = (parts.hostname, parts.port)
        elif words:
            Upstream.pieces = int(words[0])
        server = await loop.create_server(Bare if kind == "bare" else Upstream, "127.0.0.1", 0, backlog=1024)
        port = server.sockets[0].getsockname()[1]
    print(port, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


# The asking end


class Asker(asyncio.Protocol):
    """One connection that asks, checks the reply, and asks again while `plan.more()` gives it a number."""

    def __init__(self, plan):
        self.plan, self.buffer, self.asking, self.done = plan, bytearray(), None, asyncio.Event()

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport = transport
        self.ask()

    def ask(self):
        self.asking = self.plan.more()
        if self.asking is None:
            self.done.set()
            self.transport.close()
        elif (wait := self.plan.wait(self.asking)) > 0:
            asyncio.get_running_loop().call_later(wait, self.send)
        else:
            self.send()

    def send(self):
        if self.transport.is_closing():  # it was lost while it waited for its turn; counted already
            return
        self.began = time.perf_counter()
        self.transport.write(self.plan.request(self.asking))

    def data_received(self, data):
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        lines = bytes(self.buffer[:head]).lower()
        at = lines.find(b"content-length:")
        if at >= 0:
            size = int(lines[at + 15 :].split(b"\r\n", 1)[0])
            if len(self.buffer) < head + 4 + size:
                return
        elif not self.buffer.endswith(b"0\r\n\r\n"):
            return
        self.plan.answered(self.asking, lines, bytes(self.buffer[head + 4 :]), time.perf_counter() - self.began)
        self.buffer.clear()
        self.ask()

    def connection_lost(self, error):
        if not self.done.is_set():
            self.plan.counts["lost"] += 1
            self.done.set()


class Plan:
    """requests: how many to ask, or None to go on for `seconds`.  rate: requests a second, 0 for as many as go.

    counts: good, and what should not be: lost (no answer), refused, mixed_up (another question's answer), cut (a stream without its end).
    """

    def __init__(self, *, requests=None, seconds=0.0, rate=0.0, stream=False):
        self.left, self.start, self.rate = requests, time.perf_counter(), rate
        self.end = self.start + seconds
        self.number, self.seconds, self.counts = 0, deque(maxlen=100_000), Counter()
        body = {"model": "mock", "messages": [{"role": "system", "content": "You bake."}]}
        body["messages"] += [{"role": "user", "content": "How long must bread dough rise in a warm kitchen? <MARK>"}]
        body |= {"stream": True} if stream else {}
        self.body, self.stream = json.dumps(body).encode(), stream

    def more(self):
        if self.left is None:
            if time.perf_counter() >= self.end:
                return None
        elif self.left == 0:
            return None
        else:
            self.left -= 1
        self.number += 1
        return self.number

    def wait(self, number):
        """Seconds until a request's turn."""
        return self.start + number / self.rate - time.perf_counter() if self.rate else 0.0

    def request(self, number):
        body = self.body.replace(b"MARK", b"%d" % number)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer sk-bench\r\n"
        return b"%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body)

    def answered(self, number, head, body, seconds):
        self.seconds.append(seconds)
        if not head.startswith((b"http/1.1 200", b"http/1.0 200")):
            self.counts["refused"] += 1
        elif b"<%d>" % number not in body:
            self.counts["mixed_up"] += 1
        elif self.stream and b"[DONE]" not in body:
            self.counts["cut"] += 1
        else:
            self.counts["good"] += 1


async def load(port, plan, *, concurrency):
    """Ask over so many connections until the plan is done."""
    loop = asyncio.get_running_loop()
    askers = [Asker(plan) for _ in range(concurrency)]
    for asker in askers:
        await loop.create_connection(lambda asker=asker: asker, "127.0.0.1", port)
    for asker in askers:
        await asker.done.wait()
    return plan


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2:]))
