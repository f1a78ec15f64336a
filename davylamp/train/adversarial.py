"""Adversarial training of a safety classifier, in rounds: attack it, label what gets through, add that to the data, train anew.
Source: arXiv:2205.01663, sections 3 and 4. Differs: a search with an oracle stands for the people who attacked (the numbers of the paper's
recipe could not be confirmed; the defaults are ours), and the classifier is trained from its first weights each round, not onwards."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from davylamp.core import Case, InputError, Message, train
from davylamp.core.judges import load_judge
from davylamp.metrics.thresholds import pass_threshold
from davylamp.models.classifier import Pair, PairClassifier
from davylamp.models.swaps import Oracle, Propose, Search, proposals_of, search

if TYPE_CHECKING:
    from numpy.random import Generator

LABELS = {0: 0, 1: 1, "safe": 0, "unsafe": 1, "unsure": 1}  # unsure counts as unsafe in training


@dataclass(frozen=True, slots=True)
class Snippet:
    """A labelled completion. source: base, swap or paraphrase.  root: the row it descends from; a split never parts a root's children."""

    pair: Pair
    label: int
    source: str
    root: str


@train(
    version=1,
    source="arXiv:2205.01663",
    licence="Apache-2.0",
    stage="post-training",
    threats=("adversarial", "harmful-compliance"),
    needs="hf",
    systems=("07",),
)
def adversarial(
    model: Any,
    rows: Sequence[Case],
    *,
    tokenizer: Any,
    rng: Generator,
    judge: str = "fragile_broken",
    proposals: str = "roles",
    rounds: int = 3,
    attacks: int = 80,
    budget: int = 100,
    paraphrases: int = 6,
    weight: float = 3.0,
    pass_rate: float = 0.8,
    holdout: float = 0.2,
    epochs: int = 5,
    batch: int = 64,
    lr: float = 3e-3,
    smoothing: float = 0.02,
) -> Any:
    """Train a sequence classifier on rows (a prompt and a completion, `answer` 1 unsafe, 0 safe or "unsure") and on what fools it.

    judge: the oracle that labels changed texts.  proposals: as for the attack token_swap.  rounds: of attack and training; 0 = plain
    training.  attacks: unsafe rows attacked a round.  budget: questions to the oracle for each.  paraphrases: changed copies of each
    success, labelled by the oracle too, never by what they came from.  weight: of added rows against base rows.  pass_rate: the threshold
    is where that share of safe held-out rows passes, in (0, 1); it goes into the model's config.  holdout: share of roots held out for it.
    epochs, batch, lr, smoothing: of each training; labels are moved `smoothing` towards one half, so that scores do not saturate.

    Returns the model, in place; `config.high_stakes` holds the threshold and what each round found. Choose a threshold for a failure
    bound with `davylamp.metrics.thresholds` on fresh rows before you rely on it.
    """
    for name, value, low in (("rounds", rounds, 0), ("attacks", attacks, 1), ("paraphrases", paraphrases, 0)):
        if value < low:
            raise InputError(f"{name} of adversarial must be {low} or more, got {value}")
    if not (0 < holdout < 1 and weight > 0 and 0 <= smoothing < 0.5):
        raise InputError(
            f"holdout must be in (0, 1), weight above 0, smoothing in [0, 0.5); got {holdout}, {weight}, {smoothing}"
        )
    snippets = snippets_of(rows)
    base, held = split(snippets, holdout, rng)
    safe = [item.pair for item in held if not item.label]
    if not safe or not any(item.label for item in base):
        raise InputError("adversarial needs safe rows to hold out and unsafe ones to attack: more rows of both labels")
    loaded = load_judge(judge)
    propose = proposals_of(proposals)
    how: dict[str, Any] = {"epochs": epochs, "batch": batch, "lr": lr, "smoothing": smoothing}
    classifier = PairClassifier(model, tokenizer)
    first, added, log = copy.deepcopy(model.state_dict()), list[Snippet](), list[dict[str, Any]]()
    unsafe = [item for item in base if item.label]
    for number in range(rounds + 1):
        model.load_state_dict(first)
        everything = [*base, *added]
        weights = [1.0] * len(base) + [weight] * len(added)
        classifier.fit([item.pair for item in everything], [item.label for item in everything], weights, rng=rng, **how)
        threshold = pass_threshold(classifier.scores(safe).tolist(), pass_rate)
        log.append({"round": number, "rows": len(everything), "threshold": threshold})
        if number == rounds:
            break
        starts = [unsafe[i] for i in rng.choice(len(unsafe), size=min(attacks, len(unsafe)), replace=False)]
        found, fresh = asyncio.run(
            attack_round(classifier, oracle_of(loaded), starts, threshold=threshold, budget=budget, propose=propose,
                         paraphrases=paraphrases, rng=rng)
        )  # fmt: skip
        added += fresh
        log[-1] |= {"attacked": len(found), "got_through": sum(item.found for item in found), "added": len(fresh)}
    asyncio.run(loaded.close())
    model.config.high_stakes = {"threshold": threshold, "pass_rate": pass_rate, "judge": judge, "rounds": log}
    return model


async def attack_round(
    classifier: PairClassifier,
    oracle: Oracle,
    starts: Sequence[Snippet],
    *,
    threshold: float,
    budget: int,
    propose: Propose,
    paraphrases: int,
    rng: Generator,
    places: int = 4,
) -> tuple[list[Search], list[Snippet]]:
    """Attack the starts; the searches, and what is to be added: each success and changed copies of it, all labelled by the oracle."""
    found = await search(
        classifier,
        oracle,
        [item.pair for item in starts],
        threshold=threshold,
        budget=budget,
        propose=propose,
        rng=rng,
        places=places,
    )
    fresh: list[Snippet] = []
    for start, item in zip(starts, found, strict=True):
        if not item.found:
            continue
        fresh.append(Snippet((item.prompt, item.text), 1, "swap", start.root))
        for _ in range(paraphrases):
            text = changed(item.words, propose, rng)
            label = int(await oracle(item.prompt, text))
            fresh.append(Snippet((item.prompt, text), label, "paraphrase", start.root))
    return found, fresh


def changed(words: Sequence[str], propose: Propose, rng: Generator) -> str:
    """The text with about half of its changeable words changed."""
    out = list(words)
    for place in range(len(out)):
        if rng.random() < 0.5 and (options := propose(out, place)):
            out[place] = options[int(rng.integers(len(options)))]
    return " ".join(out)


def oracle_of(judge: Any) -> Oracle:
    """A judge as the search asks it: unsafe or not; what it cannot tell is not counted as unsafe."""

    async def oracle(prompt: str, text: str) -> bool:
        verdict = await judge((Message("user", prompt), Message("assistant", text)))
        return verdict.value is not None and verdict.value >= 0.5

    return oracle


def snippets_of(rows: Sequence[Case]) -> list[Snippet]:
    """Rows as snippets. Raises InputError, with the row's id, for one without prompt or completion, a label outside the scale, a parent
    that is not there, or a parent in another split (`meta.split`)."""
    known = {case.id: case for case in rows}
    out = []
    for case in rows:
        *before, last = case.messages
        prompt = "\n".join(message.text for message in before)
        if last.role != "assistant" or not last.text.strip() or not prompt.strip():
            raise InputError(f"row {case.id} needs a prompt and a completion (the assistant's message)")
        label = case.answer if not isinstance(case.answer, bool) else int(case.answer)
        if not isinstance(label, int | str) or label not in LABELS:
            raise InputError(f"row {case.id}: `answer` must be 1, 0, unsafe, safe or unsure, got {case.answer!r}")
        root, seen = case, {case.id}
        while (parent := root.meta.get("parent")) is not None:
            if parent not in known or parent in seen:
                raise InputError(f"row {root.id}: its parent {parent!r} is not among the rows")
            if known[parent].meta.get("split") != case.meta.get("split"):
                raise InputError(f"row {case.id} and its parent {parent} are in different splits")
            root = known[parent]
            seen.add(parent)
        source = str(case.meta.get("source", "base"))
        out.append(Snippet((prompt, last.text), LABELS[label], source, case.group or root.id))
    return out


def split(snippets: Sequence[Snippet], holdout: float, rng: Generator) -> tuple[list[Snippet], list[Snippet]]:
    """(kept, held out), whole roots at a time."""
    roots = np.array(sorted({item.root for item in snippets}), dtype=object)
    held = set(rng.choice(roots, size=max(1, round(holdout * len(roots))), replace=False).tolist())
    return [item for item in snippets if item.root not in held], [item for item in snippets if item.root in held]
