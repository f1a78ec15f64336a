"""Multiple choice: what a responder does with the places of the options, beside how often it is right.
Source: this repository; the audit by rotation is common practice (arXiv:2310.12955 and others)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from davylamp.core.errors import InputError
from davylamp.core.nouns import Estimate
from davylamp.core.stats import clopper_pearson, clustered_rate, rate

LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class Audit:
    """accuracy: over all rotations, clustered by item.  by_gold: accuracy where the right option stands at A, B, C, D.  picks: how often
    each letter is chosen.  flips: items whose chosen option (not letter) changes with its place.  biased: whether a letter is chosen more
    often than the right option stands there, beyond chance."""

    accuracy: Estimate
    by_gold: dict[str, Estimate]
    picks: dict[str, Estimate]
    flips: Estimate
    biased: bool


def option_audit(rows: Sequence[tuple[str, int, str, str | None]]) -> Audit:
    """rows: (item, rotation, letter of the right option in that rotation, letter chosen or None).

    Every item needs the same rotations, each once, so that the right option stands everywhere equally often; then a responder that
    always says A is right in a quarter. A choice of None is unscored. Biased: the exact 95 % interval of one letter's share, with
    Bonferroni's correction over the four, excludes 1/4.

    >>> rows = [(str(i), turn, "ABCD"[turn], "A") for i in range(30) for turn in range(4)]
    >>> audit = option_audit(rows)
    >>> audit.accuracy.value, audit.biased, audit.by_gold["A"].value, audit.by_gold["B"].value
    (0.25, True, 1.0, 0.0)
    """
    if not rows:
        raise InputError("there are no rows to audit")
    items: dict[str, dict[int, tuple[str, str | None]]] = {}
    for item, turn, gold, choice in rows:
        if gold not in LETTERS or (choice is not None and choice not in LETTERS) or turn in items.get(item, {}):
            raise InputError(
                f"item {item}: letters must be A to D and each rotation must come once, got {gold!r}, {choice!r}, {turn}"
            )
        items.setdefault(item, {})[turn] = (gold, choice)
    turns = {tuple(sorted(found)) for found in items.values()}
    if len(turns) > 1:
        raise InputError(f"every item needs the same rotations, found {len(turns)} different sets")
    known = [row for row in rows if row[3] is not None]
    missing = len(rows) - len(known)
    sums: dict[str, list[float]] = {}
    for item, _, gold, choice in known:
        sums.setdefault(item, []).append(float(gold == choice))
    accuracy = clustered_rate(
        [sum(v) for v in sums.values()],
        [len(v) for v in sums.values()],
        missing,
        name="accuracy",
        higher_is_better=True,
    )
    by_gold, picks, biased = {}, {}, False
    for letter in LETTERS:
        at = [row for row in known if row[2] == letter]
        by_gold[letter] = rate(
            sum(row[3] == letter for row in at),
            len(at),
            name="accuracy",
            category=f"gold={letter}",
            higher_is_better=True,
        )
        chosen = sum(row[3] == letter for row in known)
        picks[letter] = rate(chosen, len(known), name="picked", category=letter)
        if known:
            low, high = clopper_pearson(chosen, len(known), level=1 - 0.05 / 4)
            biased = biased or not low <= 0.25 <= high
    flipped = []
    for found in items.values():
        # The option behind a letter: how far it stands from the right one. Equal distances are the same option.
        options = {
            (LETTERS.index(choice) - LETTERS.index(gold)) % 4 for gold, choice in found.values() if choice is not None
        }
        if options:
            flipped.append(len(options) > 1)
    flips = rate(sum(flipped), len(flipped), len(items) - len(flipped), name="flip_rate")
    return Audit(accuracy, by_gold, picks, flips, biased)
