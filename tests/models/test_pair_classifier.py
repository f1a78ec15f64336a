"""The pair classifier on real tiny architectures: scores, saliency against finite differences, bad input, and what comes back from disk."""

import numpy as np
import pytest
import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from davylamp.core.errors import InputError
from davylamp.models.classifier import PairClassifier, tiny

PAIRS = [("the box stood .", "the vase broke ."), ("mia moved the box .", "the old lamp stood on the shelf .")]


def made(kind):
    model, tokenizer = tiny(width=32)
    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    torch.manual_seed(0)
    if kind == "deberta":
        model = DebertaV2ForSequenceClassification(DebertaV2Config(**small, num_labels=2, pad_token_id=0))
    elif kind == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(**small, num_labels=1, pad_token_id=0))
    return PairClassifier(model, tokenizer)


@pytest.mark.parametrize("kind", ["bert", "deberta", "llama"])
def test_scores_and_saliency_on_any_architecture(kind):
    classifier = made(kind)
    scores = classifier.scores(PAIRS)
    assert scores.shape == (2,) and ((scores > 0) & (scores < 1)).all()
    assert classifier.scores(PAIRS[1:]) == pytest.approx(scores[1:], abs=1e-5), "what stands beside it changes nothing"
    found, how = classifier.saliency(PAIRS)
    assert how == "gradient" and [len(each) for each in found] == [4, 8]
    assert all(each.max() == 1 and each.min() >= 0 for each in found)
    alone, _ = classifier.saliency(PAIRS[:1])
    assert alone[0] == pytest.approx(found[0], abs=1e-4), "padding beside a longer text changes nothing"


def test_saliency_is_the_norm_of_the_gradient_by_finite_differences():
    classifier = made("bert")
    classifier.model.double()
    table = classifier.model.get_input_embeddings()
    (found,), _ = classifier.saliency(PAIRS[:1])
    ids = classifier._encode(PAIRS[:1])
    embedded = table(ids["input_ids"]).detach()
    size, step = [], 1e-5
    for place in range(embedded.shape[1] - 4, embedded.shape[1]):
        slopes = []
        for width in range(embedded.shape[2]):
            ends = []
            for sign in (1, -1):
                moved = embedded.clone()
                moved[0, place, width] += sign * step
                with torch.no_grad():
                    ends.append(float(classifier._margin(inputs_embeds=moved, attention_mask=ids["attention_mask"])))
            slopes.append((ends[0] - ends[1]) / (2 * step))
        size.append(np.linalg.norm(slopes))
    assert found == pytest.approx(np.array(size) / max(size), abs=1e-5)


def test_without_offsets_words_are_left_out_one_by_one_and_that_is_said():
    classifier = made("bert")

    class Slow:
        is_fast, sep_token, pad_token_id = False, "[SEP]", 0

        def __len__(self):
            return len(classifier.tokenizer)

        def __call__(self, *args, **named):
            return classifier.tokenizer(*args, **named)

    slow = PairClassifier(classifier.model, Slow())
    (found,), how = slow.saliency(PAIRS[:1])
    words = PAIRS[0][1].split()
    whole = classifier.scores(PAIRS[:1])[0]
    hand = [abs(whole - classifier.scores([(PAIRS[0][0], " ".join(words[:i] + words[i + 1 :]))])[0]) for i in range(4)]
    assert how == "leave-one-out" and found == pytest.approx(np.array(hand) / max(hand), abs=1e-4)


def test_training_learns_from_the_door_and_leaves_global_randomness_alone():
    pairs = [("p", f"the {thing} broke .") for thing in ("vase", "box")] * 40
    torch.manual_seed(7)
    before = torch.get_rng_state()
    scores = []
    for _ in range(2):
        classifier = made("bert")
        torch.set_rng_state(before)
        classifier.fit(pairs, [1, 0] * 40, [1.0] * 80, rng=np.random.default_rng(0), epochs=6, batch=16, lr=5e-3)
        assert torch.equal(torch.get_rng_state(), before)
        scores.append(classifier.scores(pairs[:2]))
    assert (scores[0] == scores[1]).all() and scores[0][0] > 0.9 and scores[0][1] < 0.1


def test_what_cannot_be_used(tmp_path):
    model, tokenizer = tiny()
    with pytest.raises(InputError, match="one or two outputs"):
        PairClassifier(model.bert, tokenizer)
    with pytest.raises(InputError, match="do not belong together"):
        PairClassifier(model, tiny(words=[f"w{i}" for i in range(900)])[1])
    with pytest.raises(InputError, match="tokens, the classifier reads 64"):
        made("bert").scores([("a", "the " * 100)])
    with pytest.raises(InputError, match="no classifier"):
        PairClassifier.load(tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (PairClassifier.load(tmp_path).scores(PAIRS) == PairClassifier(model, tokenizer).scores(PAIRS)).all()
