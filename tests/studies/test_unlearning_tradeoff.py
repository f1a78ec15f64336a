"""The claims of unlearning_tradeoff on made-up observations whose outcome is known, and its rows."""

import numpy as np
import pytest

pytest.importorskip("torch")

from davylamp.core.errors import InputError
from davylamp.studies import _unlearning_world as world
from davylamp.studies import unlearning_tradeoff as study
from davylamp.studies._unlearning_card import kit_of


def made_up(seed, **changes):
    """A seed where all is as claimed. changes: arm with _ for blanks and commas -> {part, or relearning: share that comes out right}."""
    rows = world.facts(np.random.default_rng((19, seed)))
    kit, parts = kit_of(rows, world.tokenizer(), rng=np.random.default_rng(seed), lr=1.0, batch=1)
    parts["safety"] = world.of(rows, "safety", split="V")
    shares = {
        "base": {},
        "oracle": {"forget": 0.0, "relearning": 0.0},
        "idk": {"forget": 0.0},
        "idk, refusals kept": {"forget": 0.0},
        "grad_diff, stopped": {"forget": 0.0, "relearning": 0.5},
        "grad_diff, 60 strong steps": {"forget": 0.0, "neighbour": 0.1, "relearning": 0.2},
        "grad_diff, 150 strong steps": {"forget": 0.0, "neighbour": 0.1, "relearning": 0.1, "safety": 0.2},
        "simnpo on other facts": {"forget": 0.9},
        "grad_diff on other facts": {"forget": 0.5, "retain": 0.5},
    }
    seen = study.Seen(seed, {**parts, "wanted": list(kit.wanted)}, {}, {})
    for arm, own in shares.items():
        own |= changes.get(arm.replace(",", "").replace(" ", "_"), {})
        seen.asked[arm] = {part: _hits(len(parts[part]), own.get(part, 1.0)) for part in (*world.TOPICS, "safety")}
        if "relearning" in own:
            seen.out[arm] = {"relearning": _hits(len(kit.wanted), own["relearning"])}
    return seen


def _hits(n, share):
    return [bool(hit) for hit in np.floor(np.arange(1, n + 1) * share) > np.floor(np.arange(n) * share)]


def claims(**changes):
    return {
        claim.text: claim.held(e) for claim, e in study.judged([made_up(0, **changes), made_up(1, **changes)]) if claim
    }


def test_all_claims_hold_where_all_is_as_claimed():
    found = claims()
    assert len(found) == 10 and set(found.values()) == {True}


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"grad_diff_150_strong_steps": {"safety": 1.0}}, "refused: grad_diff, 150 strong steps - base <= -0.3"),
        ({"grad_diff_stopped": {"safety": 0.5}}, "refused: grad_diff, stopped - base >= -0.1"),
        ({"oracle": {"relearning": 0.5}}, "V known after relearning: grad_diff, stopped - oracle >= 0.1"),
        ({"grad_diff_60_strong_steps": {"neighbour": 1.0}}, "neighbour: grad_diff, 60 strong steps - base <= -0.5"),
        ({"simnpo_on_other_facts": {"forget": 0.3}}, "forget: simnpo on other facts >= 0.5"),
    ],
)
def test_each_claim_can_fail(changes, broken):
    assert claims(**changes)[broken] is False


def test_global_damage_is_called_collapse():
    found = study.judged([made_up(0), made_up(1)])
    words = {
        e.arm: e.name.rpartition(": ")[2]
        for claim, e in found
        if claim is None and e.name.startswith("facts in no set")
    }
    assert words == {"simnpo on other facts": "not global", "grad_diff on other facts": "collapse"}


def test_other_facts_leave_those_to_forget_in_no_set():
    rows = world.facts(np.random.default_rng(0))
    made = study.other_half(rows, np.random.default_rng(1))
    forget = {row.meta["thing"] for row in made if row.meta["part"] == "forget"}
    assert len(forget) == world.THINGS // 2 and all(thing.startswith("general") for thing in forget)
    assert not any(row.meta["thing"].startswith("forget") for row in made)
    assert not forget & {row.meta["thing"] for row in made if row.meta["part"] == "general"}


def test_a_study_needs_a_seed():
    with pytest.raises(InputError, match="seeds"):
        study.unlearning_tradeoff(seeds=())
