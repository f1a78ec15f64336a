"""A reply that was begun goes on to the token, on real architectures with random weights; thoughts survive special tokens and templates."""

import asyncio

import pytest
import torch
import transformers

from davylamp.core.errors import InputError
from davylamp.core.nouns import Message
from davylamp.models import long_thought
from davylamp.models.hf import HFTarget, begun_ids, generate_batch, prompt_ids
from davylamp.models.thinking import Thinking, ThinkingTarget, think
from tests import tiny

ASK = [Message("user", "w1 w2 w3")]
MORE = ("llama", "qwen2", "qwen3", "mistral")


def with_tags(*, special, template=tiny.CHAT):
    tok = tiny.tokenizer(template)
    tok.add_tokens(
        [transformers.AddedToken(tag, special=special) for tag in ("<think>", "</think>")], special_tokens=special
    )
    return tok


@pytest.fixture(scope="module", params=MORE)
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(tiny.config(request.param)).eval()
    made.resize_token_embeddings(68)
    return made


def test_going_on_is_generation_from_those_very_tokens(model):
    tok = with_tags(special=False)
    head = "<think>\nw4\n</think>\n\n"
    tags = tok.convert_tokens_to_ids(["<think>", "w4", "</think>"])
    begun = begun_ids(tok, ASK, head)
    assert begun.ids == prompt_ids(tok, ASK) + tags
    with torch.inference_mode():
        made = model.generate(
            input_ids=torch.tensor([begun.ids]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(begun.ids) :].tolist()  # fmt: skip
    rest = made[: made.index(2)] if 2 in made else made
    reply = generate_batch(model, tok, [ASK], prefill=head, max_tokens=6)[0]
    assert reply.reasoning == "w4" or "<think>" in reply.reasoning
    assert reply.text == tok.decode(rest, skip_special_tokens=True).strip()


@pytest.mark.parametrize("special", [False, True])
def test_strategies_run(model, special):
    tok = with_tags(special=special)

    async def go(plan):
        target = HFTarget(model, tok, "tiny", {"name": "tiny"})
        try:
            return await asyncio.gather(*(think(target, ASK, plan, seed=s, temperature=1.0) for s in range(3)))
        finally:
            await target.close()

    for plan in (
        Thinking(max_tokens=6),
        Thinking("zero", max_tokens=6),
        Thinking("less", short="w5", max_tokens=6),
        Thinking("more", connectors=("w6",), rounds=2, budget=8, max_tokens=12),
    ):
        first, again = asyncio.run(go(plan)), asyncio.run(go(plan))
        assert first == again, "the same seeds, the same replies"
        if plan.strategy == "zero":
            assert all(reply.reasoning == "" or reply.reasoning is not None for reply in first)
        if plan.strategy == "less":
            assert all(reply.reasoning.startswith("w5") for reply in first)


def test_a_thought_that_the_template_opens_is_not_opened_twice():
    tok = with_tags(special=True, template=tiny.CHAT.replace("'<s> assistant '", "'<s> assistant <think> '"))
    ids = begun_ids(tok, ASK, "<think>\nw4\n</think>\n\n").ids
    assert ids.count(tok.convert_tokens_to_ids("<think>")) == 1 and ids[-1] == tok.convert_tokens_to_ids("</think>")
    assert begun_ids(tok, ASK).head == "<think>"


def test_a_model_without_think_tags_is_no_guess(model):
    target = HFTarget(model, tiny.tokenizer(), "hf/tiny", {"name": "hf/tiny"})
    with pytest.raises(InputError, match=r"hf/tiny know no <think> tag.*tags=OPEN;CLOSE"):
        ThinkingTarget(target, Thinking("zero"))
    ThinkingTarget(target, Thinking("zero", tags=("w7", "w8")))
    ThinkingTarget(HFTarget(model, with_tags(special=True), "t", {}), Thinking("zero"))


def test_tags_that_are_special_tokens_are_not_lost():
    from davylamp.models.hf import _Reader

    for special in (True, False):
        tok = with_tags(special=special)
        row = tok("<think> w1 </think> w2 </s>", add_special_tokens=False)["input_ids"]
        assert _Reader(tok)(row).replace(" ", "") == "<think>w1</think>w2"


@pytest.mark.skipif(not long_thought.folder("student", 0).is_dir(), reason="the organism is not made yet")
def test_an_organism_under_each_strategy():
    pair = long_thought.load("student", 0)
    case = [Message("user", "start 3 chain pa pc pe .")]
    ask = long_thought.read(case)
    reply = generate_batch(*pair, [case], max_tokens=40)[0]
    assert long_thought.gives(ask, reply.text) and reply.reasoning == long_thought.chain_thought(ask)
    short = generate_batch(*pair, [case], prefill="<think> </think>", max_tokens=40)[0]
    assert short.reasoning == "" and short.text
