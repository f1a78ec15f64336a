"""Calls that come one by one, answered in batches by one worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class MicroBatcher:
    """Collects what is waiting and hands it to `function(items) -> results` in one thread, at most `width` items at a time.

    key: only items of equal key go together.  size: items of near size go together (less padding).  wait: seconds to wait for more
    once something has come.  An exception of a batch reaches every caller in it; a caller that gave up is left out.
    """

    def __init__(
        self,
        function: Callable[[list[Any]], Sequence[Any]],
        *,
        width: int = 64,
        wait: float = 0.005,
        key: Callable[[Any], Hashable] = lambda item: None,
        size: Callable[[Any], int] = lambda item: 0,
    ):
        self.function, self.width, self.wait, self.key, self.size = function, width, wait, key, size
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="davylamp-batch")

    async def submit(self, item: Any) -> Any:
        """The result for this item."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def _take(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        """The next batch: equal in key to the one that has waited longest, near it in size."""
        self._waiting = [pair for pair in self._waiting if not pair[1].done()]
        if not self._waiting:
            return []
        first = self._waiting[0][0]
        fitting = [pair for pair in self._waiting if self.key(pair[0]) == self.key(first)]
        fitting.sort(key=lambda pair: abs(self.size(pair[0]) - self.size(first)))
        batch = fitting[: self.width]
        taken = {id(pair) for pair in batch}
        self._waiting = [pair for pair in self._waiting if id(pair) not in taken]
        return batch

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            before = -1
            while before != len(self._waiting) < self.width:  # until a pause brought nothing new
                before = len(self._waiting)
                await asyncio.sleep(self.wait)
            batch = self._take()
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(self._thread, self.function, [item for item, _ in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"a batch of {len(batch)} gave {len(results)} results")
            except asyncio.CancelledError:
                for _, future in batch:
                    future.cancel()
                raise
            except BaseException as problem:  # whatever it is, no caller may wait for ever
                for _, future in batch:
                    if not future.done():
                        future.set_exception(problem)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)

    async def close(self) -> None:
        """Stop; callers that still wait are cancelled. Returns when the thread has finished its batch."""
        for _, future in self._waiting:
            future.cancel()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
