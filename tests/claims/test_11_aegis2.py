"""System 11: a category that is new at inference, refusal augmentation and the label rules, each beside its control, over several seeds."""

import numpy as np
import pytest

from davylamp.studies import _house as house
from davylamp.studies.aegis2 import aegis2_labels, aegis2_new_category, aegis2_refusals, f1, f1_gain

pytestmark = pytest.mark.claims


def broken(observed):
    return [
        (claim.text, estimate.low, estimate.high)
        for claim, estimate in observed
        if claim is not None and claim.held(estimate) is not True
    ]


@pytest.mark.parametrize("seeds", [(0, 1, 2), (3, 4, 5)], ids=str)
def test_label_rules(seeds):
    observed = aegis2_labels(seeds=seeds)
    assert len(observed) == 4 and sum(claim.control for claim, _ in observed) == 1 and not broken(observed)


@pytest.mark.slow
@pytest.mark.long
def test_a_category_that_is_new_at_inference():
    observed = aegis2_new_category()
    assert sum(claim is not None for claim, _ in observed) == 5 and not broken(observed)


@pytest.mark.slow
def test_refusal_augmentation():
    assert not broken(aegis2_refusals())


def test_the_world_keeps_its_promises():
    """New categories' words are in no training row of any arm; labels are what the policy says; the three sets are disjoint."""
    assert not set(house.TRAINED) & set(house.HELD_OUT)
    held = {word for name in house.HELD_OUT for word in house.CONCEPTS[name].split()}
    for arm in ("safety", "blend", "fixed"):
        rng = np.random.default_rng(0)
        for case in house.training_rows(arm, 300, rng):
            words = {word for _, words in case.meta["policy"] for word in words.split()}
            said = set(case.messages[-1].text.split())
            assert not (words | said) & held
            assert bool(words & said) == bool(case.answer) == bool(case.meta["violated"])
    rng, left_out = np.random.default_rng(1), 0
    for number in range(300):
        case = house.concept_row(rng, house.HELD_OUT, number, left_out=0.8)
        words = {word for _, words in case.meta["policy"] for word in words.split()}
        said = set(case.messages[-1].text.split())
        assert bool(words & said) == bool(case.answer)
        left_out += not case.answer and bool(said & held)
        blank = house.without_definitions(case, rng)
        assert blank.messages == case.messages and blank.answer == case.answer
        assert [name for name, _ in blank.meta["policy"]] == [name for name, _ in case.meta["policy"]]
        assert not said & {word for _, words in blank.meta["policy"] for word in words.split()}
    assert left_out > 60, "most safe rows name a word that this policy does not forbid"
    rng = np.random.default_rng(2)
    for number in range(100):
        case = house.refused_row(rng, number)
        words = {word for _, words in case.meta["policy"] for word in words.split()}
        assert words & set(case.messages[0].text.split()) and not words & set(case.messages[1].text.split())
        reply = house.reply_row(rng, number)
        assert bool(words_of(reply) & set(reply.messages[1].text.split())) == bool(reply.answer)


def words_of(case):
    return {word for _, words in case.meta["policy"] for word in words.split()}


def test_f1_and_its_interval():
    """Against sklearn; a row without a verdict is wrong; two equal arms have a difference of exactly 0."""
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, said = rng.integers(2, size=50), rng.integers(2, size=50)
        assert f1(truth, said) == pytest.approx(f1_score(truth, said))
    assert f1(np.array([1, 1]), np.array([1, -1])) == pytest.approx(2 / 3) and f1(np.array([1]), np.array([0])) == 0.0
    parts = [(rng.integers(2, size=100), rng.integers(2, size=100)) for _ in range(3)]
    same = f1_gain(parts, parts, rng)
    assert same.value == same.low == same.high == 0.0
    one = f1_gain(parts, None, rng)
    assert one.low < one.value < one.high and one.n == 300
