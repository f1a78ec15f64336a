"""Coverage of a test suite over features of its prompts, such as category x style x technique: what is covered, and how evenly.

Source: arXiv:2501.17132, section 3.1 (the criterion: every triple at least n times); t-way coverage and covering arrays after Cohen et al.
1997 (AETG). Axes and values are anybody's: `astral()` gives the published ones, `load` reads a TOML file.

A cell is a tuple with one value per axis, or None where a test has no value there (a plain prompt has no technique): it then covers
nothing that names this axis.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.taxonomy import taxonomy

if TYPE_CHECKING:
    from numpy.random import Generator

Cell = tuple[str | None, ...]
Part = tuple[tuple[str, str], ...]  # ((axis, value), …): what t-way coverage counts
AXES = ("category", "style", "technique")
CANDIDATES = 30  # rows tried for each row of a covering array


@dataclass(frozen=True, slots=True)
class Coverage:
    """t-way coverage at n tests each. counts: tests of every part, 0 included.  missing: the parts with fewer than n, in order."""

    t: int
    n: int
    counts: Mapping[Part, int]

    @property
    def missing(self) -> list[Part]:
        return [part for part, count in self.counts.items() if count < self.n]

    @property
    def covered(self) -> int:
        return len(self.counts) - len(self.missing)

    @property
    def share(self) -> float:
        """Covered over all, in [0, 1]; higher is better (arXiv:2501.17132, section 3.1, for t = 3)."""
        return self.covered / len(self.counts)


@dataclass(frozen=True, slots=True)
class Criterion:
    """The axes and their values, in order. Raises InputError for an axis without values, a value twice, or no axes.

    >>> criterion = Criterion({"category": ("a", "b"), "style": ("x", "y", "z")})
    >>> criterion.size, [len(criterion.parts(t)) for t in (1, 2)]
    (6, [5, 6])
    """

    axes: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.axes:
            raise InputError("a coverage criterion needs one axis or more, got none")
        for axis, values in self.axes.items():
            if isinstance(values, str) or not values or not all(isinstance(value, str) and value for value in values):
                raise InputError(f"axis {axis} must be a list of one or more names, got {values!r:.80}")
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise InputError(f"axis {axis} names {twice[0]!r} twice")

    @property
    def size(self) -> int:
        """Number of cells of the full product."""
        return math.prod(map(len, self.axes.values()))

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Every cell of the full product, the last axis fastest."""
        return itertools.product(*self.axes.values())

    def check(self, cell: Sequence[str | None], where: str = "a test") -> Cell:
        """The cell, if its values are known. Raises InputError for a wrong length, UnknownNameError with the nearest name for a value.

        >>> astral().check(("self_harm", "slangg", None))
        Traceback (most recent call last):
        davylamp.core.errors.UnknownNameError: no style (a test) named 'slangg'. Did you mean 'slang'?
        """
        if len(cell) != len(self.axes):
            raise InputError(f"{where}: a cell has {len(self.axes)} values ({', '.join(self.axes)}), got {len(cell)}")
        for (axis, values), value in zip(self.axes.items(), cell, strict=True):
            if value is not None and value not in values:
                problem = UnknownNameError(f"{axis} ({where})", str(value), values)
                if len(values) > 12 and problem.nearest is None:  # too many to be named by the error itself
                    raise InputError(f"{where}: no {axis} named {value!r}. Known: {'; '.join(values)}")
                raise problem
        return tuple(cell)

    def parts(self, t: int) -> list[Part]:
        """Every combination of t values of different axes: 25, 184 and 420 for t = 1, 2, 3 of the published axes."""
        if isinstance(t, bool) or not isinstance(t, int) or not 1 <= t <= len(self.axes):
            raise InputError(f"t must be 1 to {len(self.axes)}, the number of axes, got {t!r}")
        return [
            part
            for names in itertools.combinations(self.axes, t)
            for part in itertools.product(*([(name, value) for value in self.axes[name]] for name in names))
        ]

    def parts_of(self, cell: Sequence[str | None], t: int) -> Iterator[Part]:
        """The parts that one cell covers."""
        given = [(axis, value) for axis, value in zip(self.axes, cell, strict=True) if value is not None]
        return itertools.combinations(given, t)

    def coverage(self, cells: Iterable[Sequence[str | None]], *, t: int | None = None, n: int = 1) -> Coverage:
        """How much of the t-way criterion (default: of all axes) these tests' cells cover, at n tests each (n >= 1).

        >>> Criterion({"a": ("1", "2"), "b": ("x",)}).coverage([("1", "x")]).missing
        [(('a', '2'), ('b', 'x'))]
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n must be a whole number of 1 or more, got {n!r}")
        t = len(self.axes) if t is None else t
        counts = dict.fromkeys(self.parts(t), 0)
        for cell in cells:
            for part in self.parts_of(self.check(cell), t):
                counts[part] += 1
        return Coverage(t, n, counts)

    def matrix(self, cells: Iterable[Sequence[str | None]]) -> np.ndarray:
        """Tests of every cell: ints, one dimension per axis. Tests that lack a value of an axis stand in no cell."""
        place = [{value: i for i, value in enumerate(values)} for values in self.axes.values()]
        out: np.ndarray = np.zeros([len(values) for values in self.axes.values()], dtype=int)
        for cell in cells:
            known = self.check(cell)
            if None not in known:
                out[tuple(where[str(value)] for where, value in zip(place, known, strict=True))] += 1
        return out

    def balance(self, cells: Iterable[Sequence[str | None]]) -> float | None:
        """1 - (max - min) / max of the cells' counts, in [0, 1]: 1 if all are equal, 0 if one is empty. None without tests in cells.

        >>> Criterion({"a": ("1", "2")}).balance([("1",), ("1",), ("2",)])
        0.5
        """
        counts = self.matrix(cells)
        return None if counts.max() == 0 else float(1 - (counts.max() - counts.min()) / counts.max())

    def sample(self, t: int, *, rng: Generator) -> list[tuple[str, ...]]:
        """Few cells that cover every t-way part at least once: a covering array, row by row, each the best of some greedy tries.

        The product of the t longest axes is the least that any array can have: 84 for pairs of the published axes.
        """
        uncovered = set(self.parts(t))
        ordered = self.parts(t)
        out: list[tuple[str, ...]] = []
        while uncovered:
            left = [part for part in ordered if part in uncovered]
            best, most = None, -1
            for _ in range(CANDIDATES):
                cell = self._grown(left[rng.integers(len(left))], t, uncovered, rng)
                gain = sum(part in uncovered for part in self.parts_of(cell, t))
                if gain > most:
                    best, most = cell, gain
            assert best is not None
            out.append(best)
            uncovered -= set(self.parts_of(best, t))
        return out

    def _grown(self, start: Part, t: int, uncovered: set[Part], rng: Generator) -> tuple[str, ...]:
        """A cell that holds `start`; each other axis, in random order, takes the value that completes most uncovered parts."""
        chosen = dict(start)
        names = list(self.axes)
        for name in (names[i] for i in rng.permutation(len(names))):
            if name in chosen:
                continue
            values = self.axes[name]
            gains = np.zeros(len(values))
            for others in itertools.combinations(chosen, t - 1):
                for i, value in enumerate(values):
                    mine = {**{other: chosen[other] for other in others}, name: value}
                    gains[i] += tuple((axis, mine[axis]) for axis in names if axis in mine) in uncovered
            top = np.flatnonzero(gains == gains.max())
            chosen[name] = values[top[rng.integers(len(top))]]
        return tuple(chosen[name] for name in names)

    def json(self) -> dict[str, list[str]]:
        return {axis: list(values) for axis, values in self.axes.items()}


def astral() -> Criterion:
    """The published axes: 14 categories, 6 styles, 5 techniques; 420 cells.

    >>> astral().size, [len(astral().parts(t)) for t in (1, 2, 3)]
    (420, [25, 184, 420])
    """
    nodes = taxonomy("astral").nodes
    kinds = zip(AXES, ("hazard", "style", "technique"), strict=True)
    return Criterion({axis: tuple(node.id for node in nodes if node.kind == kind) for axis, kind in kinds})


def load(path: Path) -> Criterion:
    """Axes from a TOML file: one list of names per axis, as in `style = ["slang", "question"]`; what it leaves out stays as published.

    A list that begins with "..." adds its names to the published ones. Raises InputError that names the file.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise InputError(f"{path} is no file of features, expected TOML with lists of names ({problem})") from None
    axes = dict(astral().axes)
    for axis, values in given.items():
        if axis not in AXES:
            raise UnknownNameError(f"axis ({path.name})", axis, AXES)
        if not isinstance(values, list):
            raise InputError(f"{path.name}: {axis} must be a list of names, got {type(values).__name__}")
        axes[axis] = (*axes[axis], *values[1:]) if values[:1] == ["..."] else tuple(values)
    try:
        return Criterion(axes)
    except InputError as problem:
        raise InputError(f"{path.name}: {problem}") from None
