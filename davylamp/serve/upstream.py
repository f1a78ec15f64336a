"""Asking the server behind: kept-alive connections, aiohttp's parser, and nothing per request that can be done once.

Why not aiohttp's ClientSession, as everywhere else: of the 360 CPU microseconds that a request takes through a bare aiohttp pass-through,
225 are the session's (measured, benchmarks/gateway.py). A gateway forwards bytes to one fixed address, so it needs no URLs, cookies,
redirects or header merging. HTTP itself is still read by aiohttp's parser (llhttp); what is ours is the pool and the time limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientPayloadError
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpResponseParser
from aiohttp.streams import StreamReader

from davylamp.serve import config

IDLE_KEPT = 4.0  # seconds an idle connection is kept: less than the 5 s after which uvicorn closes its end
SWEEP = 0.25  # seconds between two looks at the time limits; they are kept to that precision


class UpstreamError(Exception):
    """The upstream gave no usable answer. status: what the client gets.  kind: one word for counts (down, slow, reset, malformed)."""

    def __init__(self, message: str, *, kind: str, status: int = 502):
        super().__init__(message)
        self.kind, self.status = kind, status


class Connection(BaseProtocol):
    """One connection: one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        super().__init__(loop)
        self.parser = self._parser = HttpResponseParser(
            self, loop, 2**18, payload_exception=ClientPayloadError, read_until_eof=True, auto_decompress=True
        )
        self.loop = loop
        self.waiter: asyncio.Future[Any] | None = None
        self.payload: StreamReader | None = None
        self.usable, self.uses, self.idle_since = True, 0, 0.0
        self.complete = True  # the last reply has come to its end
        self.deadline, self.idle_seconds = float("inf"), 0.0
        self.slow = False  # a time limit closed it

    def data_received(self, data: bytes) -> None:
        self.deadline = self.loop.time() + self.idle_seconds
        try:
            messages, upgraded, _ = self.parser.feed_data(data)
        except Exception as error:  # aiohttp raises several kinds for a reply that is no HTTP
            self._fail(UpstreamError(f"the upstream's reply is no HTTP: {type(error).__name__}", kind="malformed"))
            return
        for head, payload in messages:
            if 100 <= head.code < 200 and head.code != 101:
                continue
            if upgraded or self.waiter is None or self.waiter.done():  # nobody asked for this
                self._fail(UpstreamError("the upstream sent a reply that nobody asked for", kind="malformed"))
                return
            self.payload = payload
            self.usable = not head.should_close
            payload.on_eof(self._on_complete)
            self.waiter.set_result((head, payload))

    def _on_complete(self) -> None:
        self.complete = True

    def resume_reading(self, *more: Any, **named: Any) -> None:
        if self._reading_paused:  # the stream asks after every chunk it hands out, paused or not
            super().resume_reading(*more, **named)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.usable = False
        if self.payload is not None and not self.complete:
            try:
                if exc is not None:
                    raise exc
                self.parser.feed_eof()  # ends a reply that has no length; raises where one was promised
            except Exception as error:
                self.payload.set_exception(error)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(ConnectionResetError("the connection was closed before the reply"))
        super().connection_lost(exc)

    def _fail(self, error: Exception) -> None:
        self.usable = False
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(error)
        elif self.payload is not None and not self.complete:
            self.payload.set_exception(error)
        self.abort()

    def abort(self) -> None:
        self.usable = False
        if self.transport is not None:
            self.transport.abort()


class Answer:
    """An upstream's answer whose body is still to be read. Use as `async with`; leaving early closes the connection."""

    __slots__ = ("_connection", "_pool", "head", "payload", "said_all", "status")

    def __init__(self, pool: Pool, connection: Connection, head: Any, payload: Any):
        self._pool, self._connection, self.head, self.payload = pool, connection, head, payload
        self.status: int = head.code
        self.said_all = False  # what is still to come does not count: a stream's [DONE] was read

    @property
    def kind(self) -> str:
        """Its content type in lower case, without parameters."""
        return self.head.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises UpstreamError if it is longer than `limit` bytes or breaks off."""
        parts, size = [], 0
        while data := await self.piece():
            size += len(data)
            if size > limit:
                raise UpstreamError(f"the upstream's reply is longer than {limit} bytes", kind="malformed")
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def piece(self) -> bytes:
        """The next bytes of the body as they come, b"" at its end. Raises UpstreamError."""
        try:
            return await self.payload.readany()
        except UpstreamError:
            raise
        except Exception as error:
            if self._connection.slow:
                raise UpstreamError(
                    "the upstream fell silent in the middle of its reply", kind="slow", status=504
                ) from None
            what = f"the upstream broke off in the middle of its reply ({type(error).__name__})"
            raise UpstreamError(what, kind="reset") from None

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.said_all and not self._connection.complete and self._connection.usable:
            self._pool.linger(self._connection, self.payload)
        else:
            self._pool.give_back(self._connection)


class Pool:
    """Connections to one upstream. Must be made inside a running loop."""

    def __init__(self, upstream: config.Upstream, key: str = ""):
        parts = urlsplit(upstream.url)
        self.settings = upstream
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.base = parts.path.rstrip("/").encode()
        name = f"[{self.host}]" if ":" in self.host else self.host
        default = (parts.scheme, self.port) in (("http", 80), ("https", 443))
        host = name if default else f"{name}:{self.port}"
        self.fixed = f"Host: {host}\r\nAccept-Encoding: identity\r\n".encode()
        if key:
            self.fixed += f"Authorization: Bearer {key}\r\n".encode()
        self.loop = asyncio.get_running_loop()
        self.open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._lingering: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(upstream.connections)
        self._sweeper = self.loop.create_task(self._sweep())

    async def ask(self, method: bytes, path: bytes, headers: bytes, body: bytes = b"") -> Answer:
        """Send a request, wait for the head of its answer. headers: lines with their ends. Raises UpstreamError.

        If a kept-alive connection turns out to be closed, the request goes out once more, on a new one; nothing else is ever sent twice.
        """
        length = b"Content-Length: %d\r\n" % len(body) if method == b"POST" else b""
        data = b"%b %b%b HTTP/1.1\r\n%b%b%b\r\n%b" % (method, self.base, path, self.fixed, headers, length, body)
        while True:
            connection = await self._connection()
            kept = connection.uses > 0
            try:
                head, payload = await self._send(connection, data)
            except ConnectionResetError:
                slow = connection.slow
                self.give_back(connection)
                if slow:
                    what = f"the upstream did not answer within {self.settings.reply_seconds:g} s"
                    raise UpstreamError(what, kind="slow", status=504) from None
                if not kept:
                    raise UpstreamError("the upstream closed the connection before it answered", kind="reset") from None
                self._forget_idle()
            except BaseException:
                self.give_back(connection)
                raise
            else:
                return Answer(self, connection, head, payload)

    async def _send(self, connection: Connection, data: bytes) -> tuple[Any, Any]:
        if connection.transport is None:  # it was lost between two requests
            raise ConnectionResetError
        connection.uses += 1
        connection.payload, connection.complete = None, False
        connection.waiter = waiter = self.loop.create_future()
        connection.deadline = self.loop.time() + self.settings.reply_seconds
        connection.transport.write(data)
        try:
            return await waiter
        finally:
            connection.waiter = None

    async def _connection(self) -> Connection:
        await self._slots.acquire()
        now = self.loop.time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.transport is not None and now - connection.idle_since < IDLE_KEPT:
                return connection
            self._drop(connection)
        try:
            async with asyncio.timeout(self.settings.connect_seconds):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self.loop), self.host, self.port, ssl=self.tls, happy_eyeballs_delay=0.25
                )
        except TimeoutError:
            self._slots.release()
            raise UpstreamError("the upstream did not take the connection in time", kind="slow", status=504) from None
        except OSError as error:
            self._slots.release()
            raise UpstreamError(f"the upstream cannot be reached ({type(error).__name__})", kind="down") from None
        except BaseException:
            self._slots.release()
            raise
        connection.idle_seconds = self.settings.idle_seconds
        self.open.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep the connection for the next request, or close it if its last reply was not read to the end."""
        self._slots.release()
        connection.deadline = float("inf")
        kept = connection.complete and connection.usable and connection.transport is not None
        if kept and not connection._reading_paused:
            connection.idle_since = self.loop.time()
            self._idle.append(connection)
        else:
            self._drop(connection)

    def linger(self, connection: Connection, payload: StreamReader) -> None:
        """Give a connection back once the little that its reply still lacks has come, without anybody waiting for it."""

        async def wait() -> None:
            try:
                async with asyncio.timeout(1.0):
                    while await payload.readany():
                        pass
            except Exception:  # it is only worth keeping if all is well with it
                pass
            finally:
                self.give_back(connection)

        task = self.loop.create_task(wait())
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    def _drop(self, connection: Connection) -> None:
        self.open.discard(connection)
        connection.abort()

    def _forget_idle(self) -> None:
        while self._idle:
            self._drop(self._idle.pop())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            now = self.loop.time()
            for connection in [item for item in self.open if item.deadline < now]:
                if connection._reading_paused:  # it is our client that is slow, not the upstream
                    connection.deadline = now + connection.idle_seconds
                    continue
                connection.slow = True
                connection.abort()
            while self._idle and now - self._idle[0].idle_since >= IDLE_KEPT:  # the oldest stand first
                self._drop(self._idle.pop(0))

    async def close(self) -> None:
        """Close every connection. Replies that are being read break off."""
        self._sweeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sweeper
        for connection in list(self.open):
            connection.abort()
        await asyncio.gather(*self._lingering, return_exceptions=True)
        self.open.clear()
        self._idle.clear()
