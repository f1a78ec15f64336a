"""The tiny vision-language model: it is its language model on text, it is trained and asked with pictures, bad pictures are said."""

import base64
import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
torch.set_num_threads(1)

from davylamp.core.errors import InputError  # noqa: E402
from davylamp.core.nouns import Case, Message  # noqa: E402
from davylamp.models import organism, pictures, vision, world  # noqa: E402
from davylamp.models.hf import generate_batch  # noqa: E402


@pytest.fixture(scope="module")
def pair():
    return organism.load("aligned")


@pytest.fixture(scope="module")
def vl(pair):
    return vision.build(*pair, rng=np.random.default_rng(0))


def rng():
    return np.random.default_rng(1)


# --- the model --------------------------------------------------------------------------------------------------------------
def test_on_text_it_is_its_language_model(pair, vl):
    model, tok = pair
    ids = tok("what is the colour of this ?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(vl(input_ids=ids).logits, model(input_ids=ids).logits)
    back = vision.text_model(vl, model)
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), model.parameters(), strict=True))


def test_equal_generators_build_equal_models_and_leave_torch_alone(pair):
    state = torch.get_rng_state()
    one, two = (vision.build(*pair, rng=np.random.default_rng(5)) for _ in range(2))
    other = vision.build(*pair, rng=np.random.default_rng(6))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_a_tokenizer_without_the_mark_is_refused(pair):
    from tests import tiny

    with pytest.raises(InputError, match="<image>"):
        vision.build(pair[0], tiny.tokenizer(words=["<unk>", "a"], marks=False), rng=rng())


def test_a_batch_gives_each_row_what_it_gets_alone(pair, vl):
    """Rows with and without pictures, of different lengths, in one padded batch, against one row at a time."""
    _, tok = pair
    rows = [
        *vision.picture_rows(3, rng()),
        Case("t", (Message("user", "hello"), Message("assistant", "hello ! how can i help ?"))),
    ]
    encoded = vision.encode_rows(vl, tok, rows)
    with torch.no_grad():
        together = vision.losses_of(vl, vision.batch_of(vl, tok, encoded))
        alone = torch.cat([vision.losses_of(vl, vision.batch_of(vl, tok, [row])) for row in encoded])
    assert torch.allclose(together, alone, atol=1e-4)


def test_asking_is_what_generating_one_by_one_says(pair, vl):
    """Long and short prompts, with pictures and without, in one batch; and against the language model's own greedy reply."""
    model, tok = pair
    asks = world.cases("benign", 6, rng(), style="mixed")
    rows = [case.messages[:-1] for case in vision.picture_rows(4, rng())] + [(Message("user", "hello"),)]
    rows += [vision.with_picture(case, pictures.blank()).messages for case in asks] + [case.messages for case in asks]
    together = [reply.text for reply in vision.ask(vl, tok, rows, max_tokens=12)]
    assert together == [vision.ask(vl, tok, [row], max_tokens=12)[0].text for row in rows]
    assert together[-6:] == [reply.text for reply in generate_batch(model, tok, rows[-6:], max_tokens=12)]
    assert len(set(together)) > 3


def test_several_pools_give_the_gradient_of_one_common_batch(pair, vl):
    """Pools run one by one; the loss is the mean over the answers' tokens of all of them, as in one padded batch."""
    _, tok = pair
    pools = [vision.picture_rows(1, rng()), [Case("t", (Message("user", "hello"), Message("assistant", "hello !")))]]
    both = vision.batch_of(vl, tok, vision.encode_rows(vl, tok, [row for rows in pools for row in rows]))
    with torch.no_grad():
        mean = float(vision.losses_of(vl, both).sum() / int((both["labels"] != vision.IGNORED).sum()))
    found = vision.adapt(copy.deepcopy(vl), [(p, 1) for p in pools], tokenizer=tok, rng=rng(), steps=1, lr=1e-4)
    assert found.losses[0] == pytest.approx(mean, rel=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------------
def test_stage_1_moves_the_projector_and_nothing_else(pair, vl):
    _, tok = pair
    model = copy.deepcopy(vl)
    found = vision.adapt(
        model, [(vision.picture_rows(16, rng()), 8)], tokenizer=tok, rng=rng(), steps=3, lr=1e-2, part="projector"
    )
    moved = {
        name for (name, p), q in zip(model.named_parameters(), vl.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert moved and all("multi_modal_projector" in name for name in moved)
    assert found.losses[-1] < found.losses[0] and not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_no_steps_and_no_rate_change_nothing(pair, vl):
    _, tok = pair
    for steps, lr in ((0, 1e-3), (2, 0.0)):
        model = copy.deepcopy(vl)
        vision.adapt(model, [(vision.picture_rows(8, rng()), 4)], tokenizer=tok, rng=rng(), steps=steps, lr=lr)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), vl.parameters(), strict=True))


def test_checkpoints_are_seen_where_they_were_asked_for(pair, vl):
    _, tok = pair
    found = vision.adapt(
        copy.deepcopy(vl), [(vision.picture_rows(8, rng()), 4)], tokenizer=tok, rng=rng(), steps=3, lr=1e-3, at=(1, 3),
        watch=lambda step, model: (step, model.training),
    )  # fmt: skip
    assert found.seen == {1: (1, False), 3: (3, False)}


def test_the_preference_loss_is_the_published_one(pair, vl):
    """Equation 7 of arXiv:2305.18290, from log-probabilities that are summed by hand."""
    _, tok = pair
    asks = world.cases("hazards", 2, rng())
    rows = [
        Case(c.id, c.messages, meta={"chosen": "i can not help with that .", "rejected": str(c.answer)}) for c in asks
    ]
    pairs = vision._pairs(vl, tok, rows)
    moved = copy.deepcopy(vl)
    with torch.no_grad():
        for p in moved.model.language_model.parameters():
            p.mul_(1.01)

    def logp(model, case, reply):
        prompt, answer, _ = vision.encode(model, tok, case.messages, reply)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(answer))

    wanted = []
    for case in rows:
        gaps = [logp(m, case, case.meta["chosen"]) - logp(m, case, case.meta["rejected"]) for m in (moved, vl)]
        wanted.append(np.log1p(np.exp(-0.5 * (gaps[0] - gaps[1]))))
    with torch.no_grad():
        got = float(vision._preference_loss(moved, tok, pairs, 0.5))
    assert got == pytest.approx(np.mean(wanted), abs=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------------
def test_training_refuses_empty_pools_and_half_preferences(pair, vl):
    _, tok = pair
    rows = vision.picture_rows(4, rng())
    with pytest.raises(InputError, match="empty"):
        vision.adapt(vl, [(rows, 2), ([], 2)], tokenizer=tok, rng=rng(), steps=1, lr=1e-3)
    half = [Case("p", (Message("user", "hello"),), meta={"chosen": "hello !", "rejected": ""})]
    with pytest.raises(InputError, match=r"preference row 1 \(p\)"):
        vision.adapt(vl, [(rows, 2)], tokenizer=tok, rng=rng(), steps=1, lr=1e-3, prefer=half)


def test_a_few_bad_rows_are_left_out_and_many_stop(pair, vl):
    _, tok = pair
    rows = vision.picture_rows(60, rng())
    bad = Case("bad", (Message("user", "<image> what is this ?", media=("none.png",)), Message("assistant", "red")))
    assert len(vision.encode_rows(vl, tok, [*rows, bad])) == 60
    with pytest.raises(InputError, match=r"2 of 62 rows.*none\.png"):
        vision.encode_rows(vl, tok, [*rows, bad, bad])


def test_the_number_of_marks_must_be_the_number_of_pictures(pair, vl):
    _, tok = pair
    with pytest.raises(InputError, match="2 placeholders <image> and the row 1 picture"):
        vision.encode(vl, tok, [Message("user", "<image> <image> what is this ?", media=(pictures.blank(),))])


def saved(path, picture, **options):
    picture.save(path, **options)
    return str(path)


@pytest.mark.parametrize("what", ["missing", "empty", "corrupt", "cut", "cmyk", "alpha", "large", "network", "data"])
def test_pictures_that_cannot_be_used_are_named(tmp_path, what, monkeypatch):
    path = tmp_path / f"{what}.png"
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(whole, "PNG")
    ref = str(path)
    if what == "empty":
        path.write_bytes(b"")
    elif what == "corrupt":
        path.write_bytes(b"no picture at all")
    elif what == "cut":
        path.write_bytes(whole.getvalue()[:900])
    elif what == "cmyk":
        ref = saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (4, 4)))
    elif what == "alpha":
        ref = saved(path, Image.new("RGBA", (4, 4)))
    elif what == "large":
        path.write_bytes(whole.getvalue())
        monkeypatch.setattr(pictures, "MOST_PIXELS", 100)
    elif what == "network":
        ref = "https://example.org/a.png"
    elif what == "data":
        ref = "data:image/png;base64,***"
    with pytest.raises(InputError) as problem:
        pictures.open_picture(ref)
    assert str(problem.value).startswith("data:image" if what == "data" else ref)


def test_a_picture_survives_its_data_url_and_a_file(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    url = pictures.data_url(array)
    assert np.array_equal(np.asarray(pictures.open_picture(url)), array)
    (tmp_path / "a.png").write_bytes(base64.b64decode(url.partition(",")[2]))
    assert np.allclose(pictures.pixels(str(tmp_path / "a.png"), 16), array.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_a_typographic_picture_holds_the_text():
    one, two = (np.asarray(pictures.open_picture(pictures.typographic(text))) for text in ("a", "a long request " * 20))
    assert (one < 128).any() and (two < 128).sum() > 20 * (one < 128).sum()
