"""Calls are batched, one batch at a time, and every caller gets its own result or error."""

import asyncio
import threading
import time

import pytest

from davylamp.models.batching import MicroBatcher


def run(function, items, **options):
    async def go():
        batcher = MicroBatcher(function, **options)
        try:
            return await asyncio.gather(*(batcher.submit(item) for item in items), return_exceptions=True)
        finally:
            await batcher.close()

    return asyncio.run(go())


def test_waiting_items_go_together_up_to_the_width():
    sizes = []

    def double(items):
        sizes.append(len(items))
        return [2 * item for item in items]

    assert run(double, range(100), width=32) == [2 * i for i in range(100)]
    assert sizes == [32, 32, 32, 4]


def test_only_equal_keys_go_together_and_near_sizes_first():
    batches = []

    def keep(items):
        batches.append(list(items))
        return items

    items = ["a", "bbbb", "aa", "b", "aaaa"]
    assert run(keep, items, key=lambda item: item[0], size=len, width=2) == items
    assert batches == [["a", "aa"], ["bbbb", "b"], ["aaaa"]]


def test_batches_never_overlap():
    inside, most = [0], [0]
    lock = threading.Lock()

    def slow(items):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        with lock:
            inside[0] -= 1
        return items

    run(slow, range(20), width=4)
    assert most == [1]


def test_an_error_reaches_the_callers_of_its_batch_and_no_other():
    def picky(items):
        if "bad" in items:
            raise ValueError("no")
        return items

    found = run(picky, ["good", "bad", "fine"], width=1)
    assert found[0] == "good" and isinstance(found[1], ValueError) and found[2] == "fine"


def test_a_result_that_is_an_error_is_raised_to_its_own_caller():
    found = run(lambda items: [ValueError("row") if item == 1 else item for item in items], range(3))
    assert found[0] == 0 and isinstance(found[1], ValueError) and found[2] == 2


def test_a_caller_that_gives_up_does_not_hurt_the_others():
    async def go():
        batcher = MicroBatcher(lambda items: items, wait=0.02)
        first, second = (asyncio.create_task(batcher.submit(i)) for i in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == 1
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await batcher.submit(5) == 5
        await batcher.close()

    asyncio.run(go())


def test_a_wrong_number_of_results_is_an_error_and_nobody_waits_for_ever():
    assert all(isinstance(found, RuntimeError) for found in run(lambda items: [], range(3)))
