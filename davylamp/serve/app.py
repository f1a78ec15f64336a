"""The gateway: an OpenAI-compatible server that puts guards before and behind another one.

Five rules (docs/design.md): what it does not know passes byte for byte; guards see the whole conversation; three outcomes, all counted;
streams are judged in overlapping windows; guards load at the start, or there is no start. This file holds routes, access and limits; one
request's way is in `turn.py`, the decision in `core/policy.py`.

Longer than 400 lines because the routes of the API stand in one place, where a reader of the API looks for them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import os
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web

from davylamp.core.errors import DavylampError, InputError, UnknownNameError
from davylamp.serve import wire
from davylamp.serve.audit import AuditError, AuditLog
from davylamp.serve.config import Policy
from davylamp.serve.headers import Whole, downward, upward
from davylamp.serve.judging import Guards, ask, load_guards
from davylamp.serve.metrics import Board, Metrics, prometheus
from davylamp.serve.page import page
from davylamp.serve.turn import Turn, Unavailable, unavailable
from davylamp.serve.upstream import Pool, UpstreamError

Head = tuple[bytes, dict[bytes, bytes]]
Handler = Callable[[web.BaseRequest, Head], Awaitable[web.StreamResponse]]
BUCKETS_KEPT = 10_000  # addresses or keys whose request rate is remembered


class Gateway:
    """A running gateway. `await start()` loads the guards; `server()` gives what aiohttp serves; `await close()` ends it.

    number: which worker this is.  board: where workers leave their counts for each other.
    """

    def __init__(self, policy: Policy, *, board: Board | None = None, number: int = 0):
        self.policy, self.metrics = policy, Metrics()
        self.board = board or Board(None, number)
        self.draining = False
        self.guards: Guards
        self.pool: Pool
        self.audit: AuditLog
        self._retired: list[tuple[Guards, Pool, AuditLog]] = []
        self._keys = _keys(policy.server.keys_env)
        self._rates: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        self._run, self._count = secrets.token_hex(6), 0
        self._reloading = asyncio.Lock()
        self._ticker: asyncio.Task[None] | None = None
        self.routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", partial(self._complete, "chat")),
            "/v1/completions": ("POST", partial(self._complete, "completion")),
            "/v1/moderations": ("POST", self._moderations),
            "/v1/feedback": ("POST", self._feedback),
            "/v1/models": ("GET", self._models),
            "/healthz": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/": ("GET", self._page),
        }

    # Life

    async def start(self) -> None:
        """Load guards, open the log. Raises DavylampError; then nothing was started."""
        self.audit = AuditLog(self.policy.audit)
        self.guards = await asyncio.to_thread(load_guards, self.policy)
        self.pool = Pool(self.policy.upstream, _secret(self.policy.upstream.key_env))
        if (before := self.board.read(self.board.number)) is not None:
            self.metrics.load(before)
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    def server(self) -> web.Server:
        loop, limit = asyncio.get_running_loop(), self.policy.limits.body_bytes

        def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=limit)

        return web.Server(
            self.handle,
            request_factory=request,
            handler_cancellation=True,  # a client that leaves ends its request, and so the upstream's
            access_log=None,
            keepalive_timeout=75.0,
            lingering_time=2.0,
            auto_decompress=False,
        )

    async def reload(self, read: Callable[[], Policy]) -> None:
        """Take a new policy on. Requests on their way finish under the old one; if the new one is not usable the old one stays.

        Raises DavylampError, after counting it. Host, port, workers and keys stay as they were started.
        """
        async with self._reloading:
            try:
                policy = await asyncio.to_thread(read)
                audit = AuditLog(policy.audit)
                try:
                    guards = await asyncio.to_thread(load_guards, policy, self.guards)
                    pool = Pool(policy.upstream, _secret(policy.upstream.key_env))
                except BaseException:
                    audit.close()
                    raise
            except DavylampError:
                self.metrics.count("reloads", "failed")
                raise
            self._retired.append((self.guards, self.pool, self.audit))
            self.policy, self.guards, self.pool, self.audit = policy, guards, pool, audit
            self.metrics.count("reloads", "done")
            await self._bury()

    async def _bury(self) -> None:
        """Close what no request holds on to any more."""
        for retired in [item for item in self._retired if item[0].users == 0]:
            self._retired.remove(retired)
            guards, pool, audit = retired
            alive = [guard for other in (self.guards, *(item[0] for item in self._retired)) for guard in other.all]
            await guards.close(alive)
            await pool.close()
            audit.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                self.tick()
                if self._retired:
                    await self._bury()
            except Exception as error:  # counting must never end the service
                print(f"davylamp: {type(error).__name__} while counting: {error}", file=sys.stderr, flush=True)

    def tick(self) -> None:
        """Note the experts' weights and the requests since the last time, and leave the counts for the other workers."""
        for guard in self.guards.all:
            if weights := guard.weights():
                self.metrics.weigh(guard.name, weights)
        self.metrics.beat()
        self.board.write(self.metrics)

    async def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        self.tick()
        for guards, pool, audit in [*self._retired, (self.guards, self.pool, self.audit)]:
            await guards.close()
            await pool.close()
            audit.close()

    # Every request

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The handler that aiohttp calls."""
        path = request.rel_url.raw_path
        route = self.routes.get(path)
        if route is None:
            known = ", ".join(name for name in self.routes if name.startswith("/v1/"))
            return self._refused(
                "other", f"no {path[:100]} here: nothing unguarded passes. Known: {known}", 404, "not_found"
            )
        method, handler = route
        if request.method != method:
            return self._refused("other", f"{path} takes {method}, got {request.method}", 405, "method_not_allowed")
        try:
            return await handler(request, self._admit(request, path, method))
        except wire.BadRequest as error:
            return self._refused(path.rpartition("/")[2] or "page", str(error), error.status, error.code)

    def _admit(self, request: web.BaseRequest, path: str, method: str) -> Head:
        """The header lines for the upstream, and those for us. Raises BadRequest unless the client may ask this now."""
        lines, read = upward(request.raw_headers, drop_keys=bool(self._keys or self.policy.upstream.key_env))
        caller = b""
        if self._keys and path != "/healthz":
            caller = _caller(read.get(b"authorization", b""))
            if caller not in self._keys and not (self.policy.server.open_pages and path in ("/", "/metrics")):
                raise wire.BadRequest("a valid API key is needed", status=401, code="invalid_api_key")
        limits = self.policy.limits
        if method == "POST":
            if not read.get(b"content-type", b"").lower().startswith(b"application/json"):
                raise wire.BadRequest("the body must be application/json", status=415, code="content_type")
            if read.get(b"content-encoding", b"identity").lower() != b"identity":
                raise wire.BadRequest("compressed bodies are not taken", status=415, code="content_encoding")
            if int(read.get(b"content-length", b"0")) > limits.body_bytes:
                raise wire.BadRequest(f"the body may hold {limits.body_bytes} bytes", status=413, code="too_large")
            if self.metrics.in_flight >= limits.concurrent:
                raise wire.BadRequest("too many requests at a time", status=503, code="overloaded")
            if limits.per_minute:
                self._pace(caller or str(request.remote).encode(), limits.per_minute)
        return lines, read

    def _pace(self, caller: bytes, per_minute: int) -> None:
        """A bucket that holds `per_minute` requests and fills evenly."""
        now = time.monotonic()
        tokens, last = self._rates.pop(caller, (float(per_minute), now))
        tokens = min(per_minute, tokens + (now - last) * per_minute / 60.0)
        self._rates[caller] = (max(0.0, tokens - 1.0), now)
        if len(self._rates) > BUCKETS_KEPT:
            self._rates.popitem(last=False)
        if tokens < 1.0:
            raise wire.BadRequest("too many requests a minute", status=429, code="rate_limited")

    def _refused(self, endpoint: str, message: str, status: int, code: str) -> web.Response:
        self.metrics.count("rejected", code)
        self.metrics.count("requests", endpoint, "rejected")
        headers = {"Content-Type": "application/json"}
        if status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="davylamp", charset="UTF-8"'
        if status in (429, 503):
            headers["Retry-After"] = "1"
        if status == 405:
            headers["Allow"] = "GET, POST"
        return web.Response(
            body=wire.error(message, kind="invalid_request_error", code=code), status=status, headers=headers
        )

    async def _body(self, request: web.BaseRequest, head: Head) -> bytes:
        """The body. Raises BadRequest if it is too long, too slow, or breaks off."""
        limits, content = self.policy.limits, request.content
        try:
            data = content.read_nowait()  # mostly it is there
            if not content.is_eof():
                if head[1].get(b"expect", b"").lower() == b"100-continue" and request.transport is not None:
                    request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                parts, size = [data], len(data)
                async with asyncio.timeout(limits.body_seconds):
                    while size <= limits.body_bytes and (more := await content.readany()):
                        parts.append(more)
                        size += len(more)
                data = b"".join(parts)
        except TimeoutError:
            raise wire.BadRequest("the body did not come in time", status=408, code="slow_body") from None
        except web.RequestPayloadError as error:
            raise wire.BadRequest(f"the body broke off ({type(error).__name__})", code="broken_body") from None
        if len(data) > limits.body_bytes:
            raise wire.BadRequest(f"the body may hold {limits.body_bytes} bytes", status=413, code="too_large")
        return data

    # Completions

    async def _complete(self, endpoint: str, request: web.BaseRequest, head: Head) -> web.StreamResponse:
        guards, metrics = self.guards, self.metrics
        turn = Turn(self._id(), endpoint, request, guards, self.pool, metrics, self.audit)
        guards.users += 1
        metrics.in_flight += 1
        outcome = "error"
        try:
            try:
                response = await turn.run(await self._body(request, head), head[0])
                outcome = turn.outcome
            except wire.BadRequest as error:
                outcome = "rejected"
                metrics.count("rejected", error.code)
                turn.leave(outcome, error.status)
                response = self._error(turn, str(error), "invalid_request_error", error.code, error.status)
            except UpstreamError as error:
                outcome = "upstream_error"
                metrics.count("upstream_errors", error.kind)
                turn.leave(outcome, error.status)
                response = self._error(turn, str(error), "upstream_error", error.kind, error.status)
            except Unavailable:
                outcome = "unavailable"
                turn.leave(outcome, 503)
                response = Whole(503, b"Content-Type: application/json\r\n" + turn.lines(None), unavailable())
            return response
        except AuditError as error:
            outcome = "unavailable"
            if (
                turn.started
            ):  # what was sent cannot be taken back; the end the client would take for a whole reply does not come
                metrics.count("audit_failures")
                raise ConnectionAbortedError from None
            return self._audit_failed(error)
        except (asyncio.CancelledError, ConnectionError):
            outcome = "disconnected"
            with contextlib.suppress(AuditError):
                turn.leave(outcome, 499)
            raise
        finally:
            guards.users -= 1
            metrics.in_flight -= 1
            metrics.counts["requests"][endpoint, outcome] += 1
            metrics.took("", time.perf_counter() - turn.start)

    def _error(self, turn: Turn, message: str, kind: str, code: str, status: int) -> web.Response:
        headers = {"Content-Type": "application/json", "X-Davylamp-Id": turn.id}
        return web.Response(body=wire.error(message, kind=kind, code=code), status=status, headers=headers)

    def _id(self) -> str:
        self._count += 1
        return f"{self._run}{self._count:x}"

    # The rest

    async def _moderations(self, request: web.BaseRequest, head: Head) -> web.StreamResponse:
        """OpenAI's moderation endpoint, answered by the guards themselves."""
        guards = self.guards
        guards.users += 1
        try:
            body = wire.read_body(await self._body(request, head))
            inputs = wire.moderation_inputs(body)
            if len(inputs) > self.policy.limits.messages:
                raise wire.BadRequest(f"`input` holds {len(inputs)} texts, the limit is {self.policy.limits.messages}")
            id, asked = self._id(), guards.input or guards.output
            results, rows = [], []
            for number, message in enumerate(inputs):
                names = [f"{id}.{guard.name}.{number}" for guard in asked]
                judged = await ask(
                    [g.judge_one((message,), name, "input") for g, name in zip(asked, names, strict=True)]
                )
                for item in judged:
                    self.metrics.note(item, message.text[:400] if self.policy.page.texts else "")
                rows += [item.json(self.audit.texts) for item in judged]
                if any(item.ruling.outcome == "unavailable" and item.ruling.action == "block" for item in judged):
                    self.metrics.count("requests", "moderations", "unavailable")
                    self._log("moderations", id, "unavailable", rows)
                    return web.Response(body=unavailable(), status=503, content_type="application/json")
                verdicts = [
                    (item.verdict, guard.danger(item.verdict), item.ruling.action in ("regenerate", "block"))
                    for item, guard in zip(judged, asked, strict=True)
                    if item.verdict is not None
                ]
                results.append(wire.moderation_result(verdicts, ["text"] if not message.media else ["text", "image"]))
            flagged = "blocked" if any(result["flagged"] for result in results) else "allowed"
            self.metrics.count("requests", "moderations", flagged)
            self._log("moderations", id, flagged, rows)
            return web.json_response({"id": f"modr-{id}", "model": "davylamp", "results": results})
        except AuditError as error:
            return self._audit_failed(error)
        finally:
            guards.users -= 1

    async def _feedback(self, request: web.BaseRequest, head: Head) -> web.StreamResponse:
        """A label for an earlier verdict, handed to the guard that gave it: 1 = it was unsafe, 0 = it was not."""
        guards = self.guards
        guards.users += 1
        try:
            body = wire.read_body(await self._body(request, head))
            id, label = body.get("id"), body.get("label")
            if type(id) is not str or not id or len(id) > 300:
                raise wire.BadRequest("`id` must be a verdict's id, as X-Davylamp-Verdicts and the audit log give it")
            if type(label) is not int or label not in (0, 1):
                raise wire.BadRequest(f"`label` must be 1 (it was unsafe) or 0 (it was not), got {str(label)[:40]}")
            name = id.split(".")[1] if id.count(".") >= 2 else ""
            guard = guards.by_name.get(name)
            if guard is None:
                raise wire.BadRequest("no guard here gave a verdict of that id", status=404, code="unknown_verdict")
            if guard.feedback is None:
                raise wire.BadRequest(f"guard {name} takes no feedback", status=404, code="no_feedback")
            try:
                async with asyncio.timeout(guard.timeout):
                    await guard.give_feedback(id, label)
            except InputError as error:  # unknown, or labelled before: the guard says which
                self.metrics.count("feedback", name, "refused")
                status = 404 if isinstance(error, UnknownNameError) else 409
                raise wire.BadRequest(str(error)[:300], status=status, code="feedback_refused") from None
            except Exception as error:
                self.metrics.count("feedback", name, "failed")
                raise wire.BadRequest(
                    f"guard {name} could not take the label ({type(error).__name__})",
                    status=503,
                    code="feedback_failed",
                ) from None
            self.metrics.count("feedback", name, "taken")
            self._log("feedback", id, "taken", [{"id": id, "guard": name, "label": label}])
            return web.json_response({"id": id, "label": label, "guard": name})
        except AuditError as error:
            return self._audit_failed(error)
        finally:
            guards.users -= 1

    def _log(self, event: str, id: str, outcome: str, rows: list[dict[str, Any]]) -> None:
        self.audit.write(
            {"time": round(time.time(), 3), "id": id, "event": event, "outcome": outcome, "verdicts": rows}
        )

    def _audit_failed(self, error: AuditError) -> web.Response:
        self.metrics.count("audit_failures")
        return web.Response(
            body=wire.error(f"{error}, so nothing is answered", kind="audit_unavailable", code="unavailable"),
            status=503,
            headers={"Content-Type": "application/json", "Retry-After": "1"},
        )

    async def _models(self, request: web.BaseRequest, head: Head) -> web.StreamResponse:
        try:
            answer = await self.pool.ask(b"GET", b"/models", head[0])
            async with answer:
                data = await answer.read(self.policy.limits.reply_bytes)
                return Whole(answer.status, downward(answer.head.raw_headers), data)
        except UpstreamError as error:
            self.metrics.count("upstream_errors", error.kind)
            body = wire.error(str(error), kind="upstream_error", code=error.kind)
            return web.Response(body=body, status=error.status, content_type="application/json")

    async def _health(self, request: web.BaseRequest, head: Head) -> web.StreamResponse:
        state = "draining" if self.draining else "ok"
        return web.json_response(
            {"status": state, "guards": [guard.name for guard in self.guards.all]}, status=503 if self.draining else 200
        )

    async def _metrics(self, request: web.BaseRequest, head: Head) -> web.StreamResponse:
        text = prometheus(self.board.all(self.metrics))
        return web.Response(body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _page(self, request: web.BaseRequest, head: Head) -> web.StreamResponse:
        if not self.policy.page.enabled:
            raise wire.BadRequest("the page is switched off", status=404, code="not_found")
        body, headers = page(self.board.all(self.metrics), self.policy)
        return web.Response(body=body, headers=headers)


def _secret(name: str) -> str:
    """The value of an environment variable that the policy names. Raises InputError if it is empty or cannot stand in a header."""
    if not name:
        return ""
    value = os.environ.get(name, "").strip()
    if not value or not value.isascii() or not value.isprintable():
        raise InputError(f"no usable key: set the environment variable {name}")
    return value


def _keys(name: str) -> frozenset[bytes]:
    """Digests of the keys that are accepted. Looking a digest up tells an attacker nothing by its time."""
    if not name:
        return frozenset()
    keys = [key.strip() for key in _secret(name).split(",")]
    if not all(keys):
        raise InputError(f"{name} must hold keys parted by commas, got an empty one")
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


def _caller(header: bytes) -> bytes:
    """The digest of the key in an Authorization header: a bearer's, or the password of a browser's basic form.

    >>> _caller(b"Bearer k") == _caller(b"Basic " + base64.b64encode(b"anybody:k"))
    True
    """
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"basic":
        try:
            value = base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            value = b""
    elif scheme.lower() != b"bearer":
        value = b""
    return hashlib.sha256(value.strip()).digest()
