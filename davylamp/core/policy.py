"""Decisions on numbers: `--fail-if "unsafe_rate.high > 0.05"`. An undecidable gate is neither pass nor fail."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Estimate

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
FIELDS = (
    "value",
    "low",
    "high",
    "n",
    "unscored",
    "worst_low",
    "worst_high",
    "corrected",
    "corrected_low",
    "corrected_high",
    "p",
)
RULE = re.compile(r"\s*(\w+)(?:\[([^\]]+)\])?(?:\.(\w+))?\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit. name[slice].field op number; slice is a category, an arm, or `*` for every category; the default field is value.

    >>> parse_rule("unsafe_rate[*].high > 0.05")
    Rule(name='unsafe_rate', part='*', field='high', op='>', limit=0.05)
    """

    name: str
    part: str | None
    field: str
    op: str
    limit: float

    @property
    def text(self) -> str:
        return f"{self.name}{f'[{self.part}]' if self.part else ''}.{self.field} {self.op} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Decision:
    """broken: the limit was crossed (fail).  None: not decidable, no scored rows.  got: the number looked at."""

    rule: Rule
    estimate: Estimate
    got: float | None
    broken: bool | None


def parse_rule(text: str) -> Rule:
    match = RULE.fullmatch(text)
    if match is None:
        raise InputError(f"a limit reads like 'unsafe_rate.high > 0.05', got {text!r}")
    name, part, field, op, number = match.groups()
    if field is not None and field not in FIELDS:
        raise UnknownNameError("field of an estimate", field, FIELDS)
    try:
        return Rule(name, part, field or "value", op, float(number))
    except ValueError:
        raise InputError(f"a limit ends in a number, got {number!r} in {text!r}") from None


def field_of(estimate: Estimate, field: str) -> float | None:
    """A named number of an estimate; None where it has none."""
    if field.startswith("worst_"):
        return estimate.worst[field == "worst_high"] if estimate.worst else None
    if field.startswith("corrected"):
        index = ("corrected", "corrected_low", "corrected_high").index(field)
        return estimate.corrected[index] if estimate.corrected else None
    return getattr(estimate, field)


def decide(rule: Rule, estimates: Iterable[Estimate]) -> list[Decision]:
    """The decision for every estimate the rule speaks of. Raises UnknownNameError if there is none."""
    estimates = list(estimates)
    named = [estimate for estimate in estimates if estimate.name == rule.name]
    if not named:
        raise UnknownNameError("metric in this run", rule.name, {estimate.name for estimate in estimates})
    if rule.part is None:
        chosen = [estimate for estimate in named if estimate.category is None and estimate.arm is None] or named[:1]
    elif rule.part == "*":
        chosen = [estimate for estimate in named if estimate.category is not None]
    else:
        chosen = [estimate for estimate in named if rule.part in (estimate.category, estimate.arm)]
    if not chosen:
        raise UnknownNameError(
            f"slice of {rule.name}", rule.part or "", {e.category or e.arm or "" for e in named} - {""}
        )
    out = []
    for estimate in chosen:
        got = field_of(estimate, rule.field)
        out.append(Decision(rule, estimate, got, None if got is None else OPERATORS[rule.op](got, rule.limit)))
    return out
