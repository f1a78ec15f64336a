"""What unlearning is given: rows by part, checked before anything is trained. Parts are in `meta.part` of a row."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.core.rows import Dropped
from davylamp.core.stats import wilson
from davylamp.models.fit import IGNORED, Encoded, encode
from davylamp.models.greedy import likeliest, padded
from davylamp.models.turns import ends_of, usable
from davylamp.train._unlearn_losses import token_nll

if TYPE_CHECKING:
    from numpy.random import Generator

#: forget: to be unlearnt.  reworded: the same asked in words that unlearning must not see.  retain, general: to be kept.
#: neighbour: wanted facts beside the forgotten ones (dual use).  safety: behaviour that must stay (refusals).  holdout: never seen.
PARTS = ("forget", "reworded", "retain", "neighbour", "general", "safety", "holdout")
NEAR = 0.8  # share of words that two prompts with the same answer have in common


@dataclass(frozen=True, slots=True)
class Sets:
    """forget, retain: encoded rows.  forget_cases: the rows themselves.  dropped: with reasons."""

    forget: list[Encoded]
    retain: list[Encoded]
    forget_cases: list[Case]
    dropped: list[Dropped]


def sets(
    model: Any, rows: Sequence[Case], tokenizer: Any, *, retain: Sequence[str], allow_overlap: bool, need_retain: bool
) -> Sets:
    """The rows by part. Raises InputError for an unknown part, an empty set, or rows that are in both (listed)."""
    for name in retain:
        if name not in PARTS[2:]:
            raise InputError(f"retain names parts among {', '.join(PARTS[2:])}, got {name!r}")
    for case in rows:
        if case.meta.get("part") not in PARTS:
            raise InputError(
                f"row {case.id}: meta.part must be one of {', '.join(PARTS)}, got {case.meta.get('part')!r}"
            )
    wanted = [case for case in rows if case.meta["part"] in ("forget", *retain)]
    if not any(case.meta["part"] == "forget" for case in wanted):
        raise InputError("there is nothing to forget: no row has meta.part forget")
    kept, dropped = usable(wanted, most=1.0)
    forget = [case for case in kept if case.meta["part"] == "forget"]
    stay = [case for case in kept if case.meta["part"] != "forget"]
    if not forget:
        raise InputError(
            f"no row to forget can be trained on. First: row {dropped[0].case.id}: {dropped[0].reason}. "
            "Each row ends in the assistant's answer"
        )
    if need_retain and not stay:
        raise InputError(f"this method needs rows to retain (meta.part {' or '.join(retain)}), got none")
    if shared := overlaps(forget, stay):
        listed = "; ".join(f"{a} and {b}" for a, b in shared[:5])
        if not allow_overlap:
            raise InputError(
                f"{len(shared)} rows are both to be forgotten and to be kept, word for word or nearly: {listed}. "
                "Take them out of one set, or say allow_overlap"
            )
        print(f"{len(shared)} rows are both to be forgotten and to be kept, as allowed: {listed}", file=sys.stderr)
    encoded, _ = encode(model, tokenizer, [*forget, *stay], None)
    return Sets(encoded[: len(forget)], encoded[len(forget) :], forget, dropped)


def overlaps(forget: Sequence[Case], stay: Sequence[Case]) -> list[tuple[str, str]]:
    """Pairs of ids whose last question is the same, or whose answer is the same and the words of the question are nearly.

    >>> from davylamp.core.nouns import Message
    >>> row = lambda id, q, a: Case(id, (Message("user", q), Message("assistant", a)))
    >>> overlaps([row("f", "Who is Ada ?", "x")], [row("r", "who is ada ?", "y"), row("s", "Who is Bob ?", "x")])
    [('f', 'r')]
    """
    by_question: dict[str, list[str]] = {}
    by_answer: dict[str, list[tuple[str, set[str]]]] = {}
    for case in stay:
        question, answer = _words(case)
        by_question.setdefault(question, []).append(case.id)
        by_answer.setdefault(answer, []).append((case.id, set(question.split())))
    out: dict[tuple[str, str], None] = {}
    for case in forget:
        question, answer = _words(case)
        words = set(question.split())
        out |= dict.fromkeys((case.id, other) for other in by_question.get(question, ()))
        for other, theirs in by_answer.get(answer, ()):
            if len(words & theirs) >= NEAR * len(words | theirs):
                out[case.id, other] = None
    return list(out)


def _words(case: Case) -> tuple[str, str]:
    before = " ".join(m.text for m in case.messages[:-1])
    return " ".join(before.lower().split()), " ".join(case.messages[-1].text.lower().split())


def recall(model: Any, tokenizer: Any, rows: Sequence[Encoded], *, width: int = 128) -> list[bool]:
    """Whether each row's answer is what the model would say, greedily and to the token; the end token does not count."""
    ends, out = ends_of(model, tokenizer), list[bool]()
    for at in range(0, len(rows), width):
        part = list(rows[at : at + width])
        for (_, answer), said in zip(part, likeliest(model, tokenizer, part), strict=True):
            n = len(answer) - (answer[-1] in ends)
            out.append(answer[:n] == said[:n])
    return out


def mean_losses(model: Any, tokenizer: Any, rows: Sequence[Encoded], *, width: int = 64) -> list[float]:
    """-ln p a token of each row's answer."""
    out: list[float] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with torch.no_grad():
        for at in range(0, len(rows), width):
            part = rows[at : at + width]
            ids, mask = padded([prompt + answer for prompt, answer in part], pad, model.device)
            labels, _ = padded([[IGNORED] * len(prompt) + answer for prompt, answer in part], IGNORED, model.device)
            nll = token_nll(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], labels[:, 1:])
            out += (nll.sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)).tolist()
    return out


def need_known(model: Any, tokenizer: Any, rows: Sequence[Encoded], rng: Generator) -> None:
    """Raises InputError where the model holds the right answers for no likelier than those of other rows: nothing to unlearn.

    Each answer is put beside that of another row, and must be the likelier one; chance is 1 in 2. With fewer than six rows that have
    different answers nothing can be said, and nothing is.
    """
    pairs = []
    for prompt, answer in rows:
        others = [other for _, other in rows if other != answer]
        if others:
            pairs.append((prompt, answer, others[int(rng.integers(len(others)))]))
    pairs = pairs[:200]
    if len(pairs) < 6:
        return
    mine = mean_losses(model, tokenizer, [(prompt, own) for prompt, own, _ in pairs])
    theirs = mean_losses(model, tokenizer, [(prompt, other) for prompt, _, other in pairs])
    right = sum(a < b for a, b in zip(mine, theirs, strict=True))
    low, _ = wilson(right, len(pairs))
    if low <= 0.5:
        raise InputError(
            f"the model knows nothing of the forget set: the right answer is likelier than another row's in {right} of {len(pairs)} "
            "rows, which is chance. There is nothing to unlearn. To go on anyway, say force"
        )
