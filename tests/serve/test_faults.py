"""What may go wrong in front of, inside and behind the gateway, each with what must happen then."""

import asyncio
import json
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve import upstream as up
from tests.serve.running import Running, datas, text_of

WORD = '[[guard]]\nuse = "JUDGES:word"\n'
QUICK = "[upstream]\nconnect_seconds = 0.5\nreply_seconds = 0.5\nidle_seconds = 0.5\n"


@pytest.fixture
def behind():
    with up.Upstream() as server:
        yield server


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with up.Upstream() as server, Running(server.url, WORD, tmp_path_factory.mktemp("gateway")) as gateway:
        yield server, gateway


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def error(body):
    return json.loads(body)["error"]


# Behind


def test_upstream_down(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with Running(url, WORD, tmp_path) as gateway:
            status, _, body = gateway.chat()
            assert status == 502 and error(body)["code"] == "down"
            assert gateway.ask("GET", "/v1/models")[0] == 502
            assert gateway.chat("forbidden")[1]["X-Davylamp-Outcome"] == "blocked", "guards do not need it"
            assert gateway.counts("requests") == {("chat", "upstream_error"): 1, ("chat", "blocked"): 1}


def test_upstream_silent_before_and_within_its_reply(behind, tmp_path):
    async def silent(seen, writer):
        if seen.json.get("stream"):
            up.begin(writer)
            up.chunk(writer, b"".join(up.events("a" * 2000, 50)[:-2]))
            await writer.drain()
        await seen.gone.wait()

    behind.answer = silent
    with Running(behind.url, WORD + QUICK, tmp_path) as gateway:
        status, _, body = gateway.chat()
        assert status == 504 and error(body)["code"] == "slow"
        status, _, body = gateway.chat(stream=True)
        assert status == 200 and datas(body)[-1]["error"]["code"] == "slow" and b"[DONE]" not in body
        assert text_of(datas(body)[:-1]) == "a" * 2000, "what had come and was judged is not lost"
        until(lambda: all(seen.gone.is_set() for seen in behind.seen))


@pytest.mark.parametrize("after", [0, 1, 400, 2000])
def test_upstream_resets(behind, tmp_path, after):
    async def resets(seen, writer):
        if after:
            up.begin(writer)
            for data in up.events("a" * after, 40)[:-2]:
                up.chunk(writer, data)
                await writer.drain()
            await asyncio.sleep(0.05)
        writer.transport.abort()

    behind.answer = resets
    with Running(behind.url, WORD, tmp_path) as gateway:
        status, _, body = gateway.chat(stream=True)
        if after < 400:  # nothing was sent yet, so the client is told by the status
            assert status == 502 and error(body)["code"] == "reset"
        else:
            assert status == 200 and datas(body)[-1]["error"]["code"] == "reset" and b"[DONE]" not in body


def test_a_passage_at_the_break_is_judged_too(behind, tmp_path):
    async def resets(seen, writer):
        up.begin(writer)
        for data in up.events("a" * 800 + " forbidden", 100)[:-2]:
            up.chunk(writer, data)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.transport.abort()

    behind.answer = resets
    with Running(behind.url, WORD, tmp_path) as gateway:
        *chunks, last = datas(gateway.chat(stream=True)[2])
        assert last == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert "forbidden" not in text_of(chunks)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"NONSENSE\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n\xff\xfe{",
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{"choices": []}',
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{"choices": [1]}',
        b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\ndata: {\n\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}",
    ],
)
def test_upstream_talks_nonsense(behind, tmp_path, answer):
    async def nonsense(seen, writer):
        writer.write(answer)
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()

    behind.answer = nonsense
    with Running(behind.url, WORD, tmp_path) as gateway:
        status, _, body = gateway.chat()
        assert status == 502 and error(body)["type"] == "upstream_error"
        behind.answer = up.say("Fine.")
        assert gateway.chat()[0] == 200, "and the next request is not harmed"


def test_an_answer_nobody_asked_for_is_never_given_to_the_next_client(behind, tmp_path):
    """Response smuggling: two answers to one request on a kept-alive connection."""

    async def double(seen, writer):
        up.send(writer, up.whole("mine"))
        if len(behind.seen) == 1:
            up.send(writer, up.whole("smuggled"))

    behind.answer = double
    with Running(behind.url, WORD, tmp_path) as gateway:
        texts = [gateway.chat()[2] for _ in range(5)]
    assert not any(b"smuggled" in text for text in texts) and b"mine" in texts[-1]


def test_kept_alive_connections_that_the_server_closed_lose_nothing(behind, tmp_path):
    async def closes(seen, writer):
        up.send(writer, up.whole("Fine."))
        await writer.drain()
        writer.close()

    behind.answer = closes
    with Running(behind.url, WORD, tmp_path) as gateway:
        assert [gateway.chat()[0] for _ in range(20)] == [200] * 20


def test_connections_are_used_again(behind, tmp_path):
    with Running(behind.url, WORD, tmp_path) as gateway:
        for stream in (False, True) * 3:
            gateway.chat(stream=stream)
            until(lambda: gateway.gateway.pool._idle)
        assert len(gateway.gateway.pool.open) == 1


def test_limits_on_what_comes_back(behind, tmp_path):
    behind.answer = up.say("a" * 20_000, size=15_000)
    with Running(behind.url, WORD + "[limits]\nreply_bytes = 9000\nevent_bytes = 9000\n", tmp_path) as gateway:
        assert error(gateway.chat()[2])["code"] == "malformed"
        assert error(gateway.chat(stream=True)[2])["code"] == "malformed"


# Inside


@pytest.mark.parametrize("how", ["raises", "hangs", "nan", "forged", "none", "float", "cancels", "unsure", "recursion"])
@pytest.mark.parametrize("on", ["input", "output"])
def test_a_guard_that_fails_blocks_and_is_counted(behind, tmp_path, how, on):
    policy = f'[[guard]]\nuse = "JUDGES:broken:how={how}"\non = "{on}"\ntimeout = 0.05\n'
    with Running(behind.url, policy, tmp_path) as gateway:
        status, headers, body = gateway.chat("my secret")
        assert status == 503 and headers["X-Davylamp-Outcome"] == "unavailable"
        assert error(body)["type"] == "guard_unavailable" and b"secret" not in body and b"Fine" not in body
        assert gateway.chat(stream=True)[0] == 503
        kind = {"hangs": "timeout", "unsure": "unsure"}.get(
            how, "raised" if how in ("raises", "nan", "cancels", "recursion") else "no_verdict"
        )
        assert gateway.counts("failures") == {("broken", kind): 2}
        assert gateway.counts("requests") == {("chat", "unavailable"): 2}
        assert len(behind.seen) == (0 if on == "input" else 2)
        page = gateway.ask("GET", "/")[2]
        assert b"secret" not in page


def test_a_guard_that_fails_may_be_let_pass_but_is_counted(behind, tmp_path):
    policy = '[[guard]]\nuse = "JUDGES:broken"\non_failure = "allow"\n' + WORD
    with Running(behind.url, policy, tmp_path) as gateway:
        assert gateway.chat()[1]["X-Davylamp-Outcome"] == "allowed"
        assert gateway.chat("forbidden")[1]["X-Davylamp-Outcome"] == "blocked", "the other guard still counts"
        assert gateway.counts("verdicts")[("broken", "input", "unavailable", "")] == 2


def test_a_guard_that_fails_within_a_stream_ends_it(behind, tmp_path):
    behind.answer = up.say("a" * 900 + "x" * 900, size=60, pause=0.002)
    policy = (
        '[[guard]]\nuse = "JUDGES:word"\non = "output"\n[[guard]]\nuse = "JUDGES:broken_at:word=xx"\non = "output"\n'
    )
    with Running(behind.url, policy, tmp_path) as gateway:
        status, _, body = gateway.chat(stream=True)
        *chunks, last = datas(body)
        assert status == 200 and last["error"]["type"] == "guard_unavailable" and set(text_of(chunks)) == {"a"}
        assert gateway.counts("requests") == {("chat", "unavailable"): 1}


def test_a_guard_in_a_thread_that_blocks_holds_nobody_up(behind, tmp_path):
    policy = '[[guard]]\nuse = "JUDGES:broken:how=blocks"\non = "input"\nthread = true\ntimeout = 0.1\n'
    with Running(behind.url, policy, tmp_path) as gateway:
        assert gateway.chat()[0] == 503
        assert gateway.ask("GET", "/healthz")[0] == 200


# In front


def test_a_client_that_leaves_cancels_the_upstream(behind, tmp_path):
    async def endless(seen, writer):
        up.begin(writer)
        while not seen.gone.is_set():
            up.chunk(writer, up.event({"content": "word after word "}))
            await writer.drain()
            await asyncio.sleep(0.005)

    behind.answer = endless
    log = tmp_path / "audit.jsonl"
    with Running(behind.url, WORD + f'[audit]\npath = "{log}"\n', tmp_path) as gateway:
        for first in (b"word", b"HTTP"):  # once in the middle of the stream, once at its head
            body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
            with socket.create_connection(("127.0.0.1", gateway.port)) as client:
                client.sendall(post(body))
                got = b""
                while first not in got:
                    got += client.recv(4096)
        until(lambda: len(behind.seen) == 2 and all(seen.gone.is_set() for seen in behind.seen))
        assert gateway.counts("requests") == {("chat", "disconnected"): 2}
        assert gateway.gateway.guards.users == 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["outcome"] for row in rows].count("disconnected") == 2


def test_a_client_that_leaves_before_the_reply_cancels_the_upstream(behind, tmp_path):
    async def waits(seen, writer):
        await seen.gone.wait()

    behind.answer = waits
    with Running(behind.url, WORD, tmp_path) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            client.sendall(post(b'{"messages": [{"role": "user", "content": "Hi"}]}'))
            until(lambda: behind.seen)
        until(lambda: behind.seen[0].gone.is_set())
        assert gateway.counts("requests") == {("chat", "disconnected"): 1}


def post(body, more=b"", path=b"/v1/chat/completions"):
    head = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
    return head % (path, more, len(body)) + body


def raw(port, data, seconds=5):
    """What comes back for raw bytes, until the connection closes or nothing comes."""
    out = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        client.sendall(data)
        client.settimeout(0.5)
        try:
            while more := client.recv(65536):
                out += more
        except (TimeoutError, ConnectionError):
            pass
    return out


FINE = b'{"messages": [{"role": "user", "content": "Hi"}]}'


@pytest.mark.parametrize(
    "data",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Content-Length: 49\r\nContent-Length: 5\r\n\r\n" + FINE,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n31\r\n" + FINE + b"\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Content-Length : 49\r\n\r\n" + FINE,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: xchunked\r\n\r\n31\r\n" + FINE + b"\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n folded: x\r\nContent-Length: 49\r\n\r\n" + FINE,
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 49\r\n\r\n" + FINE,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    ],
    ids=["two lengths", "length and chunked", "space before colon", "odd coding", "folded", "no host", "long header"],
)
def test_requests_that_two_readers_read_differently_are_refused(pair, data):
    behind, gateway = pair
    before = len(behind.seen)
    assert raw(gateway.port, data).startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert len(behind.seen) == before


def test_headers_that_end_here(pair):
    behind, gateway = pair
    more = (
        b"Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\nProxy-Authorization: x\r\nUpgrade: h2c\r\n"
        b"Cookie: a=b\r\nX-Forwarded-For: 1.2.3.4\r\nContent_Length: 3\r\nX-Mine: kept\r\nAccept-Encoding: gzip\r\nHost: evil\r\n"
    )
    assert b" 400 " in raw(gateway.port, post(FINE, more)).splitlines()[0], "two hosts"
    answer = raw(gateway.port, post(FINE, more.replace(b"Host: evil\r\n", b"")))
    assert answer.startswith(b"HTTP/1.1 200")
    names = [name.lower() for name, _ in behind.seen[-1].headers]
    assert sorted(names) == ["accept-encoding", "content-length", "content-type", "host", "x-mine"]
    assert behind.seen[-1].header("Host") == [f"127.0.0.1:{behind.port}"]
    assert behind.seen[-1].header("Accept-Encoding") == ["identity"]


def test_pipelined_requests_get_their_own_answers_in_order(behind, tmp_path):
    async def echo(seen, writer):
        await asyncio.sleep(0.02 if b"first" in seen.body else 0)
        up.send(writer, up.whole(seen.json["messages"][0]["content"]))

    behind.answer = echo
    bodies = [
        b'{"messages": [{"role": "user", "content": "%b"}]}' % word for word in (b"first", b"forbidden", b"third")
    ]
    with Running(behind.url, WORD, tmp_path) as gateway:
        answer = raw(gateway.port, b"".join(map(post, bodies)))
    places = [answer.find(word) for word in (b'"first"', b"content_filter", b'"third"')]
    assert answer.count(b"HTTP/1.1 200 OK") == 3 and -1 < places[0] < places[1] < places[2]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf" + FINE,
        FINE[:-1] + b', "x": NaN}',
        FINE[:-1] + b', "messages": []}',
        b'{"messages": [{"role": "user", "content": "Hi", "content": "forbidden"}]}',
        FINE[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        FINE[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        b'{"messages": {"role": "user"}}',
        b'{"messages": [[]]}',
        b'{"messages": [{"content": "x"}]}',
        b'{"messages": [{"role": 3, "content": "x"}]}',
    ],
    ids=lambda body: repr(body[:50]),
)
def test_bodies_that_are_refused(pair, body):
    behind, gateway = pair
    before = len(behind.seen)
    status, _, answer = gateway.ask("POST", "/v1/chat/completions", body)
    assert status == 400 and error(answer)["type"] == "invalid_request_error"
    assert len(behind.seen) == before


def test_a_prompt_of_a_megabyte(pair):
    behind, gateway = pair
    text = "bread and salt " * 70_000
    status, _, _ = gateway.chat(text)
    assert status == 200 and behind.seen[-1].json["messages"][0]["content"] == text
    assert gateway.chat(text + "forbidden")[1]["X-Davylamp-Outcome"] == "blocked"
    many = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2000 + [
        {"role": "user", "content": "z"}
    ]
    assert gateway.chat(messages=many)[0] == 200


def test_a_body_that_stops_coming(behind, tmp_path):
    with Running(behind.url, WORD + "[limits]\nbody_seconds = 0.2\n", tmp_path) as gateway:
        assert raw(gateway.port, post(FINE)[:-5]).startswith(b"HTTP/1.1 408")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.just("forbidden"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "tool", "system", "developer", "x"]) | JSON,
    "content": JSON, "tool_calls": JSON, "name": JSON, "reasoning_content": JSON, "extra": JSON,
})  # fmt: skip
BODY = st.fixed_dictionaries({}, optional={
    "model": JSON, "messages": st.lists(MESSAGE, max_size=3) | JSON, "stream": JSON, "n": JSON, "seed": JSON,
    "prompt": JSON, "input": JSON, "id": JSON, "label": JSON, "suffix": JSON, "tools": JSON,
})  # fmt: skip
PATHS = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/moderations", "/v1/feedback"])


@given(path=PATHS, body=BODY)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzz_no_body_breaks_the_gateway_or_passes_a_guard_unseen(pair, path, body):
    behind, gateway = pair
    before = len(behind.seen)
    status, _, answer = gateway.ask("POST", path, body)
    assert status in (200, 400, 404) and len(answer) > 0, (status, answer)
    if status == 400:
        assert set(error(answer)) == {"message", "type", "param", "code"}
    if len(behind.seen) > before and path == "/v1/chat/completions":
        last = body["messages"][-1]
        assert last.get("role") in ("system", "developer") or "forbidden" not in json.dumps(last.get("content"))
    assert gateway.counts("requests").get(("chat", "error"), 0) == 0


@given(
    data=st.binary(max_size=60),
    head=st.sampled_from([b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n", b"GET / HTTP/1.1\r\n"]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzz_no_bytes_break_the_gateway(pair, data, head):
    gateway = pair[1]
    with socket.create_connection(("127.0.0.1", gateway.port)) as client:
        client.sendall(head + data)
    assert gateway.ask("GET", "/healthz")[0] == 200
