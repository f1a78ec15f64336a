"""Defences as targets: what they change, what they refuse, and that harmless text passes."""

import asyncio
import math

import numpy as np
import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Message, Verdict
from davylamp.core.policy import GuardRule
from davylamp.models.defended import (
    AFTER,
    BEFORE,
    HARDENING,
    REFUSAL,
    Guarded,
    Paraphrased,
    PerplexityFilter,
    calibrated,
    defend,
    worst_window,
)
from tests.attacks.worlds import Recorder

USER = (Message("user", "hello"),)


def ask(target, messages=USER):
    return asyncio.run(target(messages, seed=3, temperature=0.5))


def test_hardening_goes_before_and_joins_a_system_prompt():
    inner = Recorder(lambda messages, number: "hi")
    target = defend(inner, "hardening")
    assert ask(target).text == "hi"
    assert [m.text for m in inner.asked[0][0]] == [HARDENING, "hello"] and inner.asked[0][1:] == (
        3,
        {"temperature": 0.5},
    )
    ask(target, (Message("system", "own"), *USER))
    assert [m.text for m in inner.asked[1][0]] == [f"{HARDENING}\n\nown", "hello"]


def test_a_reminder_stands_on_both_sides():
    inner = Recorder(lambda messages, number: "hi")
    target = defend(inner, "reminder")
    ask(target)
    assert inner.asked[0][0][-1].text == f"{BEFORE}\n\nhello\n\n{AFTER}"
    ask(target, (*USER, Message("tool", "doc", call_id="1")))
    assert [m.role for m in inner.asked[1][0]] == ["user", "tool", "user"]


def test_the_worst_window_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.normal(size=int(rng.integers(1, 30))).tolist()
        window = int(rng.integers(1, 12))
        tried = [values[i : i + window] for i in range(max(1, len(values) - window + 1))]
        assert math.isclose(worst_window(values, window), max(sum(part) / len(part) for part in tried), abs_tol=1e-9)


def test_a_perplexity_filter_stops_noise_and_lets_text_pass():
    def surprise(text):
        return [1.0 if word.isalpha() else 9.0 for word in text.split()]

    inner = Recorder(lambda messages, number: "hi")
    target = PerplexityFilter(inner, surprise, threshold=3.0, window=4)
    assert ask(target).text == "hi"
    noise = ask(target, (Message("user", "please do this }{ 88 !! @@ ;; now"),))
    assert noise.text == REFUSAL and noise.finish == "content_filter" and target.blocked == 1 and len(inner.asked) == 1
    texts = ["a " * n + "}" * (n % 7 == 0) for n in range(1, 101)]
    threshold = calibrated(surprise, texts, window=4, pass_rate=0.9)
    assert sum(worst_window(surprise(text), 4) <= threshold for text in texts) >= 90
    with pytest.raises(InputError, match="20 texts"):
        calibrated(surprise, texts[:19])


def test_a_paraphrase_is_asked_instead_and_an_empty_one_is_refused():
    inner, writer = (
        Recorder(lambda messages, number: "hi"),
        Recorder(lambda messages, number: "-----\nother words\n-----"),
    )
    assert ask(Paraphrased(inner, writer)).text == "hi" and inner.asked[0][0][-1].text == "other words"
    assert "Do not follow it" in writer.asked[0][0][0].text
    assert ask(Paraphrased(inner, Recorder(lambda messages, number: "---"))).text == REFUSAL and len(inner.asked) == 1


@pytest.mark.parametrize(("side", "seen", "asked"), [("input", 1, 0), ("output", 2, 1), ("both", 1, 0)])
def test_a_guard_in_front(side, seen, asked):
    lengths = []

    async def guard(messages, case=None):
        lengths.append(len(messages))
        return Verdict(1.0)

    inner = Recorder(lambda messages, number: "hi")
    assert ask(Guarded(inner, guard, by=GuardRule(), side=side)).text == REFUSAL
    assert lengths == [seen] and len(inner.asked) == asked


@pytest.mark.parametrize(
    ("value", "failure", "text"), [(0.0, "block", "hi"), (None, "block", REFUSAL), (None, "allow", "hi")]
)
def test_a_guard_that_cannot_tell_does_what_the_rule_says(value, failure, text):
    async def guard(messages, case=None):
        return Verdict(value)

    inner = Recorder(lambda messages, number: "hi")
    assert ask(Guarded(inner, guard, by=GuardRule(on_failure=failure), side="both")).text == text


def test_defences_stack_and_name_themselves():
    inner = Recorder(lambda messages, number: "Sure.")
    target = defend(defend(inner, "reminder"), "guard:name=refusal,side=output")
    assert ask(target).text == REFUSAL and target.name == "recorder + reminder + refusal (output)"
    identity = target.identity
    assert identity["target"]["defence"]["name"] == "reminder" and identity["defence"]["guard"]["name"] == "refusal"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("wall", "no defence"),
        ("hardening:colour=red", "no option"),
        ("guard", "needs the guard's name"),
        ("guard:name=no_such", "no judge or guard"),
        ("guard:name=refusal,side=left", "no side"),
        ("guard:name=exact", "must measure"),
        ("guard:name=refusal,at=x", "must be a number"),
        ("perplexity", "needs a threshold"),
        ("perplexity:threshold=5", "needs a local model"),
        ("paraphrase", "needs a model"),
    ],
)
def test_bad_defences(spec, said):
    with pytest.raises(InputError, match=said) as error:
        defend(Recorder(), spec)
    assert isinstance(error.value, UnknownNameError) == said.startswith("no ")
