"""Detection numbers and curves against scikit-learn; intervals by coverage; bad scores are unscored, not a class."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from davylamp.core.errors import InputError
from davylamp.metrics.detection import (
    average_precision,
    confusion,
    detection,
    precision_recall_curve,
    ratios,
    roc_auc,
    roc_curve,
    sweep,
)

SEEDS = range(12)


def sample(seed, n=80):
    """Gold labels and scores with ties."""
    rng = np.random.default_rng(seed)
    gold = (rng.random(n) < 0.3).astype(int)
    gold[:2] = 0, 1
    return gold, np.round(np.clip(rng.normal(0.35 + 0.3 * gold, 0.2), 0, 1), 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_six_numbers_are_scikit_learns(seed):
    gold, scores = sample(seed)
    said = (scores >= 0.5).astype(int)
    found = {name: e.value for name, e in detection(gold.tolist(), scores.tolist()).items()}
    assert found == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(gold, said),
            "precision": metrics.precision_score(gold, said),
            "recall": metrics.recall_score(gold, said),
            "specificity": metrics.recall_score(gold, said, pos_label=0),
            "f1": metrics.f1_score(gold, said),
            "balanced_accuracy": metrics.balanced_accuracy_score(gold, said),
        }
    )
    tn, fp, fn, tp = metrics.confusion_matrix(gold, said).ravel().tolist()
    assert confusion(gold.tolist(), scores.tolist()) == {"tp": tp, "fp": fp, "tn": tn, "fn": fn, "unscored": 0}


@pytest.mark.parametrize("seed", SEEDS)
def test_curves_and_areas_are_scikit_learns(seed):
    gold, scores = sample(seed)
    precision, recall, _ = metrics.precision_recall_curve(gold, scores)
    ours = precision_recall_curve(gold.tolist(), scores.tolist())
    assert ours[0] == (0.0, None)
    assert [p for _, p in ours[1:]] == pytest.approx(precision[:-1][::-1].tolist())
    assert [r for r, _ in ours[1:]] == pytest.approx(recall[:-1][::-1].tolist())
    false, true, _ = metrics.roc_curve(gold, scores, drop_intermediate=False)
    assert np.allclose(roc_curve(gold.tolist(), scores.tolist()), np.stack((false, true), axis=1))
    assert roc_auc(gold.tolist(), scores.tolist()) == pytest.approx(metrics.roc_auc_score(gold, scores))
    assert average_precision(gold.tolist(), scores.tolist()) == pytest.approx(
        metrics.average_precision_score(gold, scores)
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_sweep_is_the_confusion_at_each_threshold(seed):
    gold, scores = sample(seed)
    for row in sweep(gold.tolist(), scores.tolist()):
        counts = confusion(gold.tolist(), scores.tolist(), threshold=row["threshold"])
        assert {name: row[name] for name in row if name != "threshold"} == ratios(**counts)


def test_undefined_is_none_and_never_0():
    found = detection([0, 0, 1], [0.0, 0.1, 0.2])
    assert found["precision"].value is None and found["f1"].value is None and found["recall"].value == 0.0
    found = detection([0, 0], [0.0, 1.0])
    assert found["recall"].value is None and found["balanced_accuracy"].value is None
    assert found["balanced_accuracy"].low is None
    found = detection([1, 0], [None, math.nan])
    assert all(e.value is None for e in found.values()) and found["accuracy"].unscored == 2
    assert detection([], [])["accuracy"].value is None and sweep([], [])[0]["recall"] is None
    assert roc_auc([1, 1], [0.1, 0.2]) is None and average_precision([0], [0.5]) is None


@pytest.mark.parametrize("bad", [None, math.nan, -0.1, 1.1, math.inf, "0.5"])
def test_a_bad_score_is_unscored(bad):
    found = detection([1, 0, 1, 0], [bad, 0.2, 0.9, 0.4])
    assert (found["accuracy"].n, found["accuracy"].unscored, found["accuracy"].value) == (3, 1, 1.0)
    assert (
        found["accuracy"].worst == (0.75, 1.0) and found["recall"].unscored == 1 and found["specificity"].unscored == 0
    )


@pytest.mark.parametrize("gold", [[2], [0.5], [-1]])
def test_bad_labels_are_refused(gold):
    with pytest.raises(InputError, match="a gold label must be 0 or 1"):
        detection(gold, [0.5])
    with pytest.raises(InputError, match="one length, got 1 and 2"):
        detection([1], [0.5, 0.5])
    with pytest.raises(InputError, match="groups must be as long"):
        detection([1], [0.5], groups=["a", "b"])


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.random(40) < 0.4, 15)  # 40 prompts answered by 15 models: an item is hard for all or for none
    gold = np.repeat(rng.random(40) < 0.3, 15).astype(int)
    scores = np.where(hard, 1 - gold, gold).astype(float)
    groups = np.repeat(np.arange(40), 15).tolist()
    naive, clustered = (detection(gold.tolist(), scores.tolist(), groups=g) for g in (None, groups))
    for name in ("accuracy", "recall", "specificity", "balanced_accuracy", "f1"):
        assert naive[name].value == clustered[name].value
        assert clustered[name].high - clustered[name].low > 2 * (naive[name].high - naive[name].low)


@pytest.mark.parametrize("name", ["recall", "f1", "balanced_accuracy"])
def test_intervals_cover(name):
    """A filter with recall 0.9 and specificity 0.8 on 300 rows, 20 % unsafe: the intervals hold the truth in about 95 of 100."""
    precision = 0.2 * 0.9 / (0.2 * 0.9 + 0.8 * 0.2)
    truth = {"recall": 0.9, "balanced_accuracy": 0.85, "f1": 2 * precision * 0.9 / (precision + 0.9)}[name]
    inside = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        gold = rng.random(300) < 0.2
        said = rng.random(300) < np.where(gold, 0.9, 0.2)
        e = detection(gold.astype(int).tolist(), said.astype(float).tolist())[name]
        inside += e.low <= truth <= e.high
    assert 0.92 <= inside / 300 <= 0.985


@given(st.lists(st.tuples(st.integers(0, 1), st.one_of(st.none(), st.floats(0, 1))), max_size=30))
def test_values_lie_within_their_intervals(rows):
    for e in detection([label for label, _ in rows], [score for _, score in rows]).values():
        if e.value is not None:
            assert 0 <= e.low <= e.value + 1e-12 and e.value - 1e-12 <= e.high <= 1
