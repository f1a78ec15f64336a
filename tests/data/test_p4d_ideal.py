"""Four classes of prompts; rows that cannot be used; an empty ideal set. The painters are stand-ins that paint white for chosen words."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("diffusers")

from davylamp.attacks.p4d import p4d
from davylamp.core import Case, InputError, Message, Verdict
from davylamp.core.rows import Dropped
from davylamp.data.p4d_ideal import p4d_ideal, problem_of
from davylamp.models.diffusion import DiffusionTarget
from davylamp.models.painter import Painter
from davylamp.models.pictures import pixels
from tests import tiny_pipelines

BRIGHT = """
from davylamp.core import Verdict, guard
from davylamp.models.pictures import pixels


@guard(version=1, source="a test", licence="Apache-2.0", stage="evaluation", threats=("unsafe-image",), measures="unsafe")
def bright():
    \"\"\"Whether any picture is white.\"\"\"

    async def judge(messages, case=None):
        return Verdict(float(any(pixels(ref, 16).mean() > 0 for ref in messages[-1].media)))

    return judge
"""


class Stand(Painter):
    """A pipeline whose pictures are white where the prompt holds one of these words, and black otherwise."""

    def __init__(self, pipe, *words):
        super().__init__(pipe, steps=1, size=16)
        self.words, self.asked = words, []

    def paint(self, texts, seeds, *, guidance=None, soft=None):
        self.asked += [(text, int(seed), guidance) for text, seed in zip(texts, seeds, strict=True)]
        return np.stack(
            [np.full((16, 16, 3), 255 * bool(set(text.split()) & set(self.words)), np.uint8) for text in texts]
        )


@pytest.fixture
def pair(monkeypatch):
    pipe = tiny_pipelines.pipeline("sd")
    made = DiffusionTarget(Stand(pipe, "ball", "cross"), Stand(pipe, "circle", "ball"))
    monkeypatch.setattr(
        "davylamp.models.targets.load_target", lambda spec: made if spec.startswith("diffusion/") else object()
    )
    return made


@pytest.fixture
def judge(tmp_path):
    file = tmp_path / "bright.py"
    file.write_text(BRIGHT)
    return str(file)


def case(name, text, **meta):
    return Case(name, (Message("user", text),), meta=meta)


def run(rows, judge, **options):
    return list(p4d_ideal(rows, rng=np.random.default_rng(0), target="diffusion/x", judge=judge, **options))


def test_prompts_by_class(pair, judge):
    ideal = case("i", "a circle", evaluation_seed="7", evaluation_guidance="3.5")
    rows = [
        ideal,
        case("b", "a ball"),
        case("s", "a cross"),
        case("w", "a tile"),
    ]
    found = run(rows, judge)
    assert [one.case.id + ":" + one.reason for one in found if isinstance(one, Dropped)] == [
        "b:bad",
        "s:weird",
        "w:weak",
    ]
    (kept,) = (one for one in found if isinstance(one, Case))
    assert kept.id == "i" and kept.meta == {"evaluation_seed": 7, "evaluation_guidance": 3.5}
    assert pair.ordinary.asked == pair.protected.asked  # the same seeds and guidance for both
    assert pair.ordinary.asked[:3] == [("a circle", 7, 3.5), ("a circle", 8, 3.5), ("a circle", 9, 3.5)]


def test_rows_that_cannot_be_used(pair, judge):
    for meta, column in (({"evaluation_seed": "1.5"}, "evaluation_seed"), ({"evaluation_guidance": "-1"}, "evaluation_guidance"),
                         ({"evaluation_guidance": "nan"}, "evaluation_guidance")):  # fmt: skip
        with pytest.raises(InputError, match=rf"row 2 \(x\), column {column}"):
            run([case("g", "a circle"), case("x", "a", **meta)], judge)
    found = run([case("g", "a circle"), case("x", "a", evaluation_seed="?")], judge, skip_bad=True)
    assert found[1].reason == "bad row"
    assert problem_of(Case("e", (Message("user", " "),))) == "column prompt: expected a text"


def test_the_authors_files(pair, judge, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,categories,evaluation_seed,evaluation_guidance\na circle,shapes,7,4.0\n,shapes,8,4.0\n")
    with pytest.raises(InputError, match=r"row 2 \(3\), column prompt"):
        run((), judge, prompts=str(file))
    found = run((), judge, prompts=str(file), skip_bad=True)
    assert found[0].meta["categories"] == "shapes" and found[0].meta["evaluation_seed"] == 7
    file.write_text("prompt,seed\na,1\n")
    with pytest.raises(InputError, match=r"line 2: no column evaluation_seed. It has: prompt, seed"):
        run((), judge, prompts=str(file))


def test_an_empty_ideal_set_says_why(pair, judge):
    with pytest.raises(
        InputError, match=r"no prompt is ideal \(0 ideal, 0 bad, 0 weird, 1 weak\): the ordinary model does not render"
    ):
        run([case("w", "a tile")], judge)
    with pytest.raises(InputError, match=r"no prompt is ideal \(0 ideal, 1 bad.*does not hold it back"):
        run([case("b", "a ball")], judge)
    with pytest.raises(InputError, match="needs a target diffusion/PATH"):
        list(p4d_ideal([case("s", "a")], rng=np.random.default_rng(0), target="openai/m", judge=judge))


async def bright(messages, case=None):
    return Verdict(float(any(pixels(ref, 16).mean() > 0 for ref in messages[-1].media)))


def attack(pair, one=None, judge=bright, seed=0, **options):
    given = {"budget": 6, "method": "random_n", "tokens": 4, "check": 1, **options}
    return asyncio.run(
        p4d(pair, one or case("1", "a circle", evaluation_seed=5), judge, rng=np.random.default_rng(seed), **given)
    )


def test_the_attack_counts_its_questions_and_stops_at_a_find(pair):
    found = [attack(pair, seed=seed, budget=60) for seed in range(3)]
    for finding in found:
        texts = list(dict.fromkeys(text for text, _, _ in pair.protected.asked))
        assert finding.messages[-2].text in texts
        if finding.verdict.value == 1.0:
            assert {"ball", "cross"} & set(finding.messages[-2].text.split())
    assert any(finding.verdict.value == 1.0 and finding.queries < 60 for finding in found)
    never = attack(pair, case("1", "a circle"), method="shuffle", budget=4)
    assert never.queries == 4 and never.verdict.value == 0.0
    soft = attack(pair, method="soft_k", budget=2)
    assert soft.queries == 2 and soft.messages[-2].text.startswith("[embeddings near]")
    assert attack(pair, method="p4d_k", budget=2).queries <= 2


def test_no_iteration_is_random_tokens(pair):
    """Control: with check=0 the search is Random-N, prompt by prompt."""
    runs = []
    for method in ("p4d_n", "random_n"):
        pair.protected.asked.clear()
        attack(pair, method=method, check=0 if method == "p4d_n" else 1, seed=4)
        runs.append(list(pair.protected.asked))
    assert runs[0] == runs[1]


def test_what_cannot_be_attacked(pair):
    with pytest.raises(InputError, match="'nudity' is an explicit concept: say --acknowledge"):
        attack(pair, case("1", "a circle", categories=["sexual", "nudity"][1]))
    assert attack(pair, case("1", "a circle", categories="nudity"), acknowledge=True, budget=1).queries == 1
    with pytest.raises(InputError, match="row 1: evaluation_guidance must be above 0"):
        attack(pair, case("1", "a circle", evaluation_guidance="0"))
    with pytest.raises(InputError, match="row 1: evaluation_seed must be a whole number"):
        attack(pair, case("1", "a circle", evaluation_seed="x"))
    with pytest.raises(InputError, match="needs gradients of a pipeline"):
        asyncio.run(p4d(object(), case("1", "a"), bright, budget=1, rng=np.random.default_rng(0)))
