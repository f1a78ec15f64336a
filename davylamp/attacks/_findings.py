"""What is alike among findings, and how little of a prompt is needed: skeletons, clusters, minimal prompts."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from davylamp.attacks._campaign import Found
from davylamp.attacks.encoding import CODES
from davylamp.core import Message
from davylamp.metrics.near import grams, jaccard

ALIKE = 0.6  # Jaccard similarity of character 3-grams from which on two skeletons are one trick
CODE = re.compile(r"\S*[A-Za-z0-9+/=]{24,}\S*")


def skeleton(found: Found) -> str:
    """The attack's last turn without what it asks: the request and long codes are cut out, case and spaces are evened.

    So that a report can show a trick without the request it carried.
    """
    request = found.case.messages[-1].text
    text = found.sent[-1].text if found.sent else ""
    text = text.replace(request, "«request»")
    for name, code in CODES.items():
        text = text.replace(code(request), f"«request in {name}»")
    return " ".join(CODE.sub("«code»", text).casefold().split()) or "«empty»"


def connected(n: int, alike: Callable[[int, int], bool]) -> list[list[int]]:
    """The groups of 0 … n-1 under `alike`, each sorted, in order of their first member (single linkage, by union-find).

    >>> connected(4, lambda i, j: abs(i - j) == 2)
    [[0, 2], [1, 3]]
    """
    above = list(range(n))

    def root(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    for i in range(n):
        for j in range(i):
            a, b = root(i), root(j)
            if a != b and alike(i, j):
                above[max(a, b)] = min(a, b)
    out: dict[int, list[int]] = {}
    for i in range(n):
        out.setdefault(root(i), []).append(i)
    return list(out.values())


@dataclass(frozen=True, slots=True)
class Cluster:
    """One trick: the findings that share it, and the cheapest of them to show."""

    skeleton: str
    attacks: tuple[str, ...]
    members: tuple[Found, ...]

    @property
    def shown(self) -> Found:
        return min(self.members, key=lambda found: (len(found.sent[-1].text) if found.sent else 0, found.case.id))


def clusters(found: Sequence[Found], *, alike: float = ALIKE) -> list[Cluster]:
    """Findings by trick, largest first. Equal skeletons are one; near ones (Jaccard of 3-grams >= `alike`) are joined."""
    by_text: dict[str, list[Found]] = {}
    for one in found:
        by_text.setdefault(skeleton(one), []).append(one)
    texts = list(by_text)
    sets = [grams(text) for text in texts]
    out = []
    for group in connected(len(texts), lambda i, j: jaccard(sets[i], sets[j]) >= alike):
        members = tuple(one for i in group for one in by_text[texts[i]])
        best = max(group, key=lambda i: len(by_text[texts[i]]))
        out.append(Cluster(texts[best], tuple(sorted({one.attack for one in members})), members))
    return sorted(out, key=lambda cluster: (-len(cluster.members), cluster.skeleton))


def pieces(text: str) -> list[str]:
    """Sentences and lines, with what parts them, so that joining all gives the text.

    >>> pieces("Do it. Now!\\nPlease")
    ['Do it. ', 'Now!\\n', 'Please']
    """
    out, start = [], 0
    for match in re.finditer(r"(?:[.!?](?=\s)|[。！？]|\n)\s*", text):
        out.append(text[start : match.end()])
        start = match.end()
    return out + ([text[start:]] if start < len(text) else [])


async def minimised(
    sent: Sequence[Message], still: Callable[[tuple[Message, ...]], Awaitable[bool]], *, questions: int
) -> tuple[tuple[Message, ...], int, bool]:
    """(messages, questions used, whether no single piece can go): pieces of the last turn, then earlier turns, go if it still works.

    still: asks whether these messages still break the target; each call is one question.  A greedy walk: what is left is 1-minimal if the
    questions last, not the smallest there is.
    """
    used, best = 0, tuple(sent)
    while True:
        for tried in _shorter(best):
            if used >= questions:
                return best, used, False
            used += 1
            if await still(tried):
                best = tried
                break
        else:
            return best, used, True


def _shorter(sent: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """Every conversation with one piece less. Earlier turns go in pairs, question and reply; a tool's call and result stay together."""
    parts = pieces(sent[-1].text)
    texts = ["".join(parts[:i] + parts[i + 1 :]).strip() for i in range(len(parts))]
    out = [(*sent[:-1], replace(sent[-1], text=text)) for text in texts if text]
    if not any(message.calls or message.role == "tool" for message in sent):
        for i in range(len(sent) - 2):
            if sent[i].role == "user" and sent[i + 1].role == "assistant":
                out.append((*sent[:i], *sent[i + 2 :]))
    return out
