"""The guards of a running gateway: loaded once, asked under a time limit, and never trusted to answer well.

What a guard's answer means is decided in `core/policy.py`; here it is only fetched. A guard that raises, hangs, or returns something that
is no verdict gives none, and says why.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from davylamp.core.errors import DavylampError, InputError
from davylamp.core.judges import LoadedJudge, load_judge
from davylamp.core.nouns import Case, Message, Verdict
from davylamp.core.policy import GuardRule, Ruling, rule
from davylamp.serve import config


class Judged(NamedTuple):
    """One verdict of one guard. id: what feedback names it by.  side: input | output.

    failure: timeout | raised | no_verdict | unsure, or empty.  why: the failure in words.
    """

    id: str
    guard: str
    side: str
    verdict: Verdict | None
    ruling: Ruling
    seconds: float
    failure: str
    why: str

    def json(self, texts: bool) -> dict[str, Any]:
        """Plain form. texts: with the reason, which may cite what was judged."""
        verdict = self.verdict
        out: dict[str, Any] = {"id": self.id, "guard": self.guard, "side": self.side, "outcome": self.ruling.outcome}
        out["action"] = self.ruling.action
        if self.ruling.level is not None:
            out["level"] = self.ruling.level
        if verdict is not None:
            out["value"] = verdict.value
            if verdict.label:
                out["label"] = verdict.label[:80]
            if verdict.categories:
                out["categories"] = list(verdict.categories)
        if self.why or (texts and verdict is not None and verdict.why):
            out["why"] = self.why or (verdict.why if verdict is not None else "")
        out["seconds"] = round(self.seconds, 6)
        return out


class Guard:
    """One loaded guard with its rule."""

    def __init__(self, settings: config.Guard, judge: LoadedJudge):
        self.settings, self.judge, self.name = settings, judge, settings.name
        self.rule: GuardRule = settings.rule(judge.measures)
        self.timeout = settings.timeout
        self.feedback: Callable[[str, int], Any] | None = getattr(judge.function, "feedback", None)
        self._side = _Thread(f"davylamp-{self.name}") if settings.thread else None

    async def judge_one(self, messages: tuple[Message, ...], id: str, side: str) -> Judged:
        """The guard's verdict on the last message, and what it means. Never raises but for cancellation."""
        start = time.perf_counter()
        verdict, failure, why = None, "", ""
        # The id travels as a case's, and only to guards that can take feedback on it: others need no case.
        case = Case(id, messages) if self.feedback is not None else None
        try:
            work = self.judge.function(messages, case)
            verdict = await within(self.timeout, work if self._side is None else self._side.run(work))
        except TimeoutError:
            failure, why = "timeout", f"gave no verdict within {self.timeout:g} s"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            failure, why = "raised", "raised CancelledError"
        except Exception as error:
            # Errors of our own are written for people; any other may hold anything, so that only its kind is kept.
            failure, why = "raised", f"raised {type(error).__name__}"
            if isinstance(error, DavylampError):
                why += f": {str(error)[:200]}"
        if failure:
            verdict = None
        elif not isinstance(verdict, Verdict):
            failure, why, verdict = "no_verdict", f"returned {type(verdict).__name__}, no verdict", None
        elif verdict.value is None:
            failure, why = "unsure", "could not tell"
        elif not (isinstance(verdict.value, float | int) and 0.0 <= verdict.value <= 1.0):
            failure, why, verdict = "no_verdict", "returned a value outside [0, 1]", None
        ruling = rule(self.rule, verdict)
        return Judged(id, self.name, side, verdict, ruling, time.perf_counter() - start, failure, why)

    async def give_feedback(self, id: str, label: int) -> None:
        """Pass a label on to the guard. Raises what the guard raises."""
        assert self.feedback is not None
        work = self.feedback(id, label)
        await (work if self._side is None else self._side.run(work))

    def danger(self, verdict: Verdict | None) -> float:
        """How unsafe, in [0, 1]; 0 without a value."""
        if verdict is None or verdict.value is None:
            return 0.0
        return verdict.value if self.rule.flag == "high" else 1.0 - verdict.value

    def weights(self) -> dict[str, float]:
        """The weights of a guard that mixes experts; empty for others."""
        try:
            given = getattr(self.judge.function, "weights", None)
            given = given() if callable(given) else given
            return {str(name): float(value) for name, value in given.items()} if isinstance(given, Mapping) else {}
        except Exception:  # a page must not fail because a guard's property does
            return {}

    async def close(self) -> None:
        try:
            if self._side is None:
                await self.judge.close()
            else:
                async with asyncio.timeout(5):
                    await self._side.run(self.judge.close())
        except Exception:  # it is on its way out, and others are to be closed after it
            pass
        finally:
            if self._side is not None:
                self._side.stop()


async def within(seconds: float, work: Any) -> Any:
    """The result of a coroutine, which is cancelled after so many seconds: TimeoutError.

    One that never waits for anything is over after its first step, and no clock is set for it.
    """
    try:
        waits_for = work.send(None)
    except StopIteration as stop:
        return stop.value
    async with asyncio.timeout(seconds):
        return await _Rest(work, waits_for)


class _Rest:
    """What is left of a coroutine that has taken its first step."""

    __slots__ = ("waits_for", "work")

    def __init__(self, work: Any, waits_for: Any):
        self.work, self.waits_for = work, waits_for

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            while True:
                try:
                    got = yield self.waits_for
                except BaseException as error:
                    self.waits_for = self.work.throw(error)
                else:
                    self.waits_for = self.work.send(got)
        except StopIteration as stop:
            return stop.value


class _Thread:
    """An event loop in a thread of its own, so that a guard that computes does not hold up the others."""

    def __init__(self, name: str):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._live, name=name, daemon=True).start()

    def _live(self) -> None:
        try:
            self.loop.run_forever()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
                self.loop.run_until_complete(asyncio.wait([task]))
        finally:
            self.loop.close()

    async def run(self, work: Any) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


class Guards:
    """The guards of one policy. users: requests that hold on to it; a retired policy closes its guards when the last one lets go."""

    def __init__(self, policy: config.Policy, guards: Sequence[Guard]):
        self.policy, self.all = policy, tuple(guards)
        self.input = tuple(guard for guard in guards if guard.settings.on in ("input", "both"))
        self.output = tuple(guard for guard in guards if guard.settings.on in ("output", "both"))
        self.by_name = {guard.name: guard for guard in guards}
        self.learning = frozenset(guard.name for guard in guards if guard.feedback is not None)
        self.users = 0

    async def close(self, kept: Sequence[Guard] = ()) -> None:
        """Close the guards, but for those whose judge lives on in `kept`."""
        alive = {id(guard.judge) for guard in kept}
        for guard in self.all:
            if id(guard.judge) not in alive:
                await guard.close()


async def ask(jobs: Sequence[Coroutine[Any, Any, Judged]]) -> list[Judged]:
    """The verdicts of several guards or messages, asked at once; a single one costs no task."""
    return [await jobs[0]] if len(jobs) == 1 else list(await asyncio.gather(*jobs))


def load_guards(policy: config.Policy, before: Guards | None = None) -> Guards:
    """Load every guard of a policy. Raises the first problem: a gateway with a guard missing does not start.

    before: guards that run already; one whose spec and thread are unchanged is taken over with all it has learnt.
    """
    ready = {(guard.settings.use, guard.settings.thread): guard for guard in before.all} if before is not None else {}
    out = []
    for settings in policy.guard:
        key = (settings.use, settings.thread)
        old = ready.pop(key, None)
        if old is not None:
            guard = Guard.__new__(Guard)
            guard.__dict__.update(old.__dict__)
            guard.settings, guard.name, guard.timeout = settings, settings.name, settings.timeout
            guard.rule = settings.rule(old.judge.measures)
        else:
            judge = _load(settings.use)
            settings.rule(judge.measures)
            if not inspect.iscoroutinefunction(getattr(judge.function, "feedback", None) or _no_feedback):
                raise InputError(f"guard {settings.use}: `feedback` must be an async function (id, label)")
            guard = Guard(settings, judge)
        out.append(guard)
    return Guards(policy, out)


def _load(spec: str) -> LoadedJudge:
    for attempt in range(3):
        try:
            return load_judge(spec)
        except DavylampError:
            raise
        except Exception as error:
            # Python 3.11 fails to parse source (SystemError) when a finaliser formats a traceback meanwhile: gh-106905.
            if not isinstance(error, SystemError) or attempt == 2:
                what = f"{type(error).__name__}: {str(error)[:200]}"
                raise InputError(f"guard {spec} does not load: {what}") from error
    raise AssertionError("unreachable")


async def _no_feedback(id: str, label: int) -> None: ...
