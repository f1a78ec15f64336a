"""Evaluation cards: what a suite measures, of what, how well judged, how fresh, and whether it can decide anything. `davylamp cards`.

A card is put together, not written: threats, stage, source and licence come from the registry, the judge's measured validity and the age
of the evidence from the runs, and only what code cannot know (layer, form, hold-out, gaps, owner) from `assets/cards/suites.toml`.

Source: arXiv:2404.14068 (layers, forms, validity of evaluations, expiry). The closed lists, the bound on kappa and the half-lives are ours.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.registry import Entry, entries, find
from davylamp.report.runs import Run

FILE = Path(__file__).parent.parent / "assets" / "cards" / "suites.toml"
AXES = {
    "layer": ("capability", "human interaction", "systemic impact"),
    "input": ("text", "image", "text+image", "audio", "video", "code", "action"),
    "output": ("text", "image", "audio", "video", "code", "action"),
    "form": ("automated benchmark", "model-graded", "human-rated", "red team", "user study", "field data", "expert uplift study"),
    "goal": ("explore", "track", "gate", "assure"),
    "better": ("lower", "higher"),
    "holdout": ("public", "shipped", "generated", "held out"),
}  # fmt: skip
TEXTS = ("metric", "gaps", "owner")
NUMBERS = ("limit", "half_life")
FIELDS = (*AXES, *TEXTS, *NUMBERS, "languages")
KAPPA_LEAST = 0.6  # a judge whose agreement with labels may be below this does not decide
ROWS_LEAST = 20
NEAR = 0.02  # early warning: an interval's end this close to its limit
STALE = 0.5  # freshness below which evidence is too old to decide
DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Card:
    """One suite's card. about: the stated fields.  judge: of the newest run.  kappa: (value, low end) of that judge against labels, None
    where it was never measured, (1.0, 1.0) where it reads an answer key.  value, ends, n, age in days: of the newest run; None without.
    """

    suite: str
    entry: Entry | None
    about: Mapping[str, Any]
    judge: str = ""
    kappa: tuple[float, float] | None = None
    value: float | None = None
    ends: tuple[float, float] | None = None
    n: int | None = None
    age: float | None = None
    missing: tuple[str, ...] = field(default=())

    @property
    def freshness(self) -> float | None:
        """0.5^(age / half-life), in (0, 1]; None without a dated run."""
        return None if self.age is None else 0.5 ** (max(0.0, self.age) / float(self.about["half_life"]))

    @property
    def least_difference(self) -> float | None:
        """The smallest difference of two rates that two runs of this size find with power 0.8, unpaired, at 95 %; None without a run."""
        if not self.n:
            return None
        p = 0.5 if self.value is None else min(max(self.value, 1 / self.n), 1 - 1 / self.n)
        return (1.959964 + 0.841621) * math.sqrt(2 * p * (1 - p) / self.n)

    @property
    def against_limit(self) -> str | None:
        """within, near or beyond the card's limit, by the interval's worse end; near is within NEAR of it. None without one."""
        if self.ends is None or self.about["limit"] is None:
            return None
        room = (
            self.about["limit"] - self.ends[1]
            if self.about["better"] == "lower"
            else self.ends[0] - self.about["limit"]
        )
        return "beyond" if room < 0 else "near" if room < NEAR else "within"

    @property
    def weak(self) -> tuple[str, ...]:
        """Why this card cannot decide; nothing if it can."""
        out = [f"not stated: {', '.join(self.missing)}"] if self.missing else []
        if self.n is None:
            out.append("no run")
        elif self.n < ROWS_LEAST:
            out.append(f"{self.n} rows, of {ROWS_LEAST} needed")
        if self.kappa is None:
            out.append("its judge was not measured")
        elif self.kappa[1] < KAPPA_LEAST:
            out.append(f"its judge's kappa may be {self.kappa[1]:.2f}, of {KAPPA_LEAST:g} needed")
        if self.freshness is not None and self.freshness < STALE:
            out.append(f"{self.age:.0f} days old, of {self.about['half_life']:g} at most")
        return tuple(out)

    def json(self) -> dict[str, Any]:
        known = self.entry
        return {
            "suite": self.suite,
            "threats": list(known.threats) if known else [],
            "systems": list(known.systems) if known else [],
            "source": known.source if known else "",
            "licence": known.licence if known else "",
            "version": known.version if known else None,
            **{name: self.about.get(name) for name in FIELDS},
            "judge": self.judge,
            "kappa": self.kappa[0] if self.kappa else None,
            "kappa_low": self.kappa[1] if self.kappa else None,
            "value": self.value,
            "against_limit": self.against_limit,
            "n": self.n,
            "age_days": None if self.age is None else round(self.age, 2),
            "freshness": None if self.freshness is None else round(self.freshness, 4),
            "least_difference": None if self.least_difference is None else round(self.least_difference, 4),
            "weak": list(self.weak),
        }


def stated(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """The stated fields by suite, a user's own over the shipped ones, checked. Raises InputError that names the place."""
    rows = _read(FILE)
    for name, row in (_read(path) if path else {}).items():
        rows[name] = {**rows.get(name, {}), **row}
        absent = [key for key in FIELDS if key not in rows[name]]
        if absent:
            raise InputError(f"{path}: the card of {name} needs {', '.join(absent)}")
    return rows


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cards are a TOML file with one table a suite ({error})") from None
    for name, row in rows.items():
        where = f"[{name}] ({path.name})"
        if not isinstance(row, Mapping):
            raise InputError(f"{where} must be a table, got {row!r}")
        for key, value in row.items():
            if key not in FIELDS:
                raise UnknownNameError(f"key of {where}", key, FIELDS)
            if key in AXES and value not in AXES[key]:
                raise UnknownNameError(f"{key} of {where}", str(value), AXES[key])
            if key in TEXTS and (not isinstance(value, str) or not value.strip()):
                raise InputError(f"{where} {key} must be a text, got {value!r}")
            if key in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                raise InputError(f"{where} {key} must be a number of 0 or more, got {value!r}")
        if row.get("half_life") == 0:
            raise InputError(f"{where} half_life must be more than 0 days")
        languages = row.get("languages", ["?"])
        if not isinstance(languages, list) or not languages or not all(isinstance(one, str) for one in languages):
            raise InputError(f"{where} languages must be a list of names, got {languages!r}")
    return rows


def cards(
    runs: Sequence[Run] = (),
    *,
    own: Path | None = None,
    things: Iterable[Entry] | None = None,
    now: datetime | None = None,
) -> list[Card]:
    """A card of every suite, in the order of their names. runs: where its judge's validity, its number and its age come from.

    now: the time against which ages are counted; without it no run has an age. A suite that nobody stated anything about has a card that
    says what is missing, and cannot decide. Raises InputError for rows of `own` that do not fit or name no suite there is.
    """
    rows = stated(own)
    known = {entry.name: entry for entry in (entries("suite") if things is None else things) if entry.kind == "suite"}
    newest: dict[str, Run] = {}
    for run in sorted(runs, key=lambda one: (str(one.record.about.get("created") or ""), one.record.id)):
        if run.record.verb == "eval":
            newest[run.name("suite")] = run
    if own is not None:
        for name in _read(own):
            if name not in known and name not in newest:
                raise UnknownNameError(f"suite ({own})", name, known)
    out = []
    for name in sorted({*known, *newest}):
        about = rows.get(name, {})
        missing = tuple(key for key in FIELDS if key not in about)
        out.append(_card(name, known.get(name), about, missing, newest.get(name), now))
    return out


def _card(
    name: str,
    entry: Entry | None,
    about: Mapping[str, Any],
    missing: tuple[str, ...],
    run: Run | None,
    now: datetime | None,
) -> Card:
    full = {**dict.fromkeys(FIELDS), "half_life": 365, **about}
    if run is None:
        return Card(name, entry, full, missing=missing)
    record = run.record
    whole = [e for e in record.estimates if e.category is None and e.arm is None]
    headline = next((e for e in whole if e.name == full["metric"]), whole[0] if whole else None)
    created, age = str(record.about.get("created") or ""), None
    if now is not None and created:
        age = (now - datetime.fromisoformat(created)).total_seconds() / 86400
    if headline is None:
        return Card(name, entry, full, run.name("judge"), validity(run), n=0, age=age, missing=missing)
    ends = None if headline.low is None or headline.high is None else (headline.low, headline.high)
    return Card(name, entry, full, run.name("judge"), validity(run), headline.value, ends, headline.n, age, missing)


def validity(run: Run) -> tuple[float, float] | None:
    """(kappa, low end) of a run's judge against labels, from its measured confusion; None where that is not known.

    A judge that reads an answer key, and the organisms' own graders, agree with the truth by construction. The low end is the 2.5 %
    quantile of a parametric bootstrap over the labelled rows.
    """
    if by_truth(run.name("judge")):
        return 1.0, 1.0
    counts = (run.record.about.get("judge_error") or {}).get("counts")
    if not counts or not counts["positives"] or not counts["negatives"]:
        return None
    import numpy as np

    tp, p, tn, n = (int(counts[key]) for key in ("true_hits", "positives", "true_passes", "negatives"))
    rng = np.random.default_rng((tp, p, tn, n))  # from the counts, so that equal runs give equal cards
    drawn = _kappa(rng.binomial(p, tp / p, size=DRAWS), p, rng.binomial(n, tn / n, size=DRAWS), n)
    return float(_kappa(tp, p, tn, n)), float(np.quantile(drawn, 0.025))


def by_truth(judge: str) -> bool:
    """Whether a judge reads an answer key, or is an organism's own grader: such a judge does not err.

    >>> by_truth("choice"), by_truth("refusal"), by_truth("")
    (True, False, False)
    """
    name = judge.partition(":")[0]
    return name.startswith("organism_") or name in {entry.name for entry in entries("judge")}


def _kappa(tp: Any, p: int, tn: Any, n: int) -> Any:
    """Cohen's kappa of a 2 x 2 table: (agreement - chance) / (1 - chance)."""
    total = p + n
    said = (tp + n - tn) / total
    chance = said * p / total + (1 - said) * n / total
    return ((tp + tn) / total - chance) / (1 - chance)


def blank(found: Sequence[Card]) -> list[str]:
    """What no card looks at, in words: whole layers, outputs and inputs, and forms of evidence."""
    out = []
    for axis in ("layer", "input", "output", "form"):
        seen = {card.about.get(axis) for card in found}
        absent = [value for value in AXES[axis] if value not in seen]
        if absent:
            out.append(f"no card with {axis} {', '.join(absent)}")
    return out


def facts(card: Card) -> list[tuple[str, str]]:
    """A card in (name, text) pairs, for a page or a terminal."""
    row = card.json()
    kappa = "not measured" if card.kappa is None else f"kappa {card.kappa[0]:.2f}, at least {card.kappa[1]:.2f}"
    number = "no run" if card.n is None else f"n {card.n}" + ("" if card.value is None else f", {card.value:.3f}")
    least = card.least_difference
    number += "" if card.against_limit is None else f", {card.against_limit} the limit"
    return [
        ("Threats", ", ".join(row["threats"])),
        ("Layer", str(row["layer"] or "not stated")),
        ("From, to", f"{row['input'] or '?'} to {row['output'] or '?'}"),
        ("Form, goal", f"{row['form'] or '?'}, to {row['goal'] or '?'}"),
        (
            "Number",
            f"{row['metric'] or '?'}, {row['better'] or '?'} is better, held to {'?' if row['limit'] is None else row['limit']}",
        ),
        ("Rows", f"{row['holdout'] or '?'}; {row['source']}; {row['licence']}"),
        ("Languages", ", ".join(row["languages"] or ["not stated"])),
        ("Judge", f"{card.judge or 'of a run'}: {kappa}" if card.judge else "no run"),
        ("Evidence", number + ("" if least is None else f"; finds differences of {least:.3f} and more")),
        ("Gaps", str(row["gaps"] or "not stated")),
        ("Owner", f"{row['owner'] or 'not stated'}; counts half after {row['half_life']} days"),
        ("Can decide", "yes" if not card.weak else "no: " + "; ".join(card.weak)),
    ]


def text(found: Sequence[Card], *, whole: bool = False) -> str:
    """Cards for a terminal: one line each, or each whole."""
    if whole:
        blocks = ["\n".join([card.suite, *(f"  {name:11} {words}" for name, words in facts(card))]) for card in found]
        return "\n\n".join(blocks)
    width = max(len(card.suite) for card in found)
    wide = max(len(card.about["metric"] or "?") for card in found)
    lines = [
        f"{card.suite:{width}}  {card.about['metric'] or '?':{wide}}  {card.about['holdout'] or '?':9}  "
        + ("can decide" if not card.weak else "; ".join(card.weak))
        for card in found
    ]
    return "\n".join([*lines, "", *(f"{words[0].upper()}{words[1:]}." for words in blank(found))]).rstrip()


def of_runs(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(suite, its card's facts) of the suites that these runs asked and somebody stated something about, for the report.

    Ages are left out: equal runs give an equal page.
    """
    asked = {run.name("suite") for run in runs if run.record.verb == "eval"}
    return (
        [(card.suite, facts(card)) for card in cards(runs) if card.suite in asked and not card.missing] if asked else []
    )


def named(names: Sequence[str], found: Sequence[Card]) -> list[Card]:
    """The cards of these suites. Raises UnknownNameError with the nearest one."""
    by = {card.suite: card for card in found}
    for name in names:
        if name not in by:
            find("suite", name)  # says what it may have been
            raise UnknownNameError("card", name, by)
    return [by[name] for name in names]
