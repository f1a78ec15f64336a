"""Decisions, and nothing else: no clock, no network, no state.

On numbers: `--fail-if "unsafe_rate.high > 0.05"`; an undecidable gate is neither pass nor fail.
On verdicts: what a guard's verdict means for the message it was given on (allow, warn, regenerate, block), level by level, and the loop
that asks again. Source of the levels and the loop: Safe RLHF-V's multi-level guardrail (arXiv:2503.17682, Beaver-Guard-V, 5 rounds).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Estimate, Verdict

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


# Guards: from a verdict to what is done

ACTIONS = ("allow", "warn", "regenerate", "block")  # from the mildest to the strongest
MEANS_UNSAFE = {"unsafe": "high", "safety": "low"}  # which end of a measure is the unsafe one, where the name says it
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Level:
    """A step of severity: it is reached by a danger of `at` or more (in [0, 1]), or by a verdict whose label is `name`.

    >>> Level("severe", 0.9, "blok")
    Traceback (most recent call last):
    davylamp.core.errors.UnknownNameError: no action of level severe named 'blok'. Did you mean 'block'?
    """

    name: str
    at: float
    action: str

    def __post_init__(self) -> None:
        if not (self.name and self.name.isascii() and self.name.isprintable()):
            raise InputError(f"a level's name must be printable ASCII, got {self.name!r}")
        if self.action not in ACTIONS:
            raise UnknownNameError(f"action of level {self.name}", self.action, ACTIONS)
        if not 0.0 <= self.at <= 1.0:
            raise InputError(f"level {self.name}: `at` must be in [0, 1], got {self.at}")


@dataclass(frozen=True, slots=True)
class GuardRule:
    """How the verdicts of one guard are read.

    levels: mild to severe, `at` rising; below the first one all is allowed.  flag: which end of the guard's value is unsafe, `high` or
    `low`; danger is the value, or 1 - value.  on_failure: `block` or `allow` where the guard gave no verdict or could not tell.
    ignore: categories that do not count; a verdict with categories, all of them ignored, is allowed.
    """

    levels: tuple[Level, ...] = (Level("unsafe", 0.5, "block"),)
    flag: str = "high"
    on_failure: str = "block"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.flag not in ("high", "low"):
            raise UnknownNameError("flag", self.flag, ("high", "low"))
        if self.on_failure not in ("block", "allow"):
            raise UnknownNameError("on_failure", self.on_failure, ("block", "allow"))
        if not self.levels:
            raise InputError("a guard needs one level or more, got none")
        names, starts = [level.name for level in self.levels], [level.at for level in self.levels]
        if len(set(names)) < len(names):
            raise InputError(f"the levels of a guard need different names, got {', '.join(names)}")
        if starts != sorted(starts):
            raise InputError(f"the levels of a guard must rise from mild to severe, got `at` = {starts}")


@dataclass(frozen=True, slots=True)
class Ruling:
    """What one verdict means. outcome: allowed | blocked | unavailable.  action: one of ACTIONS.  level: the level reached, if any.

    A ruling to regenerate counts as blocked: the message it was given on is not sent.
    """

    outcome: str
    action: str
    level: str | None = None


ALLOWED = Ruling("allowed", "allow")


def rule(by: GuardRule, verdict: Verdict | None) -> Ruling:
    """What a verdict means under the guard's rule. None (the guard failed) and "could not tell" are unavailable, never allowed in silence.

    A label that names a level and the value can disagree: the more severe of the two counts.

    >>> by = GuardRule((Level("minor", 0.3, "warn"), Level("moderate", 0.6, "regenerate"), Level("severe", 0.9, "block")))
    >>> [rule(by, Verdict(value)).action for value in (0.1, 0.3, 0.7, 1.0)]
    ['allow', 'warn', 'regenerate', 'block']
    >>> rule(by, Verdict(0.2, label="moderate")).level, rule(by, Verdict(None)).outcome
    ('moderate', 'unavailable')
    """
    if verdict is None or verdict.value is None:
        return Ruling("unavailable", by.on_failure)
    if verdict.categories and by.ignore and set(verdict.categories) <= set(by.ignore):
        return ALLOWED
    danger = verdict.value if by.flag == "high" else 1.0 - verdict.value
    for level in reversed(by.levels):
        if danger >= level.at or verdict.label == level.name:
            return Ruling("blocked" if level.action in ("regenerate", "block") else "allowed", level.action, level.name)
    return ALLOWED


def strongest(rulings: Iterable[Ruling]) -> Ruling:
    """The ruling that decides where several guards ruled: the strongest action; of equal ones a verdict before a failure.

    >>> strongest([Ruling("allowed", "warn"), Ruling("unavailable", "block"), Ruling("blocked", "regenerate")])
    Ruling(outcome='unavailable', action='block', level=None)
    """
    return max(
        rulings, key=lambda ruling: (ACTIONS.index(ruling.action), ruling.outcome != "unavailable"), default=ALLOWED
    )


@dataclass(frozen=True, slots=True)
class Regenerated(Generic[T]):
    """reply: what may be sent, None if nothing may.  ruling: the last one.  trace: (round from 1, ruling) of each reply that was judged.

    unfiltered: the reply is the one more sample of `after="last"`, which nobody judged.
    """

    reply: T | None
    ruling: Ruling
    trace: tuple[tuple[int, Ruling], ...]
    unfiltered: bool = False


async def regenerate(
    generate: Callable[[int], Awaitable[T]],
    judge: Callable[[T], Awaitable[Ruling]],
    *,
    rounds: int = 5,
    after: str = "refuse",
) -> Regenerated[T]:
    """Ask, judge, and ask again while the ruling says `regenerate`, at most `rounds` times in all (5 in the paper).

    generate: called with the round, from 0.  after: what follows when every round was flagged: `refuse` (no reply), or `last`, one more
    sample that is sent without being judged; that is the paper's curve, not a thing to deploy. A ruling to block ends it at once.
    Raises InputError on rounds < 0.
    """
    if rounds < 0:
        raise InputError(f"rounds must be 0 or more, got {rounds}")
    if after not in ("refuse", "last"):
        raise UnknownNameError("way to end", after, ("refuse", "last"))
    trace: list[tuple[int, Ruling]] = []
    ruling = Ruling("blocked", "regenerate")
    for number in range(rounds):
        reply = await generate(number)
        ruling = await judge(reply)
        trace.append((number + 1, ruling))
        if ruling.action in ("allow", "warn"):
            return Regenerated(reply, ruling, tuple(trace))
        if ruling.action == "block":
            return Regenerated(None, ruling, tuple(trace))
    if after == "last":
        return Regenerated(await generate(rounds), ruling, tuple(trace), unfiltered=True)
    return Regenerated(None, ruling, tuple(trace))


def regenerated_rates(unsafe: float, recall: float, false_alarm: float, rounds: int) -> dict[str, float]:
    """What `regenerate` leaves of a generator's unsafe rate if its samples are independent: closed form, all numbers in [0, 1].

    unsafe: the generator's unsafe rate u.  recall: r, the share of unsafe replies that are flagged.  false_alarm: f, that of safe ones.
    With the chance to accept a = (1 - u)(1 - f) + u(1 - r) and q = (1 - a)^rounds:  unsafe_refuse = u(1 - r)(1 - q)/a, refused = q,
    unsafe_last = unsafe_refuse + q u, floor = u(1 - r)/a (many rounds).

    >>> {name: round(value, 3) for name, value in regenerated_rates(0.5, 0.8, 0.0, 5).items()}
    {'unsafe_refuse': 0.165, 'unsafe_last': 0.17, 'refused': 0.01, 'floor': 0.167}
    """
    for name, value in (("unsafe", unsafe), ("recall", recall), ("false_alarm", false_alarm)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name} must be in [0, 1], got {value}")
    if rounds < 0:
        raise InputError(f"rounds must be 0 or more, got {rounds}")
    accept = (1 - unsafe) * (1 - false_alarm) + unsafe * (1 - recall)
    floor = unsafe * (1 - recall) / accept if accept > 0 else 0.0
    refused = (1 - accept) ** rounds
    passed = floor * (1 - refused)
    return {"unsafe_refuse": passed, "unsafe_last": passed + refused * unsafe, "refused": refused, "floor": floor}
