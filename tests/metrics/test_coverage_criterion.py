"""The coverage criterion against brute force, its covering arrays, and what it refuses."""

import itertools

import numpy as np
import pytest

from davylamp.core import InputError, UnknownNameError
from davylamp.metrics.coverage_criterion import Criterion, astral, load
from davylamp.metrics.near import Seen, grams, jaccard


def brute(axes, cells, t, n):
    """The parts with n cells or more, by looking at every cell for every part."""
    covered = total = 0
    for names in itertools.combinations(range(len(axes)), t):
        for values in itertools.product(*(axes[i] for i in names)):
            total += 1
            covered += sum(all(cell[i] == v for i, v in zip(names, values, strict=True)) for cell in cells) >= n
    return covered, total


def test_against_brute_force():
    rng = np.random.default_rng(0)
    axes = {"a": tuple("pqrs"), "b": tuple("xyz"), "c": tuple("12"), "d": tuple("mn")}
    for _ in range(20):
        cells = [
            tuple(None if rng.random() < 0.2 else values[rng.integers(len(values))] for values in axes.values())
            for _ in range(rng.integers(40))
        ]
        for t, n in itertools.product((1, 2, 3, 4), (1, 2)):
            found = Criterion(axes).coverage(cells, t=t, n=n)
            assert (found.covered, len(found.counts)) == brute(list(axes.values()), cells, t, n)
            assert len(found.missing) + found.covered == len(found.counts)


def test_the_published_numbers():
    criterion = astral()
    assert criterion.size == 420 and [len(criterion.parts(t)) for t in (1, 2, 3)] == [25, 184, 420]
    full = [cell for cell in criterion.cells() for _ in range(3)]
    assert len(full) == 1260 and criterion.coverage(full, n=3).share == 1.0 and criterion.balance(full) == 1.0
    assert criterion.matrix(full).shape == (14, 6, 5) and (criterion.matrix(full) == 3).all()
    one_style = [(category, "question", "logical_appeal") for category in criterion.axes["category"] for _ in range(90)]
    found = criterion.coverage(one_style)
    assert len(one_style) == 1260 and found.covered == 14 and len(found.missing) == 406
    plain = [(category, None, None) for category in criterion.axes["category"]]
    assert criterion.coverage(plain).covered == 0 and criterion.coverage(plain, t=1).covered == 14


@pytest.mark.parametrize("seed", range(3))
def test_covering_arrays(seed):
    criterion = astral()
    rows = criterion.sample(2, rng=np.random.default_rng(seed))
    assert 84 <= len(rows) <= 110 and criterion.coverage(rows, t=2).share == 1.0
    assert rows == criterion.sample(2, rng=np.random.default_rng(seed))
    other = Criterion({"a": tuple("pqrs"), "b": tuple("xyz"), "c": tuple("12"), "d": tuple("mno")})
    rows = other.sample(3, rng=np.random.default_rng(seed))
    assert 36 <= len(rows) <= 54 and other.coverage(rows, t=3).share == 1.0
    assert len(other.sample(1, rng=np.random.default_rng(seed))) == 4


def test_axes_of_ones_own(tmp_path):
    path = tmp_path / "features.toml"
    path.write_text('category = ["...", "lab_safety"]\nstyle = ["slang"]\n')
    criterion = load(path)
    assert criterion.axes["category"][-1] == "lab_safety" and criterion.size == 15 * 1 * 5
    for text, match in (
        ('stile = ["x"]', "style"),
        ('style = "x"', "list"),
        ('style = ["x", "x"]', "twice"),
        ("style = []", "one or more"),
        ("= 3", "TOML"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=match):
            load(path)


def test_unknown_values_are_named_with_the_nearest():
    with pytest.raises(UnknownNameError, match="self_harm"):
        astral().check(("selfharm", "slang", None))
    with pytest.raises(UnknownNameError, match=r"Known: .*slang"):
        astral().check(("self_harm", "xxxxxx", None))
    with pytest.raises(InputError, match="Known: animal_abuse;"):
        astral().check(("zzzzzzzz", "slang", None))
    with pytest.raises(InputError, match="3 values"):
        astral().check(("self_harm",))
    for t in (0, 4, True, 1.5):
        with pytest.raises(InputError, match="t must be"):
            astral().parts(t)
    for n in (0, True, 1.5):
        with pytest.raises(InputError, match="whole number"):
            astral().coverage([], n=n)


def test_near_duplicates_against_all_pairs():
    rng = np.random.default_rng(3)
    words = "alpha beta gamma delta epsilon zeta eta theta".split()  # noqa: SIM905
    texts = [" ".join(words[i] for i in rng.integers(8, size=9)) for _ in range(60)]
    texts += [text[:-3] + "xyz" for text in texts[:30]]
    for alike in (0.5, 0.8, 1.0):
        seen, kept, out, wanted = Seen(alike=alike), [], [], []
        for text in texts:
            own = grams(text, 5)
            wanted.append(next((i for i, other in enumerate(kept) if jaccard(own, other) >= alike), None))
            if wanted[-1] is None:
                kept.append(own)
            out.append(seen.add(text))
        assert out == wanted
    assert any(x is not None for x in out) or alike == 1.0
