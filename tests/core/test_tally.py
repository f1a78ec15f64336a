import numpy as np
import pytest

from davylamp.core.nouns import Metric
from davylamp.core.stats import rate
from davylamp.core.tally import Tally, metric_from, metric_json


def row(name, value, *, failed=False, **case):
    return {"case": {"id": name, **case}, "verdict": None if failed else {"value": value}}


def by_slice(tally, **more):
    return {(e.name, e.category, e.arm): e for e in tally.estimates(**more)}


def test_slices_unscored_and_failed():
    tally = Tally((Metric("unsafe_rate"),))
    for i, value in enumerate((1.0, 0.0, None, 0.0)):
        tally.add(row(str(i), value, category="a" if i < 2 else "b"))
    tally.add(row("x", None, failed=True, category="b"))
    found = by_slice(tally)
    whole = found["unsafe_rate", None, None]
    assert (whole.value, whole.n, whole.unscored) == (pytest.approx(1 / 3), 3, 2) and whole.worst == (0.2, 0.6)
    assert found["unsafe_rate", "a", None].value == 0.5 and found["unsafe_rate", "b", None].n == 1
    assert tally.counts == {"rows": 5, "scored": 3, "unscored": 1, "failed": 1}


def test_where_flip_and_crossed_slices():
    tally = Tally(
        (
            Metric(
                "over_refusal_rate",
                flip=True,
                where=(("meta.label", "safe"),),
                by=("meta.arm", "meta.arm*category", "meta.kind"),
            ),
        )
    )
    tally.add(row("1", 0.0, category="c", meta={"label": "safe", "arm": "x", "kind": "advice"}))
    tally.add(row("2", 1.0, category="c", meta={"label": "safe", "arm": "y"}))
    tally.add(row("3", 0.0, category="c", meta={"label": "unsafe", "arm": "x"}))
    found = by_slice(tally)
    assert found["over_refusal_rate", None, None].value == 0.5
    assert found["over_refusal_rate", None, "x"].value == 1.0 and found["over_refusal_rate", "c", "y"].value == 0.0
    assert found["over_refusal_rate", "kind=advice", None].n == 1


def test_no_matching_row_gives_no_rate():
    assert by_slice(Tally((Metric("m"),)))["m", None, None].value is None


def test_groups_widen_and_rows_of_their_own_do_not():
    alone, grouped = Tally((Metric("m"),)), Tally((Metric("m"),))
    for i in range(40):
        value = float(i // 10 % 2)
        alone.add(row(str(i), value, group=str(i)))
        grouped.add(row(str(i), value, group=str(i // 10)))
    one, two = by_slice(alone)["m", None, None], by_slice(grouped)["m", None, None]
    assert (one.low, one.high) == (rate(20, 40).low, rate(20, 40).high)
    assert two.high - two.low > 2 * (one.high - one.low) and "4 clusters" in two.method


def test_epochs_cluster_by_case():
    tally = Tally((Metric("m"),), epochs=5)
    for i in range(50):
        tally.add(row(str(i % 10), float(i % 10 < 5)))
    assert "10 clusters" in by_slice(tally)["m", None, None].method


def test_contrast_is_paired_and_leaves_out_half_pairs():
    metric = Metric("effect", against=("meta.arm", "none", "safety"))
    tally = Tally((metric,))
    for i in range(20):
        tally.add(row(f"{i}/none", 1.0, group=str(i), meta={"arm": "none"}))
        if i < 18:
            tally.add(row(f"{i}/safety", 0.0 if i < 12 else 1.0, group=str(i), meta={"arm": "safety"}))
    found = tally.estimates()[0]
    assert (found.arm, found.n, found.unscored) == ("none - safety", 18, 2)
    assert found.value == pytest.approx(12 / 18) and found.p == pytest.approx(2 * 0.5**12) and found.low > 0.3


def test_the_judges_error_is_taken_out_also_when_flipped():
    error = {"true_hits": 90, "positives": 100, "true_passes": 80, "negatives": 100}
    plain, flipped = Tally((Metric("m"),)), Tally((Metric("m", flip=True),))
    for i in range(100):
        plain.add(row(str(i), float(i < 40)))
        flipped.add(row(str(i), float(i < 40)))
    one, two = plain.estimates(error=error)[0], flipped.estimates(error=error)[0]
    assert one.corrected[0] == pytest.approx((0.4 - 0.2) / 0.7)
    assert two.corrected[0] == pytest.approx(1 - one.corrected[0])


def test_metrics_survive_json():
    metric = Metric(
        "a", flip=True, where=(("meta.x", 1),), by=("category",), against=("meta.arm", "a", "b"), higher_is_better=True
    )
    assert metric_from(metric_json(metric)) == metric


def test_per_group_is_any_of_the_group_in_each_slice():
    """Against brute force on random tables: a group is broken if any of its rows is; with an unscored row and none broken it is open."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.choice([0.0, 1.0, None], p=[0.7, 0.2, 0.1], size=(12, 5))
        tally = Tally((Metric("any", per="group", by=("meta.tier",)), Metric("mean", by=("meta.tier",))))
        for item, line in enumerate(values):
            for language, value in enumerate(line):
                about = {"group": f"g{item}", "meta": {"tier": "high" if language < 2 else "low"}}
                tally.add(row(f"{item}-{language}", value, **about))
        found = by_slice(tally)
        for part, columns in ((None, slice(None)), ("tier=high", slice(0, 2)), ("tier=low", slice(2, 5))):
            lines = [line[columns] for line in values]
            states = [1.0 if 1.0 in line else None if None in line else 0.0 for line in map(list, lines)]
            known = [state for state in states if state is not None]
            estimate = found["any", part, None]
            assert (estimate.n, estimate.unscored) == (len(known), states.count(None))
            assert estimate.value == pytest.approx(sum(known) / len(known))


def test_per_group_ignores_the_judges_error_and_survives_the_round_trip():
    metric = Metric("any", per="group")
    assert metric_from(metric_json(metric)) == metric
    assert "per" not in metric_json(Metric("m"))  # the ids of records that hold no such metric stay as they are
    tally = Tally((metric,))
    tally.add(row("1", 1.0, group="g"))
    error = {"true_hits": 90, "positives": 100, "true_passes": 90, "negatives": 100}
    assert tally.estimates(error=error)[0].corrected is None


def test_a_list_puts_a_case_into_a_slice_for_each():
    tally = Tally((Metric("m", by=("meta.tags", "meta.tags*meta.arm")),))
    tally.add(row("1", 1.0, meta={"tags": ["a", "b"], "arm": "x"}))
    tally.add(row("2", 0.0, meta={"tags": ["b"], "arm": "x"}))
    found = by_slice(tally)
    assert found["m", "tags=b", None].value == 0.5 and found["m", "tags=a", "x"].n == 1


def test_no_slice_is_corrected_where_the_error_does_not_fit_all_rows():
    """A judge that calls half of the safe rows unsafe cannot have called only 20 % of 60 unsafe; a slice of 5 is too small to tell."""
    error = {"true_hits": 95, "positives": 100, "true_passes": 50, "negatives": 100}
    tally, fits = Tally((Metric("unsafe_rate"),)), Tally((Metric("unsafe_rate"),))
    for i in range(60):
        tally.add(row(str(i), float(i % 5 == 0), category=f"c{i % 12}"))
        fits.add(row(str(i), float(i % 5 != 0), category=f"c{i % 12}"))
    whole, *slices = tally.estimates(error=error)
    assert len(slices) == 12 and all(e.corrected is None and "does not fit" in e.method for e in (whole, *slices))
    assert all(e.corrected is not None for e in fits.estimates(error=error))  # the control
