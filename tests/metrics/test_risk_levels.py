"""Means over a tree, the injection identity, pairs of models, and harm where both are unsafe, against counting by hand."""

import numpy as np
import pytest

from davylamp.core.errors import InputError
from davylamp.metrics.risk_levels import harm_level, injection_table, paired_models, tree_means

RNG = np.random.default_rng(0)


def test_the_tree_against_brute_force():
    rng = np.random.default_rng(1)
    rows = [((f"a{i % 2}", f"b{i % 4}", f"c{i % 12}", f"d{i % 24}"), float(rng.choice([0, 0.5, 1]))) for i in range(96)]
    found = tree_means(rows, rng=RNG)

    def macro(node):
        below = sorted({path[: len(node) + 1] for path, _ in rows if path[: len(node)] == node})
        if len(node) == 4:
            return np.mean([score for path, score in rows if path == node])
        return np.mean([macro(child) for child in below])

    for node, (micro, big) in found.items():
        inside = [score for path, score in rows if path[: len(node)] == node]
        assert micro.value == pytest.approx(np.mean(inside), abs=1e-12) and micro.n == len(inside)
        assert big.value == pytest.approx(macro(node), abs=1e-12)
    assert len(found) == 1 + 2 + 4 + 12 + 24


def test_unscored_items_and_children():
    found = tree_means([(("a", "x"), None), (("a", "y"), 1.0)], rng=RNG)
    micro, macro = found[("a",)]
    assert (micro.n, micro.unscored) == (1, 1) and (macro.value, macro.unscored) == (1.0, 1)
    assert found[("a", "x")][0].value is None


@pytest.mark.parametrize("rows", [[], [(("a",), 1.0), (("a", "b"), 1.0)], [(("a", ""), 1.0)], [(("a",), 1.5)]])
def test_bad_trees(rows):
    with pytest.raises(InputError):
        tree_means(rows, rng=RNG)


def test_the_injection_identity():
    rng = np.random.default_rng(2)
    rows = [
        (
            ("direct", "indirect")[int(rng.random() < 0.3)],
            ("security", "logic")[int(rng.random() < 0.4)],
            float(rng.random() < 0.4),
        )
        for _ in range(251)
    ]
    found = injection_table(rows)
    for one, two in (("direct", "indirect"), ("security", "logic")):
        both = found[one].n * found[one].value + found[two].n * found[two].value
        assert found["all"].value == pytest.approx(both / (found[one].n + found[two].n), abs=1e-12)
    assert injection_table([("direct", "logic", None)])["all"].unscored == 1
    with pytest.raises(InputError):
        injection_table([])


def test_pairs_of_models():
    a = {"x": {str(i): 1.0 for i in range(60)}, "y": {str(i): float(i % 2) for i in range(60)}}
    b = {"x": {str(i): float(i % 3 == 0) for i in range(60)}, "y": {str(i): float(i % 2) for i in range(60)}}
    found = paired_models(a, b, rng=RNG)
    assert found["x"].low > 0.5 and found["x"].p < 1e-6 and found["y"].value == 0.0 and found["y"].p == 1.0
    a["x"]["0"] = None
    assert paired_models(a, b, rng=RNG)["x"].unscored == 1


def test_unequal_items_are_named():
    with pytest.raises(InputError, match="x: only one of the models has the items 7"):
        paired_models({"x": {"1": 1.0, "7": 1.0}}, {"x": {"1": 1.0}}, rng=RNG)
    with pytest.raises(InputError, match="only one has: y"):
        paired_models({"x": {}, "y": {}}, {"x": {}}, rng=RNG)


def rows(n, unsafe, score, start=0):
    return {str(i): (i % 10 < unsafe, {"helpfulness": score}) for i in range(start, start + n)}


def test_harm_on_the_intersection_only():
    found, warnings = harm_level(rows(100, 8, 0.9), rows(100, 5, 0.4), rng=RNG)
    assert found["helpfulness"].value == pytest.approx(0.5) and found["helpfulness"].n == 50 and not warnings
    same, _ = harm_level(rows(100, 8, 0.9), rows(100, 8, 0.9), rng=RNG)
    assert same["helpfulness"].value == 0.0


def test_too_few_pairs_give_no_number_and_pairs_by_chance_a_warning():
    found, warnings = harm_level(rows(100, 8, 0.9), rows(100, 8, 0.4, start=80), rng=RNG)
    assert found["helpfulness"].value is None and found["helpfulness"].n == 16
    assert any("160 items are in one model only" in text for text in warnings) and any(
        "too few" in text for text in warnings
    )
