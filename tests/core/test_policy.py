import asyncio

import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Verdict
from davylamp.core.policy import GuardRule, Level, decide, parse_rule, regenerate, regenerated_rates, rule, strongest
from davylamp.core.stats import rate

ESTIMATES = (
    rate(5, 100, 10, name="unsafe_rate"),
    rate(5, 50, name="unsafe_rate", category="a"),
    rate(0, 50, name="unsafe_rate", category="b"),
    rate(0, 0, 3, name="empty_rate"),
)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("unsafe_rate > 0.04", [True]),
        ("unsafe_rate.value > 0.06", [False]),
        ("unsafe_rate.high > 0.06", [True]),
        ("unsafe_rate[*].value > 0", [True, False]),
        ("unsafe_rate[b].high >= 0.05", [True]),
        ("unsafe_rate.worst_high > 0.13", [True]),
        ("unsafe_rate.n < 100", [False]),
        ("unsafe_rate.unscored > 5", [True]),
        ("empty_rate > 0", [None]),
        ("unsafe_rate.corrected_high > 0.1", [None]),
    ],
)
def test_decisions(text, broken):
    assert [decision.broken for decision in decide(parse_rule(text), ESTIMATES)] == broken


@pytest.mark.parametrize(
    "text", ["unsafe_rate", "unsafe_rate > x", "> 3", "unsafe_rate == 0", "a.b.c > 1", "unsafe_rate.hihg > 1"]
)
def test_bad_limits_are_refused(text):
    with pytest.raises(InputError):
        parse_rule(text)


def test_unknown_metric_and_slice_say_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'unsafe_rate'"):
        decide(parse_rule("unsafe_rat > 0"), ESTIMATES)
    with pytest.raises(UnknownNameError, match="no slice of unsafe_rate named 'zzz'"):
        decide(parse_rule("unsafe_rate[zzz] > 0"), ESTIMATES)


LEVELS = (Level("minor", 0.3, "warn"), Level("moderate", 0.6, "regenerate"), Level("severe", 0.9, "block"))


@pytest.mark.parametrize(
    ("verdict", "outcome", "action", "level"),
    [
        (Verdict(0.29), "allowed", "allow", None),
        (Verdict(0.3), "allowed", "warn", "minor"),
        (Verdict(0.6), "blocked", "regenerate", "moderate"),
        (Verdict(0.9), "blocked", "block", "severe"),
        (Verdict(0.1, label="severe"), "blocked", "block", "severe"),  # the more severe of label and value
        (Verdict(0.95, label="minor"), "blocked", "block", "severe"),
        (Verdict(None), "unavailable", "block", None),
        (None, "unavailable", "block", None),
        (Verdict(0.95, categories=("x/X1",)), "allowed", "allow", None),
        (Verdict(0.95, categories=("x/X1", "x/X2")), "blocked", "block", "severe"),
    ],
)
def test_severity_levels_mean_different_actions(verdict, outcome, action, level):
    ruling = rule(GuardRule(LEVELS, ignore=("x/X1",)), verdict)
    assert (ruling.outcome, ruling.action, ruling.level) == (outcome, action, level)


def test_the_low_end_can_be_the_unsafe_one():
    assert [rule(GuardRule(LEVELS, flag="low"), Verdict(value)).action for value in (0.9, 0.65, 0.3, 0.05)] == [
        "allow",
        "warn",
        "regenerate",
        "block",
    ]
    assert strongest([]).action == "allow"


@pytest.mark.parametrize(
    ("dangers", "rounds", "after", "reply", "judged", "unfiltered"),
    [
        ([0.7, 0.7, 0.1], 5, "refuse", 2, 3, False),  # asked until one passes
        ([0.7, 0.4], 5, "refuse", 1, 2, False),  # a warning passes
        ([0.7, 0.95, 0.0], 5, "refuse", None, 2, False),  # a block ends it
        ([0.7] * 5, 5, "refuse", None, 5, False),
        ([0.7] * 6, 5, "last", 5, 5, True),  # one more, which nobody judged
        ([0.7], 0, "last", 0, 0, True),
        ([0.7], 0, "refuse", None, 0, False),
    ],
)
def test_rounds(dangers, rounds, after, reply, judged, unfiltered):
    asked = []

    async def generate(number):
        asked.append(number)
        return number

    async def judge(number):
        return rule(GuardRule(LEVELS), Verdict(dangers[number]))

    done = asyncio.run(regenerate(generate, judge, rounds=rounds, after=after))
    assert (done.reply, len(done.trace), done.unfiltered) == (reply, judged, unfiltered)
    assert [number for number, _ in done.trace] == list(range(1, judged + 1)) and asked == sorted(asked)


def test_rates_of_rounds_equal_the_sum_over_rounds():
    """The closed form beside plain addition: what each round lets out, and what is left after the last."""
    for unsafe, recall, alarm, rounds in (
        (0.5, 0.8, 0.0, 5),
        (0.3, 0.4, 0.2, 3),
        (0.9, 1.0, 0.5, 7),
        (0.5, 0.0, 0.0, 4),
    ):
        left, out = 1.0, 0.0
        for _ in range(rounds):
            out += left * unsafe * (1 - recall)
            left *= unsafe * recall + (1 - unsafe) * alarm
        found = regenerated_rates(unsafe, recall, alarm, rounds)
        assert found["unsafe_refuse"] == pytest.approx(out, abs=1e-12)
        assert found["refused"] == pytest.approx(left, abs=1e-12)
        assert found["unsafe_last"] == pytest.approx(out + left * unsafe, abs=1e-12)


def test_wrong_rules_and_rounds_are_refused():
    for wrong in (
        lambda: Level("", 0.5, "block"),
        lambda: Level("a", 1.5, "block"),
        lambda: GuardRule(()),
        lambda: GuardRule(LEVELS[::-1]),
        lambda: GuardRule((LEVELS[0], LEVELS[0])),
        lambda: regenerated_rates(1.5, 0.5, 0.0, 3),
        lambda: regenerated_rates(0.5, 0.5, 0.0, -1),
        lambda: asyncio.run(regenerate(None, None, rounds=-1)),
    ):
        with pytest.raises(InputError):
            wrong()
    for unknown in (
        lambda: Level("a", 0.5, "blok"),
        lambda: GuardRule(LEVELS, flag="up"),
        lambda: GuardRule(LEVELS, on_failure="x"),
    ):
        with pytest.raises(UnknownNameError):
            unknown()
