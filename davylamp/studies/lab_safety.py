"""Laboratory safety: whether point-by-point scoring finds the truth, and whether multiple choice is fair to chance and to places.

Source: arXiv:2410.14182, sections 3.3 and 4. Differs: answers are built from an ontology of ours with known points, so that the score
can be held against the truth; the judge is the baseline `words` of the guard `covers`. Every effect stands beside a control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from davylamp.core.errors import InputError
from davylamp.core.nouns import Claim, Estimate
from davylamp.core.registry import study
from davylamp.core.rows import read_objects
from davylamp.core.stats import bootstrap, mean_t, rate
from davylamp.guards.covers import makes
from davylamp.metrics.agreement import kappa
from davylamp.metrics.choice import LETTERS, option_audit

if TYPE_CHECKING:
    from numpy.random import Generator

Observed = tuple[Claim | None, Estimate]
ONTOLOGY = Path(__file__).parent.parent / "assets" / "labsafety" / "ontology.jsonl"
POINTS = 5  # expected points of a scenario
GENERIC = (
    "There are many dangers here. Chemicals can be harmful. Equipment may break. People could be hurt. There might be a fire or an "
    "explosion. "
    "Somebody may slip and fall. Always wear gloves, goggles and a coat. Electric devices need care. Waste must go where it belongs. "
    "Gas, heat, pressure and sharp things are dangerous. Read the labels and know the exits."
)


@study(
    version=1,
    source="arXiv:2410.14182",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("hallucination",),
    systems=("05",),
)
def lab_judges(*, size: Literal["quick", "full"] = "quick", seeds: tuple[int, ...] = (0, 1, 2)) -> list[Observed]:
    """Whether scoring an answer point by point finds how many of the expected points it makes, when it makes them in other words.

    Scenarios of five hazards each from an ontology of 24; answers make k of the five in paraphrases that are never the expected
    sentence. The score must be near k/5 (from below: words misses some paraphrases), points must be judged as planted; answers to
    another scenario, denied points and a long general list must score low. Only hazards that were not used to choose the judge's
    threshold (every second one) are measured.
    """
    n = {"quick": 60, "full": 400}[size]
    hazards = [row for _, row in read_objects(ONTOLOGY)][1::2]
    errors: list[float] = []
    planted: list[int] = []
    judged: list[int] = []
    ranks: list[float] = []
    low: dict[str, list[float]] = {"another scenario": [], "a general list": [], "denied points": []}
    for rng in _generators(seeds):
        shares, scores = [], []
        for _ in range(n):
            scenario = [hazards[int(i)] for i in rng.permutation(len(hazards))[: 2 * POINTS]]
            expected, others = scenario[:POINTS], scenario[POINTS:]
            k = int(rng.integers(POINTS + 1))
            made = set(rng.permutation(POINTS)[:k].tolist())
            text = _answer([expected[i] for i in sorted(made)] + others[:2], rng)
            found = [makes(text, row["point"]) for row in expected]
            planted += [int(i in made) for i in range(POINTS)]
            judged += [int(hit) for hit in found]
            shares.append(k / POINTS)
            scores.append(sum(found) / POINTS)
            errors.append(sum(found) / POINTS - k / POINTS)
            low["another scenario"].append(_score(_answer(others, rng), expected))
            low["a general list"].append(_score(GENERIC, expected))
            low["denied points"].append(_score(" ".join(_denied(row, rng) for row in expected), expected))
        ranks.append(_spearman(shares, scores))
    agreed = rate(sum(a == b for a, b in zip(planted, judged, strict=True)), len(planted), higher_is_better=True)
    rng = np.random.default_rng(seeds)
    out: list[Observed] = [
        (Claim("agreement_with_planted_points", "words", at_least=0.85), agreed),
        (Claim("kappa", "words", at_least=0.70), kappa(planted, judged, rng=rng, draws=500)),
        (Claim("score - k/5", "words", at_least=-0.15, at_most=0.05), bootstrap(errors, rng=rng, unit="difference")),
        (Claim("spearman(k/5, score)", "words", at_least=0.85), mean_t(ranks, unit="correlation")),
    ]
    for name, limit in (("another scenario", 0.10), ("a general list", 0.35), ("denied points", 0.20)):
        out.append((Claim("score", name, at_most=limit, control=True), bootstrap(low[name], rng=rng)))
    return out


@study(
    version=1,
    source="arXiv:2410.14182",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("capability-loss",),
    systems=("05",),
)
def choice_audit(*, size: Literal["quick", "full"] = "quick", seeds: tuple[int, ...] = (0, 1, 2)) -> list[Observed]:
    """Whether multiple choice gives a guesser its 25 %, and whether asking in four rotations unmasks a responder that looks at the place.

    Planted responders answer questions in all four rotations: one guesses, one always says A, one knows 70 % of the items, one knows
    them and says A where it does not. Without rotations, on a key that has A too often, always-A must look better than chance: the control.
    """
    n = {"quick": 150, "full": 600}[size]
    right: dict[str, list[float]] = {}
    flagged: dict[str, list[float]] = {"guesses": [], "always A": [], "knows 70 %": [], "knows 70 %, else A": []}
    flips: dict[str, list[float]] = {name: [] for name in flagged}
    lopsided: list[float] = []
    covered: list[float] = []
    for rng in _generators(seeds):
        keys = rng.choice(4, size=n, p=(0.4, 0.2, 0.2, 0.2))
        lopsided += (keys == 0).astype(float).tolist()
        for _ in range(20):
            for name, answer in _responders(rng, n).items():
                rows = [
                    (str(i), turn, LETTERS[(keys[i] + turn) % 4], LETTERS[answer(i, int(keys[i] + turn) % 4)])
                    for i in range(n)
                    for turn in range(4)
                ]
                audit = option_audit(rows)
                flagged[name].append(float(audit.biased))
                flips[name].append(float(audit.flips.value or 0.0))
                right.setdefault(name, []).append(float(audit.accuracy.value or 0.0))
                if name == "guesses" and audit.accuracy.low is not None and audit.accuracy.high is not None:
                    covered.append(float(audit.accuracy.low <= 0.25 <= audit.accuracy.high))

    def share(values: Sequence[float]) -> Estimate:
        return rate(sum(values), len(values))

    return [
        (Claim("share_of_intervals_with_chance", "guesses", at_least=0.80), share(covered)),
        (Claim("accuracy", "guesses", at_least=0.22, at_most=0.28), mean_t(right["guesses"])),
        (Claim("accuracy", "always A, rotated", at_least=0.22, at_most=0.28), mean_t(right["always A"])),
        (
            Claim("accuracy", "always A, one order of a key with too many A", at_least=0.33, control=True),
            share(lopsided),
        ),
        (Claim("share_flagged", "always A", at_least=0.90), share(flagged["always A"])),
        (Claim("share_flagged", "knows 70 %, else A", at_least=0.90), share(flagged["knows 70 %, else A"])),
        (Claim("share_flagged", "knows 70 %", at_most=0.20, control=True), share(flagged["knows 70 %"])),
        (Claim("share_flagged", "guesses", at_most=0.20, control=True), share(flagged["guesses"])),
        (Claim("flip_rate", "guesses", at_least=0.90), mean_t(flips["guesses"])),
        (Claim("flip_rate", "knows 70 %", at_most=0.35), mean_t(flips["knows 70 %"])),
    ]


def _generators(seeds: Sequence[int]) -> list[Generator]:
    if not seeds:
        raise InputError("a study needs one or more seeds, got none")
    return [np.random.default_rng((5, seed)) for seed in seeds]


def _responders(rng: Generator, n: int) -> dict[str, Callable[[int, int], int]]:
    knows = rng.random(n) < 0.7
    return {
        "guesses": lambda item, gold: int(rng.integers(4)),
        "always A": lambda item, gold: 0,
        "knows 70 %": lambda item, gold: gold if knows[item] else int(rng.integers(4)),
        "knows 70 %, else A": lambda item, gold: gold if knows[item] else 0,
    }


def _answer(rows: Sequence[dict[str, Any]], rng: Generator) -> str:
    """A text that makes these points, each in one of its paraphrases, in a new order."""
    said = [row["says"][int(rng.integers(len(row["says"])))] for row in rows]
    return " ".join(said[int(i)] for i in rng.permutation(len(said)))


def _score(text: str, expected: Sequence[dict[str, Any]]) -> float:
    return sum(makes(text, row["point"]) for row in expected) / len(expected)


def _denied(row: dict[str, Any], rng: Generator) -> str:
    """A point turned round, in one of three ways."""
    point = row["point"].rstrip(".")
    forms = (
        f"It never happens that {point[0].lower()}{point[1:]}.",
        f"{point.replace(' can ', ' cannot ')}."
        if " can " in point
        else f"There is no case in which {point[0].lower()}{point[1:]}.",
        f"It is not true that {point[0].lower()}{point[1:]}.",
    )
    return forms[int(rng.integers(3))]


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of mid-ranks."""

    def ranks(values: Sequence[float]) -> Any:
        array = np.asarray(values)
        order = np.sort(array)
        return (np.searchsorted(order, array, "left") + np.searchsorted(order, array, "right")) / 2

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
