"""The thought is split off; nothing of the answer is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from davylamp.models.thinking import split_thinking


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
