"""The ten nouns. Everything that crosses a file boundary is one of these and survives `json.dumps` and back.

Message  Case  Target  Judge  Verdict  Suite (with its Metrics)  Finding  Estimate  Claim  Record
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from davylamp.core.errors import InputError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. The thought (`reasoning`), the answer (`text`), pictures and tool calls are separate on purpose.

    role: system | user | assistant | tool.  media: URLs, data URLs or paths.  calls: tool calls in the OpenAI wire form.
    call_id: for role tool, which call this answers.  finish: why the model stopped (stop | length | content_filter | …),
    empty if unknown.  tokens: (prompt, completion) as the target counted them, (0, 0) if it did not.

    >>> Message("user", "hello").json()
    {'role': 'user', 'content': 'hello'}
    """

    role: str
    text: str = ""
    reasoning: str | None = None
    media: tuple[str, ...] = ()
    calls: tuple[Mapping[str, Any], ...] = ()
    call_id: str | None = None
    finish: str = ""
    tokens: tuple[int, int] = (0, 0)

    def json(self) -> dict[str, Any]:
        """Plain form, only what is set; `text` is written as `content`, the name the field uses."""
        out: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.reasoning is not None:
            out["reasoning"] = self.reasoning
        if self.media:
            out["media"] = list(self.media)
        if self.calls:
            out["calls"] = [dict(call) for call in self.calls]
        if self.call_id is not None:
            out["call_id"] = self.call_id
        if self.finish:
            out["finish"] = self.finish
        if self.tokens != (0, 0):
            out["tokens"] = list(self.tokens)
        return out


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `category` is a taxonomy node such as `aegis2/violence`; `group` clusters intervals; `answer` is the key.

    >>> Case("1", (Message("user", "2+2?"),), answer="4").json()
    {'id': '1', 'messages': [{'role': 'user', 'content': '2+2?'}], 'answer': '4'}
    """

    id: str
    messages: tuple[Message, ...]
    category: str | None = None
    answer: Any = None
    group: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"id": self.id, "messages": [message.json() for message in self.messages]}
        for name, value in (("category", self.category), ("answer", self.answer), ("group", self.group)):
            if value is not None:
                out[name] = value
        if self.meta:
            out["meta"] = dict(self.meta)
        return out


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says. value in [0, 1], or None: could not tell. None is never turned into a class.

    label: a finer state in words (`nonresponsive`, `blocked`).  categories: hazard nodes.  why: one sentence.

    >>> Verdict(1.5)
    Traceback (most recent call last):
    davylamp.core.errors.InputError: a verdict's value must be in [0, 1] or None, got 1.5
    """

    value: float | None
    label: str | None = None
    categories: tuple[str, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        if self.value is not None and not (0.0 <= self.value <= 1.0):  # NaN fails the comparison too
            raise InputError(f"a verdict's value must be in [0, 1] or None, got {self.value}")

    def json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"value": self.value}
        if self.label is not None:
            out["label"] = self.label
        if self.categories:
            out["categories"] = list(self.categories)
        if self.why:
            out["why"] = self.why
        return out


class Target(Protocol):
    """Whatever can be asked. `identity` names all that determines its replies (name, address, weights' hash); plain types."""

    name: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message: ...


class Judge(Protocol):
    """Says how far a conversation shows what it `measures` (complied, unsafe, correct, …). A guard needs no `case`.

    The last message is the reply under judgement; those before it are the conversation.
    """

    async def __call__(self, messages: Sequence[Message], case: Case | None = None) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class Metric:
    """How verdicts become a number: the mean of `value` (or of 1 - value, with `flip`) over the cases that match `where`.

    where: pairs of a case path (`category`, `meta.label`) and the value it must have.  by: case paths to break down by; a path that
    holds a list (tags) puts the case into a slice for each.
    against: (case path, a, b) makes it a paired contrast instead: mean(a) - mean(b) over cases that share `group`.
    label: count the verdicts with this label instead of averaging values (a share of `invalid`, of `refused`).
    per: `case`; or `group`: the largest value of the cases that share a group counts once (an attack that may choose among them); or
    `category`: each category counts the same, however many cases it has (macro average).

    >>> Metric("over_refusal_rate", flip=True, where=(("meta.label", "safe"),)).higher_is_better
    False
    """

    name: str
    flip: bool = False
    where: tuple[tuple[str, Any], ...] = ()
    by: tuple[str, ...] = ("category",)
    against: tuple[str, str, str] | None = None
    higher_is_better: bool = False
    per: Literal["case", "group", "category"] = "case"
    label: str = ""


async def ask_once(target: Target, case: Case, *, seed: int = 0, **settings: Any) -> tuple[Message, ...]:
    """The default play: put the case's messages to the target and return its one reply."""
    return (await target(case.messages, seed=seed, **settings),)


@dataclass(frozen=True, slots=True)
class Suite:
    """Questions with a way to score them. `cases` can be walked through more than once; `judge` is a judge's name.

    play: `async (target, case, *, seed, **settings) -> messages that followed`; ask-once unless the suite steps a world.
    settings: generation settings the suite asks for (such as max_tokens); the user's own win.
    notes: what a reader of the numbers must know.
    """

    name: str
    cases: Iterable[Case]
    judge: str
    metrics: tuple[Metric, ...]
    play: Callable[..., Any] = ask_once
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """What an attack brings home: the conversation that got the verdict, and what it cost."""

    case: Case
    messages: tuple[Message, ...]
    verdict: Verdict
    queries: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its doubt. Never a bare float.

    value, low, high: the estimate and its 95 % interval; None if no row could be scored.
    n: scored rows.  unscored: rows without a verdict.  worst: (lowest, highest) value had all unscored gone one way.
    corrected: (value, low, high) after the judge's measured error is taken out, or None.
    category, arm: which slice this is; None = all.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0
    worst: tuple[float, float] | None = None
    method: str = ""
    unit: str = "rate"
    higher_is_better: bool = False
    name: str = ""
    category: str | None = None
    arm: str | None = None
    corrected: tuple[float, float, float] | None = None
    p: float | None = None

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "category": self.category,
            "arm": self.arm,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "unscored": self.unscored,
            "worst": list(self.worst) if self.worst else None,
            "corrected": list(self.corrected) if self.corrected else None,
            "p": self.p,
            "method": self.method,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
        }


@dataclass(frozen=True, slots=True)
class Claim:
    """A study's promise: `quantity` of `arm` minus that of `against`, decided on the interval's end, never on the middle.

    at_least: holds if the low end of the difference is >= it.  at_most: holds if the high end is <= it.
    Without `against` the quantity of the arm itself is meant.

    >>> Claim("unsafe_rate", arm="top head off", against="random head off", at_least=0.30).text
    'unsafe_rate: top head off - random head off >= 0.3'
    """

    quantity: str
    arm: str
    against: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    control: bool = False

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise InputError(f"a claim needs at_least or at_most, got neither for {self.quantity!r}")

    @property
    def text(self) -> str:
        what = f"{self.quantity}: {self.arm}" + (f" - {self.against}" if self.against else "")
        if self.at_least is not None and self.at_most is not None:
            return f"{what} in [{self.at_least:g}, {self.at_most:g}]"
        return f"{what} >= {self.at_least:g}" if self.at_least is not None else f"{what} <= {self.at_most:g}"

    def held(self, estimate: Estimate) -> bool | None:
        """True, False, or None where there is no interval to decide on."""
        if (
            estimate.low is None
            or estimate.high is None
            or not (math.isfinite(estimate.low) and math.isfinite(estimate.high))
        ):
            return None
        low_ok = self.at_least is None or estimate.low >= self.at_least
        return low_ok and (self.at_most is None or estimate.high <= self.at_most)


@dataclass(frozen=True, slots=True)
class Record:
    """What ran, on what, with which versions and seeds, and what came out. See `core/record.py` for its JSON form.

    id: hash of `inputs`, which hold all that determines the result.  parents: ids of the records it came from.
    """

    verb: str
    name: str
    inputs: Mapping[str, Any]
    id: str
    parents: tuple[str, ...] = ()
    status: str = "running"
    estimates: tuple[Estimate, ...] = ()
    claims: tuple[Mapping[str, Any], ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
