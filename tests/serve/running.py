"""A gateway in a thread, and small clients for it."""

import asyncio
import http.client
import json
import threading
import time
from pathlib import Path

from aiohttp import web

from davylamp.serve.app import Gateway
from davylamp.serve.config import read_policy

HERE = Path(__file__).parent


def use(name):
    """The spec of a guard of judges.py."""
    return f"{HERE / 'judges.py'}:{name}"


class Running:
    """A gateway before `upstream`, with the guards of a policy in TOML (the [upstream] table is filled in)."""

    def __init__(self, upstream, policy, folder):
        self.path = folder / "policy.toml"
        self.upstream = upstream
        self.write(policy)
        self._ready, self.error = threading.Event(), None

    def write(self, policy):
        self.path.write_text(policy.replace("JUDGES", str(HERE / "judges.py")), encoding="utf-8")

    def read(self):
        return read_policy(self.path, upstream=self.upstream)

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)
        if self.error is not None:
            raise self.error
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _serve(self):
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.gateway = Gateway(self.read())
            await self.gateway.start()
        except Exception as error:
            self.error = error
            self._ready.set()
            return
        runner = web.ServerRunner(self.gateway.server(), shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = site.port if hasattr(site, "_bound_port") else site._server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        await runner.cleanup()
        await self.gateway.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def call(self, coroutine):
        """Run something in the gateway's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def ask(self, method, path, body=None, headers=None):
        """(status, headers, bytes) of one request; a dict is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict | list) else body
            given = {"Content-Type": "application/json", **(headers or {})} if data is not None else headers or {}
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def chat(self, text="Hello", headers=None, **more):
        messages = more.pop("messages", [{"role": "user", "content": text}])
        return self.ask("POST", "/v1/chat/completions", {"model": "mock", "messages": messages, **more}, headers)

    def counts(self, name):
        """A counter as {label values: number}, once all requests have ended: a client may have its last byte a little earlier."""
        end = time.monotonic() + 10
        while self.gateway.metrics.in_flight and time.monotonic() < end:
            time.sleep(0.002)
        return dict(self.gateway.metrics.counts[name])


def datas(body):
    """The data of all events of a streamed body, parsed; [DONE] as text."""
    out = []
    for part in body.decode().split("\n\n"):
        if part.startswith("data: "):
            out.append("[DONE]" if part == "data: [DONE]" else json.loads(part[6:]))
    return out


def text_of(events):
    """What a client puts together from a stream."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if event != "[DONE]"
        for choice in event.get("choices", ())
    )
