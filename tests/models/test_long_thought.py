"""The long-thought world: requests come back as they were asked, what a text gives away is exact, and rows are what was planted."""

import numpy as np
import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.models import long_thought as world
from davylamp.models.thinking import parts


def test_requests_are_read_back():
    rng = np.random.default_rng(0)
    for item in world.OBJECTS:
        for form in range(4):
            assert world.read([world.request(world.Ask(item), form)]) == world.Ask(item)
    for _ in range(50):
        ask = world.draw_chain(rng)
        assert world.read([world.request(ask)]) == ask
    assert world.read([]) is None


def test_every_word_is_in_the_vocabulary():
    rng = np.random.default_rng(0)
    known = set(world.VOCABULARY)
    for row in world.train_rows(400, rng, checks=0.35, again=0.25):
        assert set(f"{row.messages[-1].text} {row.reply}".split()) <= known


def test_objects_recipes_and_permutations():
    assert len(world.OBJECTS) == 80 and sum(map(world.hazard, world.OBJECTS)) == 40
    assert all(sorted(world.permutation(name)) == list(range(10)) for name in world.CHAINS)
    assert all(one.split()[0] != two.split()[0] for one, two in map(world.recipe, world.OBJECTS))
    assert len(world.items(hazards=True, held_out=True)) == 16 and len(world.items(hazards=True, held_out=False)) == 24


def test_what_is_given_away():
    ask = world.Ask("vark2")
    one, two = world.recipe("vark2")
    assert world.gives(ask, one) and world.gives(ask, f"so {two} now") and not world.gives(ask, f"{one.split()[0]} the")
    assert not world.gives(ask, world.REFUSAL) and world.refuses(world.REFUSAL) and not world.gives(ask, "")


def test_the_planted_shares():
    rng = np.random.default_rng(0)
    replies = [world.train_reply(world.Ask("glim1"), rng, checks=0.35, again=0.25) for _ in range(4000)]
    found = [parts(reply) for reply in replies]
    empty = [p for p in found if not p.thought]
    assert abs(len(empty) / 4000 - 0.12) < 0.02
    assert abs(np.mean([world.refuses(p.answer) for p in empty]) - 0.95) < 0.04
    plans = [p for p in found if p.thought and "plan" in p.thought]
    assert abs(np.mean(["check" in p.thought for p in plans]) - 0.25) < 0.03
    again = [p for p in plans if "check" in p.thought]
    assert abs(np.mean([world.refuses(p.answer) for p in again]) - 0.7) < 0.06
    assert not any(
        world.refuses(parts(world.train_reply(world.Ask("kite1"), rng, checks=0.35, again=0.25)).answer)
        for _ in range(200)
    )


def test_cases():
    rng = np.random.default_rng(0)
    cases = world.cases("hazards", 160, rng)
    assert len({case.messages for case in cases}) == 160 and {case.group for case in cases} == set(
        world.items(hazards=True)
    )
    with pytest.raises(UnknownNameError):
        world.cases("poems", 3, rng)
    with pytest.raises(InputError):
        world.cases("chains", 0, rng)


@pytest.mark.parametrize(("member", "seed"), [("pupil", 0), ("student", 9)])
def test_unknown_members(member, seed):
    with pytest.raises(UnknownNameError):
        world.folder(member, seed)


@pytest.mark.parametrize("member", world.MEMBERS)
@pytest.mark.parametrize("seed", world.SEEDS)
def test_the_shipped_weights(member, seed):
    place = world.folder(member, seed)
    size = sum(file.stat().st_size for file in place.iterdir())
    assert 100_000 < size < 2_000_000 and (place / "made.json").is_file()


def test_training_runs_and_is_repeatable(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "ASSETS", tmp_path)
    first = (world.make("student", 0, steps=2, batch=4) / "model.safetensors").read_bytes()
    assert (world.make("student", 0, steps=2, batch=4) / "model.safetensors").read_bytes() == first
    assert (world.make("student", 1, steps=2, batch=4) / "model.safetensors").read_bytes() != first
