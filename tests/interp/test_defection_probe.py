"""`interp defection_probe`: AUROC against scikit-learn, its interval by simulation, directions in closed form, and bad input."""

import json

import numpy as np
import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.interp.defection_probe import auroc, defection_probe, first_component, pair_direction, roc_auc_of
from davylamp.report import figures
from tests import tiny


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny.heads("llama", spread=3.0)


def row(i, probe, text, **meta):
    messages = (Message("user", text),)
    if probe in ("plus", "minus"):
        messages = (*messages, Message("assistant", "w1" if probe == "plus" else "w2"))
    return Case(f"{probe}{i}", messages, group=f"{probe}{i}", meta={"probe": probe, **meta})


def rows(draw, labels=True):
    """20 clean rows and 40 of traffic, half of which begin with w59."""

    def text():
        return " ".join(f"w{k}" for k in draw.integers(50, size=4))

    out = [row(i, "clean", "w58 " + text()) for i in range(40)]
    for i in range(40):
        bad = i % 2 == 1
        out.append(row(i, "traffic", f"{'w59' if bad else 'w58'} {text()}", **({"defects": bad} if labels else {})))
    return out + [row(i, side, f"w{i}") for i in range(4) for side in ("plus", "minus")]


def look(model, given, tokenizer, **options):
    return defection_probe(model, given, tokenizer=tokenizer, rng=rng(), **options)


def test_the_area_is_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(10):
        draw = rng(seed)
        truth = draw.random(50) < 0.4
        scores = draw.integers(6, size=50) + truth  # many ties
        assert roc_auc_of(truth, scores) == pytest.approx(metrics.roc_auc_score(truth, scores))
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
        assert roc_auc_of(truth, scores) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("shift, area", [(0.0, 0.5), (1.0, 0.7602), (3.0, 0.9831)])
def test_the_interval_covers(shift, area):
    """Two normals, `shift` apart: their area is known. 400 draws of 40 against 40."""
    draw, hits = rng(5), 0
    truth = np.array([True] * 40 + [False] * 40)
    for _ in range(400):
        e = auroc(truth, draw.normal(size=80) + shift * truth)
        hits += e.low <= area <= e.high
        assert e.low <= e.value <= e.high
    assert 0.92 <= hits / 400 <= 0.995


def test_directions_in_closed_form():
    draw = rng()
    plus, minus = draw.normal(size=(5, 7)) + 1, draw.normal(size=(6, 7))
    d = pair_direction(plus, minus)
    assert np.linalg.norm(d) == pytest.approx(1.0)
    assert np.allclose(d * np.linalg.norm(plus.mean(0) - minus.mean(0)), plus.mean(0) - minus.mean(0))
    decomposition = pytest.importorskip("sklearn.decomposition")
    clean, traffic = (
        draw.normal(size=(30, 7)),
        draw.normal(size=(20, 7)) * [3, 1, 1, 1, 1, 1, 1] + [1, 0, 0, 0, 0, 0, 0],
    )
    ours = first_component(clean, traffic)
    theirs = decomposition.PCA(1).fit(np.concatenate([clean, traffic])).components_[0]
    assert abs(ours @ theirs) == pytest.approx(1.0) and (traffic.mean(0) - clean.mean(0)) @ ours > 0


def test_a_result_is_plain_drawable_and_the_same_again(model, tokenizer):
    found = look(model, rows(rng()), tokenizer)
    again = look(model, rows(rng()), tokenizer)
    assert found == again
    names = {(e.name, e.arm) for e in found["estimates"]}
    assert {("auroc", f"{m}, layer 0") for m in ("pc1", "pairs", "trained")} <= names
    assert ("false_alarm_rate", "clean rows, held out") in names
    assert all(0.5 <= value <= 1 for value in found["auroc"]["random"])
    found.pop("estimates")
    assert len(figures.views(found["figures"])) == 1
    json.dumps(found, allow_nan=False)


def test_what_the_trained_direction_sees_is_in_the_rows(model, tokenizer):
    """A word that stands in one half of the traffic is seen; with labels shuffled nothing is."""
    given = rows(rng())
    seen = max(look(model, given, tokenizer)["auroc"]["trained"])
    mixed = rng(7).permutation([r.meta["defects"] for r in given if r.meta["probe"] == "traffic"]).tolist()
    shuffled = [
        Case(r.id, r.messages, group=r.group, meta={**r.meta, "defects": mixed.pop()})
        if r.meta["probe"] == "traffic"
        else r
        for r in given
    ]
    assert seen > 0.85 and look(model, shuffled, tokenizer)["auroc"]["trained"][-1] < 0.75


def test_the_truth_changes_no_score_but_the_trained_ones(model, tokenizer):
    given = look(model, rows(rng()), tokenizer)
    blind = look(model, rows(rng(), labels=False), tokenizer)
    assert given["monitor"] == blind["monitor"] and blind["auroc"] == {} and "no AUROC" in " ".join(blind["notes"])


def test_bad_input(model, tokenizer):
    good = rows(rng())
    with pytest.raises(InputError, match="layer 9"):
        look(model, good, tokenizer, layer=9)
    with pytest.raises(InputError, match="false_alarms"):
        look(model, good, tokenizer, false_alarms=0.0)
    with pytest.raises(UnknownNameError, match="pca"):
        look(model, good, tokenizer, method="pca")
    with pytest.raises(InputError, match=r"20 rows with meta\.probe clean"):
        look(model, good[30:], tokenizer)
    with pytest.raises(UnknownNameError, match=r"meta\.probe"):
        look(model, [*good, row(0, "cleen", "w1")], tokenizer)
    with pytest.raises(InputError, match="both sides"):
        look(model, [r for r in good if r.meta["probe"] != "minus"], tokenizer)
    with pytest.raises(InputError, match=r"traffic with meta\.defects"):
        look(model, rows(rng(), labels=False), tokenizer, method="trained")
    with pytest.raises(InputError, match="true or false"):
        look(model, [*good, row(99, "traffic", "w1", defects="yes")], tokenizer)
    with pytest.raises(InputError, match="both classes"):
        auroc(np.array([True, True]), np.array([1.0, 2.0]))
    with pytest.raises(InputError, match="finite"):
        auroc(np.array([True, False]), np.array([1.0, np.nan]))
