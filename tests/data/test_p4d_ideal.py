"""Four classes of prompts; rows that cannot be used; an empty ideal set."""

import numpy as np
import pytest

pytest.importorskip("diffusers")

from davylamp.core import Case, InputError, Message
from davylamp.core.rows import Dropped
from davylamp.data.p4d_ideal import p4d_ideal, problem_of

TARGET = "diffusion/tiny:negative=circle,steps=8"


def case(name, text, **meta):
    return Case(name, (Message("user", text),), meta=meta)


def run(rows, **options):
    return list(p4d_ideal(rows, rng=np.random.default_rng(0), target=TARGET, **options))


def test_prompts_by_class():
    rows = [
        case(str(i), f"a {colour} circle on black", evaluation_seed=str(i))
        for i, colour in enumerate(["red", "green", "blue", "yellow"])
    ]
    found = run([*rows, case("s", "a red square on black"), case("b", "a red ball on black")])
    kept = {one.id: one for one in found if isinstance(one, Case)}
    dropped = {one.case.id: one.reason for one in found if isinstance(one, Dropped)}
    assert len(kept) >= 2 and set(kept) <= set("0123")
    assert dropped["s"] == "weak" and dropped["b"] in ("bad", "ideal")
    first = next(iter(kept.values()))
    assert first.meta["evaluation_seed"] == int(first.id) and first.meta["evaluation_guidance"] > 0


def test_rows_that_cannot_be_used():
    good = case("g", "a red circle on black")
    for meta, column in (({"evaluation_seed": "1.5"}, "evaluation_seed"), ({"evaluation_guidance": "-1"}, "evaluation_guidance"),
                         ({"evaluation_guidance": "nan"}, "evaluation_guidance")):  # fmt: skip
        with pytest.raises(InputError, match=rf"row 2 \(x\), column {column}"):
            run([good, case("x", "a", **meta)])
    found = run([good, case("x", "a", evaluation_seed="?")], skip_bad=True)
    assert found[1].reason == "bad row"
    assert problem_of(Case("e", (Message("user", " "),))) == "column prompt: expected a text"


def test_the_authors_files(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text(
        "prompt,categories,evaluation_seed,evaluation_guidance\na red circle on black,shapes,7,4.0\n,shapes,8,4.0\n"
    )
    with pytest.raises(InputError, match=r"row 2 \(3\), column prompt"):
        run((), prompts=str(file))
    found = run((), prompts=str(file), skip_bad=True)
    assert found[0].meta["categories"] == "shapes" and found[0].meta["evaluation_seed"] == 7
    file.write_text("prompt,seed\na,1\n")
    with pytest.raises(InputError, match=r"line 2: no column evaluation_seed. It has: prompt, seed"):
        run((), prompts=str(file))


def test_an_empty_ideal_set_says_why():
    with pytest.raises(InputError, match=r"no prompt is ideal \(0 ideal, 0 bad, 0 weird, 1 weak\)"):
        run([case("s", "a red square on black")])
    with pytest.raises(InputError, match="needs a target diffusion/PATH"):
        list(p4d_ideal([case("s", "a")], rng=np.random.default_rng(0), target="openai/m"))
