"""Swapping words until a classifier lets a failure pass: the search behind the rewriting tool, and its automatic form.

Source: arXiv:2205.01663, section 4.2 (token saliency, substitutions ordered by how much they lower the score, the failure kept); proposals
by a masked language model as in BERT-Attack, arXiv:2004.09984. Differs: an oracle stands for the person, every question to it is counted,
and many starts go side by side, so that the classifier works in batches.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from davylamp.core.errors import InputError
from davylamp.data.fragile_stories import ROLES, same_role
from davylamp.models.classifier import Pair, falls, left_out

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

Oracle = Callable[[str, str], Awaitable[bool]]
Propose = Callable[[Sequence[str], int], Sequence[str]]  # (words, place) -> words that may stand there
Order = Literal["saliency", "random", "random-gradient"]


class Scores(Protocol):
    """What is attacked: (n,) scores of pairs, or an awaitable of them. `saliency` may be missing: then words are left out one by one."""

    def scores(self, pairs: Sequence[Pair]) -> Any: ...


async def _scored(classifier: Scores, pairs: Sequence[Pair]) -> NDArray[np.float64]:
    found = classifier.scores(pairs) if pairs else np.zeros(0)
    return np.asarray(await found if inspect.isawaitable(found) else found, dtype=float)


@dataclass
class Search:
    """One attack on its way, and its outcome. checks: questions to the oracle.  found: the text passes and still fails its task.

    edits: (place, operation, old words, new words, score before, score after) of what was taken on.
    """

    prompt: str
    words: list[str]
    score: float
    checks: int = 0
    found: bool = False
    edits: list[tuple[int, str, str, str, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    saliency: str = ""
    stuck: bool = False
    seen: set[str] = field(default_factory=set)

    @property
    def text(self) -> str:
        return " ".join(self.words)


async def search(
    classifier: Scores,
    oracle: Oracle,
    starts: Sequence[Pair],
    *,
    threshold: float,
    budget: int,
    propose: Propose,
    rng: Generator,
    order: Order = "saliency",
    places: int = 4,
    insert: Propose | None = None,
) -> list[Search]:
    """Attack each start, a text that is known to fail, until its score is below `threshold` or `budget` questions were asked.

    Each step takes the `places` most salient words, makes a candidate of every proposal there, and asks the oracle in the order of their
    scores; the first that still fails is taken on. insert: proposals to put before a word, instead of in its place.  order: by saliency,
    by chance, or by the saliency of random gradients (a control).  A text is never asked about twice.

    >>> import asyncio
    >>> class Length:
    ...     def scores(self, pairs): return np.array([min(len(text) / 20, 1.0) for _, text in pairs])
    >>> async def still(prompt, text): return "vase" in text
    >>> found = asyncio.run(search(Length(), still, [("", "the vase shattered")], threshold=0.8, budget=9,
    ...     propose=lambda words, i: {"shattered": ["broke", "burst into bits"]}.get(words[i], []), rng=np.random.default_rng(0)))
    >>> found[0].text, found[0].checks, found[0].found
    ('the vase broke', 1, True)
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold must be between 0 and 1, got {threshold}")
    if isinstance(budget, bool) or budget < 1 or places < 1:
        raise InputError(f"budget and places must be 1 or more, got {budget} and {places}")
    began = time.perf_counter()
    states = [
        Search(prompt, text.split(), float(score), seen={text})
        for (prompt, text), score in zip(starts, await _scored(classifier, list(starts)), strict=True)
    ]
    for state in states:
        state.found = state.score < threshold  # it passes as it is: no question needed
    while active := [state for state in states if not (state.found or state.stuck or state.checks >= budget)]:
        salient = await _salient(classifier, active, order, rng)
        pools = [_candidates(state, each, propose, insert, places) for state, each in zip(active, salient, strict=True)]
        flat = [(state.prompt, " ".join(words)) for state, pool in zip(active, pools, strict=True) for words, _ in pool]
        found = await _scored(classifier, flat)
        at = 0
        for state, pool in zip(active, pools, strict=True):
            scores = found[at : at + len(pool)]
            at += len(pool)
            state.stuck = not await _ask(state, pool, scores, oracle, threshold, budget)
            state.seconds = time.perf_counter() - began
    return states


async def _salient(
    classifier: Scores, active: Sequence[Search], order: Order, rng: Generator
) -> list[NDArray[np.float64]]:
    pairs = [(state.prompt, state.text) for state in active]
    if order == "random":
        return [rng.random(len(state.words)) for state in active]
    finder: Any = getattr(classifier, "saliency", None)
    if finder is None:
        tried = [left_out(pair) for pair in pairs]
        flat = await _scored(classifier, [pair for each in tried for pair in each])
        found, how = falls(flat, [len(each) for each in tried]), "leave-one-out"
    else:
        found, how = finder(pairs, rng=rng) if order == "random-gradient" else finder(pairs)
    for state in active:
        state.saliency = how
    return found


def _candidates(
    state: Search, salient: NDArray[np.float64], propose: Propose, insert: Propose | None, places: int
) -> list[tuple[list[str], tuple[int, str, str, str]]]:
    """(words, what was done) at the most salient places that have proposals; none that was asked about before."""
    out: list[tuple[list[str], tuple[int, str, str, str]]] = []
    used = 0
    for place in np.argsort(-salient, kind="stable").tolist():
        words = state.words
        fresh = []
        for new in (insert or propose)(words, place):
            rest = words[place:] if insert is not None else words[place + 1 :]
            made = [*words[:place], *new.split(), *rest]
            if " ".join(made) not in state.seen:
                fresh.append((made, (place, "insert" if insert else "swap", "" if insert else words[place], new)))
        out += fresh
        used += bool(fresh)
        if used == places:
            break
    return out


async def _ask(
    state: Search,
    pool: Sequence[tuple[list[str], tuple[int, str, str, str]]],
    scores: NDArray[np.float64],
    oracle: Oracle,
    threshold: float,
    budget: int,
) -> bool:
    """Ask about the candidates from the lowest score on, take the first that still fails; False if there was none."""
    for i in np.argsort(scores, kind="stable").tolist():
        if state.checks >= budget:
            return True
        words, (place, what, old, new) = pool[i]
        text = " ".join(words)
        state.seen.add(text)
        state.checks += 1
        if await oracle(state.prompt, text):
            state.edits.append((place, what, old, new, state.score, float(scores[i])))
            state.words, state.score = words, float(scores[i])
            state.found = state.score < threshold
            return True
    return False


class MaskedWords:
    """Proposals of a masked language model: its `top` words for a place that is masked.

    model: a `...ForMaskedLM`.  inserting: mask a new place before the word instead.
    """

    def __init__(self, model: Any, tokenizer: Any, *, top: int = 8, inserting: bool = False):
        if tokenizer.mask_token is None:
            raise InputError("the model of proposals has no mask token: expected one for masked language modelling")
        if top < 1:
            raise InputError(f"top must be 1 or more, got {top}")
        self.model, self.tokenizer, self.top, self.inserting = model.eval(), tokenizer, top, inserting

    def __call__(self, words: Sequence[str], place: int) -> list[str]:
        import torch

        rest = words[place:] if self.inserting else words[place + 1 :]
        text = " ".join([*words[:place], self.tokenizer.mask_token, *rest])
        inputs = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        at = (inputs["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()[0, 0]
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, at]
        special = set(self.tokenizer.all_special_ids)
        out = []
        for token in logits.argsort(descending=True).tolist():
            word = self.tokenizer.decode([token]).strip()
            if token not in special and word and " " not in word and word != words[place]:
                out.append(word)
            if len(out) == self.top:
                break
        return out


def proposals_of(spec: str, *, inserting: bool = False) -> Propose:
    """The proposals that an option names. Raises InputError for a folder that holds no model."""
    if spec == "roles":
        fillers = (*ROLES["how"], *ROLES["look"])
        return (lambda words, place: fillers) if inserting else (lambda words, place: same_role(words[place]))
    folder = Path(spec)
    if not (folder / "config.json").is_file():
        raise InputError(f"proposals must be `roles` or the folder of a masked language model, got {spec!r}")
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model: Any = AutoModelForMaskedLM.from_pretrained(folder)
    return MaskedWords(model, AutoTokenizer.from_pretrained(folder), inserting=inserting)
