"""`davylamp serve`: the processes of the gateway. One worker runs in this process; several share the port and are watched by it.

SIGTERM and SIGINT stop: no new connections, requests on their way finish. SIGHUP reads the policy file again and reopens the audit log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from davylamp.core.errors import DavylampError, InputError, RunError
from davylamp.serve.app import Gateway
from davylamp.serve.config import Policy, read_policy
from davylamp.serve.judging import load_guards
from davylamp.serve.metrics import Board

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_serve(
    *,
    upstream: str | None = None,
    guards: Sequence[str] = (),
    policy: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    workers: int | None = None,
    audit: Path | None = None,
    check: bool = False,
) -> None:
    """Serve until a signal says stop. Raises DavylampError if the policy or a guard is not usable; then nothing was opened.

    upstream: base URL of the server behind.  guards: specs, `lamp` or `input=lamp`.  policy: TOML file; the other options are put over it.
    port: 0 takes a free one.  check: load everything, say so, and end.
    """
    given: dict[str, Any] = {
        "path": policy,
        "upstream": upstream,
        "guards": tuple(guards),
        "audit": None if audit is None else str(audit),
        "host": host,
        "port": port,
        "workers": workers,
    }
    read = read_policy(**given)
    if check:
        loaded = load_guards(read)
        asyncio.run(loaded.close())
        _say(f"the policy is usable: {_described(read)}")
    elif read.server.workers == 1:
        asyncio.run(_serve(given, read, _socket(read, shared=False)))
    else:
        _Supervisor(given, read).run()


def _say(text: str) -> None:
    print(f"davylamp: {text}", file=sys.stderr, flush=True)


def _described(policy: Policy) -> str:
    names = ", ".join(f"{guard.name} ({guard.on})" for guard in policy.guard)
    return f"guards {names} before {policy.upstream.url}"


def _socket(policy: Policy, *, shared: bool) -> socket.socket:
    """A bound socket. Raises RunError if the address is taken or not ours."""
    server = policy.server
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as error:
        raise RunError(f"cannot listen on {server.host}:{server.port}: {error.strerror}") from None
    return bound


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def _serve(
    given: dict[str, Any],
    policy: Policy,
    bound: socket.socket,
    *,
    number: int = 0,
    board: Path | None = None,
    parent: Any = None,
) -> None:
    """One worker, from start to stop. parent: the end of a pipe; it hears that we are ready, and its end is ours."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    gateway = Gateway(policy, board=Board(board, number), number=number)
    await gateway.start()
    runner = web.ServerRunner(gateway.server(), shutdown_timeout=policy.server.grace_seconds)
    await runner.setup()
    await web.SockSite(runner, bound, backlog=1024).start()
    tasks: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            await gateway.reload(lambda: read_policy(**given))
        except DavylampError as error:
            _say(f"the policy was not taken on, the old one stays: {error}")
        else:
            _say(f"policy taken on: {_described(gateway.policy)}")

    def on_hangup() -> None:
        task = loop.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for name in SIGNALS:
        loop.add_signal_handler(name, stop.set)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    if parent is None:
        _say(f"serving {_address(bound)}/v1, {_described(policy)}")
    else:
        parent.send("ready")
        loop.add_reader(parent.fileno(), stop.set)  # it is readable only when the parent has gone
    # What was loaded stays; looking through it again and again at every collection is a tenth of a request's CPU.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    await stop.wait()
    gateway.draining = True
    for task in list(tasks):
        await task
    await runner.cleanup()
    await gateway.close()


def _worker(given: dict[str, Any], policy: Policy, number: int, board: str, parent: Any) -> None:
    """The main function of a worker process."""
    for name in (signal.SIGINT, signal.SIGHUP):  # the terminal sends these to us too; the supervisor decides
        signal.signal(name, signal.SIG_IGN)
    try:
        asyncio.run(
            _serve(given, policy, _socket(policy, shared=True), number=number, board=Path(board), parent=parent)
        )
    except DavylampError as error:
        parent.send(json.dumps([type(error).__name__, str(error)]))
        raise SystemExit(error.exit_code) from None


class _Supervisor:
    """Starts the workers, passes signals on, and starts a worker again that died or stands still."""

    def __init__(self, given: dict[str, Any], policy: Policy):
        # The port is held here, bound but not listening, so that it is still ours while a worker starts again.
        self.bound = _socket(policy, shared=True)
        server = dataclasses.replace(policy.server, port=self.bound.getsockname()[1])
        self.policy = dataclasses.replace(policy, server=server)
        self.given = given
        self.board = Path(tempfile.mkdtemp(prefix="davylamp-serve-"))
        self.context = multiprocessing.get_context("spawn")
        self.processes: list[Any] = [None] * server.workers
        self.pipes: list[Any] = [None] * server.workers
        self.born = [0.0] * server.workers
        self.ready = [False] * server.workers  # it has loaded its guards, however long that took
        self.falls = [0] * server.workers  # how often it ended young, in a row
        self.due = [0.0] * server.workers  # when it may start again
        self.stopping = False

    def run(self) -> None:
        for name, handler in ((signal.SIGTERM, self._stop), (signal.SIGINT, self._stop), (signal.SIGHUP, self._hangup)):
            signal.signal(name, handler)
        try:
            for number in range(len(self.processes)):
                self._start(number)
            for number in range(len(self.processes)):
                self._wait_ready(number)
            _say(f"serving {_address(self.bound)}/v1 with {len(self.processes)} workers, {_described(self.policy)}")
            while not self.stopping:
                time.sleep(0.2)
                for number in range(len(self.processes)):
                    self._look(number)
        finally:
            self._end()

    def _start(self, number: int) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=_worker,
            args=(self.given, self.policy, number, str(self.board), theirs),
            name=f"davylamp-serve-{number}",
        )
        process.start()
        theirs.close()
        self.processes[number], self.pipes[number] = process, ours
        self.born[number], self.ready[number] = time.monotonic(), False

    def _wait_ready(self, number: int) -> None:
        """Raise what the worker raised, if it did not come up."""
        pipe, process = self.pipes[number], self.processes[number]
        while not self.stopping and not pipe.poll(0.1):
            if not process.is_alive():
                raise RunError(f"worker {number} ended with code {process.exitcode} before it was ready")
        if self.stopping:
            return
        try:
            word = pipe.recv()
        except EOFError:
            raise RunError(f"worker {number} ended before it was ready") from None
        self.ready[number] = word == "ready"
        if not self.ready[number]:
            kind, text = json.loads(word)
            raise (InputError if kind in ("InputError", "UnknownNameError") else RunError)(text)

    def _look(self, number: int) -> None:
        process, now = self.processes[number], time.monotonic()
        if process is None:
            if now >= self.due[number]:
                self._start(number)
            return
        if process.is_alive():
            if not self.ready[number]:
                self._hear(number, now)
                return
            if not self._stands_still(number, now):
                return
            _say(f"worker {number} stood still for {self.policy.server.stuck_seconds:g} s and is started again")
            process.kill()
            process.join()
        else:
            process.join()
            _say(f"worker {number} ended with code {process.exitcode} and is started again")
        self.pipes[number].close()
        self.falls[number] = self.falls[number] + 1 if now - self.born[number] < 10.0 else 0
        self.due[number] = now + (min(30.0, 0.25 * 2 ** self.falls[number]) if self.falls[number] else 0.0)
        self.processes[number] = None

    def _hear(self, number: int, now: float) -> None:
        """Whether a worker that starts again is ready; one that cannot start says why and ends."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipes[number].poll():
                word = self.pipes[number].recv()
                if word == "ready":
                    self.ready[number], self.born[number] = True, now
                else:
                    _say(f"worker {number} cannot start: {json.loads(word)[1]}")

    def _stands_still(self, number: int, now: float) -> bool:
        try:
            age = time.time() - (self.board / f"{number}.json").stat().st_mtime
        except OSError:
            age = now - self.born[number]
        limit = self.policy.server.stuck_seconds
        return min(age, now - self.born[number]) > limit

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _hangup(self, *_: object) -> None:
        for process in self.processes:
            if process is not None and process.is_alive():
                os.kill(process.pid, signal.SIGHUP)

    def _end(self) -> None:
        self.stopping = True
        for process in self.processes:
            if process is not None and process.is_alive():
                process.terminate()
        end = time.monotonic() + self.policy.server.grace_seconds + 5.0
        for process in self.processes:
            if process is not None:
                process.join(max(0.1, end - time.monotonic()))
                if process.is_alive():
                    process.kill()
                    process.join()
        self.bound.close()
        shutil.rmtree(self.board, ignore_errors=True)
