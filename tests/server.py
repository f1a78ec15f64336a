"""An OpenAI-compatible server on loopback that answers as it is told, also badly. Runs in a thread of its own."""

import asyncio
import json
import threading
from collections import Counter

from aiohttp import web


def say(text, **more):
    """A well-formed chat completion."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return web.json_response(
        {
            "choices": [{"message": message, "finish_reason": more.pop("finish", "stop")}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
            **more,
        }
    )


class Server:
    """`answer` is a function (body, number of this call) -> response; the default says it cannot help.

    asked: the bodies received.  counts: how often each last user message was asked.
    """

    def __init__(self, answer=None, port=0):
        self.answer = answer or (lambda body, number: say("I can't help with that."))
        self.asked, self.counts, self.port = [], Counter(), port
        self._ready = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def target(self):
        return f"openai/mock@{self.url}"

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _serve(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        await runner.cleanup()

    async def _handle(self, request):
        body = json.loads(await request.read())
        self.asked.append(body)
        if body.get("messages"):
            self.counts[json.dumps(body["messages"])] += 1
        response = self.answer(body, len(self.asked))
        return await response if asyncio.iscoroutine(response) else response
