"""Guard training: what a row becomes, what is refused, and that a few steps on tiny models of four architectures change what they say."""

import numpy as np
import pytest
import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.data.guard_format import load_format
from davylamp.data.guard_policy import load_policy
from davylamp.train.guard_sft import guard_sft, lesson
from tests import tiny

AEGIS1 = load_format("aegis1")


def row(number, answer, **meta):
    word = "weapon" if answer else "bread"
    text = f"how to make {word}"
    return Case(
        str(number), (Message("user", text),), "aegis/guns_and_illegal_weapons" if answer else None, answer, meta=meta
    )


def test_a_lesson_is_prompt_and_right_answer():
    rng, policy = np.random.default_rng(0), load_policy("aegis")
    made = lesson(row(1, 1), AEGIS1, policy, rng, drop=0.9)
    assert [m.role for m in made.messages] == ["user", "assistant"]
    code = made.messages[1].text.removeprefix("unsafe\n")
    assert f"{code}: Guns and Illegal Weapons" in made.messages[0].text
    assert lesson(row(1, 0), AEGIS1, policy, rng).messages[1].text == "safe"
    fixed = [lesson(row(1, 1), AEGIS1, policy, rng, shuffle=False).messages for _ in range(2)]
    assert fixed[0] == fixed[1] and fixed[0][1].text == "unsafe\nO4"
    texts = {lesson(row(1, 1), AEGIS1, policy, rng).messages[0].text for _ in range(5)}
    assert len(texts) == 5, "shuffled anew for every row"


def test_replies_and_policies_of_their_own():
    form, policy, rng = load_format("aegis2"), load_policy("aegis2"), np.random.default_rng(0)
    refused = Case("1", (Message("user", "x"), Message("assistant", "no")), answer=0, meta={"prompt_unsafe": True})
    assert lesson(refused, form, policy, rng).messages[1].text == '{"User Safety": "unsafe", "Response Safety": "safe"}'
    own = {"policy": [["off topic", "leaves trains"]], "violated": ["custom/off_topic"]}
    made = lesson(Case("2", (Message("user", "soup?"),), answer=1, meta=own), form, policy, rng)
    assert "S1: off topic. leaves trains" in made.messages[0].text and "off topic" in made.messages[1].text


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("7", (Message("user", "x"),)), "row 7: a guard's row needs answer"),
        (Case("7", (Message("user", "x"),), answer="maybe"), "needs answer 1"),
        (Case("7", (Message("user", "REDACTED"),), answer=1), "row 7 is redacted"),
        (Case("7", (Message("user", "x"),), "aegis/nothing", 1), "has no category 'aegis/nothing'"),
        (Case("7", (Message("tool", "x"),), answer=1), "role tool"),
    ],
)
def test_rows_that_are_refused(case, message):
    with pytest.raises(InputError, match=message):
        lesson(case, AEGIS1, load_policy("aegis"), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"), [({"family": "llama_guard3"}, "written here"), ({"drop": 1.0}, "drop must be")]
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        guard_sft(None, [row(1, 1)], tokenizer=None, rng=np.random.default_rng(0), **options)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen2", "gpt_neox"])
def test_every_architecture_learns_a_little(name):
    """LoRA on a tiny random model: the loss of the right answers falls, the tokenizer's own template is as it was."""
    from davylamp.models.fit import answer_loss, encode

    model, tokenizer, rng = tiny.guard(name, initializer_range=0.1), tiny.guard_tokenizer(), np.random.default_rng(0)
    rows = [
        row(i, i % 2, policy=[["weapon", "a weapon"]], violated=["custom/weapon"] if i % 2 else []) for i in range(8)
    ]
    lessons = [lesson(case, AEGIS1, load_policy("aegis"), np.random.default_rng(1)) for case in rows]
    before_template, lr = tokenizer.chat_template, 5e-3 if name == "gpt_neox" else 2e-2
    pairs, _ = encode(model, tokenizer, lessons, None)

    def loss(trained):
        with torch.inference_mode():
            return float(answer_loss(trained, tokenizer, pairs))

    before = loss(model)
    trained = guard_sft(
        model, rows, tokenizer=tokenizer, rng=rng, family="aegis1", steps=12, batch=8, rank=8, lr=lr, dropout=0.0
    )
    assert loss(trained) < 0.9 * before and tokenizer.chat_template == before_template
