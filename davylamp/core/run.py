"""The runner: puts cases to a target, has the replies judged, and writes every row as it comes.

It knows nothing of HTTP or models: a target and a judge are functions it is given. A row is keyed by the hash of case, target,
settings and seed; what the log already holds is not asked again, and a reply that lacks its verdict is only judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from davylamp.core.errors import BudgetError, DavylampError, InputError, RunError, TargetError
from davylamp.core.nouns import Case, Judge, Message, Target, ask_once
from davylamp.core.rows import RowLog, canonical


@dataclass(frozen=True, slots=True)
class Limits:
    """How hard to press. None of this changes a reply, so none of it is part of a record's id.

    width: calls at a time.  tries: attempts a row (>= 1).  timeout: seconds a call may take.  pause: seconds before the second
    try, doubled each time, with +-50 % jitter.  give_up: rows that fail in a row, with no success in between, before the run stops.
    max_calls, max_tokens: the run stops when it has spent them (None: no limit).
    """

    width: int = 32
    tries: int = 5
    timeout: float = 120.0
    pause: float = 0.5
    give_up: int = 20
    max_calls: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("width", "tries", "give_up"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.timeout <= 0 or self.pause < 0:
            raise InputError(f"timeout must be > 0 and pause >= 0 seconds, got {self.timeout} and {self.pause}")


@dataclass(slots=True)
class Progress:
    """What the run has done so far; `line` is for a person."""

    total: int | None = None
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    kept: int = 0
    failed: int = 0
    calls: int = 0
    retries: int = 0
    tokens: int = 0

    def line(self) -> str:
        seconds = time.monotonic() - self.started
        speed = self.done / seconds if seconds > 0 else 0.0
        text = f"{self.done + self.kept}{f'/{self.total}' if self.total else ''} rows  {speed:.1f}/s"
        if self.total and speed:
            left = int((self.total - self.done - self.kept) / speed)
            text += f"  ETA {left // 60}:{left % 60:02d}"
        return (
            text
            + (f"  {self.kept} kept" if self.kept else "")
            + (f"  {self.retries} retries" if self.retries else "")
            + (f"  {self.failed} failed" if self.failed else "")
        )


def row_keys(target: Target, settings: Mapping[str, Any]) -> Callable[[str, int], str]:
    """A function (canonical JSON of the case, seed) -> key of 32 hex digits."""
    base = hashlib.sha256(
        canonical({"target": dict(target.identity), "settings": dict(settings)}).encode("utf-8", "backslashreplace")
    )

    def key(case_json: str, seed: int) -> str:
        state = base.copy()
        state.update(f"{seed}\n{case_json}".encode("utf-8", "backslashreplace"))
        return state.hexdigest()[:32]

    return key


async def collect(
    cases: Iterable[Case],
    target: Target,
    judge: Judge,
    log: RowLog,
    *,
    seed: int = 0,
    epochs: int = 1,
    settings: Mapping[str, Any] | None = None,
    play: Callable[..., Any] = ask_once,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Progress:
    """Ask and judge every (case, seed) the log does not hold yet; seeds are seed, seed + 1, … over the epochs.

    Returns the progress at the end. Raises BudgetError, RunError (target down, disk full) or KeyboardInterrupt; the log then holds
    all rows finished by then, and the same call goes on from there.
    """
    limits, progress, settings = limits or Limits(), progress or Progress(), dict(settings or {})
    asker = _Asker(target, limits, progress, random.Random(seed))
    key_of = row_keys(target, settings)
    work = _work(cases, key_of, log, seed, epochs, progress)
    failures, last = 0, ""

    async def one(case: Case, case_json: str, key: str, row_seed: int) -> None:
        nonlocal failures, last
        started = time.perf_counter()
        reply = log.reply(key)
        error = ""
        if reply is None:
            try:
                reply = await play(asker, case, seed=row_seed, **settings)
            except TargetError as problem:
                error, failures = str(problem), failures + 1
                last = error
        verdict = None
        if reply is not None:
            failures = 0
            try:
                verdict = await judge(case.messages + reply, case)
            except TargetError as problem:  # the judge's own model failed: keep the reply, judge it next time
                error = f"judge: {problem}"
        head = f'{{"key":"{key}","case":{case_json},"seed":{row_seed},"seconds":{time.perf_counter() - started:.3f},"reply":'
        tail = f',"error":{canonical(error)}}}' if error else "}"
        log.append(
            head
            + (canonical([message.json() for message in reply]) if reply is not None else "null")
            + ',"verdict":'
            + (canonical(verdict.json()) if verdict is not None else "null")
            + tail
        )
        progress.failed += verdict is None
        progress.done += 1
        if failures >= limits.give_up:
            raise RunError(
                f"the target failed {failures} rows in a row and the run stopped. Last: {error}. "
                "All rows so far are kept: run the same command again to go on"
            )

    stop: list[DavylampError] = []  # the first reason to end; rows under way are finished, since they are paid for

    async def worker() -> None:
        for item in work:
            if stop:
                return
            try:
                await one(*item)
            except (BudgetError, RunError) as problem:
                stop.append(problem)

    with _ctrl_c(asyncio.current_task()) as interrupted:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(limits.width):
                    group.create_task(worker())
        except BaseExceptionGroup as problems:
            raise problems.exceptions[0] from None
        except asyncio.CancelledError:
            if interrupted:
                raise KeyboardInterrupt from None
            raise
    if stop:
        raise stop[0]
    if progress.done and failures == progress.done:
        raise RunError(
            f"the target failed every row ({failures}). Last: {last}. Is it up, and is its name right? Run the same command again to go on"
        )
    return progress


def _work(
    cases: Iterable[Case], key_of: Callable[[str, int], str], log: RowLog, seed: int, epochs: int, progress: Progress
) -> Iterator[tuple[Case, str, str, int]]:
    """What is left to do, taken as the workers ask for it. A case that stands twice is asked once."""
    taken: set[str] = set()
    for epoch in range(epochs):
        for case in cases:
            case_json = canonical(case.json())
            key = key_of(case_json, seed + epoch)
            if log.state.get(key) == "done" or key in taken:
                progress.kept += 1
                continue
            taken.add(key)
            yield case, case_json, key, seed + epoch


class _Asker:
    """The target as the runner calls it: with budget, time-out, retries, and one shared pause when the server says 429."""

    def __init__(self, target: Target, limits: Limits, progress: Progress, jitter: random.Random):
        self.target, self.limits, self.progress, self.jitter = target, limits, progress, jitter
        self.name, self.identity = target.name, target.identity
        self.quiet_until = 0.0

    async def __call__(self, messages: Any, *, seed: int = 0, **settings: Any) -> Message:
        limits, progress = self.limits, self.progress
        for attempt in range(1, limits.tries + 1):
            if self.quiet_until > time.monotonic():
                await asyncio.sleep(self.quiet_until - time.monotonic())
            if limits.max_calls is not None and progress.calls >= limits.max_calls:
                raise BudgetError(
                    f"the budget of {limits.max_calls} calls is spent. All rows so far are kept: raise --max-calls to go on"
                )
            if limits.max_tokens is not None and progress.tokens >= limits.max_tokens:
                raise BudgetError(
                    f"the budget of {limits.max_tokens} tokens is spent. All rows so far are kept: raise --max-tokens-total to go on"
                )
            progress.calls += 1
            try:
                async with asyncio.timeout(limits.timeout):
                    reply = await self.target(messages, seed=seed, **settings)
            except TimeoutError:
                problem = TargetError(f"{self.name} did not answer within {limits.timeout:g} s", retry=True)
            except TargetError as raised:
                problem = raised
            else:
                progress.tokens += sum(reply.tokens)
                return reply
            if not problem.retry or attempt == limits.tries:
                raise problem
            progress.retries += 1
            wait = limits.pause * 2 ** (attempt - 1) * self.jitter.uniform(0.5, 1.5)
            if problem.after is not None:  # the server named a time: everybody waits, so that a storm dies down
                wait = min(max(wait, problem.after), 60.0)
                self.quiet_until = max(self.quiet_until, time.monotonic() + wait)
            else:
                await asyncio.sleep(min(wait, 60.0))
        raise AssertionError("unreachable")


@contextlib.contextmanager
def _ctrl_c(task: asyncio.Task[Any] | None) -> Iterator[list[bool]]:
    """The first Ctrl-C or SIGTERM cancels the task, so that open rows end and the record is written. A second one is Python's own."""
    interrupted: list[bool] = []
    loop = asyncio.get_running_loop()

    def stop() -> None:
        interrupted.append(True)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if task is not None:
            task.cancel()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
    except (ValueError, NotImplementedError, RuntimeError):  # not in the main thread: the caller's handler stays
        yield interrupted
        return
    try:
        yield interrupted
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextlib.asynccontextmanager
async def progress_on_stderr(progress: Progress, label: str, *, quiet: bool = False) -> AsyncIterator[None]:
    """A line on stderr, renewed twice a second on a terminal, every ten seconds into a file."""
    terminal = sys.stderr.isatty()

    async def show() -> None:
        while True:
            await asyncio.sleep(0.5 if terminal else 10.0)
            print(
                f"\r\x1b[K{label}  {progress.line()}" if terminal else f"{label}  {progress.line()}",
                end="" if terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    task = None if quiet else asyncio.create_task(show())
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            if terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
