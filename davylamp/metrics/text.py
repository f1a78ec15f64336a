"""What a set of texts is like: length, sameness, variety, and how much of it is Chinese."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from davylamp.core.errors import InputError


def cjk_share(text: str) -> float:
    """Share of a text's characters that are Chinese, blanks left out, in [0, 1]; 0 for an empty text.

    >>> cjk_share("中文 ab"), cjk_share("")
    (0.5, 0.0)
    """
    kept = [c for c in text if not c.isspace()]
    return sum("\u3400" <= c <= "\u9fff" for c in kept) / max(1, len(kept))


def distinct_n(texts: Sequence[str], n: int = 3) -> float | None:
    """Different character n-grams over all of them, in (0, 1]; None where there is none. Falls with the size of a set: compare equal sizes.

    Li et al. 2016 (arXiv:1510.03055), section 5, with characters for words.

    >>> distinct_n(["abcd", "abcx"]), distinct_n(["ab"])
    (0.75, None)
    """
    if n < 1:
        raise InputError(f"n of distinct_n must be 1 or more, got {n}")
    found = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(found)) / len(found) if found else None


def statistics(pairs: Mapping[str, Sequence[tuple[str, str]]]) -> list[dict[str, float | int | str | None]]:
    """One row a category: rows, mean characters of prompt and reply, share of prompts that stood before, distinct-3, Chinese share.

    pairs: category -> (prompt, reply) pairs; an empty reply is left out of the mean.

    >>> statistics({"a": [("中文一", "好"), ("中文一", "")]})[0]
    {'category': 'a', 'rows': 2, 'prompt_characters': 3.0, 'reply_characters': 1.0, 'duplicates': 0.5, 'distinct_3': 0.5, 'chinese': 1.0}
    """
    out: list[dict[str, float | int | str | None]] = []
    for category, rows in pairs.items():
        if not rows:
            raise InputError(f"no rows of {category}: nothing to count")
        prompts, replies = [prompt for prompt, _ in rows], [reply for _, reply in rows if reply]
        out.append(
            {
                "category": category,
                "rows": len(rows),
                "prompt_characters": sum(map(len, prompts)) / len(prompts),
                "reply_characters": sum(map(len, replies)) / len(replies) if replies else None,
                "duplicates": 1 - len({" ".join(prompt.split()) for prompt in prompts}) / len(prompts),
                "distinct_3": distinct_n(prompts),
                "chinese": cjk_share("".join(prompts)),
            }
        )
    return out
