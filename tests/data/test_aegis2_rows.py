"""Refusal augmentation, topic blend, redacted texts and the data card; what cannot be used is dropped with its reason."""

import json

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import Dropped
from davylamp.data.aegis2 import data_card, key_of, propose_categories, refusal_augmentation, rehydrate, topic_blend

RNG = np.random.default_rng


def row(number, answer=1, text="open the lamp", **meta):
    return Case(
        str(number), (Message("user", f"{text} {number}"),), "aegis2/threat" if answer else None, answer, meta=meta
    )


def test_refusals_are_safe_replies_to_unsafe_prompts():
    rows = [row(i, i % 2) for i in range(200)] + [
        Case("r", (Message("user", "x"), Message("assistant", "y")), answer=1)
    ]
    out = list(refusal_augmentation(rows, rng=RNG(0), share=1.0))
    more = [case for case in out if case.id.endswith("-refused")]
    assert len(more) == 100 and len(out) == 301
    for case in more:
        assert case.answer == 0 and case.messages[-1].role == "assistant" and case.meta["prompt_unsafe"]
        assert case.meta["response_label_source"] == "refusal_data_augmentation"
    assert list(refusal_augmentation(rows, rng=RNG(0), share=0.0)) == rows
    some = [case for case in refusal_augmentation(rows, rng=RNG(1), share=0.3) if case.id.endswith("-refused")]
    assert 15 < len(some) < 45
    for options in ({"share": 1.1}, {"share": -0.1}, {"refusals": "nowhere.txt"}):
        with pytest.raises(InputError):
            list(refusal_augmentation(rows, rng=RNG(0), **options))


def topics(path, rows):
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return str(path)


TOPIC = {
    "domain": "travel",
    "system_instruction": "Help with trains only.",
    "conversation": [
        {"role": "user", "content": "Is there a train?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "When?"},
    ],
    "distractors": [{"distractor": "What is a good soup?"}, "Sing!", ""],
}


def test_topic_blend(tmp_path):
    file = topics(tmp_path / "t.jsonl", [TOPIC, {**TOPIC, "conversation": [{"role": "assistant", "content": "Hi"}]}])
    out = list(topic_blend([row(i) for i in range(200)], rng=RNG(0), topics=file, share=0.33))
    dropped = [item for item in out if isinstance(item, Dropped)]
    assert sorted(item.reason for item in dropped) == ["an empty distractor", "no user turn"]
    cases = [item for item in out if isinstance(item, Case)]
    mixed = [case for case in cases if case.id.startswith("topic-")]
    assert len(mixed) / len(cases) == pytest.approx(0.33, abs=0.01) and len({case.id for case in cases}) == len(cases)
    for case in mixed:
        assert case.messages[-1].role == "user" and case.meta["policy"][0][0] == "off topic for travel"
        assert (case.answer == 1) == bool(case.meta["violated"])
    assert {case.answer for case in mixed} == {0, 1}
    assert len(list(topic_blend([row(0)], rng=RNG(0), topics=file, share=0.0))) == 3
    for share in (-0.1, 0.95):
        with pytest.raises(InputError, match="share of topic rows"):
            list(topic_blend([row(0)], rng=RNG(0), topics=file, share=share))
    with pytest.raises(InputError, match="no topic dialogue"):
        list(topic_blend([row(0)], rng=RNG(0), topics=topics(tmp_path / "e.jsonl", [{**TOPIC, "conversation": []}])))
    with pytest.raises(InputError, match="line 1"):
        list(topic_blend([row(0)], rng=RNG(0), topics=topics(tmp_path / "w.jsonl", [{"domain": "x"}])))


def test_redacted_texts_come_back_or_stay_out(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"id": "7", "text": "the text itself"}\n')
    rows = [
        row(0),
        *(Case(str(i), (Message("user", "REDACTED"),), answer=1, meta={"reconstruction_id": i}) for i in (7, 8)),
    ]
    out = list(rehydrate(rows, rng=RNG(0), texts=str(file)))
    assert out[0] == rows[0] and out[1].messages[0].text == "the text itself" and isinstance(out[2], Dropped)
    assert list(rehydrate(rows, rng=RNG(0), texts=str(file), lenient=True))[2] == rows[2]
    file.write_text('{"id": "7"}\n')
    with pytest.raises(InputError, match="id and text"):
        list(rehydrate(rows, rng=RNG(0), texts=str(file)))


def test_the_card_counts():
    rows = [
        row(1, 1, source="a", violated=["aegis2/threat", "aegis2/violence"]),
        row(2, 0, source="b"),
        Case("3", (Message("user", "REDACTED"),), meta={"source": "b"}),
    ]
    card = data_card(rows, licences={"a": "MIT"})
    assert (
        "3 rows: 3 prompts alone, 0 with a reply; 1 unsafe, 1 safe, 1 without a label; 1 redacted; 3 different prompts."
        in card
    )
    assert "| aegis2/threat, aegis2/violence | 1 |" in card and "| a | MIT |" in card and "| b | unknown |" in card
    assert key_of(row(1)) == key_of(Case("x", (Message("user", "OPEN  the lamp 1"),)))


def test_proposals_from_free_text():
    texts = [
        "Self promotion",
        "self-promotion of a shop",
        "promotion",
        "Spoilers",
        "spoiler",
        "",
        "  ",
        "one of its kind",
    ]
    found = propose_categories(texts)
    assert found[0][1] == 3 and len(found) == 2
    assert propose_categories([]) == []
