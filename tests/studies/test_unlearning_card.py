"""The report card: its verdict rule, its attacks on models whose state is known, and rows that cannot be used."""

import copy

import numpy as np
import pytest
import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Estimate
from davylamp.studies import _unlearning_attacks as attacks
from davylamp.studies import _unlearning_card as card
from davylamp.studies import _unlearning_world as world


def sure(value, half=0.01, arm="attack"):
    return Estimate(value, value - half, value + half, 50, arm=arm)


@pytest.mark.parametrize(
    ("asked", "back", "lost", "word"),
    [
        (sure(0.0), [sure(0.0)], [sure(0.0)], "removed as far as tested"),
        (sure(0.0), [sure(0.0), sure(0.5)], [sure(0.0)], "hidden"),
        (sure(0.4), [sure(0.5)], [sure(0.0)], "not forgotten"),
        (sure(0.0), [sure(0.5)], [sure(0.5)], "collapse"),
        (sure(0.0), [sure(0.1, 0.2)], [sure(0.1, 0.2)], "cannot tell"),
        (sure(0.0), [sure(0.06, 0.02)], [sure(0.0)], "removed as far as tested"),
        (sure(0.0), [Estimate(None, None, None, 0)], [sure(0.0)], "cannot tell"),
    ],
)
def test_the_verdict_is_decided_on_interval_ends_in_this_order(asked, back, lost, word):
    assert card.verdict(asked, back, lost)[0] == word


@pytest.fixture(scope="module")
def small():
    """Two parts of a world, three things a split, and a model that knows them: enough for attacks whose outcome is certain."""
    torch.set_num_threads(1)
    rows, things = world.facts(np.random.default_rng(0)), {}
    for row in world.of(rows, "forget", "retain"):
        things.setdefault((row.meta["part"], row.meta["split"]), {})[row.meta["thing"]] = 1
    chosen = {thing for many in things.values() for thing in list(many)[:3]}
    rows = [row for row in world.of(rows, "forget", "reworded", "retain") if row.meta["thing"] in chosen]
    return world.learn(rows, world.tokenizer(), seed=0, rng=np.random.default_rng(0), steps=90), rows


def kit(rows, seed=0):
    return card.kit_of(rows, world.tokenizer(), rng=np.random.default_rng(seed), lr=3e-4, batch=32)


def test_attacks_on_a_model_that_knows_and_on_one_that_does_not(small):
    model, rows = small
    given, _ = kit(rows)
    assert all(given.ask(model, given.wanted)), "the premise"
    empty = world.new_model(5)
    for name, attack in {
        "8 bits": lambda m: given.ask(attacks.quantised(m, 8), given.wanted),
        "little pruned": lambda m: given.ask(attacks.pruned(m, 0.01), given.wanted),
        "merge with itself": lambda m: given.ask(attacks.merged(m, m), given.wanted),
        "probe": lambda m: attacks.probed(m, given),
        "logit lens": lambda m: attacks.lensed(m, given),
    }.items():
        knows, not_ = sum(attack(model)), sum(attack(empty))
        assert len(attack(model)) == len(given.wanted)
        assert not_ <= 0.35 * len(given.wanted), (name, not_)
        if name not in ("probe", "logit lens"):
            assert knows >= 0.9 * len(given.wanted), (name, knows)


def test_attacks_leave_the_model_alone(small):
    model, rows = small
    given, _ = kit(rows)
    before = copy.deepcopy(model.state_dict())
    attacks.relearn(model, given, given.taught, [1])
    attacks.relearn(model, given, given.taught, [1], rank=2)
    (
        attacks.quantised(model, 4),
        attacks.pruned(model, 0.5),
        attacks.merged(model, world.new_model(1)),
        attacks.in_context(model, given),
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rounding_against_numpy():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        levels = 2 ** (bits - 1) - 1
        scale = weight.numpy().__abs__().max(1, keepdims=True) / levels
        assert np.allclose(attacks.rounded(weight, bits).numpy(), np.round(weight.numpy() / scale) * scale, atol=1e-6)
        assert all(len(row.unique()) <= 2 * levels + 1 for row in attacks.rounded(weight, bits))
    with pytest.raises(InputError, match="bits must be from 2 to 8"):
        attacks.rounded(weight, 1)


def test_the_untouched_model_is_not_forgotten_and_an_oracle_needs_none(small):
    """Control: the base handed in as its own unlearnt version. Without an oracle nothing is known of chance, and plain asking tells all."""
    model, rows = small
    found = card.card(
        model, model, None, rows, world.tokenizer(), rng=np.random.default_rng(0), looks=[1], thorough=False
    )
    assert found.verdict == "not forgotten" and found.estimates[0].name == "verdict: not forgotten"
    assert {one.value for one in found.estimates if one.name == "lost"} == {0.0}
    assert "asked +100 points" in found.why


def test_a_base_that_knows_nothing_is_refused(small):
    _, rows = small
    with pytest.raises(InputError, match="nothing to unlearn"):
        empty = world.new_model(5)
        card.card(empty, empty, empty, rows, world.tokenizer(), rng=np.random.default_rng(0), looks=[1], thorough=False)


def test_rows_that_cannot_be_used(small, capsys):
    _, rows = small
    with pytest.raises(InputError, match="nothing to forget"):
        kit(world.of(rows, "retain"))
    with pytest.raises(InputError, match="rows to retain"):
        kit(world.of(rows, "forget"))
    from dataclasses import replace

    with pytest.raises(InputError, match=r"meta\.part must be one of"):
        kit([replace(rows[0], meta={})])
    one_side = [replace(r, meta={**r.meta, "split": "T"}) for r in rows]
    with pytest.raises(InputError, match="split V"):
        kit(one_side)
    undealt = [replace(r, meta={k: v for k, v in r.meta.items() if k != "split"}) for r in rows]
    given, _ = kit(undealt)
    facts = [{card.fact_of(r) for r in side} for side in (given.taught, given.wanted)]
    assert not facts[0] & facts[1] and abs(len(facts[0]) - len(facts[1])) <= 1
    first = next(r for r in rows if r.meta["part"] == "forget" and r.meta["split"] == "T")
    linked = [replace(r, meta={**r.meta, "shares_with": [first.id]}) if r.meta["split"] == "V" else r for r in rows]
    capsys.readouterr()
    kit(linked)
    assert "may follow from split T" in capsys.readouterr().err
