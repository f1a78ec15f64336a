"""The thought is split off, nothing of the answer is lost; strategies begin a reply, or say that they cannot."""

import asyncio
import re

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from davylamp.core.errors import InputError, TargetError
from davylamp.core.nouns import Message
from davylamp.models.targets import load_target
from davylamp.models.thinking import Parts, Thinking, ThinkingTarget, parts, plan_from, split_thinking, think
from tests.server import say


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("plain", None, "plain"),
        ("", None, ""),
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("<Thinking>hm</Thinking>yes", "hm", "yes"),
        ("hm\n</think>yes", "hm", "yes"),  # the template opened it
        ("<think></think>yes", "", "yes"),
        ("<think>a</think><think>b</think>yes", "a\n\nb", "yes"),
        ("<think>cut off", "cut off", ""),
        ("  <think>a</think>  b  ", "a", "b"),
        ("write <think> to open a thought", None, "write <think> to open a thought"),
        ("write <think>x</think> in it", None, "write <think>x</think> in it"),
        ("<think>a</think> later </think> stays", "a", "later </think> stays"),
        ("<thinker>a", None, "<thinker>a"),
    ],
)
def test_forms(text, thought, answer):
    assert split_thinking(text) == (thought, answer)


@given(st.text(), st.text())
def test_no_character_of_the_answer_is_lost(thought, answer):
    if any(mark in (thought + answer).lower() for mark in ("<think", "</think")):
        return
    assert split_thinking(f"<think>{thought}</think>{answer}") == (thought.strip(), answer.strip())
    assert split_thinking(answer) == (None, answer)


T, C = "<think>", "</think>"
#: (raw reply, opened by the template, thought, answer, status)
HAND_MADE = [
    ("a", False, None, "a", "none"),
    ("", False, None, "", "none"),
    ("  a  ", False, None, "  a  ", "none"),
    (f"{T}a{C}b", False, "a", "b", "closed"),
    (f"{T}\na\n{C}\n\nb", False, "a", "b", "closed"),
    (f"\n\n{T} a {C} b", False, "a", "b", "closed"),
    (f"{T.upper()}a{C.upper()}b", False, "a", "b", "closed"),
    ("<thinking>a</thinking>b", False, "a", "b", "closed"),
    (f"a{C}b", False, "a", "b", "closed"),
    (f"a{C}b", True, "a", "b", "closed"),
    (f"\na\n{C}\n\nb\n", True, "a", "b", "closed"),
    ("a", True, "a", "", "open"),
    ("", True, "", "", "open"),
    (f"{C}b", True, "", "b", "empty"),
    (f"{C}b", False, "", "b", "empty"),
    (f"{T}a{C}b", True, "a", "b", "closed"),  # the template opened it, and the model again
    (f"{T}a", False, "a", "", "open"),
    (f"{T}", False, "", "", "open"),
    (f"{T}a\nb", False, "a\nb", "", "open"),
    (f"{T}{C}b", False, "", "b", "empty"),
    (f"{T}\n\n{C}\n\nb", False, "", "b", "empty"),
    (f"{T}a{C}", False, "a", "", "closed"),
    (f"{T}{C}", False, "", "", "empty"),
    (f"{T}a{C}{T}b{C}c", False, "a\n\nb", "c", "closed"),
    (f"{T}a{C}\n{T}b{C}\n{T}c{C} d", False, "a\n\nb\n\nc", "d", "closed"),
    (f"{T}{C}{T}b{C}c", False, "b", "c", "closed"),
    (f"{T}a{C}{T}b", False, "a\n\nb", "", "open"),
    (f"a{C}{T}b{C}c", True, "a\n\nb", "c", "closed"),
    (f"{T}a {T}b{C} c{C}d", False, f"a {T}b{C} c", "d", "closed"),
    (f"{T}a {T}b {T}c{C}{C}{C}d", False, f"a {T}b {T}c{C}{C}", "d", "closed"),
    (f"{T}I write {T} here{C}b", False, f"I write {T} here", "b", "closed"),  # broken nesting: the first closing tag
    (f"{T}a{C} later {C} stays", False, "a", f"later {C} stays", "closed"),
    (f"say {T} to think", False, None, f"say {T} to think", "none"),
    (f"say {T}x{C} in it", False, None, f"say {T}x{C} in it", "none"),
    ("<thinker>a", False, None, "<thinker>a", "none"),
    ("<think a", False, None, "<think a", "none"),
    (f"{T}a</thin", False, "a</thin", "", "open"),
    (f"{T}ä 拒绝{C}否", False, "ä 拒绝", "否", "closed"),
    (f"{T}a{C}{C}b", False, "a", f"{C}b", "closed"),
    (f"{T}a{C}b {T}c", False, "a", f"b {T}c", "closed"),
    (f"{T}x < y{C}x > y", False, "x < y", "x > y", "closed"),
    (f"{T}{{'a': [{C}]", False, "{'a': [", "]", "closed"),
]


def test_hand_made_replies():
    assert len(HAND_MADE) >= 40
    for text, opened, thought, answer, status in HAND_MADE:
        found = parts(text, opened=opened)
        assert (found.thought, found.answer, found.status) == (thought, answer, status), text


def test_other_tags():
    tags = ("[[", "]]")
    assert parts("[[a]]b", tags=tags) == Parts("a", "b", "closed", 1)
    assert parts("a]]b", tags=tags).thought == "a" and parts("<think>a</think>b", tags=tags).status == "none"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"strategy": "none"}, "no thinking strategy named 'none'"),
        ({"strategy": "more", "budget": 0}, "got budget 0"),
        ({"strategy": "more", "rounds": -1}, "rounds -1"),
        ({"strategy": "more", "budget": 16_000}, "got budget 16000, max_tokens 16000"),
        ({"strategy": "zero", "tags": ("<a>", "<a>")}, "two different texts"),
        ({"strategy": "zero", "tags": ("", "</a>")}, "two different texts"),
        ({"strategy": "more", "connectors": ()}, "one or more connectors"),
    ],
)
def test_bad_plans(given, says):
    with pytest.raises(InputError, match=re.escape(says)):
        Thinking(**given)


@pytest.mark.parametrize("text", ["zero,rounds", "zero,size=3", "more,budget=x", "none"])
def test_bad_names_of_plans(text):
    with pytest.raises(InputError):
        plan_from(text)


class Scripted:
    """Says what it is told to, and notes what it was asked with."""

    name, identity, prefills = "scripted", {"name": "scripted"}, True

    def __init__(self, *says):
        self.says, self.asked = list(says), []

    async def __call__(self, messages, *, seed=0, prefill="", **settings):
        self.asked.append((prefill, settings, seed))
        thought, answer, finish, tokens = self.says.pop(0)
        found = parts(prefill + thought + answer)
        return Message("assistant", found.answer, reasoning=found.thought, finish=finish, tokens=(5, tokens))


def ask(target, plan, **settings):
    return asyncio.run(think(target, [Message("user", "x")], plan, **settings))


def test_zero_and_less_begin_the_reply():
    target = Scripted(("", "yes", "stop", 1), ("", "yes", "stop", 1))
    assert ask(target, Thinking("zero")) == Message("assistant", "yes", reasoning="", finish="stop", tokens=(5, 1))
    assert ask(target, Thinking("less", short="Easy.")).reasoning == "Easy."
    assert [asked[0] for asked in target.asked] == ["<think>\n\n</think>\n\n", "<think>\nEasy.\n</think>\n\n"]


def test_more_goes_on_until_its_rounds_are_spent():
    target = Scripted(*((f"t{i}", "", "stop", 3) for i in range(3)), ("", "done", "stop", 4))
    plan = Thinking("more", connectors=("Wait",), rounds=2, budget=100, max_tokens=120)
    reply = ask(target, plan, temperature=0.5)
    assert reply.reasoning == "t0\nWaitt1\nWaitt2" and reply.text == "done" and reply.tokens == (5, 13)
    heads = [asked[0] for asked in target.asked]
    assert heads[1] == "<think>\nt0\nWait" and heads[3] == "<think>\nt0\nWaitt1\nWaitt2\n</think>\n\n"
    assert [asked[1]["max_tokens"] for asked in target.asked] == [100, 97, 94, 20]
    assert all(asked[1]["stop"] == "</think>" for asked in target.asked[:3]) and "stop" not in target.asked[3][1]


def test_more_ends_at_its_budget_and_closes_the_thought():
    target = Scripted(("t0", "", "stop", 8), ("t1", "", "length", 2), ("", "done", "stop", 1))
    reply = ask(target, Thinking("more", rounds=10, budget=10, max_tokens=15))
    assert reply.text == "done" and len(target.asked) == 3 and target.asked[-1][1]["max_tokens"] == 5
    assert target.asked[-1][0].endswith("</think>\n\n")


def test_connectors_come_from_the_seed():
    def heads(seed):
        target = Scripted(*((f"t{i}", "", "stop", 1) for i in range(7)), ("", "done", "stop", 1))
        ask(target, Thinking("more", rounds=6, budget=100, max_tokens=120), seed=seed)
        return [asked[0] for asked in target.asked]

    assert heads(0) == heads(0) and len({tuple(heads(seed)) for seed in range(6)}) > 1


def test_a_target_that_cannot_go_on_is_refused_by_name():
    class Plain(Scripted):
        prefills = False

    with pytest.raises(InputError, match=r"scripted cannot go on from a reply.*it supports default only"):
        ask(Plain(), Thinking("zero"))
    with pytest.raises(InputError, match="scripted cannot go on"):
        ThinkingTarget(Plain(), Thinking("more"))
    assert ask(Plain(("", "yes", "stop", 1)), Thinking()).text == "yes"


def test_the_users_max_tokens_win():
    target = Scripted(("", "yes", "stop", 1))
    ask(target, Thinking("zero"), max_tokens=7)
    assert target.asked[0][1]["max_tokens"] == 7
    with pytest.raises(InputError, match="got budget 10000, max_tokens 7"):
        ask(target, Thinking("more"), max_tokens=7)


def test_by_name_and_its_identity():
    target = load_target("think/more,budget=50,rounds=3,connectors=wait;again/openai/m@http://127.0.0.1:1/v1")
    assert target.plan == Thinking("more", budget=50, rounds=3, connectors=("wait", "again"))
    assert target.identity["thinking"]["budget"] == 50 and target.identity["name"] == "openai/m (more thinking)"
    with pytest.raises(InputError, match="expected think/"):
        load_target("think/zero")


# --- behind a server -------------------------------------------------------------------------------------------------------------------
def at(server, plan):
    async def go():
        target = load_target(f"think/{plan}/{server.target}")
        try:
            return await target([Message("user", "x")], max_tokens=40)
        finally:
            await target.close()

    return asyncio.run(go())


def test_a_server_goes_on_from_the_begun_reply(server):
    server.answer = lambda body, number: say("yes")
    assert at(server, "zero") == Message("assistant", "yes", reasoning="", finish="stop", tokens=(3, 2))
    body = server.asked[0]
    assert body["messages"][-1] == {"role": "assistant", "content": "<think>\n\n</think>\n\n"}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False and "prefill" not in body


def test_a_server_that_refuses_or_thinks_anew_is_named(server):
    server.answer = lambda body, number: web.json_response({"error": "unknown field"}, status=400)
    with pytest.raises(TargetError, match=r"openai/mock did not take a reply that was begun.*strategy default only"):
        at(server, "zero")
    server.answer = lambda body, number: say("yes", message={"reasoning_content": "hm"})
    with pytest.raises(TargetError, match="openai/mock thought of its own"):
        at(server, "less")
    server.answer = lambda body, number: say("<think>hm</think>yes")
    with pytest.raises(TargetError, match="openai/mock thought of its own"):
        at(server, "zero")


def test_a_servers_parser_may_take_the_rest_of_an_open_thought(server):
    server.answer = lambda body, number: (
        say("yes") if "</think>" in body["messages"][-1]["content"] else say("", message={"reasoning_content": "hm"})
    )
    assert at(server, "more,rounds=0,budget=9") == Message(
        "assistant", "yes", reasoning="hm", finish="stop", tokens=(3, 4)
    )
