"""The filtered target: no failure behind an oracle, the generator's own distribution behind a constant, an explicit refusal otherwise."""

import asyncio

import numpy as np
import pytest
from scipy.stats import chisquare

from davylamp.core.errors import InputError
from davylamp.core.nouns import Message, Verdict
from davylamp.data.fragile_stories import FAILS, HOLDS, ROLES, breaks
from davylamp.guards.fragile_broken import fragile_broken
from davylamp.models.filtered import REFUSAL, Filtered

WORDS = {role: words[0] for role, words in ROLES.items()}
TEXTS = [form.format(**WORDS) for form in (*FAILS, *HOLDS)]


class Generator:
    name, identity = "generator", {"name": "generator"}

    def __init__(self, texts=TEXTS):
        self.texts = texts

    async def __call__(self, messages, *, seed=0, **settings):
        return Message("assistant", self.texts[np.random.default_rng(seed).integers(len(self.texts))])


def ask(target, n=1, step=100):
    async def go():
        return [(await target([Message("user", "?")], seed=i * step)) for i in range(n)]

    return asyncio.run(go())


def test_behind_an_oracle_nothing_fails():
    target = Filtered(Generator(), fragile_broken(), tries=20)
    replies = ask(target, 300)
    assert not any(breaks(reply.text) for reply in replies)
    assert target.counts["answered"] == 300 and target.counts["tries"] > 330


def test_behind_a_constant_the_distribution_is_the_generators():
    async def calm(messages, case=None):
        return Verdict(0.1)

    target = Filtered(Generator(), calm)
    texts = [reply.text for reply in ask(target, 1300)]
    assert target.counts["tries"] == 1300
    assert chisquare([texts.count(text) for text in dict.fromkeys(TEXTS)]).pvalue > 0.01


def test_where_nothing_passes_that_is_said():
    async def strict(messages, case=None):
        return Verdict(0.9)

    async def unsure(messages, case=None):
        return Verdict(None)

    for guard, generator, counted in (
        (strict, Generator(), "refused"),
        (unsure, Generator(), "unscored"),
        (strict, Generator([" "]), "empty"),
    ):
        target = Filtered(generator, guard, tries=3)
        (reply,) = ask(target)
        assert reply.text == REFUSAL and reply.finish == "content_filter"
        assert target.counts["refused"] == 1 and target.counts["tries"] == 3 and target.counts[counted]


def test_best_of_n_takes_the_lowest():
    async def length(messages, case=None):
        return Verdict(len(messages[-1].text) / 100)

    (reply,) = ask(Filtered(Generator(), length, threshold=0.99, tries=60, how="best"))
    assert reply.text == min(TEXTS, key=len)


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"threshold": 1.0}, {"tries": 0}, {"how": "worst"}])
def test_bad_options(bad):
    with pytest.raises(InputError):
        Filtered(Generator(), fragile_broken(), **bad)
