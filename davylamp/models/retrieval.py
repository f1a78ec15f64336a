"""Retrieval over a user's documents: BM25, or any embedding one hands in.

Source: Robertson & Zaragoza 2009, equation 3.15 (BM25), with Lucene's idf, ln(1 + (N - df + 0.5) / (df + 0.5)), always positive, so
that a word of more than half the documents does not count against them. Why not a library: this is 30 lines on numpy, which the base
install has; a test holds it to bm25s and to a dense form. A user's documents are data: they are searched, never followed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from davylamp.core.errors import InputError
from davylamp.metrics.near import Seen

WORD = re.compile(r"\w+")
Embed = Callable[[Sequence[str]], np.ndarray]


class Index(Protocol):
    """What can be searched: one score per document, higher is nearer."""

    @property
    def texts(self) -> Sequence[str]: ...

    def scores(self, query: str) -> np.ndarray: ...


def words_of(text: str) -> list[str]:
    """Lower-case words: runs of letters, digits and _ of any script. Underscores part words, so that `hate_speech` is two.

    >>> words_of("Hate_speech, 2 words!")
    ['hate', 'speech', '2', 'words']
    """
    return WORD.findall(text.casefold().replace("_", " "))


class BM25:
    """k1 >= 0: how soon a repeated word stops to count.  b in [0, 1]: how much a long document is marked down.

    >>> index = BM25(["a cat", "a dog and a dog", "the sun is up"])
    >>> [round(float(score), 3) for score in index.scores("dog sun")]
    [0.0, 1.255, 0.942]
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75):
        if k1 < 0 or not 0 <= b <= 1:
            raise InputError(f"BM25 needs k1 >= 0 and b in [0, 1], got {k1:g} and {b:g}")
        self.texts: Sequence[str] = list(texts)
        counts = [Counter(words_of(text)) for text in self.texts]
        lengths = np.array([sum(count.values()) for count in counts], dtype=float)
        mean = lengths.mean() if lengths.size and lengths.sum() else 1.0
        self._norm = k1 * (1 - b + b * lengths / mean)
        self._k1 = k1
        # word -> (documents that hold it, how often each does)
        found: dict[str, tuple[list[int], list[int]]] = {}
        for i, count in enumerate(counts):
            for word, times in count.items():
                places = found.setdefault(word, ([], []))
                places[0].append(i)
                places[1].append(times)
        self._found = {word: (np.array(where), np.array(times, dtype=float)) for word, (where, times) in found.items()}

    def scores(self, query: str) -> np.ndarray:
        """(documents,) BM25 of the query, >= 0. A word that stands twice in the query counts twice."""
        out = np.zeros(len(self.texts))
        for word in words_of(query):
            if word in self._found:
                where, times = self._found[word]
                idf = math.log(1 + (len(self.texts) - len(where) + 0.5) / (len(where) + 0.5))
                out[where] += idf * times * (self._k1 + 1) / (times + self._norm[where])
        return out


class Embedded:
    """Cosine of embeddings. embed: texts -> (texts, width) floats, from whatever model is at hand."""

    def __init__(self, texts: Sequence[str], embed: Embed):
        self.texts: Sequence[str] = list(texts)
        self._embed = embed
        self._rows = _unit(embed(self.texts), len(self.texts))

    def scores(self, query: str) -> np.ndarray:
        """(documents,) cosines with the query, in [-1, 1]."""
        return self._rows @ _unit(self._embed([query]), 1)[0]


def _unit(rows: np.ndarray, n: int) -> np.ndarray:
    rows = np.asarray(rows, dtype=float)
    if rows.ndim != 2 or len(rows) != n or not np.isfinite(rows).all():
        raise InputError(f"an embedding must give {n} rows of finite numbers, got shape {rows.shape}")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest(
    index: Index,
    query: str,
    k: int,
    *,
    among: Sequence[int] | None = None,
    alike: float = 0.8,
    least: float | None = None,
) -> list[int]:
    """The k documents with the highest scores, best first, equal ones in their order; one that nearly repeats another is passed over.

    among: only these.  alike: Jaccard of character 5-grams from which a text repeats another.  least: scores must be above it.
    k must be 1 or more; fewer come back where there are no more.

    >>> nearest(BM25(["a red cat", "A red cat!", "a dog"]), "red cat", 2)
    [0, 2]
    """
    if k < 1:
        raise InputError(f"k must be 1 or more, got {k}")
    scores = index.scores(query)
    pool = np.arange(len(scores)) if among is None else np.asarray(among, dtype=int)
    seen = Seen(alike=alike)
    out: list[int] = []
    for i in pool[np.argsort(-scores[pool], kind="stable")].tolist():
        if (least is not None and scores[i] <= least) or len(out) == k:
            break
        if seen.add(index.texts[i]) is None:
            out.append(i)
    return out
