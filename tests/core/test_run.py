"""The runner against a real local server that misbehaves."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web

from davylamp.core.errors import BudgetError, InputError, RunError, TargetError
from davylamp.core.nouns import Case, Message, Verdict
from davylamp.core.rows import RowLog, read_run
from davylamp.core.run import Limits, Progress, collect, row_keys
from davylamp.models.openai import OpenAITarget
from tests.server import say

QUICK = Limits(width=8, tries=4, timeout=5, pause=0.01)


class Yes:
    name, measures, identity = "yes", "complied", {"name": "yes", "version": 1}

    async def __call__(self, messages, case=None):
        return Verdict(1.0 if messages[-1].text else None)


def cases(n):
    return [Case(str(i), (Message("user", f"question {i}"),), category=f"demo/{i % 2}") for i in range(n)]


def run(path, server, items, limits=QUICK, judge=None, **more):
    async def go():
        target = OpenAITarget("mock", base_url=server.url)
        log = RowLog(path)
        try:
            return await collect(items, target, judge or Yes(), log, limits=limits, **more)
        finally:
            log.close()
            await target.close()

    return asyncio.run(go())


def values(path):
    return {row["case"]["id"]: row["verdict"] and row["verdict"]["value"] for row in read_run(path)}


def test_every_case_once_and_nothing_twice(tmp_path, server):
    path = tmp_path / "rows.jsonl"
    progress = run(path, server, cases(50))
    assert (progress.done, progress.calls, len(server.asked)) == (50, 50, 50)
    again = run(path, server, cases(60))
    assert (again.kept, again.done, len(server.asked)) == (50, 10, 60)
    assert len(values(path)) == 60 and set(server.counts.values()) == {1}


def test_settings_seed_and_epochs_make_other_rows(tmp_path, server):
    path = tmp_path / "rows.jsonl"
    run(path, server, cases(3), epochs=2, seed=5)
    assert sorted(body["seed"] for body in server.asked) == [5, 5, 5, 6, 6, 6]
    run(path, server, cases(3), settings={"temperature": 1.0})
    assert len(server.asked) == 9 and server.asked[-1]["temperature"] == 1.0


def test_429_storm_is_waited_out(tmp_path, server):
    def answer(body, number):
        return (
            web.Response(status=429, headers={"Retry-After": "0.05"}, text="slow down") if number <= 12 else say("ok")
        )

    server.answer = answer
    progress = run(tmp_path / "r", server, cases(20), limits=Limits(width=4, tries=6, pause=0.01))
    assert progress.retries == 12 and progress.failed == 0 and len(values(tmp_path / "r")) == 20


@pytest.mark.parametrize(
    "broken",
    [
        lambda: web.Response(status=500, text="oops"),
        lambda: web.Response(status=200, text="<html>gateway</html>", content_type="text/html"),
        lambda: web.Response(status=200, text="", content_type="application/json"),
        lambda: web.Response(status=200, body=b"\xff\xfe{", content_type="application/json"),
        lambda: web.json_response([1, 2]),
    ],
    ids=["500", "html", "empty", "bytes", "list"],
)
def test_garbage_is_tried_again(tmp_path, server, broken):
    def answer(body, number):
        return say("ok") if server.counts[json.dumps(body["messages"])] > 1 else broken()

    server.answer = answer
    progress = run(tmp_path / "r", server, cases(5))
    assert progress.retries == 5 and values(tmp_path / "r") == {str(i): 1.0 for i in range(5)}


@pytest.mark.parametrize(
    "broken",
    [
        lambda: web.json_response({"error": "no"}),
        lambda: web.json_response({"choices": []}),
        lambda: web.json_response({"choices": [{"message": None}]}),
        lambda: web.json_response({"choices": [{"message": {"content": 5}}]}),
        lambda: web.Response(status=400, text="bad request"),
        lambda: web.Response(status=401, text="who are you"),
    ],
    ids=["error", "no choices", "null", "number", "400", "401"],
)
def test_what_asking_again_cannot_mend_is_a_failed_row(tmp_path, server, broken):
    server.answer = lambda body, number: broken() if body["messages"][0]["content"] == "question 1" else say("ok")
    progress = run(tmp_path / "r", server, cases(3))
    assert progress.failed == 1 and progress.retries == 0
    rows = {row["case"]["id"]: row for row in read_run(tmp_path / "r")}
    assert rows["1"]["reply"] is None and rows["1"]["verdict"] is None and "openai/mock answered" in rows["1"]["error"]
    server.answer = lambda body, number: say("ok")
    assert run(tmp_path / "r", server, cases(3)).done == 1  # only the failed one is asked again
    assert values(tmp_path / "r") == {"0": 1.0, "1": 1.0, "2": 1.0}


def test_an_empty_reply_is_a_reply(tmp_path, server):
    server.answer = lambda body, number: say("")
    run(tmp_path / "r", server, cases(1))
    assert values(tmp_path / "r") == {"0": None}


def test_a_slow_target_times_out(tmp_path, server):
    async def slow():
        await asyncio.sleep(5)
        return say("late")

    server.answer = lambda body, number: slow()
    with pytest.raises(RunError, match="failed every row"):
        run(tmp_path / "r", server, cases(1), limits=Limits(tries=2, timeout=0.1, pause=0.01))
    assert len(server.asked) == 2 and "did not answer within 0.1 s" in next(read_run(tmp_path / "r"))["error"]


def test_a_target_that_is_down_stops_the_run_early(tmp_path):
    class Down:
        url = "http://127.0.0.1:1/v1"

    with pytest.raises(RunError, match="cannot be reached"):
        run(tmp_path / "r", Down, cases(500), limits=Limits(width=4, tries=2, pause=0.0, give_up=6))
    assert len(values(tmp_path / "r")) < 20


def test_a_target_that_dies_half_way_is_gone_on_with(tmp_path, server):
    server.answer = lambda body, number: say("ok") if number <= 10 else web.Response(status=503, text="gone")
    with pytest.raises(RunError, match="rows in a row"):
        run(tmp_path / "r", server, cases(40), limits=Limits(width=2, tries=1, give_up=5))
    before = sum(value == 1.0 for value in values(tmp_path / "r").values())
    assert before == 10
    server.answer = lambda body, number: say("ok")
    run(tmp_path / "r", server, cases(40))
    assert values(tmp_path / "r") == {str(i): 1.0 for i in range(40)}
    assert sum(count for count in server.counts.values()) <= 40 + 10


def test_a_connection_cut_in_the_middle_is_tried_again(tmp_path):
    whole = json.dumps({"choices": [{"message": {"content": "ok"}}]}).encode()
    seen = []

    async def talk(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        seen.append(1)
        body = whole if len(seen) > 1 else whole[:9]
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(whole), body)
        )
        await writer.drain()
        writer.close()

    async def go():
        async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
            target = OpenAITarget("mock", base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
            log = RowLog(tmp_path / "r")
            try:
                return await collect(cases(1), target, Yes(), log, limits=QUICK)
            finally:
                log.close()
                await target.close()

    progress = asyncio.run(go())
    assert (progress.retries, progress.failed) == (1, 0) and values(tmp_path / "r") == {"0": 1.0}


def test_budgets_stop_the_run_and_keep_the_rows(tmp_path, server):
    with pytest.raises(BudgetError, match="budget of 7 calls"):
        run(tmp_path / "r", server, cases(50), limits=Limits(width=3, max_calls=7))
    assert len(server.asked) == 7 and len(values(tmp_path / "r")) == 7
    with pytest.raises(BudgetError, match="tokens"):
        run(tmp_path / "r", server, cases(50), limits=Limits(width=1, max_tokens=20))  # five tokens a reply
    assert len(values(tmp_path / "r")) == 7 + 4


def test_a_judge_that_fails_keeps_the_reply(tmp_path, server):
    class Down(Yes):
        async def __call__(self, messages, case=None):
            raise TargetError("judge model is down")

    progress = run(tmp_path / "r", server, cases(4), judge=Down())
    assert progress.failed == 4 and len(server.asked) == 4
    run(tmp_path / "r", server, cases(4))
    assert len(server.asked) == 4 and values(tmp_path / "r") == {str(i): 1.0 for i in range(4)}


def test_a_bug_in_a_judge_is_not_swallowed(tmp_path, server):
    class Bug(Yes):
        async def __call__(self, messages, case=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "r", server, cases(4), judge=Bug())


def test_keys_depend_on_all_that_matters():
    class Target:
        name, identity = "t", {"name": "t"}

    class Other:
        name, identity = "t", {"name": "t", "base_url": "x"}

    base = row_keys(Target(), {"a": 1})("{}", 0)
    assert base == row_keys(Target(), {"a": 1})("{}", 0)
    assert (
        len(
            {
                base,
                row_keys(Other(), {"a": 1})("{}", 0),
                row_keys(Target(), {"a": 2})("{}", 0),
                row_keys(Target(), {"a": 1})("{}", 1),
                row_keys(Target(), {"a": 1})("{ }", 0),
            }
        )
        == 5
    )


@pytest.mark.parametrize("bad", [{"width": 0}, {"tries": 0}, {"timeout": 0}, {"pause": -1}, {"give_up": 0}])
def test_limits_are_checked(bad):
    with pytest.raises(InputError):
        Limits(**bad)


def test_progress_line():
    progress = Progress(total=100, started=time.monotonic() - 10)
    progress.done, progress.kept, progress.retries = 20, 30, 2
    assert progress.line() == "50/100 rows  2.0/s  ETA 0:25  30 kept  2 retries"


def start(tmp_path, server, rows, *more):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "davylamp",
            "eval",
            str(rows),
            "--target",
            server.target,
            "--judge",
            "includes",
            "--width",
            "2",
            "--runs",
            str(tmp_path / "runs"),
            "--quiet",
            "--json",
            "--no-report",
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def ids(tmp_path):
    return [json.loads(path.read_text())["id"] for path in tmp_path.glob("runs/*/record.json")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_and_started_again_ends_the_same(tmp_path, server, number):
    async def answer(body):
        await asyncio.sleep(0.02)
        return say("yes it is")

    server.answer = lambda body, number: answer(body)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"id": str(i), "messages": [{"role": "user", "content": str(i)}], "answer": "yes"}) + "\n"
            for i in range(60)
        )
    )
    process = start(tmp_path, server, rows)
    while len(server.asked) < 10:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.wait(10)
    assert process.returncode == (3 if number != signal.SIGKILL else -9)
    if number != signal.SIGKILL:
        assert "All rows so far are kept" in process.stderr.read()
        assert json.loads(next(tmp_path.glob("runs/*/record.json")).read_text())["status"] == "interrupted"
    process.stdout.close(), process.stderr.close()
    first = ids(tmp_path)
    done = start(tmp_path, server, rows)
    out, err = done.communicate(timeout=30)
    assert done.returncode == 0, err
    record = json.loads(out)
    assert first == ids(tmp_path) == [record["id"]]
    assert record["status"] == "finished" and record["counts"]["scored"] == 60 and record["estimates"][0]["n"] == 60
    assert max(Counter(body["messages"][0]["content"] for body in server.asked).values()) <= 2
    assert len(server.asked) <= 60 + 4  # at most the calls in flight were asked twice
    fresh = start(tmp_path / "other", server, rows)
    assert json.loads(fresh.communicate(timeout=30)[0])["id"] == record["id"]


def test_two_runs_into_the_same_folder(tmp_path, server):
    released = threading.Event()

    async def slow():
        while not released.is_set():
            await asyncio.sleep(0.01)
        return say("yes")

    server.answer = lambda body, number: slow()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "1", "messages": [{"role": "user", "content": "x"}], "answer": "yes"}\n')
    one = start(tmp_path, server, rows)
    while not server.asked:
        time.sleep(0.01)
    two = start(tmp_path, server, rows)
    _, said = two.communicate(timeout=30)
    released.set()
    assert two.returncode == 3 and "another run is writing" in said
    assert one.wait(30) == 0
    one.stdout.close(), one.stderr.close()
