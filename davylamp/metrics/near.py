"""How alike two texts are, by the character n-grams that they share."""

from __future__ import annotations

from davylamp.core.errors import InputError


def grams(text: str, size: int = 3) -> frozenset[str]:
    """The set of character n-grams (size >= 1); of a shorter text, the text.

    >>> sorted(grams("abcd")), sorted(grams("abcd", 5))
    (['abc', 'bcd'], ['abcd'])
    """
    return frozenset(text[i : i + size] for i in range(len(text) - size + 1)) or frozenset({text})


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared over all, in [0, 1]; 1 for two empty sets.

    >>> jaccard(frozenset("ab"), frozenset("bc"))
    0.3333333333333333
    """
    return len(a & b) / len(a | b) if a | b else 1.0


class Seen:
    """Texts one after another; says which earlier one a text nearly repeats. Exact; a million pairs a second or so.

    alike: Jaccard of n-grams of `size` characters from which a text repeats another, in (0, 1]; case and spacing are evened.

    >>> seen = Seen()
    >>> [seen.add(text) for text in ("tell me of the tall tower", "unlike it", "Tell me of the tall  tower!")]
    [None, None, 0]
    """

    def __init__(self, *, alike: float = 0.8, size: int = 5):
        if not 0 < alike <= 1:
            raise InputError(f"alike must be in (0, 1], got {alike:g}")
        self.alike, self.size = alike, size
        self._bit: dict[str, int] = {}
        self._kept: list[tuple[int, int]] = []  # (grams as bits of one number, how many)

    def add(self, text: str) -> int | None:
        """The number of the first kept text that this one nearly repeats; None if there is none, and then it is kept."""
        own = grams(" ".join(text.casefold().split()), self.size)
        mine, n = sum(1 << self._bit.setdefault(gram, len(self._bit)) for gram in own), len(own)
        least, most = self.alike * n, n / self.alike
        for i, (theirs, m) in enumerate(self._kept):
            if least <= m <= most:  # sets of other sizes cannot be that alike
                shared = (mine & theirs).bit_count()
                if shared >= self.alike * (n + m - shared):
                    return i
        self._kept.append((mine, n))
        return None
