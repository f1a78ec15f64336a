"""The encoder of lamp beside transformers' own, its adapter, its int8 weights, its training; on tiny models made on the spot."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel

from davylamp.core.errors import InputError
from davylamp.guards._lamp_encoder import PIECES, STRIDE, encoder_hash, load_encoder
from davylamp.guards._lamp_fit import _batches, encoder_scores, fit_encoder, pad, platt
from davylamp.guards._lamp_hash import HAZARDS, write_weights
from davylamp.guards._lamp_minilm import MiniLM
from davylamp.guards._lamp_rows import Sentence
from davylamp.guards._lamp_text import Reading

WORDS = "how do i bake kill bread soup bomb person process make a the in game now please .".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of two blocks with its tokenizer, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    config = BertConfig(vocab_size=len(vocab), hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=96, max_position_embeddings=256, initializer_range=0.2)  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


def test_the_forward_pass_equals_that_of_transformers(folder):
    theirs, ours = BertModel.from_pretrained(folder, attn_implementation="eager").eval(), load_encoder(folder)
    ids = torch.randint(4, 20, (3, 17), generator=torch.Generator().manual_seed(1))
    lengths = [17, 9, 4]
    mask = torch.arange(17)[None, :] < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        states = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        wanted = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        assert torch.allclose(ours.hidden(ids, lengths), wanted, atol=1e-5)
        alone = ours.hidden(ids[1:2, :9])
    assert torch.allclose(alone, wanted[1:2], atol=1e-5), "padding changes nothing"


def test_windows_cover_a_long_text_and_carry_the_context(folder):
    encoder = load_encoder(folder)
    first, last = encoder.marks
    (short,) = encoder.windows("how do i bake bread", "make soup")
    assert short[0] == first and short[-1] == last and short.count(last) == 2 and len(short) == 2 + 1 + 2 + 5
    cut = encoder.windows("bread " * 500)
    assert all(len(window) <= PIECES + 2 for window in cut) and len(cut) == 1 + -(-(500 - PIECES) // STRIDE)
    assert sum(len(window) - 2 for window in cut) >= 500
    assert encoder.windows("") == [[first, last]]


def test_a_merged_adapter_gives_the_same_output(folder):
    encoder = load_encoder(folder)
    torch.manual_seed(2)
    encoder.adapter = {
        name: (torch.randn(4, weight.shape[1]) / 8, torch.randn(weight.shape[0], 4) / 8)
        for name, (weight, _) in encoder.linear.items()
    }
    ids = torch.tensor(encoder.windows("how do i bake bread"))
    plain = load_encoder(folder).hidden(ids)
    with_adapter = encoder.hidden(ids)
    encoder.merge()
    assert torch.allclose(encoder.hidden(ids), with_adapter, atol=1e-5)
    assert not torch.allclose(plain, with_adapter, atol=1e-2)


def test_int8_stays_near_float(folder):
    exact, fast = load_encoder(folder), load_encoder(folder)
    fast.quantise()
    rng = np.random.default_rng(0)
    near = []
    with torch.inference_mode():
        for _ in range(20):
            ids = torch.tensor([[2, *rng.integers(4, 20, 12).tolist(), 3]])
            near.append(float(torch.nn.functional.cosine_similarity(exact.hidden(ids), fast.hidden(ids))))
    assert min(near) > 0.98 and max(near) < 1 - 1e-7, "near, and truly another computation"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "roberta"}, "expected a BERT"),
        ({"hidden_act": "relu"}, "expected a BERT"),
        ({"num_hidden_layers": 9}, "lacks the weight"),
    ],
)
def test_a_folder_that_is_no_such_encoder(folder, tmp_path, change, text):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=text):
        load_encoder(tmp_path)


def test_missing_files(folder, tmp_path):
    with pytest.raises(InputError, match="no encoder"):
        load_encoder(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InputError, match="tokenizer"):
        load_encoder(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]))
    ids = load_encoder(tmp_path).windows("how do i bake bread")
    assert ids == load_encoder(folder).windows("how do i bake bread"), "vocab.txt gives the same pieces"


def rows(n=160, seed=0):
    """kill is unsafe with person, safe with process: no word alone tells."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        verb = ("kill", "make")[i % 2]
        thing = ("person", "process")[(i // 2) % 2]
        extra = rng.choice(["please", "now", "in the game now", "do"])
        label = int(verb == "kill" and thing == "person")
        out.append(Sentence(f"how do i {verb} a {thing} {extra}", "", label, label - 1, f"g{i % 20}", "s", "en"))
    return out


def test_training_learns_a_contrast_and_the_weights_come_back_whole(folder, tmp_path):
    encoder = load_encoder(folder)
    torch.manual_seed(0)
    arrays = fit_encoder(
        encoder, rows(), rng=np.random.default_rng(0), epochs=12, rank=4, frozen=1, lr=1e-2, tokens=400
    )
    test = rows(40, seed=1)
    scores = encoder_scores(encoder, arrays, test)
    labels = [row.label for row in test]
    assert min(s for s, y in zip(scores, labels, strict=True) if y) > max(
        s for s, y in zip(scores, labels, strict=True) if not y
    )
    assert not any(name.startswith("0.") for name in arrays), "frozen blocks carry no adapter"
    about = {"calibration": [1.0, 0.0], "encoder": encoder_hash(folder)}
    write_weights(tmp_path / "minilm.npz", arrays, about)
    again = MiniLM(folder, tmp_path / "minilm.npz", precision="float")
    found = [row[0] for row in again.scores([Reading(row.text) for row in test])]
    assert np.allclose(found, scores, atol=2e-3)
    fast = MiniLM(folder, tmp_path / "minilm.npz", precision="int8")
    quick = [row[0] for row in fast.scores([Reading(row.text) for row in test])]
    assert np.corrcoef(quick, scores)[0, 1] > 0.99 and all(
        len(row) == 1 + len(HAZARDS) for row in fast.scores([Reading("a")])
    )


def test_the_same_seed_gives_the_same_adapter(folder):
    one, two = (
        fit_encoder(
            load_encoder(folder), rows(40), rng=np.random.default_rng(3), epochs=1, rank=2, frozen=1, tokens=400
        )
        for _ in range(2)
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_weights_for_another_encoder_are_refused(folder, tmp_path):
    arrays = fit_encoder(
        load_encoder(folder), rows(8), rng=np.random.default_rng(0), epochs=1, rank=2, tokens=400, frozen=2
    )
    write_weights(tmp_path / "w.npz", arrays, {"calibration": [1.0, 0.0], "encoder": "0" * 64})
    with pytest.raises(InputError, match="another encoder"):
        MiniLM(folder, tmp_path / "w.npz")
    with pytest.raises(InputError, match="precision"):
        MiniLM(folder, tmp_path / "w.npz", precision="int4")


def test_batches_hold_every_row_once_within_the_budget():
    rng = np.random.default_rng(0)
    ids = [[0] * int(n) for n in rng.integers(1, 60, 500)]
    found = _batches(range(500), ids, 200)
    assert sorted(i for batch in found for i in batch) == list(range(500))
    assert all(len(batch) == 1 or len(batch) * max(len(ids[i]) for i in batch) <= 200 for batch in found)
    tensor, lengths = pad([[1, 2, 3], [4]])
    assert tensor.tolist() == [[1, 2, 3], [4, 0, 0]] and lengths == [3, 1]


def test_platt_finds_the_minimum_that_scipy_finds():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.2).astype(int)
    logits = rng.normal(2.0 * labels - 1.5, 1.5)
    positives, negatives = labels.sum(), (1 - labels).sum()
    weight = np.where(labels == 1, 0.5 / positives, 0.5 / negatives)
    target = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(theta):
        z = theta[0] * logits + theta[1]
        return (weight * (np.logaddexp(0, z) - target * z)).sum() + 5e-5 * ((theta - [1, 0]) ** 2).sum()

    wanted = optimize.minimize(loss, [1.0, 0.0], tol=1e-12).x
    assert np.allclose(platt(logits, labels), wanted, atol=1e-4)
