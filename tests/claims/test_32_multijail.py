"""32: refusals fade with the language's share of alignment, and Self-Defence closes the gap where its controls do not."""

import pytest

pytest.importorskip("torch")

from davylamp.studies.multilingual import multilingual

pytestmark = [pytest.mark.claims, pytest.mark.slow, pytest.mark.long]


def test_self_defence_closes_the_gap_and_its_controls_do_not():
    found = [(claim, estimate) for claim, estimate in multilingual(seeds=(0, 1)) if claim is not None]
    assert len(found) == 8
    assert {claim.text: claim.held(estimate) for claim, estimate in found} == {claim.text: True for claim, _ in found}
