"""Whole words and phrases only; nothing else is promised."""

import asyncio

import pytest

from davylamp.core.errors import InputError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A Discount, please", 1.0),
        ("free\n trial", 1.0),
        ("discounted", 0.0),
        ("free of trial", 0.0),
        ("dis count", 0.0),
        ("a.b", 1.0),
        ("axb", 0.0),
        (" ", None),
    ],
)
def test_words(text, value):
    judge = load_judge("keyword_rule:words=discount/free trial/a.b")
    assert judge.measures == "unsafe" and asyncio.run(judge([Message("user", text)])).value == value


def test_none():
    with pytest.raises(InputError, match="one word or more"):
        load_judge("keyword_rule:words=/")
