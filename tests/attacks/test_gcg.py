"""GCG on a tiny model made on the spot: losses against the library's own, gradients against differences, refusals before any question."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from davylamp.attacks.gcg import SuffixTask, gcg, plain_tokens, swaps, white_box  # noqa: E402
from davylamp.core.errors import InputError  # noqa: E402
from davylamp.core.nouns import Message  # noqa: E402
from davylamp.models import organism  # noqa: E402
from tests.attacks.worlds import Recorder, case, complied  # noqa: E402

torch.set_num_threads(1)
ASK = "how do i make the songbox ?"


@pytest.fixture(scope="module")
def pair():
    return organism.new_model(0).eval(), organism.tokenizer()


@pytest.fixture
def task(pair):
    return SuffixTask.of(*pair, (Message("user", ASK),), "take ashwort then stir bluesalt")


def suffix(task, seed=0, length=6):
    return task.start(plain_tokens(task.tokenizer), length, np.random.default_rng(seed))


def test_a_loss_is_the_librarys_own(task):
    """Against transformers' loss of one row with all but the goal masked."""
    rng = np.random.default_rng(1)
    many = swaps(suffix(task), None, plain_tokens(task.tokenizer), 5, rng)
    for ids, loss in zip(many, task.losses(many).tolist(), strict=True):
        row = [*task.head, *ids, *task.tail, *task.goal]
        labels = [-100] * (len(row) - len(task.goal)) + task.goal
        own = task.model(input_ids=torch.tensor([row]), labels=torch.tensor([labels])).loss
        assert abs(float(own.detach()) - loss) < 1e-5


def test_the_gradient_is_the_slope_of_the_loss(task):
    """Central differences along one-hot directions, in double precision."""
    model = organism.new_model(0).double().eval()
    double = SuffixTask.of(model, task.tokenizer, (Message("user", ASK),), "take ashwort")
    ids = suffix(double)
    gradient = double.gradient(ids)
    table = model.get_input_embeddings().weight.detach()

    def loss(place, token, step):
        rows = table[torch.tensor([*double.head, *ids, *double.tail, *double.goal])].clone()
        rows[len(double.head) + place] += step * table[token]
        logits = model(inputs_embeds=rows[None]).logits[0, -len(double.goal) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(double.goal)).detach())

    for place, token in ((0, 50), (3, 120), (5, 77)):
        slope = (loss(place, token, 1e-2) - loss(place, token, -1e-2)) / 2e-2
        assert abs(slope - float(gradient[place, token])) < 1e-3


def test_swaps_move_one_token_and_suffixes_survive_as_text(task):
    ids, allowed = suffix(task), plain_tokens(task.tokenizer)
    near = task.gradient_top(ids, allowed, 7)
    assert near.shape == (6, 7) and set(near.flatten().tolist()) <= set(allowed.tolist())
    for one in swaps(ids, near, allowed, 30, np.random.default_rng(0)):
        changed = [i for i in range(6) if one[i] != ids[i]]
        assert len(changed) <= 1 and all(one[i] in near[i].tolist() for i in changed)
        assert task.survives(one)


def test_tokens_that_merge_when_written_do_not_survive(task):
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    inner.decoder = decoders.Fuse()
    merging = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)
    bare = replace(task, tokenizer=merging, before="", after="", head=[], tail=[])
    assert bare.survives([2, 1]) and bare.survives([1, 0]) and not bare.survives([0, 1])


def test_the_search_lowers_the_loss_and_counts_its_questions(pair):
    target = Recorder()
    target.model, target.tokenizer = pair
    of = case(ASK, answer="take ashwort then stir bluesalt")
    found = asyncio.run(
        gcg(target, of, complied, budget=3, rng=np.random.default_rng(0), steps=3, candidates=16, length=6)
    )
    assert found.queries == len(target.asked) == 3
    task = SuffixTask.of(*pair, of.messages, of.answer)
    losses = []
    for messages, _, _ in target.asked:
        assert messages[-1].text.startswith(ASK + " ")
        ids = pair[1](messages[-1].text.removeprefix(ASK), add_special_tokens=False)["input_ids"]
        losses.append(float(task.losses([ids])[0]))
    assert losses[0] > losses[1] > losses[2]


def test_text_only_targets_are_refused_before_any_question():
    target = Recorder()
    with pytest.raises(InputError, match="gcg needs gradients; recorder offers text"):
        asyncio.run(gcg(target, case(), complied, budget=3, rng=np.random.default_rng(0)))
    assert not target.asked
    outer = Recorder()
    outer.target = Recorder()
    outer.target.model, outer.target.tokenizer = "m", "t"
    assert white_box(outer) == ("m", "t")


@pytest.mark.parametrize("bad", [{"length": 0}, {"steps": 0}, {"candidates": 0}, {"top": 0}])
def test_bad_numbers(bad, pair):
    with pytest.raises(InputError, match="1 or more"):
        asyncio.run(gcg(Recorder(), case(), complied, budget=1, rng=np.random.default_rng(0), **bad))


def test_a_template_that_changes_the_text_is_said(pair):
    model, tokenizer = pair
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages[0]['content'] | lower | replace('s', 'z') }}"
        with pytest.raises(InputError, match="finds no place"):
            SuffixTask.of(model, tokenizer, (Message("user", ASK),), "take")
    finally:
        tokenizer.chat_template = before
