"""Self-Defence: a model writes safety pairs in English, translates them to other languages, and is then trained on all of them.
Source: arXiv:2310.06474, section 4, Algorithm 1. Differs: every line that comes back is checked and what fails is dropped with its reason;
a stage that keeps too little stops (the paper does not check); translation is always from English."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tomllib import loads
from typing import TYPE_CHECKING, Any

from davylamp.core import Case, InputError, Message, RunError, data
from davylamp.core.rows import Dropped
from davylamp.metrics.near import grams, jaccard
from davylamp.models.retry import patiently
from davylamp.models.targets import load_target

if TYPE_CHECKING:
    from numpy.random import Generator

PROMPTS = Path(__file__).parent.parent / "assets" / "self_defense" / "prompts.toml"
NAMES = {
    "zh": "Chinese", "it": "Italian", "vi": "Vietnamese", "ar": "Arabic", "ko": "Korean",
    "th": "Thai", "bn": "Bengali", "sw": "Swahili", "jv": "Javanese",
}  # fmt: skip
SCRIPTS = {
    "zh": ("\u4e00", "\u9fff"),
    "ko": ("\uac00", "\ud7af"),
    "ar": ("\u0600", "\u06ff"),
    "th": ("\u0e00", "\u0e7f"),
    "bn": ("\u0980", "\u09ff"),
}
KEYS = ("index", "is_safe", "input", "output")
NEAR = 0.7  # Jaccard of character 3-grams from which two requests are the same
ROUNDS = 4  # times the number of questions that would do if every line were good
Ask = Callable[[str], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A request with its reply. index: its number among the English pairs."""

    index: int
    is_safe: bool
    input: str
    output: str

    def line(self) -> str:
        return json.dumps({key: getattr(self, key) for key in KEYS}, ensure_ascii=False)


@data(
    version=1,
    source="arXiv:2310.06474",
    licence="Apache-2.0",
    stage="data",
    threats=("distribution-shift", "harmful-compliance"),
    systems=("32",),
)
def self_defense(
    rows: Iterable[Case],
    *,
    rng: Generator,
    model: str,
    translator: str = "",
    languages: tuple[str, ...] = tuple(NAMES),
    pairs: int = 50,
    unsafe_share: float = 0.3,
    batch: int = 5,
    shots: int = 3,
    keep: float = 0.8,
    max_tokens: int = 2048,
) -> Iterator[Case | Dropped]:
    """Safety and general pairs in English and in each language, written and translated by the model itself, as rows to train on.

    rows: the seeds: each ends in a reply, and `meta.label` is safe or unsafe. model: the target that writes, and translates unless there
    is a `translator`. languages: codes of the languages; a name of your own is put to the model as it stands.  pairs: of English, of
    which `unsafe_share` are unsafe (published: 50 and 0.3); each is translated to every language.  batch: pairs asked for at a time.
    shots: seeds shown, drawn anew each time.  keep: share of the wanted pairs that must be good, in English and in each language.
    max_tokens: length of one answer.

    Rows come English first, `meta` with language, label and the index that their translations share. Dropped with a reason: not_json, keys,
    label, empty, copied, duplicate, language, untranslated. Raises InputError for seeds that do not fit, RunError where too few are kept.
    """
    _check(pairs, unsafe_share, batch, shots, keep, languages)
    seeds = _seeds(rows, shots, pairs, unsafe_share)
    prompts = loads(PROMPTS.read_text(encoding="utf-8"))

    async def go() -> tuple[list[Case | Dropped], list[str]]:
        writer = load_target(model)
        other = load_target(translator) if translator else writer
        try:
            asks = [_asker(target, max_tokens) for target in (writer, other)]
            english, out = await augment(
                seeds, asks[0], prompts, rng=rng, pairs=pairs, unsafe_share=unsafe_share, batch=batch, shots=shots
            )
            found: list[Case | Dropped] = [*_cases(english, "en"), *out]
            if len(english) < keep * pairs:
                return found, [f"English: {len(english)} of {pairs}"]
            short = []
            for language in languages:
                done, lost = await translate(english, asks[1], prompts, language, batch=batch)
                found += [*_cases(done, language), *lost]
                if len(done) < keep * len(english):
                    short.append(f"{NAMES.get(language, language)}: {len(done)} of {len(english)}")
            return found, short
        finally:
            for target in dict.fromkeys((writer, other)):
                if (close := getattr(target, "close", None)) is not None:
                    await close()

    found, short = asyncio.run(go())
    if short:
        reasons = Counter(item.reason for item in found if isinstance(item, Dropped))
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise RunError(f"too few good pairs ({keep:.0%} are needed): {'; '.join(short)}. Dropped: {told or 'none'}")
    yield from found


def _check(pairs: int, share: float, batch: int, shots: int, keep: float, languages: Sequence[str]) -> None:
    if pairs < 1 or batch < 1 or shots < 1:
        raise InputError(f"pairs, batch and shots must be 1 or more, got {pairs}, {batch} and {shots}")
    if not 0 <= share <= 1 or not 0 <= keep <= 1:
        raise InputError(f"unsafe_share and keep must be in [0, 1], got {share:g} and {keep:g}")
    if not languages or len(set(languages)) < len(languages) or "en" in languages:
        raise InputError(
            f"languages must be one or more other than en, each once, got {', '.join(languages) or 'none'}"
        )


def _seeds(rows: Iterable[Case], shots: int, pairs: int, share: float) -> dict[bool, list[Pair]]:
    seeds: dict[bool, list[Pair]] = {True: [], False: []}
    for case in rows:
        label = case.meta.get("label")
        if label not in ("safe", "unsafe") or len(case.messages) < 2 or case.messages[-1].role != "assistant":
            raise InputError(f"seed {case.id}: expected a request with its reply and meta.label safe or unsafe")
        seeds[label == "safe"].append(Pair(0, label == "safe", case.messages[-2].text, case.messages[-1].text))
    unsafe = round(pairs * share)
    for is_safe, wanted in ((False, unsafe), (True, pairs - unsafe)):
        if wanted and len(seeds[is_safe]) < shots:
            raise InputError(
                f"{len(seeds[is_safe])} {'safe' if is_safe else 'unsafe'} seeds, and {shots} are shown at a time"
            )
    return seeds


def _asker(target: Any, max_tokens: int) -> Ask:
    async def ask(prompt: str) -> str:
        message = (Message("user", prompt),)
        said = await patiently(lambda: target(message, temperature=0.7, max_tokens=max_tokens), who=str(target.name))
        return str(said.text)

    return ask


def _cases(pairs: Sequence[Pair], language: str) -> list[Case]:
    return [
        Case(
            f"{language}-{pair.index}",
            (Message("user", pair.input), Message("assistant", pair.output)),
            group=str(pair.index),
            meta={"language": language, "label": "safe" if pair.is_safe else "unsafe", "index": pair.index},
        )
        for pair in pairs
    ]


def _lost(text: str, reason: str, number: int, language: str) -> Dropped:
    return Dropped(
        Case(f"{language}-dropped-{number}", (Message("user", text[:2000] or " "),), meta={"language": language}),
        reason,
    )


# --- stage 1 ----------------------------------------------------------------------------------------------------------------------------
async def augment(
    seeds: Mapping[bool, Sequence[Pair]],
    ask: Ask,
    prompts: Mapping[str, str],
    *,
    rng: Generator,
    pairs: int,
    unsafe_share: float,
    batch: int,
    shots: int,
) -> tuple[list[Pair], list[Dropped]]:
    """English pairs written by `ask`, each checked; and what was dropped. It stops after ROUNDS times the questions that could do."""
    kept: list[Pair] = []
    lost: list[Dropped] = []
    unsafe = round(pairs * unsafe_share)
    for is_safe, wanted in ((False, unsafe), (True, pairs - unsafe)):
        have: list[Pair] = []
        for _ in range(ROUNDS * -(-wanted // batch)):
            if len(have) >= wanted:
                break
            shown = [seeds[is_safe][i] for i in rng.choice(len(seeds[is_safe]), size=shots, replace=False)]
            start = len(kept) + len(have) + 1
            prompt = _filled(
                prompts["general" if is_safe else "unsafe"],
                n=str(min(batch, wanted - len(have))),
                start=str(start),
                shown="\n".join(Pair(i, p.is_safe, p.input, p.output).line() for i, p in enumerate(shown, 1)),
            )
            for row, raw, fault in _read(await ask(prompt)):
                reason = fault or _why_not(row, is_safe, seeds[is_safe], [*kept, *have])
                if reason or len(have) >= wanted:
                    if reason:
                        lost.append(_lost(raw, reason, len(lost), "en"))
                    continue
                have.append(Pair(len(kept) + len(have), is_safe, row["input"].strip(), row["output"].strip()))
        kept += have
    return kept, lost


def _why_not(row: Mapping[str, Any], is_safe: bool, seeds: Sequence[Pair], have: Sequence[Pair]) -> str:
    """Why a line is dropped; nothing if it is good."""
    if row["is_safe"] is not is_safe:
        return "label"
    if not row["input"].strip() or not row["output"].strip():
        return "empty"
    form = _form(row["input"])
    if any(jaccard(form, _form(seed.input)) >= NEAR for seed in seeds):
        return "copied"
    return "duplicate" if any(jaccard(form, _form(pair.input)) >= NEAR for pair in have) else ""


def _read(text: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(row, the line, what is wrong with it) of each line that could be an object."""
    for line in text.splitlines():
        line = line.strip().rstrip(",")
        if not line.startswith("{"):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            yield {}, line, "not_json"
            continue
        if set(row) != set(KEYS) or not isinstance(row["input"], str) or not isinstance(row["output"], str):
            yield {}, line, "keys"
        elif not isinstance(row["is_safe"], bool):
            yield {}, line, "label"
        else:
            yield row, line, ""


def _form(text: str) -> frozenset[str]:
    return grams(" ".join(text.casefold().split()))


# --- stage 2 ----------------------------------------------------------------------------------------------------------------------------
async def translate(
    pairs: Sequence[Pair], ask: Ask, prompts: Mapping[str, str], language: str, *, batch: int
) -> tuple[list[Pair], list[Dropped]]:
    """Each English pair in `language`, from `ask`, checked; and what was dropped. A translation belongs to its pair by index."""
    kept: list[Pair] = []
    lost: list[Dropped] = []
    for start in range(0, len(pairs), batch):
        part = {pair.index: pair for pair in pairs[start : start + batch]}
        prompt = _filled(
            prompts["translate"],
            language=NAMES.get(language, language),
            pairs="\n".join(pair.line() for pair in part.values()),
        )
        for row, raw, fault in _read(await ask(prompt)):
            source = None if fault else part.get(row["index"])
            reason = fault or (_why_not_translated(row, source, language) if source else "keys")
            if reason or source is None:
                lost.append(_lost(raw, reason, len(lost), language))
                continue
            del part[source.index]
            kept.append(Pair(source.index, source.is_safe, row["input"].strip(), row["output"].strip()))
        lost += [_lost(pair.input, "untranslated", len(lost) + i, language) for i, pair in enumerate(part.values())]
    return kept, lost


def _why_not_translated(row: Mapping[str, Any], source: Pair, language: str) -> str:
    if row["is_safe"] is not source.is_safe:
        return "label"
    if not row["input"].strip() or not row["output"].strip():
        return "empty"
    text = row["input"] + row["output"]
    if row["input"].strip() == source.input or (language in SCRIPTS and _share(text, *SCRIPTS[language]) < 0.5):
        return "language"
    return ""


def _share(text: str, low: str, high: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum(low <= c <= high for c in letters) / max(1, len(letters))


def _filled(text: str, **values: str) -> str:
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text.strip()
