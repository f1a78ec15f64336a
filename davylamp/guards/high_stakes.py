"""The high-stakes guard: a trained classifier of completions in their prompt, at a threshold chosen for a stated failure bound.
Source: arXiv:2205.01663, sections 2 and 4. The classifier comes from `davylamp train adversarial`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from davylamp.core import Case, InputError, Message, Verdict, guard
from davylamp.models.classifier import Pair, PairClassifier


@guard(
    version=1,
    source="arXiv:2205.01663",
    licence="Apache-2.0",
    stage="deployment",
    threats=("harmful-compliance", "adversarial"),
    needs="hf",
    measures="unsafe",
    systems=("07",),
)
def high_stakes(*, model: str, threshold: float = 0.0) -> HighStakes:
    """How likely the last message fails in its conversation, bent so that 0.5 is the threshold; None if it is empty.

    model: the folder of a classifier, as `davylamp train adversarial` writes it (or any sequence classifier of transformers with one
    output, or two of which the second means unsafe).  threshold: in (0, 1), a score from here on is unsafe; 0 = the folder's own.
    """
    if not 0 <= threshold < 1:
        raise InputError(f"threshold must be in (0, 1), or 0 for the folder's own, got {threshold}")
    folder = Path(model)
    classifier = PairClassifier.load(folder)
    own = getattr(classifier.model.config, "high_stakes", None) or {}
    chosen = threshold or float(own.get("threshold", 0.0))
    if not 0 < chosen < 1:
        raise InputError(f"{folder.name} names no threshold in (0, 1): give one, threshold=…")
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return HighStakes(classifier, chosen, {"weights": digest.hexdigest(), "threshold": chosen})


class HighStakes:
    """The guard itself; `classifier` and `threshold` are there for whoever wants the score as it is."""

    def __init__(self, classifier: PairClassifier, threshold: float, identity: Mapping[str, Any]):
        self.classifier, self.threshold, self.identity = classifier, threshold, identity

    async def __call__(self, messages: Sequence[Message], case: Case | None = None) -> Verdict:
        if not any(c.isprintable() and not c.isspace() for c in messages[-1].text):
            return Verdict(None, label="nonresponsive", why="empty message")
        try:
            score = float(self.classifier.scores([pair_of(messages)])[0])
        except InputError as problem:  # longer than the classifier reads
            return Verdict(None, why=str(problem))
        score = min(max(score, 1e-12), 1 - 1e-12)
        bent = math.log(score / (1 - score)) - math.log(self.threshold / (1 - self.threshold))
        value = 0.5 if score == self.threshold else 1 / (1 + math.exp(-bent))
        return Verdict(value, "unsafe" if score >= self.threshold else "safe", why=f"score {score:.4g}")


def pair_of(messages: Sequence[Message]) -> Pair:
    """(prompt, completion): all earlier text, and the last message's."""
    return "\n".join(message.text for message in messages[:-1]), messages[-1].text
