"""The head of `lamp` that needs numpy alone: hashed features, a small table of int8 vectors, one hidden layer.

score = W2 relu(W1 [w; c; x] + b1) + b2. w: sum of the vectors of the text's word features / sqrt(their number), c: of its characters,
x: of the context's words (0 without one).
Sources: arXiv:1607.01759 (fastText: hashed n-grams, mean of vectors) and arXiv:0902.2206 (feature hashing). Differs: a hidden layer over
the sums, so that two words can mean together what neither means alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from davylamp.core import InputError
from davylamp.guards._lamp_text import BUCKETS, WINDOW, Reading, buckets, windows

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What the outputs say, in order: unsafe, then one coarse hazard each.
HAZARDS = (
    "mlc/S1",
    "mlc/S2",
    "mlc/S5",
    "mlc/S7",
    "mlc/S8",
    "mlc/S9",
    "mlc/S10",
    "mlc/S11",
    "mlc/S12",
    "x/X2",
    "x/X4",
    "x/X6",
    "x/X8",
)
PART = 512
ONES = np.ones(PART, dtype=np.float32)
KEPT = 256  # contexts whose vectors are kept, of at most 400 characters each
SHAPES = ("table", "step", "w1", "b1", "w2", "b2")


class HashHead:
    """The weights as arrays. table: (65536, d) int8, times `step`.  w1: (h, 3d).  b1: (h,).  w2: (1 + hazards, h).  b2: (1 + hazards,)."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]):
        if absent := [name for name in SHAPES if name not in arrays]:
            raise InputError(f"the hashed head lacks {', '.join(absent)}")
        self.table = arrays["table"]
        if self.table.dtype != np.int8 or self.table.ndim != 2 or len(self.table) != BUCKETS:
            raise InputError(f"the hashed head's table must be int8 of {BUCKETS} rows, got {self.table.shape}")
        self.step = float(arrays["step"])
        self._before = lru_cache(KEPT)(self._context)  # a request is read once for each window of its reply
        self.w1, self.b1 = arrays["w1"].astype(np.float32), arrays["b1"].astype(np.float32)
        self.w2, self.b2 = arrays["w2"].astype(np.float32), arrays["b2"].astype(np.float32)
        wide = 3 * self.table.shape[1]
        if self.w1.shape[1] != wide or self.w2.shape != (1 + len(HAZARDS), len(self.w1)):
            raise InputError(f"the hashed head's layers do not fit its table: {self.w1.shape}, {self.w2.shape}")

    def vector(self, keys: NDArray[np.intp]) -> NDArray[np.float32]:
        """Sum of the feature vectors over the square root of their number."""
        return self._mean(self._rows(keys))

    def _rows(self, keys: NDArray[np.intp]) -> NDArray[np.float32]:
        # Gathered as int8 and then widened: a table of floats would not stay in a core's cache.
        return self.table.take(keys, axis=0).astype(np.float32)

    def _mean(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        # Whole numbers up to 127: their sum is exact in float32 in any order, and a product with ones is the fastest sum there is.
        # In parts so small that no BLAS parts them among threads.
        n = len(rows)
        summed = np.dot(ONES[:n], rows[:PART])
        for at in range(PART, n, PART):
            summed += np.dot(ONES[: n - at], rows[at : at + PART])
        return summed * (self.step / n**0.5 if n else 0.0)

    def score(self, reading: Reading) -> NDArray[np.float32]:
        """(1 + hazards,) logits; those of the window that looks most unsafe."""
        wide = self.table.shape[1]
        seen = np.zeros(3 * wide, dtype=np.float32)
        if reading.context:
            seen[2 * wide :] = self._before(reading.context[-WINDOW:])
        best: NDArray[np.float32] | None = None
        for piece in windows(reading.text):
            keys, n = buckets(piece)
            rows = self._rows(keys)
            seen[:wide], seen[wide : 2 * wide] = self._mean(rows[:n]), self._mean(rows[n:])
            hidden = self.w1.dot(seen)
            hidden += self.b1
            out = self.w2.dot(np.maximum(hidden, 0, out=hidden))
            out += self.b2
            if best is None or out[0] > best[0]:
                best = out
        assert best is not None
        return best

    def _context(self, text: str) -> NDArray[np.float32]:
        return self.vector(buckets(text, context=True, grams=False)[0])


def read_weights(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a weights file and what it says about itself. Raises InputError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
    except (OSError, ValueError, KeyError) as problem:
        raise InputError(
            f"{path} holds no weights of lamp: {problem}. Expected a file that `guard train` wrote"
        ) from None
    return arrays, about


def write_weights(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """The way there: one compressed .npz file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about, sort_keys=True)), **dict[str, Any](arrays))
    part.replace(path)
