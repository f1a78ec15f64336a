"""`davylamp incidents FILE [RUN...]`: what happened after release, put beside what the map of threats knows and what runs have shown since.

An incident belongs to the threat that it names, else to the one whose description, or whose named incidents, it reads most like. One that
reads like none is uncovered; several uncovered ones that read alike are proposed as a new threat. An incident stays open until a sound run
that is newer than it says something about its threat.

Sources: arXiv:2404.14068 (monitoring feeds the register), arXiv:2504.15585 (an incident opens requirements at its stages until newer
evidence closes it). Differs: likeness is by words, and people decide what becomes of a proposal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp import coverage
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Estimate
from davylamp.core.registry import THREATS
from davylamp.core.rows import read_objects
from davylamp.core.stats import rate
from davylamp.report.runs import Run, gather

KEYS = ("id", "text", "threat", "date")
ALIKE = 0.25  # cosine from which a text belongs to a threat, or two texts to one cluster
CLUSTER = 3  # uncovered incidents that read alike before they are proposed as a threat
#: Words of four letters and more that say nothing about what happened; shorter ones are left out anyway.
COMMON = frozenset(
    (
        "been",
        "from",
        "have",
        "into",
        "that",
        "their",
        "them",
        "then",
        "there",
        "they",
        "this",
        "were",
        "what",
        "when",
        "which",
    )
)
COMMON |= {"with", "your", "after", "before", "does", "more", "than", "very", "must", "made"}


@dataclass(frozen=True, slots=True)
class Incident:
    """One thing that happened. threat: what it belongs to, None if it is uncovered.  named: whether the row said so itself.
    stages: where that threat can enter.  closed_by: id of the run that is evidence and newer, empty while the incident is open."""

    id: str
    text: str
    date: str
    threat: str | None
    named: bool
    likeness: float
    stages: tuple[str, ...] = ()
    closed_by: str = ""


@dataclass(slots=True)
class Intake:
    """incidents, in the order of the file.  proposals: (words that the cluster shares, ids of its incidents)."""

    incidents: list[Incident]
    proposals: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)

    @property
    def uncovered(self) -> Estimate:
        """The share that no threat of the register covers."""
        return rate(sum(one.threat is None for one in self.incidents), len(self.incidents), name="uncovered")

    @property
    def open(self) -> list[Incident]:
        return [one for one in self.incidents if not one.closed_by]

    def json(self) -> dict[str, Any]:
        return {
            "uncovered": self.uncovered.json(),
            "incidents": [
                {
                    "id": one.id, "date": one.date, "threat": one.threat, "named": one.named, "likeness": round(one.likeness, 3),
                    "stages": list(one.stages), "closed_by": one.closed_by,
                }
                for one in self.incidents
            ],
            "proposals": [{"words": list(words), "incidents": list(ids)} for words, ids in self.proposals],
        }  # fmt: skip


def take_in(
    rows: Iterable[tuple[str, Mapping[str, Any]]], folders: Sequence[Path] = (), *, own: Path | None = None
) -> Intake:
    """The incidents of these (place, row) pairs beside the register and these runs.

    A row has a text, an id, and if known a threat and a date (ISO, such as 2026-03-01). own: a register over ours.
    Raises InputError for a row without text or id, an id that stands twice, a date that is none, and a threat that does not exist.
    """
    register = coverage.register(own)
    given = _checked(rows)
    examples = {name: [str(row["about"])] for name, row in register.items()}
    for row in given:
        if row["threat"]:
            examples[row["threat"]].append(row["text"])
    weights = _weights([text for texts in examples.values() for text in texts] + [row["text"] for row in given])
    known = {name: [_vector(text, weights) for text in texts] for name, texts in examples.items()}
    runs = gather(folders) if folders else []
    sound = _sound(folders, runs, own)
    incidents = []
    for row in given:
        likeness, name = 1.0, row["threat"]
        if not name:
            own_vector = _vector(row["text"], weights)
            likeness, name = max(
                (max(_cosine(own_vector, one) for one in ones), threat) for threat, ones in known.items()
            )
        threat = name if likeness >= ALIKE else None
        stages = tuple(register[threat]["stages"]) if threat else ()
        closed = next((run for run, created in sound.get(threat or "", ()) if created > row["date"]), "")
        incidents.append(
            Incident(row["id"], row["text"], row["date"], threat, bool(row["threat"]), likeness, stages, closed)
        )
    return Intake(incidents, _clusters([one for one in incidents if one.threat is None], weights))


def from_file(path: Path, folders: Sequence[Path] = (), *, own: Path | None = None) -> Intake:
    """As `take_in`, from a .jsonl or .csv file."""
    return take_in(((f"{path.name} line {number}", row) for number, row in read_objects(path)), folders, own=own)


def _checked(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
    out: list[dict[str, str]] = []
    seen: set[str] = set()
    for where, row in rows:
        for key in row:
            if key not in KEYS:
                raise UnknownNameError(f"key of {where}", str(key), KEYS)
        for key in ("id", "text"):
            if not str(row.get(key) or "").strip():
                raise InputError(f"{where}: an incident needs {key}")
        threat, date, id_ = str(row.get("threat") or ""), str(row.get("date") or ""), str(row["id"])
        if threat and threat not in THREATS:
            raise UnknownNameError(f"threat of {where}", threat, THREATS)
        if date:
            try:
                when = datetime.fromisoformat(date)
            except ValueError:
                raise InputError(f"{where}: date must be like 2026-03-01, got {date[:40]!r}") from None
            date = (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC).isoformat(timespec="seconds")
        if id_ in seen:
            raise InputError(f"{where}: id {id_!r} stands twice")
        seen.add(id_)
        out.append({"id": id_, "text": str(row["text"]), "threat": threat, "date": date})
    if not out:
        raise InputError("no incidents: expected rows with id and text")
    return out


def _sound(folders: Sequence[Path], runs: Sequence[Run], own: Path | None) -> dict[str, list[tuple[str, str]]]:
    """threat -> (run id, time of the run) of the runs that are evidence without a fault."""
    times = {run.record.id: _utc(str(run.record.about.get("created") or "")) for run in runs}
    out: dict[str, list[tuple[str, str]]] = {}
    for threat in coverage.cover(folders, own=own).threats if folders else ():
        for cell in threat.cells:
            out.setdefault(threat.name, []).extend(
                (one.run, times[one.run]) for one in cell.evidence if not one.weak and times.get(one.run)
            )
    return out


def _utc(created: str) -> str:
    return datetime.fromisoformat(created).astimezone(UTC).isoformat(timespec="seconds") if created else ""


# --- likeness ---------------------------------------------------------------------------------------------------------------------------
Vector = Mapping[str, float]


def _words(text: str) -> list[str]:
    """Lower-case words of four letters and more without the commonest ones, each without a plural s.

    >>> _words("The model's answers were wrong")
    ['model', 'answer', 'wrong']
    """
    found = (word.removesuffix("'s") for word in re.findall(r"[^\W\d_]+(?:'s)?", text.casefold()))
    return [word.removesuffix("s") for word in found if len(word) > 3 and word not in COMMON]


def _weights(texts: Sequence[str]) -> dict[str, float]:
    """Inverse document frequency, 1 + ln((1 + n) / (1 + df))."""
    counts = Counter(word for text in texts for word in set(_words(text)))
    return {word: 1 + math.log((1 + len(texts)) / (1 + count)) for word, count in counts.items()}


def _vector(text: str, weights: Mapping[str, float]) -> Vector:
    counts = Counter(_words(text))
    raw = {word: count * weights[word] for word, count in counts.items()}
    length = math.sqrt(sum(value * value for value in raw.values())) or 1.0
    return {word: value / length for word, value in raw.items()}


def _cosine(a: Vector, b: Vector) -> float:
    return sum(value * b[word] for word, value in a.items() if word in b)


def _clusters(found: Sequence[Incident], weights: Mapping[str, float]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Groups of three or more that hang together by likeness (single link), each with the words that most of it shares."""
    vectors = [_vector(one.text, weights) for one in found]
    group = list(range(len(found)))
    for i in range(len(found)):
        for j in range(i):
            if group[i] != group[j] and _cosine(vectors[i], vectors[j]) >= ALIKE:
                old, new = group[i], group[j]
                group = [new if one == old else one for one in group]
    out = []
    for name in dict.fromkeys(group):
        members = [found[i] for i, one in enumerate(group) if one == name]
        if len(members) >= CLUSTER:
            counts = Counter(word for one in members for word in set(_words(one.text)))
            shared = tuple(word for word, count in counts.most_common(5) if count * 2 >= len(members))
            out.append((shared, tuple(one.id for one in members)))
    return out


def text(found: Intake) -> str:
    """The intake for a terminal. No incident's text is shown: it may hold what a user wrote."""
    counts = Counter(one.threat or "uncovered" for one in found.incidents)
    closed = Counter(one.threat for one in found.incidents if one.closed_by)
    share = found.uncovered
    out = [
        f"{name:20} {count:4}   " + (f"{count - closed[name]} open" if name != "uncovered" else "no threat covers them")
        for name, count in counts.most_common()
    ]
    out += ["", f"uncovered: {share.value:.1%} [{share.low:.1%}, {share.high:.1%}] of {share.n}"]
    for words, ids in found.proposals:
        out.append(
            f"a new threat? {len(ids)} uncovered incidents share {', '.join(words) or 'few words'}: {', '.join(ids[:8])}"
        )
    return "\n".join(out)
