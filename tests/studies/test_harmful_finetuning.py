"""The table of defences: what it measures beside the four rates, and what it refuses. The claim itself runs as a slow test."""

import numpy as np
import pytest

pytest.importorskip("peft")

import torch

from davylamp.core.errors import UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.studies._finetuned import put_back, split_by_name
from davylamp.studies.harmful_finetuning import drift, harmful_finetuning, perplexity
from tests import tiny

TOK = tiny.tokenizer()
ROWS = [Case(str(i), (Message("user", f"w{i} w3"), Message("assistant", "w5 w6"))) for i in range(3)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_drift_is_zero_for_the_same_model_and_grows_with_the_change(name):
    model, near, far = (tiny.model(name) for _ in range(3))
    with torch.no_grad():
        for parameter, a, b in zip(model.parameters(), near.parameters(), far.parameters(), strict=True):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            a.add_(0.001 * noise)
            b.add_(0.01 * noise)
    same, little, much = (drift(model, other, ROWS, tokenizer=TOK) for other in (model, near, far))
    assert same == 0.0 < little < much


def test_perplexity_of_a_model_that_says_all_words_alike_is_the_vocabulary():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, ROWS, tokenizer=TOK) == pytest.approx(64, rel=1e-5)


def test_names_validate_or_test_and_never_both():
    from davylamp.models import world

    test, validation = split_by_name(world.cases("hazards", 120, np.random.default_rng(0), style="mixed"))
    names = [{case.meta["item"] for case in part} for part in (test, validation)]
    assert not names[0] & names[1] and len(names[0]) == 24 and len(names[1]) == 16


def test_a_model_is_put_back_to_the_bit_even_after_an_error():
    model = tiny.model("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), put_back(model), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        raise ZeroDivisionError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_an_unknown_defence_is_refused():
    with pytest.raises(UnknownNameError, match="no defence named 'vacine'"):
        harmful_finetuning(defences=("vacine",))


@pytest.mark.slow
@pytest.mark.claims
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_antidote_on_plain_fine_tuning_brings_refusals_back():
    torch.set_num_threads(1)
    observed = harmful_finetuning(seeds=(0,), defences=("sft",))
    assert [claim.held(estimate) for claim, estimate in observed if claim] == [True]
    assert {"task", "compliance", "drift", "perplexity"} <= {e.name for claim, e in observed if not claim}
