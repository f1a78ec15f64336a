"""A model's thought, split off its answer."""

from __future__ import annotations

import re

OPEN = re.compile(r"\s*<(think|thinking)>", re.IGNORECASE)
CLOSE = re.compile(r"</(think|thinking)>", re.IGNORECASE)


def split_thinking(text: str) -> tuple[str | None, str]:
    """(thought, answer). A thought is a leading <think> block, or all before the first </think> where the template opened it already.

    A block that is never closed was cut off: all of it is thought, and the answer is empty. Marks later in the text stay text.

    >>> split_thinking("<think>hm</think> yes"), split_thinking("hm</think>yes"), split_thinking("yes")
    (('hm', 'yes'), ('hm', 'yes'), (None, 'yes'))
    >>> split_thinking("<think>hm"), split_thinking("say <think> to think")
    (('hm', ''), (None, 'say <think> to think'))
    """
    thoughts: list[str] = []
    while (opening := OPEN.match(text)) or (not thoughts and CLOSE.search(text) and "<think" not in text.lower()):
        inside = text[opening.end() :] if opening else text
        closing = CLOSE.search(inside)
        if closing is None:
            thoughts.append(inside.strip())
            text = ""
            break
        thoughts.append(inside[: closing.start()].strip())
        text = inside[closing.end() :]
    if not thoughts:
        return None, text
    return "\n\n".join(thought for thought in thoughts if thought), text.strip()
