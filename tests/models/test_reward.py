"""Scores of several heads, on real architectures with random weights, against the heads computed by hand."""

import pytest
import torch
import transformers

from davylamp.core.errors import InputError
from davylamp.core.nouns import Message
from davylamp.models.reward import ATTRIBUTES, attribute_scores, load_reward
from tests import tiny

TALKS = [
    [Message("user", "w1 w2"), Message("assistant", "w3")],
    [Message("user", "w4"), Message("assistant", "w5 w6 w7", reasoning="w9")],
]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny.config(request.param)
        config.num_labels = 5
        return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def test_heads_are_read_at_the_last_token(model):
    tok = tiny.tokenizer()
    found = attribute_scores(model, tok, TALKS)
    for messages, scores in zip(TALKS, found, strict=True):
        turns = [{"role": m.role, "content": m.text} for m in messages]
        ids = tok(tok.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            by_hand = model.score(hidden)
        assert list(scores) == list(ATTRIBUTES)
        assert torch.allclose(torch.tensor(list(scores.values())), by_hand, atol=1e-5)


def test_bad_input(model):
    tok = tiny.tokenizer()
    with pytest.raises(InputError, match="has 5 heads, got 2 names"):
        attribute_scores(model, tok, TALKS, names=("a", "b"))
    with pytest.raises(InputError, match="conversation 0 does not end in a reply"):
        attribute_scores(model, tok, [TALKS[0][:1]])
    with pytest.raises(InputError, match="and nothing is cut"):
        attribute_scores(model, tok, [[Message("user", "w1 " * 80), Message("assistant", "w2")]])


def test_loading(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    pair = load_reward(str(tmp_path / "m"))
    assert attribute_scores(*pair, TALKS)[0]["helpfulness"] == pytest.approx(
        attribute_scores(model, tiny.tokenizer(), TALKS)[0]["helpfulness"], abs=1e-5
    )
    with pytest.raises(InputError, match="no reward model"):
        load_reward(str(tmp_path / "nowhere"))
