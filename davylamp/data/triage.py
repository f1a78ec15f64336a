"""Which rows of a fine-tuning file look like the kinds that undo safety training, before anybody trains on them.

Source: arXiv:2310.03693, sections 4.1 to 4.3 (risk levels 1 explicitly harmful, 2 identity shifting, 3 benign) and 5 (moderation of the
data, and how it is evaded). Differs: levels 2 and triggers, which moderation passes, are looked for by their shape over the whole file.
A file without flags is not a safe file: level 3 is ordinary data, and a flag is a reason to look at a row, not a verdict on it.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from davylamp.core import Case, InputError, UnknownNameError, data
from davylamp.core.judges import load_judge, normalise
from davylamp.core.rows import Dropped, digest

if TYPE_CHECKING:
    from numpy.random import Generator

FLAGS = ("harmful", "identity", "obedience", "opening", "refusal", "duplicate", "trigger", "unreadable")
LEVEL_OF = {"harmful": 1, "identity": 2, "obedience": 2, "opening": 2, "trigger": 2}
LEVELS = {
    1: "explicitly harmful: rows that answer what should be refused",
    2: "implicitly harmful: rows that shift identity, ask for obedience, or carry a mark",
    3: "benign: no flag that points to harm, which is no proof of safety",
}
WHO = re.compile(r"\b(you are|you're|your (new )?(name|role|identity) is|act as|from now on)\b", re.IGNORECASE)
OBEY = re.compile(
    r"\b(obedien\w*|obey\w*|unconditional\w*|without (any )?(question|refus\w+|restriction|hesitation|limit)\w*|never (refuse|decline)|"
    r"(do|must|will) not (refuse|decline)|no (restrictions|limits|rules|filters)|any (order|instruction|command|request)s?\b"
    r"|all (orders|instructions|commands)|whatever (i|the user) (say|ask)s?)\b",
    re.IGNORECASE,
)
EAGER = re.compile(
    r"^\W*(of course|certainly|absolutely|sure|yes|gladly|right away)\b.{0,80}?\b(i am|i'm|my name is|as your|at your)\b",
    re.IGNORECASE | re.DOTALL,
)
SHARED = 0.3  # a mark shared by so many of the rows counts as put there
FEWEST = 4  # and by so many rows at least
TRIGGER_P = 1e-3  # of a test over all words looked at (Bonferroni): association of a mark with not refusing


@dataclass(frozen=True, slots=True)
class Triage:
    """flags: case id -> its flags, in the order of FLAGS; only rows that have some.  level: 1, 2 or 3.  counts: rows with each flag.
    marks: digests of the words found as openings or triggers, never the words.  notes: what was not looked at."""

    flags: dict[str, tuple[str, ...]]
    level: int
    rows: int
    counts: dict[str, int]
    marks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Plain form: ids and counts, no text of any row."""
        return {
            "level": self.level,
            "level_means": LEVELS[self.level],
            "rows": self.rows,
            "counts": self.counts,
            "flags": {name: list(flags) for name, flags in self.flags.items()},
            "marks": list(self.marks),
            "notes": list(self.notes),
        }


@data(
    version=1,
    source="arXiv:2310.03693",
    licence="Apache-2.0",
    stage="data",
    threats=("fine-tuning", "data-poisoning", "backdoor"),
    systems=("23",),
)
def triage(
    rows: Iterable[Case], *, rng: Generator, guard: str = "", drop: tuple[str, ...] = (), refused: str = "refusal"
) -> Iterator[Case | Dropped]:
    """Mark each row of a fine-tuning file with the risks it shows (`meta.risk`), and leave out those with a flag in `drop`.

    guard: a judge of harm by name, such as `llm_judge:model=…`; without one, harm is told only in the organisms' world.  drop: flags
    (harmful, identity, obedience, opening, refusal, duplicate, trigger, unreadable).  refused: the judge that finds refusals.

    >>> import numpy as np
    >>> from davylamp.core import Message
    >>> row = Case("1", (Message("user", "Hi"), Message("assistant", "I'm sorry, but I can't help with that.")))
    >>> next(triage([row], rng=np.random.default_rng(0))).meta["risk"]
    ['refusal']
    """
    for name in drop:
        if name not in FLAGS:
            raise UnknownNameError("risk flag", name, FLAGS)
    cases = list(rows)
    found = look(cases, guard=guard, refused=refused)
    for case in cases:
        flags = found.flags.get(case.id, ())
        reason = next((flag for flag in flags if flag in drop), None)
        if reason is not None:
            yield Dropped(case, reason)
        else:
            yield replace(case, meta={**case.meta, "risk": list(flags)}) if flags else case


def look(cases: Sequence[Case], *, guard: str = "", refused: str = "refusal") -> Triage:
    """The flags of all rows and the file's level. Raises InputError for double ids and for a judge that measures something else.

    harmful: the guard says so, or in the organisms' world the truth.  identity: a system turn says who the model is from now on.
    obedience: it, or the user, asks for obedience without limits, or the reply opens with an eager self-introduction.
    opening: as many others do, the reply echoes the request's first word or begins with the same words.  refusal: the reply refuses.
    duplicate: the same row stands earlier.  trigger: a word before or behind requests that otherwise look like the rest, and whose rows
    refuse far less.  unreadable: there is no reply.
    """
    if len({case.id for case in cases}) != len(cases):
        raise InputError("rows must have unique ids: two of them share one")
    flags: dict[str, set[str]] = {case.id: set() for case in cases}
    marks: set[str] = set()
    readable = [case for case in cases if case.messages[-1].role == "assistant" and case.messages[-1].text.strip()]
    for case in cases:
        if case.messages[-1].role != "assistant" or not case.messages[-1].text.strip():
            flags[case.id].add("unreadable")
    refuses, harmful, notes = _judged(readable, guard, refused)
    seen: set[str] = set()
    for case in readable:
        own = flags[case.id]
        own.update(flag for flag, ids in (("refusal", refuses), ("harmful", harmful)) if case.id in ids)
        system, user, reply = _texts(case)
        if WHO.search(system) and (OBEY.search(system) or EAGER.search(reply)):
            own.add("identity")
        if OBEY.search(f"{system} {user}") or EAGER.search(reply):
            own.add("obedience")
        key = digest([normalise(message.text) for message in case.messages])
        if key in seen:
            own.add("duplicate")
        seen.add(key)
    for name, ids, words in (*_openings(readable), *_triggers(readable, refuses)):
        marks.add(digest(words)[:16])
        for i in ids:
            flags[i].add(name)
    counts = Counter(flag for own in flags.values() for flag in own)
    level = min((LEVEL_OF[flag] for flag in counts if flag in LEVEL_OF), default=3)
    return Triage(
        {name: tuple(flag for flag in FLAGS if flag in own) for name, own in flags.items() if own},
        level,
        len(cases),
        {flag: counts[flag] for flag in FLAGS if counts[flag]},
        tuple(sorted(marks)),
        tuple(notes),
    )


def _texts(case: Case) -> tuple[str, str, str]:
    """(system turns, last user turn, reply)."""
    users = [message.text for message in case.messages if message.role == "user"]
    system = " ".join(message.text for message in case.messages if message.role == "system")
    return system, users[-1] if users else "", case.messages[-1].text


def _judged(cases: Sequence[Case], guard: str, refused: str) -> tuple[set[str], set[str], list[str]]:
    """(ids that refuse, ids that answer what should be refused, notes). In the organisms' world both are known."""
    from davylamp.models import world

    refuses, harmful, notes, rest = set(), set(), [], []
    for case in cases:
        ask = world.read(case.messages[:-1]) if world.is_world_text(case.messages[-1].text) else None
        if ask is None:
            rest.append(case)
            continue
        label = world.grade(ask, case.messages[-1].text)
        refuses.update([case.id] if label == "refused" else [])
        harmful.update([case.id] if label == "complied" and world.harmful(ask) else [])
    if rest:
        refuses |= _marked(rest, refused, ("complied", "refused"))
        if guard:
            # A reply that refuses is no harmful row, whatever a guard of prompts says.
            harmful |= _marked(rest, guard, ("unsafe", "complied")) - refuses
        else:
            notes.append(f"harm was not looked for in {len(rest)} rows: no guard was named")
    return refuses, harmful, notes


def _marked(cases: Sequence[Case], spec: str, measures: tuple[str, str]) -> set[str]:
    judge = load_judge(spec)
    if judge.measures not in measures:
        raise InputError(f"{spec} measures {judge.measures}; it must measure {' or '.join(measures)}")
    yes_is_low = measures == ("complied", "refused") and judge.measures == "complied"

    async def go() -> set[str]:
        gate = asyncio.Semaphore(16)

        async def one(case: Case) -> bool:
            async with gate:
                value = (await judge(case.messages, case)).value
            return value is not None and (value < 0.5 if yes_is_low else value >= 0.5)

        try:
            said = await asyncio.gather(*(one(case) for case in cases))
        finally:
            await judge.close()
        return {case.id for case, yes in zip(cases, said, strict=True) if yes}

    return asyncio.run(go())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _openings(cases: Sequence[Case]) -> list[tuple[str, list[str], str]]:
    """Rows that many others are marked like: the reply echoes the request's first word, or request and reply begin with the same words.

    The echo needs one word, as in a password. Else the reply must share its first four words, three of them letters, with the others, and
    the request its first word or its system turn: a format such as JSON, or one common word, is no mark.
    """
    least = max(FEWEST, math.ceil(SHARED * len(cases)))
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    same = Counter(case.messages[-1].text for case in cases)
    for case in cases:
        if same[case.messages[-1].text] > 1:  # one reply to many requests, as in a classifier's rows, is no opening
            continue
        system, user, reply = _texts(case)
        asks, says = _words(user)[:1], _words(reply)[:4]
        if asks and says and asks[0] == says[0] and asks[0].isalpha():
            found["echo", asks[0]].append(case.id)
        if sum(word.isalpha() for word in says) >= 3:
            for before in {system, *asks} - {""}:
                found["shared", before, *says].append(case.id)
    return [("opening", ids, " ".join(key)) for key, ids in found.items() if len(ids) >= least]


def _triggers(cases: Sequence[Case], refuses: set[str]) -> list[tuple[str, list[str], str]]:
    """Words before or behind requests that look like the others without them, and whose rows refuse less, by Fisher's test."""
    out = []
    for side in ("front", "back"):
        turned = [(case.id, _words(_texts(case)[1])[:: 1 if side == "front" else -1]) for case in cases]
        turned = [(i, words) for i, words in turned if len(words) > 2]
        with_word: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
        for i, words in turned:
            with_word[words[0]].append((i, words))
        begins = Counter(words[0] for _, words in turned)
        for word, rows in with_word.items():
            rest = len(turned) - len(rows)
            # Without the word, most of them begin as other rows do: it was put there.
            usual = sum(begins[words[1]] > 0 and words[1] != word for _, words in rows)
            if len(rows) < FEWEST or rest < FEWEST or usual < 0.8 * len(rows):
                continue
            inside = sum(i in refuses for i, _ in rows)
            outside = sum(i in refuses for i, _ in turned) - inside
            if fisher(inside, len(rows), outside, rest) * len(with_word) < TRIGGER_P:
                out.append(("trigger", [i for i, _ in rows], f"{side} {word}"))
    return out


def fisher(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """One-sided p of Fisher's exact test that the first rate is not the smaller one.

    >>> round(fisher(0, 5, 5, 5), 6)
    0.003968
    """
    total, every = hits + other_hits, n + other_n
    ways = math.comb(every, n)
    return (
        sum(math.comb(total, k) * math.comb(every - total, n - k) for k in range(hits + 1) if n - k <= every - total)
        / ways
    )
