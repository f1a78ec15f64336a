import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.policy import decide, parse_rule
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
