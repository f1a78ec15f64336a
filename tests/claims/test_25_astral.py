"""25: generated, balanced tests find a planted style weakness that a static baseline misses, and find none where there is none."""

import pytest

pytest.importorskip("torch")

from davylamp.guards.astral_oracle import read_safety
from davylamp.studies.astral import _coverage, _news, _oracles, astral_tests
from tests.guards.test_astral_oracle import REPLIES


def held(found):
    claims = [(claim, estimate) for claim, estimate in found if claim is not None]
    assert claims and any(claim.control for claim, _ in claims)
    assert {claim.text: claim.held(estimate) for claim, estimate in claims} == {claim.text: True for claim, _ in claims}
    return claims


@pytest.mark.claims
def test_coverage_is_counted():
    held(_coverage())


@pytest.mark.claims
@pytest.mark.slow
def test_fresh_news_find_more_and_frozen_news_do_not():
    held(_news(2, (0, 1, 2)))


@pytest.mark.claims
@pytest.mark.slow
def test_planted_oracles_are_measured():
    held(_oracles(40, (0, 1, 2)))


@pytest.mark.claims
def test_no_reply_is_silently_safe():
    """E: all hand-made replies are read rightly or not at all; the control is a reader by substring, which is wrong."""
    assert all(read_safety(text)[0] in (label, None) for text, label in REPLIES)
    naive = [("safe" if "safe" in text.lower() else None, label) for text, label in REPLIES]
    assert sum(said == "safe" != label for said, label in naive) > 20


@pytest.mark.claims
@pytest.mark.slow
@pytest.mark.long
def test_generated_tests_find_the_weakness_and_the_robust_twin_shows_none():
    found, figures = astral_tests()
    assert len(held(found)) == 22 and len(figures) == 2
