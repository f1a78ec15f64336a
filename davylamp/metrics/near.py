"""How alike two texts are, by the character 3-grams that they share."""

from __future__ import annotations


def grams(text: str) -> frozenset[str]:
    """The set of character 3-grams; of a shorter text, the text.

    >>> sorted(grams("abcd"))
    ['abc', 'bcd']
    """
    return frozenset(text[i : i + 3] for i in range(len(text) - 2)) or frozenset({text})


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared over all, in [0, 1]; 1 for two empty sets.

    >>> jaccard(frozenset("ab"), frozenset("bc"))
    0.3333333333333333
    """
    return len(a & b) / len(a | b) if a | b else 1.0
