"""How a guard or a data engine asks a model or a server again; the runner repeats only calls of the target under test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from davylamp.core import TargetError

T = TypeVar("T")


async def patiently(
    call: Callable[[], Awaitable[T]], *, who: str, tries: int = 4, timeout: float = 120.0, pause: float = 0.5
) -> T:
    """The result of `call`, tried again after errors that may pass. Raises the last TargetError.

    tries: attempts in all.  timeout: seconds for each.  pause: seconds before the second attempt, doubled each time, unless the server
    names a time; never above 30.
    """
    for attempt in range(tries):
        try:
            async with asyncio.timeout(timeout):
                return await call()
        except TimeoutError:
            problem = TargetError(f"{who} did not answer within {timeout:g} s", retry=True)
        except TargetError as raised:
            problem = raised
        if not problem.retry or attempt == tries - 1:
            raise problem
        await asyncio.sleep(min(pause * 2**attempt if problem.after is None else problem.after, 30.0))
    raise AssertionError("unreachable")
