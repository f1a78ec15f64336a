"""Pictures through an hf target: pixels of the checkpoint's own processor, batches with and without pictures, what is refused."""

import asyncio
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")
torch.set_num_threads(1)

from davylamp.core.errors import InputError  # noqa: E402
from davylamp.core.nouns import Message  # noqa: E402
from davylamp.models import organism, pictures, vision, world  # noqa: E402
from davylamp.models.eyes import Eyes  # noqa: E402
from davylamp.models.hf import load  # noqa: E402

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}, "do_center_crop": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA whose tower is loud enough that two pictures get two replies."""
    out = tmp_path_factory.mktemp("llava")
    model, tok = organism.load("aligned")
    vl = vision.build(model, tok, rng=np.random.default_rng(0))
    with torch.no_grad():
        vl.model.multi_modal_projector.linear_2.weight.mul_(60.0)
    vl.save_pretrained(out)
    tok.save_pretrained(out)
    transformers.CLIPImageProcessorPil(**HALF).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def target(folder):
    return load(str(folder))


def ask(target, conversations):
    async def go():
        return await asyncio.gather(*(target(m, max_tokens=8) for m in conversations), return_exceptions=True)

    return asyncio.run(go())


def test_replies_are_those_of_the_toys_own_way_of_asking(target):
    """`vision.ask` scales pixels by hand and knows no image processor: two ways to the same replies, in one mixed batch."""
    rng = np.random.default_rng(1)
    rows = [case.messages[:-1] for case in vision.picture_rows(12, rng)]
    rows += [case.messages for case in world.cases("benign", 4, rng, style="mixed")]
    got = ask(target, rows)
    assert [reply.text for reply in got] == [
        reply.text for reply in vision.ask(target.model, target.tokenizer, rows, max_tokens=8)
    ]
    assert len({reply.text for reply in got[:12]}) > 1  # what is shown is seen
    assert ask(target, [rows[0]])[0].text == got[0].text


def test_pixels_and_places(target, folder):
    eyes = Eyes(target.model, target.tokenizer, str(folder))
    turn = vision.picture_rows(1, np.random.default_rng(2))[0].messages[0]
    ids, shown = eyes.encode([turn])
    assert np.allclose(shown[0], pictures.pixels(turn.media[0], 16), atol=1e-6)
    assert ids.count(eyes.token) == 4 and ids == vision.encode(target.model, target.tokenizer, [turn])[0]
    assert eyes.encode([Message("user", "what is this ?", media=turn.media)])[0] == ids  # no mark: shown first


def test_a_template_that_loops_over_parts_is_spoken_to_in_parts(target, folder):
    eyes = Eyes(target.model, target.tokenizer, str(folder))
    plain = target.tokenizer.chat_template
    turn = vision.picture_rows(1, np.random.default_rng(2))[0].messages[0]
    try:
        target.tokenizer.chat_template = (
            "{% for m in messages %}{% for p in m['content'] if p is mapping %}"
            "{{ '<image> ' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
        )
        assert eyes.encode([turn])[0][:4] == [eyes.token] * 4
        target.tokenizer.chat_template = "{% for m in messages %}what is this ?{% endfor %}"
        with pytest.raises(InputError, match="one <image> for each"):
            eyes.encode([turn])
    finally:
        target.tokenizer.chat_template = plain


def test_what_cannot_be_shown_is_said(target, folder, tmp_path):
    blank = pictures.blank()
    got = ask(
        target,
        [
            (Message("user", "<image> <image> what is this ?", media=(blank,)),),
            (Message("user", "what is this ?", media=("none.png",)),),
            (Message("user", "what is this ?", media=("https://host/a.png",)),),
            (Message("user", "what is this ?", media=(blank,)),),
        ],
    )
    for problem, words in zip(got, ("2 placeholders", "no such file", "local files"), strict=False):
        assert isinstance(problem, InputError) and words in str(problem)
    assert isinstance(got[3], Message)  # the bad ones fail alone
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="preprocessor_config"):
        Eyes(target.model, target.tokenizer, str(bare))
    transformers.CLIPImageProcessorPil(**{**HALF, "size": {"height": 8, "width": 8}}).save_pretrained(bare)
    with pytest.raises(InputError, match=r"\(3, 8, 8\)"):
        Eyes(target.model, target.tokenizer, str(bare)).encode([Message("user", "", media=(blank,))])
