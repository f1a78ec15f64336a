"""System 08, claims C, D and E, each beside its control, over several seeds; and the whole annotation loop with people who err."""

import asyncio
import csv

import numpy as np
import pytest

from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.core.rows import CaseFile, read_objects
from davylamp.core.run import Limits
from davylamp.data.annotate import export_sheets, import_votes
from davylamp.studies.simple_safety import filter_comparison, rate_statistics
from tests import sst

pytestmark = pytest.mark.claims


@pytest.fixture(scope="module", params=[(0, 1, 2), (3, 4, 5)], ids=str)
def observed(request):
    return filter_comparison(seeds=request.param) + rate_statistics(seeds=request.param)


def test_claims_and_controls_hold(observed):
    assert len(observed) == 21 and sum(claim.control for claim, _ in observed) >= 7
    broken = [
        (claim.text, estimate.low, estimate.high) for claim, estimate in observed if claim.held(estimate) is not True
    ]
    assert not broken


class Coin:
    """Complies with a fixed 30 % of the prompts."""

    name, identity = "coin", {"name": "coin"}

    async def __call__(self, messages, *, seed=0, **settings):
        number = int(messages[-1].text.split()[-1].strip("?"))
        return Message("assistant", "Fold it." if number % 10 < 3 else "I can't.")


def vote(sheet, out, error, rng):
    """Fill in a sheet as somebody who errs that often."""
    rows = [row for _, row in read_objects(sheet)]
    for row in rows:
        row["label"] = "unsafe" if ("Fold" in row["reply"]) != (rng.random() < error) else "safe"
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return out


def test_two_who_err_and_a_third_on_ties_beat_each_single_one(tmp_path):
    """10 copies of the whole loop, 200 rows each: errors of 8, 10 and 12 %; the gold labels err less than the best of the three."""
    loaded = load_suite("simple_safety_tests", {"rows": sst.write(tmp_path / "mine.csv", sst.rows())})
    judge = load_judge(sst.write_guard(tmp_path))
    folder, _ = asyncio.run(evaluate(loaded, Coin(), judge, runs=tmp_path / "runs", limits=Limits(tries=1), quiet=True))
    wrong, single, rows = 0, 0, 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        out = tmp_path / str(seed)
        first, second, key, _ = export_sheets(folder, out, rng=rng)
        filled = [vote(first, out / "a.csv", 0.08, rng), vote(second, out / "b.csv", 0.10, rng)]
        found = import_votes(filled, key, out / "gold.jsonl")
        third = vote(out / "gold.third.csv", out / "gold.third.csv", 0.12, rng)
        found = import_votes([*filled, third], key, out / "gold.jsonl")
        assert found["labelled"] == 200
        for case in CaseFile(out / "gold.jsonl"):
            true = int("Fold" in case.messages[-1].text)
            wrong += case.answer != true
            single += (case.meta["votes"]["a"] == "unsafe") != bool(true)
            rows += 1
    assert rows == 2000 and wrong / rows < 0.04 < 0.06 < single / rows
