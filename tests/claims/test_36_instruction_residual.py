"""System 36: pre-training on breaks a chat model's refusals; its updated base plus the residual has them, and other residuals do not."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from davylamp.core.errors import InputError
from davylamp.models import organism
from davylamp.studies.continued_pretraining import (
    continue_pretraining,
    continued_pretraining,
    new_items,
    packed,
    renamed,
    shuffled,
    texts,
)

pytestmark = pytest.mark.claims


@pytest.mark.slow
@pytest.mark.long
def test_claims_and_controls_hold():
    torch.set_num_threads(1)
    observed = continued_pretraining(size="quick", seeds=(0, 1, 2))
    claims = [(claim, estimate) for claim, estimate in observed if claim is not None]
    assert len(claims) == 12 and sum(claim.control for claim, _ in claims) == 2
    broken = [(claim.text, e.low, e.high) for claim, e in claims if claim.held(e) is not True]
    assert not broken
    shown = {(e.name, e.arm) for claim, e in observed if claim is None}
    assert {("loss_on_new_text", "base + text"), ("fit_cosine", "residual and update")} <= shown


def test_a_twin_in_another_basis_computes_the_same():
    model, tok = organism.load("aligned")
    ids = torch.tensor([tok("the colour of the lantern")["input_ids"]])
    twin = renamed(model, np.random.default_rng(0))
    assert torch.allclose(twin(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    assert not torch.equal(twin.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_shuffled_residual_has_the_norm_of_the_residual():
    base, aligned = (organism.load(name)[0] for name in ("base", "aligned"))
    other = shuffled(aligned, base, np.random.default_rng(0))
    for a, b, c in zip(other.parameters(), base.parameters(), aligned.parameters(), strict=True):
        assert torch.norm(a - b).item() == pytest.approx(torch.norm(c - b).item(), rel=1e-3, abs=1e-6)


def test_packing_loses_no_token_and_cuts_at_the_length():
    tok = organism.tokenizer()
    corpus = [text for text, _ in zip(texts(new_items(np.random.default_rng(0)), np.random.default_rng(1)), range(40))]  # noqa: B905
    every = [i for text in corpus for i in (tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"], tok.eos_token_id)]  # fmt: skip # noqa: E501
    pieces = [ids for ids, _ in packed(iter(corpus), tok, rows=2, context=20)]
    assert torch.cat(pieces).flatten().tolist() == every[: 40 * len(pieces)] and len(every) - 40 * len(pieces) < 40


def test_bad_budgets_and_texts_are_refused():
    model, tok = organism.load("base")
    with pytest.raises(InputError, match="less than one step"):
        continue_pretraining(model, tok, iter(["a"]), tokens=10)
    with pytest.raises(InputError, match="less than one batch"):
        list(packed(iter([]), tok, rows=2, context=20))
    with pytest.raises(InputError, match=r"ended|less than one batch"):
        continue_pretraining(model, tok, iter(["the colour"] * 300), tokens=3000)
    with pytest.raises(InputError, match="number of spare tokens"):
        new_items(np.random.default_rng(0), 17)
    with pytest.raises(InputError, match="at least one seed"):
        continued_pretraining(seeds=())
