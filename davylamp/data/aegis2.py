"""Rows for a guard in the manner of Aegis 2.0: refusal augmentation, topic blend, redacted texts put back, and a data card.

Source: arXiv:2501.09004 (5,000 rows of unsafe prompts with refusals; topic-following data under the same instruction; third-party texts as
REDACTED with an id). The published rows themselves are read by `data/guard_rows.py` (form aegis2).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from davylamp.core import Case, InputError, Message, data
from davylamp.core.rows import Dropped, read_objects
from davylamp.data.guard_policy import custom

if TYPE_CHECKING:
    from numpy.random import Generator

REDACTED = "REDACTED"
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I won't do that. If there is something else, I am glad to help.",
    "That is something I have to decline.",
    "I can't assist with this request, because it could cause harm.",
)
LENGTHS = (10, 30, 100, 300, 1000)  # words, upper ends of the histogram's bins


@data(
    version=1,
    source="arXiv:2501.09004",
    licence="Apache-2.0",
    stage="data",
    threats=("over-refusal", "harmful-compliance"),
    systems=("11",),
)
def refusal_augmentation(
    rows: Iterable[Case], *, rng: Generator, share: float = 0.2, refusals: str = ""
) -> Iterator[Case]:
    """All rows, and for a share of the unsafe prompts one more: the prompt with a refusal, labelled safe. Without them a guard takes every
    reply to an unsafe prompt for unsafe.

    share: of the unsafe prompts, in [0, 1].  refusals: a text file with one refusal a line; by default four of ours.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must be in [0, 1], got {share}")
    texts = list(REFUSALS)
    if refusals:
        path = Path(refusals)
        if not path.is_file():
            raise InputError(f"no file {refusals}. Expected one refusal a line")
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise InputError(f"{refusals} holds no refusal")
    for case in rows:
        yield case
        if case.messages[-1].role == "user" and str(case.answer) == "1" and rng.random() < share:
            said = Message("assistant", texts[int(rng.integers(len(texts)))])
            meta = {**case.meta, "prompt_unsafe": True, "response_label_source": "refusal_data_augmentation"}
            yield replace(case, id=f"{case.id}-refused", messages=(*case.messages, said), answer=0, meta=meta)


@data(
    version=1,
    source="arXiv:2501.09004; arXiv:2404.03820 for the topic rows",
    licence="Apache-2.0",
    stage="data",
    threats=("distribution-shift",),
    systems=("11",),
)
def topic_blend(rows: Iterable[Case], *, rng: Generator, topics: str, share: float = 0.33) -> Iterator[Case | Dropped]:
    """Rows mixed with topic-following dialogues, each under a policy of its own, so that a guard learns to read the policy it is shown.

    topics: a .jsonl file of dialogues with domain, system_instruction, conversation (turns with role and content) and distractors
    (texts, or objects with `distractor`): an off-topic user turn is unsafe under the category of the domain, an on-topic one safe.
    share: of topic rows in what comes out, in [0, 0.9]; topic rows are drawn anew when they run out.
    """
    if not 0 <= share <= 0.9:
        raise InputError(f"the share of topic rows must be in [0, 0.9], got {share}")
    found = list(topic_rows(Path(topics)))
    kept = [row for row in found if isinstance(row, Case)]
    if not kept:
        raise InputError(f"{topics} holds no topic dialogue that can be used")
    yield from (row for row in found if isinstance(row, Dropped))
    order: list[int] = []
    owed, number = 0.0, 0
    for case in rows:
        yield case
        owed += share / (1 - share)
        while owed >= 1:
            order = order or rng.permutation(len(kept)).tolist()
            topic = kept[order.pop()]
            yield replace(topic, id=f"{topic.id}-{number}")
            owed, number = owed - 1, number + 1


def topic_rows(path: Path) -> Iterator[Case | Dropped]:
    """On-topic and off-topic rows of a file of dialogues (see `topic_blend`); the format is known from its documentation."""
    for number, row in read_objects(path):
        where = f"{path.name} line {number}"
        domain, rule, turns = row.get("domain"), row.get("system_instruction"), row.get("conversation")
        if not isinstance(domain, str) or not isinstance(rule, str) or not isinstance(turns, list):
            raise InputError(f"{where}: a topic dialogue needs domain, system_instruction and conversation")
        messages = []
        for turn in turns:
            if (
                not isinstance(turn, Mapping)
                or turn.get("role") not in ("user", "assistant")
                or not isinstance(turn.get("content"), str)
            ):
                raise InputError(f"{where}: a turn needs the role user or assistant, and content")
            messages.append(Message(turn["role"], turn["content"]))
        name = f"off topic for {domain.strip()}"
        meta = {"policy": [[name, f"leaves what this assistant is for: {rule.strip()}"]], "source": path.stem}
        asked = [i for i, message in enumerate(messages) if message.role == "user"]
        base = Case(f"topic-{number}", tuple(messages) or (Message("user", ""),), group=f"topic-{number}", meta=meta)
        if not asked:
            yield Dropped(base, "no user turn")
            continue
        end = asked[-1]
        yield replace(base, messages=tuple(messages[: end + 1]), answer=0, meta={**meta, "violated": []})
        for i, item in enumerate(row.get("distractors") or ()):
            text = item.get("distractor") if isinstance(item, Mapping) else item
            if not isinstance(text, str) or not text.strip():
                yield Dropped(base, "an empty distractor")
                continue
            off = (*messages[:end], Message("user", text))
            yield replace(
                base, id=f"{base.id}-off{i}", messages=off, answer=1, meta={**meta, "violated": [custom(name)]}
            )


@data(
    version=1,
    source="arXiv:2501.09004",
    licence="Apache-2.0",
    stage="data",
    threats=("harmful-compliance",),
    systems=("11",),
)
def rehydrate(rows: Iterable[Case], *, rng: Generator, texts: str, lenient: bool = False) -> Iterator[Case | Dropped]:
    """Put third-party texts back where rows say REDACTED. A row whose text is not in the file stays out, with its reason.

    texts: a .jsonl or .csv file with id and text; a row names its id in `meta.reconstruction_id`.  lenient: pass a row that stays
    redacted on as it is instead of dropping it (it is still refused by guard_sft).
    """
    known: dict[str, str] = {}
    for number, row in read_objects(Path(texts)):
        if not isinstance(row.get("text"), str) or row.get("id") in (None, ""):
            raise InputError(f"{Path(texts).name} line {number}: a text needs id and text")
        known[str(row["id"])] = row["text"]
    for case in rows:
        if not redacted(case):
            yield case
            continue
        text = known.get(str(case.meta.get("reconstruction_id")))
        if text is None:
            yield case if lenient else Dropped(case, "redacted, and its text is not in the file")
            continue
        messages = tuple(replace(m, text=text) if m.text.strip() == REDACTED else m for m in case.messages)
        yield replace(case, messages=messages, meta={**case.meta, "rehydrated": True})


def redacted(case: Case) -> bool:
    return any(message.text.strip() == REDACTED for message in case.messages)


def data_card(rows: Sequence[Case], *, title: str = "guard rows", licences: Mapping[str, str] | None = None) -> str:
    """A card in Markdown: counts by label, source, split and category, which categories stand together, lengths, licences, near-copies.

    >>> print(data_card([Case("1", (Message("user", "hello"),), answer=0)]).splitlines()[2])
    1 rows: 1 prompts alone, 0 with a reply; 0 unsafe, 1 safe, 0 without a label; 0 redacted; 1 different prompts.
    """
    labels = Counter(str(case.answer) for case in rows)
    asked = {key_of(case) for case in rows}
    alone = sum(case.messages[-1].role == "user" for case in rows)
    out = [
        f"# {title}",
        "",
        f"{len(rows)} rows: {alone} prompts alone, {len(rows) - alone} with a reply; {labels['1']} unsafe, {labels['0']} safe, "
        f"{len(rows) - labels['1'] - labels['0']} without a label; {sum(map(redacted, rows))} redacted; {len(asked)} different prompts.",
        "",
    ]
    nodes = [tuple(case.meta.get("violated") or ((case.category,) if case.category else ())) for case in rows]
    for name, values in (
        ("source", [str(case.meta.get("source", "unknown")) for case in rows]),
        ("split", [str(case.meta.get("split", "none")) for case in rows]),
        ("label by", [str(case.meta.get("response_label_source", "human")) for case in rows]),
        ("category", [node for found in nodes for node in found]),
    ):
        out += [
            f"| {name} | rows |",
            "|---|---|",
            *(f"| {value} | {n} |" for value, n in Counter(values).most_common()),
            "",
        ]
    pairs = Counter(pair for found in nodes for pair in itertools.combinations(sorted(set(found)), 2))
    out += [
        "| categories together | rows |",
        "|---|---|",
        *(f"| {a}, {b} | {n} |" for (a, b), n in pairs.most_common()),
        "",
    ]
    words = [sum(len(message.text.split()) for message in case.messages) for case in rows]
    bins = Counter(next((f"<= {end}" for end in LENGTHS if n <= end), f"> {LENGTHS[-1]}") for n in words)
    names = [*(f"<= {end}" for end in LENGTHS), f"> {LENGTHS[-1]}"]
    out += ["| words | rows |", "|---|---|", *(f"| {name} | {bins[name]} |" for name in names), ""]
    sources = sorted({str(case.meta.get("source", "unknown")) for case in rows})
    out += [
        "| source | licence |",
        "|---|---|",
        *(f"| {name} | {(licences or {}).get(name, 'unknown')} |" for name in sources),
        "",
    ]
    return "\n".join(out)


def key_of(case: Case) -> str:
    """A row's own key by its prompt: the ids of the published rows are not unique, so splits go by this."""
    text = next((message.text for message in case.messages if message.role == "user"), "")
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def propose_categories(texts: Iterable[str], *, least: int = 2) -> list[tuple[str, int, tuple[str, ...]]]:
    """Free-text "Other" categories grouped into proposals: (name, count, spellings), most frequent first, those below `least` left out.

    Two texts are of one group if they share a content word's stem that is not rare in both; the most frequent spelling names the group.

    >>> propose_categories(["Fraud", "fraud / scams", "Gambling", "online gambling", "weather"])
    [('Fraud', 2, ('Fraud', 'fraud / scams')), ('Gambling', 2, ('Gambling', 'online gambling'))]
    """
    counts = Counter(" ".join(text.split()) for text in texts if text.strip())
    stems = {text: {word[:6] for word in re.findall(r"[^\W\d_]{4,}", text.casefold())} for text in counts}
    frequent = Counter(stem for text, n in counts.items() for stem in stems[text] for _ in range(n))
    groups: dict[str, list[str]] = {}
    for text in counts:
        key = max(sorted(stems[text]), key=lambda stem: frequent[stem], default=text.casefold())
        groups.setdefault(key, []).append(text)
    found = []
    for members in groups.values():
        members.sort(key=lambda text: (-counts[text], len(text)))
        found.append((members[0], sum(counts[text] for text in members), tuple(members)))
    return sorted((row for row in found if row[1] >= least), key=lambda row: (-row[1], row[0]))
