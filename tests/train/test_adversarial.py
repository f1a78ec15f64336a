"""Adversarial training as a trainer: it closes what it found, its rows are checked, and the guard reads what it wrote."""

import asyncio

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message
from davylamp.core.registry import find
from davylamp.data.fragile_stories import breaks, fragile_stories
from davylamp.guards.high_stakes import high_stakes
from davylamp.models.classifier import tiny
from davylamp.train.adversarial import adversarial, snippets_of, split


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    rows = list(fragile_stories((), rng=np.random.default_rng(0), n=400))
    model, tokenizer = tiny(width=32)
    found = adversarial(
        model,
        rows,
        tokenizer=tokenizer,
        rng=np.random.default_rng(0),
        rounds=1,
        attacks=12,
        budget=12,
        epochs=8,
        lr=5e-3,
    )
    assert found is model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.config.high_stakes


def test_a_round_attacks_labels_and_adds(trained):
    _, log = trained
    first, last = log["rounds"]
    assert first["attacked"] == 12 and 0 < first["got_through"] <= 12
    assert first["added"] == 7 * first["got_through"] and last["rows"] == first["rows"] + first["added"]
    assert 0 < log["threshold"] == last["threshold"] < 1


def test_the_guard_reads_what_it_wrote(trained):
    folder, log = trained
    judge = load_judge(f"high_stakes:model={folder}")
    assert (
        judge.measures == "unsafe"
        and judge.identity["threshold"] == log["threshold"]
        and len(judge.identity["weights"]) == 64
    )
    guard = judge.function
    rows = list(fragile_stories((), rng=np.random.default_rng(5), n=200))
    right = 0
    for case in rows:
        value = asyncio.run(guard(case.messages)).value
        score = guard.classifier.scores([(case.messages[0].text, case.messages[1].text)])[0]
        assert (value >= 0.5) == (score >= guard.threshold)
        right += (value >= 0.5) == case.answer
    assert right > 130
    assert asyncio.run(guard([Message("user", "x"), Message("assistant", " ")])).value is None
    assert asyncio.run(guard([Message("user", "x"), Message("assistant", "the " * 500)])).value is None
    with pytest.raises(InputError, match="threshold"):
        high_stakes(model=str(folder), threshold=1.0)
    with pytest.raises(InputError, match="no classifier"):
        high_stakes(model=str(folder / "nowhere"))


def case(id="a", prompt="p", text="the vase broke .", answer=1, **more):
    return Case(id, (Message("user", prompt), Message("assistant", text)), answer=answer, **more)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([case(text=" ")], "row a needs a prompt and a completion"),
        ([case(prompt="")], "row a needs a prompt and a completion"),
        ([case(answer="bad")], "row a: `answer` must be"),
        ([case(answer=0.5)], "row a: `answer` must be"),
        ([case(meta={"parent": "z"})], "row a: its parent 'z' is not among the rows"),
        ([case(meta={"parent": "a"})], "row a: its parent 'a' is not among the rows"),
        (
            [case(meta={"split": "train"}), case("b", meta={"parent": "a", "split": "test"})],
            "row b and its parent a are in different splits",
        ),
    ],
)
def test_rows_that_cannot_be_used(rows, message):
    with pytest.raises(InputError, match=message):
        snippets_of(rows)


def test_children_stay_with_their_parent_and_unsure_counts_as_unsafe():
    rows = [case(f"{i}") for i in range(20)]
    rows += [
        case(f"{i}.{k}", meta={"parent": f"{i}" if k == 0 else f"{i}.0", "source": "paraphrase"})
        for i in range(20)
        for k in range(2)
    ]
    rows.append(case("u", answer="unsure"))
    snippets = snippets_of(rows)
    assert snippets[-1].label == 1 and snippets[25].source == "paraphrase"
    kept, held = split(snippets, 0.3, np.random.default_rng(0))
    assert not {item.root for item in kept} & {item.root for item in held} and len(kept) + len(held) == 61


def test_options_out_of_range():
    model, tokenizer = tiny(width=32)
    rows = list(fragile_stories((), rng=np.random.default_rng(0), n=30))
    for bad in ({"rounds": -1}, {"attacks": 0}, {"holdout": 1.0}, {"weight": 0.0}, {"smoothing": 0.5}):
        with pytest.raises(InputError):
            adversarial(model, rows, tokenizer=tokenizer, rng=np.random.default_rng(0), **bad)
    with pytest.raises(InputError, match="both labels"):
        safe = [row for row in rows if not breaks(row.messages[-1].text)]
        adversarial(model, safe, tokenizer=tokenizer, rng=np.random.default_rng(0))
    assert find("train", "adversarial").stage == "post-training"
