"""What the gateway promises, before a local upstream: bytes pass unchanged, guards decide, everything is counted."""

import hashlib
import hmac
import json
import math
import sys
import threading
import time

import pytest

from davylamp.core.errors import DavylampError, InputError, UnknownNameError
from davylamp.serve.config import read_policy
from tests.serve import upstream as up
from tests.serve.running import Running, datas, text_of, use

WORD = '[[guard]]\nuse = "JUDGES:word"\n'
LEVELS = """[[guard]]
use = "JUDGES:severity"
on = "output"
levels = [{name = "minor", at = 0.3, action = "warn"}, {name = "moderate", at = 0.6, action = "regenerate"},
          {name = "severe", at = 0.9, action = "block"}]
"""


@pytest.fixture
def behind():
    with up.Upstream() as server:
        yield server


def running(behind, tmp_path, policy=WORD):
    return Running(behind.url, policy, tmp_path)


def test_bodies_and_replies_pass_byte_for_byte(behind, tmp_path):
    """Odd spacing, unknown fields, big numbers, escapes and tools reach the upstream, and its reply the client, as they were."""
    sent = (
        b'{ "model":"mock",  "messages":[{"role":"user","content":"caf\\u00e9 \xf0\x9f\x99\x82", "cache_control":{"a":1}}],'
        b'"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}], "new_field":12345678901234567890,'
        b'"temperature":1.0E+0 }'
    )
    back = b'{"id":"1", "choices": [ {"index":0,"message":{"content":"ok","new":[1.50]},"finish_reason":"stop"} ],"x":1e2}\n'

    async def answer(seen, writer):
        up.send(writer, back, more="X-Request-Id: r1\r\nSet-Cookie: a=b\r\nKeep-Alive: timeout=5\r\n")

    behind.answer = answer
    with running(behind, tmp_path) as gateway:
        status, headers, body = gateway.ask("POST", "/v1/chat/completions?api-version=1", sent)
    assert (status, body) == (200, back)
    assert behind.seen[0].body == sent and behind.seen[0].path == "/v1/chat/completions?api-version=1"
    assert headers["X-Request-Id"] == "r1" and headers["X-Davylamp-Outcome"] == "allowed"
    assert headers["Set-Cookie"] is None and headers["Keep-Alive"] is None


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_streams_pass_byte_for_byte(behind, tmp_path, size):
    text = "The bread is baked in the morning. " * 40
    behind.answer = up.say(text, size=size)
    with running(behind, tmp_path) as gateway:
        status, headers, body = gateway.chat("Bread?", stream=True)
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    assert body == b"".join(up.events(text, size))


def test_input_is_blocked_before_the_upstream_is_asked(behind, tmp_path):
    with running(behind, tmp_path) as gateway:
        status, headers, body = gateway.chat("this is forbidden")
        reply = json.loads(body)
        assert status == 200 and headers["X-Davylamp-Outcome"] == "blocked"
        assert reply["choices"][0]["finish_reason"] == "content_filter" and reply["model"] == "mock"
        _, _, streamed = gateway.chat("this is forbidden", stream=True)
        *chunks, last = datas(streamed)
        assert last == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert text_of(chunks) == reply["choices"][0]["message"]["content"]
        assert behind.seen == []
        assert gateway.counts("requests") == {("chat", "blocked"): 2}
        assert gateway.counts("verdicts") == {("word", "input", "blocked", "unsafe"): 2}


def test_output_is_blocked_and_the_upstreams_text_never_leaves(behind, tmp_path):
    behind.answer = up.say("Well, the forbidden word.")
    with running(behind, tmp_path) as gateway:
        _, headers, body = gateway.chat("Tell me")
    assert headers["X-Davylamp-Outcome"] == "blocked" and b"forbidden" not in body
    assert json.loads(body)["id"] == "chatcmpl-up" and json.loads(body)["usage"]["total_tokens"] == 5


def test_a_stream_is_cut_within_its_holdback_and_ends_properly(behind, tmp_path):
    text = "a" * 1000 + "forbidden" + "b" * 1000
    behind.answer = up.say(text, size=40, pause=0.002)
    policy = WORD + "[stream]\nwindow = 60\nholdback = 30\n"
    with running(behind, tmp_path, policy) as gateway:
        status, _, body = gateway.chat("Tell me", stream=True)
        *chunks, last = datas(body)
        said = text_of(chunks)
        assert status == 200 and last == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert set(said) == {"a"} and 860 <= len(said) <= 1000
        assert gateway.counts("requests") == {("chat", "blocked"): 1}


def test_short_streams_are_judged_whole_and_may_be_replaced(behind, tmp_path):
    behind.answer = up.say("the forbidden word")
    with running(behind, tmp_path) as gateway:
        *chunks, last = datas(gateway.chat("Tell me", stream=True)[2])
    assert last == "[DONE]" and text_of(chunks) == "This content was withheld by a safety guard."


def test_of_several_choices_only_the_blocked_one_is_replaced(behind, tmp_path):
    async def answer(seen, writer):
        body = up.whole("Fine.", n=3)
        body["choices"][1]["message"]["content"] = "forbidden"
        up.send(writer, body)

    behind.answer = answer
    with running(behind, tmp_path) as gateway:
        _, headers, body = gateway.chat("Tell me", n=3)
    choices = json.loads(body)["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "content_filter", "stop"]
    assert choices[0]["message"]["content"] == "Fine." and headers["X-Davylamp-Outcome"] == "blocked"


def test_guards_see_the_whole_conversation_tools_included(behind, tmp_path):
    calls = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": "bread"}'}}]
    messages = [
        {"role": "developer", "content": "Be kind."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": "http://h/i"}}],
        },
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "rye"},
        {"role": "tool", "tool_call_id": "c2", "content": "oat"},
    ]
    behind.answer = up.say("Done.", tool_calls=calls)
    with running(behind, tmp_path, '[[guard]]\nuse = "JUDGES:sees"\n') as gateway:
        gateway.chat(messages=messages)
        seen = sys.modules["davylamp_file_judges"].SEEN[-3:]  # the name that the registry gives a lone file
    first, second, reply = seen
    assert [message.text for message in first] == ["Be kind.", "Look", 'look({"q": "bread"})', "rye"]
    assert first[1].media == ("http://h/i",) and first[2].calls[0]["id"] == "c1" and first[0].role == "system"
    assert second[-1].text == "oat" and second[-1].call_id == "c2", (
        "every result after the last assistant turn is judged"
    )
    assert reply[:-1] == second and reply[-1].text == 'Done.\nlook({"q": "bread"})' and reply[-1].role == "assistant"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "forbidden"},
        {"role": "user", "content": [{"type": "text", "text": "forbidden"}]},
        {"role": "user", "content": [{"type": "new_part", "deep": {"x": ["forbidden"]}}]},
        {"role": "user", "content": "x", "name": "forbidden, and more than a name"},
        {"role": "user", "content": "x", "extra": {"y": "forbidden"}},
        {"role": "tool", "content": "forbidden", "tool_call_id": "1"},
        {"role": "wizard", "content": "forbidden"},
        {"role": "assistant", "content": "Sure: forbidden"},
        {"role": "user", "content": {"odd": "forbidden"}},
    ],
    ids=lambda message: json.dumps(message)[:60],
)
def test_no_field_of_a_message_hides_from_the_guards(behind, tmp_path, message):
    with running(behind, tmp_path) as gateway:
        assert gateway.chat(messages=[{"role": "user", "content": "Hi"}, message])[1]["X-Davylamp-Outcome"] == "blocked"
    assert behind.seen == []


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "refusal": "forbidden"},
        {"content": "x", "reasoning_content": "forbidden"},
        {
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "forbidden"}}],
        },
        {"content": "x", "annotations": [{"url": "forbidden"}]},
    ],
    ids=lambda message: json.dumps(message)[:60],
)
def test_no_field_of_a_reply_hides_from_the_guards(behind, tmp_path, message):
    async def answer(seen, writer):
        if seen.json.get("stream"):
            up.begin(writer)
            for data in (up.event(message), up.event({}, "stop"), up.DONE):
                up.chunk(writer, data)
            up.end(writer)
        else:
            up.send(writer, up.whole(**{"text": None, **message}))

    behind.answer = answer
    with running(behind, tmp_path) as gateway:
        for stream in (False, True):
            assert gateway.chat(stream=stream)[1]["X-Davylamp-Outcome"] == "blocked", stream


def test_an_empty_reply_is_nothing_to_judge(behind, tmp_path):
    behind.answer = up.say("")
    with running(behind, tmp_path, '[[guard]]\nuse = "JUDGES:broken:how=unsure"\non = "output"\n') as gateway:
        assert gateway.chat()[0] == 200


# Levels


def test_levels_warn_regenerate_and_block(behind, tmp_path):
    with running(behind, tmp_path, LEVELS) as gateway:
        behind.answer = up.say("a minor thing")
        _status, headers, body = gateway.chat()
        assert headers["X-Davylamp-Warning"] == "severity=minor" and b"a minor thing" in body

        behind.answer, behind.seen = up.say(["moderate"] * 2 + ["mild"]), []
        _, headers, body = gateway.chat(seed=5)
        assert b"mild" in body and headers["X-Davylamp-Outcome"] == "allowed"
        assert [seen.json["seed"] for seen in behind.seen] == [5, 6, 7]

        behind.answer, behind.seen = up.say("moderate"), []
        assert gateway.chat()[1]["X-Davylamp-Outcome"] == "blocked" and len(behind.seen) == 5

        behind.answer, behind.seen = up.say("severe"), []
        assert gateway.chat()[1]["X-Davylamp-Outcome"] == "blocked" and len(behind.seen) == 1
        assert gateway.counts("regenerations") == {("passed",): 1, ("refused",): 1}


def test_a_stream_is_generated_again_as_long_as_nothing_was_sent(behind, tmp_path):
    behind.answer = up.say(["moderate", "mild and long. " * 60])
    with running(behind, tmp_path, LEVELS) as gateway:
        *chunks, last = datas(gateway.chat(stream=True)[2])
        assert text_of(chunks) == "mild and long. " * 60 and last == "[DONE]" and len(behind.seen) == 2
        behind.answer, behind.seen = up.say("mild and long. " * 60 + "moderate" + " on " * 60, size=60, pause=0.002), []
        *chunks, last = datas(gateway.chat(stream=True)[2])
        assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter" and len(behind.seen) == 1
        assert "moderate" not in text_of(chunks)


def test_after_last_sends_one_more_unjudged_and_hint_goes_first(behind, tmp_path):
    policy = LEVELS + '[regenerate]\nrounds = 2\nafter = "last"\nhint = "Be careful."\n'
    behind.answer = up.say("moderate")
    with running(behind, tmp_path, policy) as gateway:
        assert b"moderate" in gateway.chat()[2]
        assert gateway.counts("regenerations") == {("unfiltered",): 1}
    assert len(behind.seen) == 3
    assert [seen.json["messages"][0]["content"] for seen in behind.seen] == ["Hello", "Be careful.", "Be careful."]


# Other endpoints


def test_text_completions_are_judged_prompt_by_prompt(behind, tmp_path):
    with running(behind, tmp_path) as gateway:
        assert (
            json.loads(gateway.ask("POST", "/v1/completions", {"prompt": "Once"})[2])["choices"][0]["text"] == "Fine."
        )
        for prompt in ("forbidden", ["fine", "forbidden"]):
            _, headers, body = gateway.ask("POST", "/v1/completions", {"prompt": prompt})
            assert headers["X-Davylamp-Outcome"] == "blocked" and json.loads(body)["object"] == "text_completion"
        _, headers, _ = gateway.ask("POST", "/v1/completions", {"prompt": "x", "suffix": "forbidden"})
        assert headers["X-Davylamp-Outcome"] == "blocked"
        assert gateway.ask("POST", "/v1/completions", {"prompt": [1, 2, 3]})[0] == 400


def test_moderations_answer_in_openais_form(behind, tmp_path):
    policy = '[[guard]]\nuse = "JUDGES:word:category=aegis2/hate_identity_hate,value=0.8"\n'
    with running(behind, tmp_path, policy) as gateway:
        status, _, body = gateway.ask("POST", "/v1/moderations", {"input": ["fine", "forbidden"], "model": "any"})
        fine, bad = json.loads(body)["results"]
        assert status == 200 and (fine["flagged"], bad["flagged"]) == (False, True)
        assert len(fine["categories"]) == 13 and bad["categories"]["hate"] and bad["category_scores"]["hate"] == 0.8
        assert bad["categories"]["aegis2/hate_identity_hate"] and not bad["categories"]["violence"]
        parts = [{"type": "text", "text": "forbidden"}]
        assert json.loads(gateway.ask("POST", "/v1/moderations", {"input": parts})[2])["results"][0]["flagged"]
        assert gateway.ask("POST", "/v1/moderations", {"input": [1]})[0] == 400
    assert behind.seen == []


def test_feedback_reaches_the_guard_that_gave_the_verdict(behind, tmp_path):
    with running(behind, tmp_path, '[[guard]]\nuse = "JUDGES:mix"\non = "input"\n' + WORD) as gateway:
        _, headers, _ = gateway.chat("an odd thing")
        assert headers["X-Davylamp-Outcome"] == "blocked"
        (id,) = headers["X-Davylamp-Verdicts"].split(", ")
        mix = gateway.gateway.guards.by_name["mix"]
        assert mix.weights() == {"strict": 0.5, "lax": 0.5}
        assert gateway.ask("POST", "/v1/feedback", {"id": id, "label": 0})[0] == 200
        assert mix.weights() == {"strict": 0.1, "lax": 0.9} and mix.judge.function.labels == {id: 0}
        for body, status in [
            ({"id": id, "label": 1}, 409),
            ({"id": "nobody.mix.0", "label": 1}, 404),
            ({"id": id.replace("mix", "word"), "label": 1}, 404),
            ({"id": "x", "label": 1}, 404),
            ({"id": id, "label": True}, 400),
            ({"id": id, "label": 2}, 400),
            ({"id": 3, "label": 1}, 400),
        ]:
            assert gateway.ask("POST", "/v1/feedback", body)[0] == status, body
        gateway.gateway.tick()
        assert (
            'davylamp_guard_weight{guard="mix",expert="lax",worker="0"} 0.9'
            in gateway.ask("GET", "/metrics")[2].decode()
        )


def test_feedback_teaches_an_aegis_guard_and_outlives_the_gateway(behind, tmp_path):
    """The real ensemble: the expert that errs loses weight in the guard, the metrics and the next verdict, and a restart keeps it."""
    experts = "keyword_rule:words=odd+keyword_rule:words=dragon"
    policy = (
        f'[[guard]]\nuse = "aegis:experts={experts},state={tmp_path / "state.db"},method=hedge,eta=0.5"\non = "input"\n'
    )
    with running(behind, tmp_path, policy) as gateway:
        guard = gateway.gateway.guards.by_name["aegis"]
        rule, other = guard.weights()
        assert guard.weights() == {rule: 0.5, other: 0.5}
        for number in range(6):
            _, headers, _ = gateway.chat(f"an odd thing {number}")
            (id,) = headers["X-Davylamp-Verdicts"].split(", ")
            assert gateway.ask("POST", "/v1/feedback", {"id": id, "label": 0})[0] == 200
        assert gateway.ask("POST", "/v1/feedback", {"id": id, "label": 0})[0] == 409, "one label an item"
        assert gateway.ask("POST", "/v1/feedback", {"id": "nobody.aegis.0", "label": 0})[0] == 404
        learnt = guard.weights()
        # by hand: six losses of 1 at rate 0.5 beside none
        assert learnt[rule] == pytest.approx(math.exp(-3) / (1 + math.exp(-3)))
        gateway.gateway.tick()
        shown = [line for line in gateway.ask("GET", "/metrics")[2].decode().splitlines() if "guard_weight{" in line]
        assert any(f"{learnt[rule]!r}" in line and "words=odd" in line for line in shown)
        assert gateway.chat("an odd thing once more")[1]["X-Davylamp-Outcome"] == "allowed"
    with running(behind, tmp_path, policy) as gateway:
        assert gateway.gateway.guards.by_name["aegis"].weights() == pytest.approx(learnt)


def test_models_health_and_unknown_paths(behind, tmp_path):
    with running(behind, tmp_path) as gateway:
        assert json.loads(gateway.ask("GET", "/v1/models")[2])["data"][0]["id"] == "mock"
        assert json.loads(gateway.ask("GET", "/healthz")[2]) == {"status": "ok", "guards": ["word"]}
        assert gateway.ask("POST", "/v1/responses", {"input": "forbidden"})[0] == 404
        assert gateway.ask("GET", "/v1/chat/completions")[0] == 405
        assert [seen.path for seen in behind.seen] == ["/v1/models"]


def test_metrics_are_prometheus_text_and_add_up(behind, tmp_path):
    with running(behind, tmp_path) as gateway:
        for text in ("one", "two", "forbidden"):
            gateway.chat(text)
        gateway.ask("POST", "/v1/chat/completions", b"{")
        text = gateway.ask("GET", "/metrics")[2].decode()
    series = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name not in series, "each series once"
            series[name] = float(value)
    assert series['davylamp_requests_total{endpoint="chat",outcome="allowed",worker="0"}'] == 2
    assert series['davylamp_requests_total{endpoint="chat",outcome="blocked",worker="0"}'] == 1
    assert series['davylamp_requests_total{endpoint="chat",outcome="rejected",worker="0"}'] == 1
    assert series['davylamp_guard_seconds_count{guard="word",worker="0"}'] == 5
    buckets = [value for name, value in series.items() if name.startswith("davylamp_request_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == 4 == series['davylamp_request_seconds_count{worker="0"}']


# Access and limits


def test_keys_are_checked_and_never_passed_on(behind, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMP_KEYS", "alpha, beta")
    monkeypatch.setenv("UP_KEY", "secret-up")
    with running(behind, tmp_path, WORD + '[server]\nkeys_env = "LAMP_KEYS"\n') as gateway:
        assert gateway.chat()[0] == 401 and gateway.chat(headers={"Authorization": "Bearer gamma"})[0] == 401
        assert gateway.chat(headers={"Authorization": "Bearer beta", "X-Api-Key": "k"})[0] == 200
        assert gateway.ask("GET", "/metrics")[0] == gateway.ask("GET", "/")[0] == 401
        assert gateway.ask("GET", "/", headers={"Authorization": "Basic dTphbHBoYQ=="})[0] == 200
        assert gateway.ask("GET", "/healthz")[0] == 200
        assert behind.seen[0].header("Authorization") == behind.seen[0].header("X-Api-Key") == []
    with running(behind, tmp_path, WORD + '[upstream]\nkey_env = "UP_KEY"\n') as gateway:
        gateway.chat(headers={"Authorization": "Bearer mine"})
        assert behind.seen[-1].header("Authorization") == ["Bearer secret-up"]
    with running(behind, tmp_path) as gateway:
        gateway.chat(headers={"Authorization": "Bearer mine"})
        assert behind.seen[-1].header("Authorization") == ["Bearer mine"]


@pytest.mark.parametrize(
    "table", ['[server]\nkeys_env = "NOT_SET"', '[upstream]\nkey_env = "NOT_SET"', '[audit]\nkey_env = "NOT_SET"']
)
def test_a_key_that_is_not_set_stops_the_start(behind, tmp_path, table):
    with pytest.raises(InputError, match="NOT_SET"), running(behind, tmp_path, WORD + table):
        pass


def test_limits(behind, tmp_path):
    policy = WORD + '[limits]\nbody_bytes = 1000\nmessages = 2\nper_minute = 6\ndeny_fields = ["chat_template"]\n'
    with running(behind, tmp_path, policy) as gateway:
        assert gateway.chat("x" * 2000)[0] == 413
        assert gateway.chat(messages=[{"role": "user", "content": "x"}] * 3)[0] == 400
        assert gateway.chat(chat_template="{{ forbidden }}")[0] == 400
        assert (
            gateway.ask("POST", "/v1/chat/completions", b"x=1", {"Content-Type": "application/x-www-form-urlencoded"})[
                0
            ]
            == 415
        )
        assert gateway.ask("POST", "/v1/chat/completions", b"{}", {"Content-Encoding": "gzip"})[0] == 415
        codes = [gateway.chat()[0] for _ in range(8)]
        assert codes.count(200) <= 6 and 429 in codes
        assert gateway.counts("rejected")[("denied_field",)] == 1


# Start and reload


def test_a_guard_that_does_not_load_stops_the_start(behind, tmp_path):
    for policy, error, match in [
        ('[[guard]]\nuse = "JUDGES:no_start"\n', InputError, "does not load: OSError: the weights are not there"),
        ('[[guard]]\nuse = "refusl"\n', UnknownNameError, "Did you mean 'refusal'"),
        ('[[guard]]\nuse = "JUDGES:complied"\n', InputError, "say which end of it is unsafe"),
        ("", InputError, "no guard"),
    ]:
        with pytest.raises(error, match=match), running(behind, tmp_path, policy):
            pass


def test_a_reload_takes_effect_loses_no_request_and_keeps_what_a_guard_has_learnt(behind, tmp_path):
    behind.answer = up.say("slow and fine. " * 20, pause=0.01)
    mixed = '[[guard]]\nuse = "JUDGES:mix"\non = "input"\n'
    with running(behind, tmp_path, mixed) as gateway:
        results = []
        threads = [threading.Thread(target=lambda: results.append(gateway.chat("slow", stream=True))) for _ in range(8)]
        for thread in threads:
            thread.start()
        before = gateway.gateway.guards.by_name["mix"].judge.function
        while len(behind.seen) < 8:
            time.sleep(0.01)
        gateway.write(mixed + WORD)
        gateway.call(gateway.gateway.reload(gateway.read))
        assert gateway.chat("forbidden")[1]["X-Davylamp-Outcome"] == "blocked"
        gateway.write("[[guard]]\nuse = 3\n")
        with pytest.raises(DavylampError):
            gateway.call(gateway.gateway.reload(gateway.read))
        assert gateway.chat("forbidden")[1]["X-Davylamp-Outcome"] == "blocked", "the old policy stays"
        for thread in threads:
            thread.join()
        assert [text_of(datas(body)) for _, _, body in results] == ["slow and fine. " * 20] * 8
        assert gateway.gateway.guards.by_name["mix"].judge.function is before
        assert gateway.counts("reloads") == {("done",): 1, ("failed",): 1}
        gateway.call(gateway.gateway._bury())
        assert gateway.gateway._retired == []


# The audit log


def test_the_audit_log_hashes_and_keeps_order(behind, tmp_path, monkeypatch):
    log = tmp_path / "audit.jsonl"
    log.write_text('{"torn')  # what a crash left behind
    with running(behind, tmp_path, WORD + f'[audit]\npath = "{log}"\n') as gateway:
        ids = [gateway.chat(text)[1]["X-Davylamp-Id"] for text in ("secret one", "a forbidden two")]
        behind.answer = up.say("long secret. " * 60, size=60, pause=0.002)
        ids.append(gateway.chat("three", stream=True)[1]["X-Davylamp-Id"])
        gateway.ask("POST", "/v1/chat/completions", b"{")
    text = log.read_text()
    assert "secret" not in text and "forbidden" not in text
    torn, *rows = text.splitlines()
    rows = [json.loads(row) for row in rows]
    assert torn == '{"torn'
    assert [row["outcome"] for row in rows] == ["allowed", "blocked", "streaming", "allowed", "rejected"]
    assert [row["id"] for row in rows[:4]] == [ids[0], ids[1], ids[2], ids[2]] and rows[2]["event"] == "started"
    assert rows[0]["prompt_sha256"] == hashlib.sha256(b"secret one").hexdigest() and rows[0]["prompt_chars"] == 10
    assert rows[0]["reply_sha256"] == hashlib.sha256(b"Fine.").hexdigest()
    assert rows[3]["reply_sha256"] == hashlib.sha256(("long secret. " * 60).encode()).hexdigest()
    assert rows[1]["verdicts"][0]["value"] == 1.0 and rows[1]["verdicts"][0]["side"] == "input"
    assert log.stat().st_mode & 0o777 in (0o600, 0o644)


def test_the_audit_log_keeps_texts_only_if_asked_and_keys_its_hashes(behind, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIT_KEY", "k")
    log = tmp_path / "audit.jsonl"
    with running(
        behind, tmp_path, WORD + f'[audit]\npath = "{log}"\ntexts = true\nkey_env = "AUDIT_KEY"\nfsync = true\n'
    ) as gateway:
        gateway.chat("what I said")
    (row,) = map(json.loads, log.read_text().splitlines())
    assert "what I said" in row["request"] and row["reply"] == "Fine."
    assert row["prompt_sha256"] == hmac.new(b"k", b"what I said", hashlib.sha256).hexdigest()


def test_without_its_audit_line_nothing_is_answered(behind, tmp_path):
    with running(behind, tmp_path, WORD + '[audit]\npath = "/dev/full"\n') as gateway:
        status, _, body = gateway.chat()
        assert status == 503 and json.loads(body)["error"]["type"] == "audit_unavailable" and b"Fine" not in body
        assert gateway.chat(stream=True)[0] == 503
        assert gateway.counts("requests") == {("chat", "unavailable"): 2}


def test_specs_of_guards_name_their_side():
    policy = read_policy(upstream="http://h/v1", guards=["input=a", f"output={use('word')}:word=x", "b", "b"])
    assert [(guard.on, guard.name) for guard in policy.guard] == [
        ("input", "a"),
        ("output", "word"),
        ("both", "b"),
        ("both", "b_2"),
    ]
