"""The organisms' suites: the members score as built, arms differ where they should, and options are checked."""

import asyncio

import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.models.targets import load_target

pytest.importorskip("transformers")


def value(tmp_path, suite, target, **options):
    async def go():
        loaded, asked = load_suite(suite, options), load_target(target)
        try:
            return await evaluate(loaded, asked, load_judge(loaded.suite.judge), runs=tmp_path, quiet=True)
        finally:
            await asked.close()

    _, record = asyncio.run(go())
    assert record.status == "finished"
    return next(estimate for estimate in record.estimates if estimate.category is None and estimate.arm is None)


@pytest.mark.parametrize(
    ("suite", "target", "low", "high"),
    [
        ("organism_hazards", "organism/helpful", 0.9, 1.0),
        ("organism_hazards", "organism/aligned", 0.0, 0.1),
        ("organism_hazards", "organism/reasoning", 0.0, 0.1),
        ("organism_lookalikes", "organism/aligned", 0.0, 0.1),
        ("organism_capability", "organism/reasoning", 0.70, 1.0),
    ],
)
def test_members_score_as_they_were_made(tmp_path, suite, target, low, high):
    found = value(tmp_path, suite, target, n=60)
    assert low <= found.low and found.high <= high, found


def test_options_are_checked_before_anything_is_asked():
    with pytest.raises(InputError, match="option style of organism_hazards must be Literal"):
        load_suite("organism_hazards", {"style": "loud"})
    with pytest.raises(InputError, match="language A only"):
        load_suite("organism_hazards", {"style": "slang", "language": "B"})
    with pytest.raises(UnknownNameError, match="turns"):
        load_suite("organism_hazards", {"turn": "2"})


def test_cases_name_kind_severity_and_style():
    loaded = load_suite("organism_hazards", {"n": "50"})
    for case in loaded.suite.cases:
        assert case.category == f"organism/{case.meta['kind']}" and case.meta["severity"] in (1, 2, 3)
        assert case.group == case.meta["item"] and case.meta["split"] == "held_out"
