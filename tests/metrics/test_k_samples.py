"""Safe@1, Safe@K and ConsSafe@K against every label vector, and what unscored replies and unequal lengths do."""

import itertools

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.metrics.k_samples import (
    cons_safe_at_k,
    gap,
    invalid,
    k_samples,
    safe_at_1,
    safe_at_k,
    thought_by_answer,
    unbiased_safe_at_k,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("k", [4, 5])
def test_all_label_vectors(k):
    for labels in itertools.product((False, True), repeat=k):
        good = sum(1 for label in labels if label)
        assert safe_at_1(labels) == good / k
        assert safe_at_k(labels) == min(int(label) for label in labels)
        assert cons_safe_at_k(labels) == (1 if good >= k / 2 else 0)
        assert safe_at_k(labels) <= cons_safe_at_k(labels) and safe_at_k(labels) <= safe_at_1(labels)


@pytest.mark.parametrize(("n", "safe", "k"), [(6, 4, 3), (7, 7, 2), (5, 1, 2), (6, 0, 1)])
def test_unbiased_is_the_mean_over_all_choices(n, safe, k):
    labels = [True] * safe + [False] * (n - safe)
    every = [all(chosen) for chosen in itertools.combinations(labels, k)]
    assert unbiased_safe_at_k(safe, n, k) == pytest.approx(sum(every) / len(every), abs=1e-12)


def test_a_set_against_brute_force():
    labels = RNG.random((60, 5)) < 0.7
    prompts = {str(i): row.tolist() for i, row in enumerate(labels)}
    first, every, most = k_samples(prompts, rng=RNG)
    assert first.value == pytest.approx(labels.mean(), abs=1e-12) and first.n == 300
    assert every.value == pytest.approx(labels.all(axis=1).mean(), abs=1e-12) and every.n == 60
    assert most.value == pytest.approx((labels.sum(axis=1) >= 2.5).mean(), abs=1e-12)
    for estimate in (first, every, most):
        assert estimate.low < estimate.value < estimate.high


def test_equal_prompts_are_not_certain():
    _, every, _ = k_samples({str(i): [True] * 5 for i in range(20)}, rng=RNG)
    assert every.value == 1.0 and every.low < 0.9


def test_the_interval_covers_over_prompts():
    """Prompts differ, so that replies of one prompt go together: 95 % must hold for Safe@1 all the same."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        chances = rng.beta(0.5, 0.5, size=60)
        rows = {str(i): (rng.random(5) < p).tolist() for i, p in enumerate(chances)}
        first = k_samples(rows, rng=rng)[0]
        held += first.low <= 0.5 <= first.high
    assert held / 200 >= 0.90


def test_unscored_replies_give_a_range():
    prompts = {"a": [True, None], "b": [False, None], "c": [True, True], "d": [None, None]}
    first, every, most = k_samples(prompts, rng=RNG)
    assert (first.n, first.unscored) == (4, 4)
    assert (every.n, every.unscored, every.worst) == (2, 2, (0.25, 0.75))
    assert (most.n, most.unscored, most.worst) == (2, 2, (0.5, 1.0)), "one of two safe is a tie, and safe"
    assert invalid(3, 100) and not invalid(2, 100) and invalid(0, 0)


@pytest.mark.parametrize("bad", [{}, {"a": [True, True], "b": [True]}, {"a": []}], ids=["none", "unequal", "empty"])
def test_bad_rows(bad):
    with pytest.raises(InputError):
        k_samples(bad, rng=RNG)


def test_the_prompt_is_named():
    with pytest.raises(InputError, match="p-17"):
        k_samples({"a": [True, True], "p-17": [True]}, rng=RNG)


def test_k_below_two():
    assert len(k_samples({"a": [True], "b": [False]}, rng=RNG)) == 1
    for score in (safe_at_k, cons_safe_at_k):
        with pytest.raises(InputError, match="K must be 2 or more, got 1"):
            score([True])
    with pytest.raises(InputError):
        unbiased_safe_at_k(3, 2, 1)


def test_the_table_sums_to_one():
    rows = [(str(i % 30), bool(a), bool(b)) for i, (a, b) in enumerate(RNG.random((150, 2)) < 0.6)]
    *cells, difference = thought_by_answer([*rows, ("0", None, True)])
    assert sum(cell.value for cell in cells) == pytest.approx(1.0, abs=1e-12) and cells[0].unscored == 1
    assert difference.value == pytest.approx(
        np.mean([b - a for _, a, b in [(n, float(x), float(y)) for n, x, y in rows]]), abs=1e-9
    )
    same = gap([(str(i), 0.0) for i in range(10)])
    assert same.value == 0.0 and same.low < -0.2 and same.high > 0.2
