"""Repair: what is tried, what is refused before anything is computed."""

import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.repair import FAMILIES, family, run_repair, tries

pytest.importorskip("torch")


def test_what_is_tried_depends_on_what_is_at_hand():
    bare = tries(full=False, unaligned=False, harmful=False, preferences=False)
    assert {family(one) for one in bare} == {"merge"}
    everything = tries(full=True, unaligned=True, harmful=True, preferences=True)
    assert {family(one) for one in everything} == set(FAMILIES)
    quick = tries(full=False, unaligned=True, harmful=True, preferences=True)
    assert {one.arm for one in quick} < {one.arm for one in everything}
    assert len({one.arm for one in everything}) == len(everything)


def test_antidote_is_tried_beside_a_random_mask_of_its_ratio():
    for one in tries(full=True, unaligned=False, harmful=True, preferences=False):
        if family(one) == "antidote":
            assert one.control[1] == {**one.options, "score": "random"}


def test_equal_models_are_nothing_to_repair(tmp_path):
    with pytest.raises(InputError, match="the same"):
        run_repair("organism/aligned", "organism/aligned", tmp_path / "out", runs=tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuned", "aligned", "says"),
    [
        ("organism/helpful", "organism/base", "cannot give refusals back"),
        ("organism/reasoning", "organism/aligned", "nothing to repair"),
    ],
)
def test_what_cannot_be_repaired_is_said(tmp_path, tuned, aligned, says):
    with pytest.raises(InputError, match=says):
        run_repair(tuned, aligned, tmp_path / "out", runs=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "out").exists()


def test_bad_options(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        run_repair("organism/helpful", "organism/aligned", tmp_path / "there")
    with pytest.raises(UnknownNameError, match="antidote"):
        run_repair("organism/helpful", "organism/aligned", tmp_path / "out", only=("antidot",))
