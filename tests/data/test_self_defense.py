"""Self-Defence: the two stages with a writer that makes planted mistakes, the checks of its lines, and what stops it."""

import asyncio
import json

import numpy as np
import pytest

from davylamp.core.errors import InputError, RunError
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import Dropped
from davylamp.data.self_defense import Pair, augment, self_defense, translate
from davylamp.studies.multilingual import dictionary, english_pairs, translated

WRITER = """
import json, re
CALLS = []
WORDS = "amber birch cedar dune ember fjord grove heath inlet jetty knoll larch marsh north ochre plain quartz ridge slate tarn".split()

def write(messages, *, seed=0, **settings):
    text = messages[-1].text
    CALLS.append(text)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    if text.startswith("Translate"):
        out = []
        for row in lines:
            if "{lost}" in row["input"]:
                continue
            row["input"], row["output"] = ("\\u4f60\\u597d" * 3 + str(row["index"]) for _ in range(2))
            out.append(row)
        return "\\n".join(json.dumps(row) for row in out)
    n, start = int(re.search(r"Write (\\d+) more", text)[1]), int(re.search(r"from (\\d+)", text)[1])
    safe = "is_safe (true)" in text
    rows = []
    for i in range(start, start + n):
        words = " ".join(WORDS[(i * k + len(CALLS)) % 20] for k in (1, 3, 7, 9, 11))
        rows.append({"index": i, "is_safe": safe, "input": f"{words} {i}", "output": f"reply about {words}"})
    return "Here you are:\\n" + "\\n".join(json.dumps(row) for row in rows)
"""


def seeds(n=4):
    return [
        Case(f"{label}{i}", (Message("user", f"{label} seed number {i} zz"), Message("assistant", "a reply")), meta={"label": label})
        for label in ("safe", "unsafe")
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture
def writer(tmp_path):
    path = tmp_path / "writer.py"
    path.write_text(WRITER)
    return f"python/{path}:write"


def made(writer, rows=None, **options):
    return list(
        self_defense(
            rows or seeds(),
            rng=np.random.default_rng(0),
            model=writer,
            **{"pairs": 20, "languages": ("zh",), **options},
        )
    )


def test_both_stages(writer):
    found = made(writer)
    rows = [item for item in found if isinstance(item, Case)]
    by = {language: [row for row in rows if row.meta["language"] == language] for language in ("en", "zh")}
    assert [len(part) for part in by.values()] == [20, 20]
    assert sum(row.meta["label"] == "unsafe" for row in by["en"]) == 6
    assert {row.group for row in by["zh"]} == {row.group for row in by["en"]}  # translated from English, pair by pair
    assert all(row.messages[-1].role == "assistant" for row in rows)


def answering(*texts):
    said = iter(texts)

    async def ask(prompt):
        return next(said, "")

    return ask


def line(i, text, is_safe=False, output="because", **more):
    return json.dumps({"index": i, "is_safe": is_safe, "input": text, "output": output, **more})


def test_each_fault_has_its_reason():
    texts = [
        line(1, "quite a new thing"),
        line(2, "quite a new thing!"),
        line(3, "unsafe seed number 1 zz"),
        line(4, "another matter entirely", is_safe=True),
        line(5, "words without an answer", output=" "),
        line(6, "too many keys", extra=1),
        '{"index": 7, "is_safe": "no", "input": "x", "output": "y"}',
        '{"index": 8, broken',
        "no object at all",
        line(9, "one further subject"),
    ]
    shelf = {False: [Pair(0, False, f"unsafe seed number {i} zz", "r") for i in range(3)], True: []}
    options = {"pairs": 2, "unsafe_share": 1.0, "batch": 10, "shots": 3}
    kept, lost = asyncio.run(
        augment(shelf, answering("\n".join(texts)), {"unsafe": "{shown}"}, rng=np.random.default_rng(0), **options)
    )
    assert [pair.input for pair in kept] == ["quite a new thing", "one further subject"]
    assert [item.reason for item in lost] == ["duplicate", "copied", "label", "empty", "keys", "label", "not_json"]
    assert all(isinstance(item, Dropped) for item in lost)


def test_translations_are_checked():
    pairs = [Pair(i, True, f"hello {i}", "fine") for i in range(5)]
    told = "\n".join(
        [
            line(0, "你好你好", True, "很好"),
            line(1, "still English", True, "fine"),
            line(2, "", True, "很好"),
            line(9, "你好", True, "很好"),
            line(0, "又一次", True, "很好"),
        ]
    )
    kept, lost = asyncio.run(translate(pairs, answering(told), {"translate": "{pairs}"}, "zh", batch=5))
    assert [pair.index for pair in kept] == [0]
    assert sorted(item.reason for item in lost) == ["empty", "keys", "keys", *["language"], *["untranslated"] * 4]


def test_too_few_good_pairs_stop_it(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def write(messages, **settings):\n    return 'I would rather not.'\n")
    with pytest.raises(RunError, match=r"English: 0 of 20"):
        made(f"python/{path}:write")


def test_too_few_translations_stop_it(writer, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def write(messages, **settings):\n    return ''\n")
    with pytest.raises(RunError, match=r"Chinese: 0 of 20.*untranslated 20"):
        made(writer, translator=f"python/{path}:write")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pairs": 0}, "1 or more"),
        ({"unsafe_share": 1.5}, "in \\[0, 1\\]"),
        ({"languages": ()}, "each once"),
        ({"languages": ("en",)}, "other than en"),
        ({"shots": 9}, "4 unsafe seeds, and 9"),
    ],
)
def test_bad_options(writer, options, says):
    with pytest.raises(InputError, match=says):
        made(writer, **options)


def test_seeds_need_a_label_and_a_reply(writer):
    with pytest.raises(InputError, match="seed x: expected"):
        made(writer, rows=[Case("x", (Message("user", "hi"),))])


def test_a_worse_dictionary_translates_worse():
    """The share of right words falls with the share of wrong words in the dictionary."""
    from davylamp.models import world

    pairs, table = english_pairs(20, 0.3, np.random.default_rng(0)), dictionary("B")
    right = [" ".join(table.get(word, word) for word in pair.input.split()) for pair in pairs]
    kept = []
    for share in (0.0, 0.1, 0.3, 0.5, 1.0):
        rng = np.random.default_rng(1)
        wrong = dictionary("B", rng)
        mixed = {word: wrong[word] if rng.random() < share else table[word] for word in table}
        found = translated(pairs, "B", mixed)
        words = [(a == b) for pair in found for a, b in zip(pair.input.split(), right[pair.index].split(), strict=True)]
        kept.append(np.mean(words))
    assert kept == sorted(kept, reverse=True) and kept[0] == 1
    assert right[0] == world.translate(pairs[0].input, "B")
