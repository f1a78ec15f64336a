"""A model's thought: splitting it off the answer, and decoding strategies that cut it short or make it longer.

Source: arXiv:2502.12025, section 5 (ZeroThink, LessThink, MoreThink; minimum forcing after arXiv:2501.19393). Differs: the connector is
drawn from a generator of the row's own seed, and a thought that ends without its closing tag counts as ended, as one that was closed does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Message, Target

OPEN = re.compile(r"\s*<(think|thinking)>", re.IGNORECASE)
CLOSE = re.compile(r"</(think|thinking)>", re.IGNORECASE)
TAGS = ("<think>", "</think>")
STRATEGIES = ("default", "zero", "less", "more")
Strategy = Literal["default", "zero", "less", "more"]
SHORT_THOUGHT = (
    "This can be answered without thinking about it for long."  # our words; the published sentence says as much
)
CONNECTORS = ("Wait", "Let me think again")  # as published


@dataclass(frozen=True, slots=True)
class Parts:
    """A reply in two. thought: None where there is none.  status: none | closed | empty (closed, with nothing in it) | open (cut off: then
    there is no answer, and the row is neither safe nor a refusal).  blocks: how many thoughts stood in front of the answer."""

    thought: str | None
    answer: str
    status: Literal["none", "closed", "empty", "open"]
    blocks: int = 0


def parts(text: str, *, tags: tuple[str, str] | None = None, opened: bool = False) -> Parts:
    """Thought and answer of a raw reply.

    A thought is a leading block, several of them, or all before the first closing tag where the template opened it already (`opened`, or
    seen by there being no opening tag at all). A block that is never closed was cut off: all of it is thought. Tags later in the text stay
    text. A block inside a block belongs to the outer one if both are closed.

    tags: (open, close); by default <think> and <thinking>, in any case.

    >>> parts("<think>hm</think> yes"), parts("hm", opened=True).status
    (Parts(thought='hm', answer='yes', status='closed', blocks=1), 'open')
    >>> parts("<think>a <think>b</think> c</think> d").answer
    'd'
    """
    start, end = _patterns(tags)
    thoughts: list[str] = []
    closed = True
    while (opening := start.match(text)) or (
        not thoughts and (opened or (end.search(text) and not _opens_anywhere(text, tags)))
    ):
        inside = text[opening.end() :] if opening else text
        found = _closing(inside, start, end)
        if found is None:
            thoughts.append(inside.strip())
            text, closed = "", False
            break
        thoughts.append(inside[: found.start()].strip())
        text = inside[found.end() :]
    if not thoughts:
        return Parts(None, text, "none")
    thought = "\n\n".join(each for each in thoughts if each)
    status: Literal["closed", "empty", "open"] = "open" if not closed else "closed" if thought else "empty"
    return Parts(thought, text.strip(), status, len(thoughts))


def split_thinking(text: str) -> tuple[str | None, str]:
    """(thought, answer) of a raw reply, as `parts` finds them.

    >>> split_thinking("<think>hm</think> yes"), split_thinking("hm</think>yes"), split_thinking("yes")
    (('hm', 'yes'), ('hm', 'yes'), (None, 'yes'))
    >>> split_thinking("<think>hm"), split_thinking("say <think> to think")
    (('hm', ''), (None, 'say <think> to think'))
    """
    found = parts(text)
    return found.thought, found.answer


def status_of(reply: Message) -> str:
    """What became of a reply's thought: none, closed, empty, or open (a thought, and no answer after it).

    >>> status_of(Message("assistant", "", reasoning="so")), status_of(Message("assistant", "yes"))
    ('open', 'none')
    """
    if reply.reasoning is None:
        return "none"
    if not reply.text.strip():
        return "open"
    return "closed" if reply.reasoning.strip() else "empty"


def _patterns(tags: tuple[str, str] | None) -> tuple[re.Pattern[str], re.Pattern[str]]:
    if tags is None:
        return OPEN, CLOSE
    return re.compile(r"\s*" + re.escape(tags[0]), re.IGNORECASE), re.compile(re.escape(tags[1]), re.IGNORECASE)


def _opens_anywhere(text: str, tags: tuple[str, str] | None) -> bool:
    return ("<think" if tags is None else tags[0].lower()) in text.lower()


def _closing(inside: str, start: re.Pattern[str], end: re.Pattern[str]) -> re.Match[str] | None:
    """The closing tag of the block that begins here. Where the nesting is broken, the first one: a thought may well name the tag."""
    first, at, depth = end.search(inside), 0, 1
    opening = re.compile(start.pattern.removeprefix(r"\s*"), re.IGNORECASE)
    while (found := end.search(inside, at)) is not None:
        depth += len(opening.findall(inside[at : found.start()])) - 1
        if depth == 0:
            return found
        at = found.end()
    return first


# --- strategies ------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Thinking:
    """How a reply's thought is steered. Plain types, so that a record can hold it.

    strategy: default (as the model does), zero (an empty thought is put into its mouth), less (one short sentence, `short`), more (a closed
    thought is opened again behind a connector, `rounds` times or until it has `budget` tokens; then it is closed and the answer written).
    max_tokens: of thought and answer together; for more it must leave room behind the budget.  tags: of the thought.

    >>> Thinking("zero").prefill()
    '<think>\\n\\n</think>\\n\\n'
    >>> Thinking("more", budget=100, max_tokens=100)
    Traceback (most recent call last):
    davylamp.core.errors.InputError: max_tokens must be above the budget, or no room is left for the answer: got budget 100, max_tokens 100
    """

    strategy: Strategy = "default"
    tags: tuple[str, str] = TAGS
    short: str = SHORT_THOUGHT
    connectors: tuple[str, ...] = CONNECTORS
    rounds: int = 10  # N and B as published
    budget: int = 10_000
    max_tokens: int = 16_000

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UnknownNameError("thinking strategy", self.strategy, STRATEGIES)
        if len(self.tags) != 2 or not all(tag.strip() for tag in self.tags) or self.tags[0] == self.tags[1]:
            raise InputError(
                f"think_tags must be two different texts, such as <think>,</think>, got {','.join(self.tags)!r}"
            )
        if self.budget < 1 or self.rounds < 0 or self.max_tokens < 1:
            raise InputError(
                f"budget and max_tokens must be 1 or more and rounds 0 or more, got budget {self.budget}, "
                f"max_tokens {self.max_tokens}, rounds {self.rounds}"
            )
        if self.strategy == "more":
            if self.budget >= self.max_tokens:
                raise InputError(
                    "max_tokens must be above the budget, or no room is left for the answer: "
                    f"got budget {self.budget}, max_tokens {self.max_tokens}"
                )
            if not self.connectors or not all(text.strip() for text in self.connectors):
                raise InputError("MoreThink needs one or more connectors that are not empty")

    def prefill(self) -> str:
        """What the reply is made to begin with; empty for default."""
        start, end = self.tags
        if self.strategy == "default":
            return ""
        if self.strategy == "more":
            return f"{start}\n"
        inside = "" if self.strategy == "zero" else self.short
        return f"{start}\n{inside}\n{end}\n\n"

    def json(self) -> dict[str, Any]:
        """What determines replies: only the knobs that the strategy reads."""
        read = {
            "default": (),
            "zero": ("tags",),
            "less": ("tags", "short"),
            "more": ("tags", "connectors", "rounds", "budget"),
        }
        every = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: every[key] for key in ("strategy", "max_tokens", *read[self.strategy])}


async def think(
    target: Target, messages: Sequence[Message], plan: Thinking, *, seed: int = 0, **settings: Any
) -> Message:
    """One reply under the plan. The tokens of MoreThink's rounds add up. A `max_tokens` among the settings wins over the plan's.

    Raises InputError for a target that cannot go on from a begun reply, and TargetError for a server that did not.
    """
    plan = replace(plan, max_tokens=settings.pop("max_tokens", None) or plan.max_tokens)
    if plan.strategy == "default":
        return _again(await target(messages, seed=seed, max_tokens=plan.max_tokens, **settings), plan)
    if not can_prefill(target):
        raise InputError(
            f"{target.name} cannot go on from a reply that was begun for it, so the strategy {plan.strategy!r} cannot run on it: it "
            "supports default only. Targets that can: hf/…, organism/…, and openai/… behind a server with continue_final_message (vLLM)"
        )
    if plan.strategy == "more":
        return await _more(target, messages, plan, seed, settings)
    # A model may open a second thought of its own behind a closed one; that is what it does, and it stays in `reasoning`.
    return _again(
        await target(messages, seed=seed, prefill=plan.prefill(), max_tokens=plan.max_tokens, **settings), plan
    )


async def _more(
    target: Target, messages: Sequence[Message], plan: Thinking, seed: int, settings: dict[str, Any]
) -> Message:
    """Minimum forcing: the closing tag is replaced by a connector, until the rounds or the budget are spent; then the answer."""
    start, end = plan.tags
    draw = random.Random(f"davylamp connector {seed}")
    head, thought, used, read = plan.prefill(), "", 0, 0
    for turn in range(plan.rounds + 1):
        reply = await target(
            messages, seed=seed + turn, prefill=head, stop=end, max_tokens=plan.budget - used, **settings
        )
        used, read = used + reply.tokens[1], reply.tokens[0] or read
        thought = _again(reply, plan).reasoning or ""
        if turn == plan.rounds or used >= plan.budget or reply.finish == "length":
            break
        head = f"{start}\n{thought}\n{draw.choice(plan.connectors)}"
    answer = await target(
        messages,
        seed=seed,
        prefill=f"{start}\n{thought}\n{end}\n\n",
        max_tokens=max(1, plan.max_tokens - max(used, plan.budget)),
        **settings,
    )
    answer = _again(answer, plan)
    return Message(
        "assistant",
        answer.text,
        reasoning=thought,
        finish=answer.finish,
        tokens=(read, used + answer.tokens[1]),
    )


def _again(reply: Message, plan: Thinking) -> Message:
    """The reply split by the plan's own tags, where they are not those that every target knows."""
    if plan.tags == TAGS or reply.reasoning is not None:
        return reply
    found = parts(reply.text, tags=plan.tags)
    return Message(
        "assistant",
        found.answer,
        reasoning=found.thought,
        calls=reply.calls,
        finish=reply.finish,
        tokens=reply.tokens,
    )


def can_prefill(target: Target) -> bool:
    """Whether the target says that it goes on from a begun reply (`prefills`)."""
    return bool(getattr(target, "prefills", False))


def plan_from(text: str) -> Thinking:
    """The plan of a target's name: a strategy, and behind commas what differs from the defaults. The parts of a list (tags,
    connectors) are parted by `;`.

    >>> plan_from("more,budget=50,rounds=3,connectors=Wait;Hold on").connectors
    ('Wait', 'Hold on')
    >>> plan_from("none")
    Traceback (most recent call last):
    davylamp.core.errors.UnknownNameError: no thinking strategy named 'none'. Known: default, zero, less, more
    """
    strategy, *given = text.split(",")
    options: dict[str, Any] = {}
    for part in given:
        name, mark, value = part.partition("=")
        kinds = {"tags": tuple, "connectors": tuple, "short": str, "rounds": int, "budget": int, "max_tokens": int}
        if not mark:
            raise InputError(f"an option of a thinking strategy reads name=value, got {part!r}")
        if name not in kinds:
            raise UnknownNameError("option of a thinking strategy", name, kinds)
        if kinds[name] is int and not re.fullmatch(r"-?\d+", value):
            raise InputError(f"{name} of a thinking strategy must be a whole number, got {value!r}")
        options[name] = tuple(value.split(";")) if kinds[name] is tuple else kinds[name](value)
    return Thinking(strategy, **options)  # type: ignore[arg-type]  # checked there


class ThinkingTarget:
    """A target under a strategy: measured in a suite as it is deployed. `prefill` of its own is not taken."""

    def __init__(self, target: Target, plan: Thinking):
        if plan.strategy != "default" and not can_prefill(target):
            raise InputError(
                f"{target.name} cannot go on from a reply that was begun for it: it supports the strategy default only"
            )
        knows = getattr(target, "knows", None)  # a local model can say; what a server's model knows cannot be seen
        if plan.strategy != "default" and plan.tags == TAGS and knows is not None and not knows(TAGS[0]):
            raise InputError(
                f"the tokenizer and chat template of {target.name} know no {TAGS[0]} tag. Name the tags that its thoughts stand in "
                "(think/zero,tags=OPEN;CLOSE/…), or use the strategy default"
            )
        self.inner, self.plan = target, plan
        self.name = f"{target.name} ({plan.strategy} thinking)"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**self.inner.identity, "name": self.name, "thinking": self.plan.json()}

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        return await think(self.inner, messages, self.plan, seed=seed, **settings)

    async def close(self) -> None:
        closing = getattr(self.inner, "close", None)
        if closing is not None:
            await closing()
