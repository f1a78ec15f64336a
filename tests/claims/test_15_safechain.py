"""System 15: strategies, judges of thoughts, and training on safe thoughts, each beside its control."""

import pytest

from davylamp.core.errors import InputError
from davylamp.models import long_thought
from davylamp.studies.safechain import safe_thoughts, thinking_strategies, thought_judges

pytestmark = [pytest.mark.claims, pytest.mark.slow]


def broken(observed):
    return [(claim.text, e.low, e.high) for claim, e in observed if claim is not None and claim.held(e) is not True]


def test_strategies():
    observed = thinking_strategies(seeds=(0, 1, 2))
    assert not broken(observed) and sum(claim.control for claim, _ in observed if claim) >= 2
    levels = {(e.arm, e.name): e.value for claim, e in observed if claim is None}
    for arm in ("default", "zero", "less", "more"):
        assert levels[arm, "safe@5"] <= min(levels[arm, "safe@1"], levels[arm, "cons_safe@5"])
    assert (
        levels["more", "tokens_per_reply"] > levels["default", "tokens_per_reply"] > levels["zero", "tokens_per_reply"]
    )


def test_judges():
    observed = thought_judges(seeds=(0, 1, 2))
    assert not broken(observed) and sum(claim.control for claim, _ in observed) >= 1


def test_training():
    observed = safe_thoughts(seeds=(0, 1, 2))
    assert not broken(observed) and sum(claim.control for claim, _ in observed) >= 2


def test_other_seeds_are_refused():
    for seeds in ((), (0, 7)):
        with pytest.raises(InputError, match="training seeds that ship"):
            thinking_strategies(seeds=seeds)
    assert long_thought.SEEDS == (0, 1, 2)
