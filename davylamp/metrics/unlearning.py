"""Numbers about unlearning: TOFU's and MUSE's scores, membership scores, what came back, what else was damaged. Arrays in, numbers out.

Sources: TOFU (arXiv:2401.06121) and its published code; MUSE (arXiv:2407.06460); min-k (2310.16789), min-k++ (2404.02936); extraction
strength and exact memorisation as in open-unlearning. Losses are means of -ln p over an answer's tokens, in nats. Something that cannot
be said is None, never 0 or 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from davylamp.core.errors import InputError, NeedsError
from davylamp.metrics.detection import roc_auc

#: The sets behind TOFU's model utility; on the first the answer's own probability counts, on the others its share among the choices.
UTILITY_SETS = ("retain", "real_authors", "world_facts")


def probability(losses: Sequence[float]) -> float:
    """Mean of exp(-loss), in [0, 1]: what TOFU calls probability of forget and retain answers. losses: (n,), n > 0.

    >>> probability([0.0, 0.0])
    1.0
    """
    return float(np.exp(-_numbers(losses, "losses")).mean())


def choice_probability(true: Sequence[float], false: Sequence[Sequence[float]]) -> float:
    """Mean of p_true / (p_true + sum of p_false). true: (n,) losses.  false: (n, k) losses of wrong answers.

    >>> choice_probability([0.0], [[0.0, 0.0, 0.0]])
    0.25
    """
    right, wrong = np.exp(-_numbers(true, "true")), np.exp(-_numbers(false, "false"))
    if wrong.ndim != 2 or len(wrong) != len(right):
        raise InputError(f"false must be (n, k) for n = {len(right)} true losses, got shape {wrong.shape}")
    return float((right / (right + wrong.sum(1))).mean())


def truth_ratios(paraphrase: Sequence[float], perturbed: Sequence[Sequence[float]]) -> np.ndarray:
    """R of each row: exp(-mean loss of the wrong answers) / exp(-loss of the paraphrased right one); (n,), above 0.

    The losses are averaged first and then exponentiated, as TOFU's code does; its logs store 1/R.

    >>> truth_ratios([1.0], [[1.0, 3.0]]).round(4).tolist()
    [0.3679]
    """
    right, wrong = _numbers(paraphrase, "paraphrase"), _numbers(perturbed, "perturbed")
    if wrong.ndim != 2 or len(wrong) != len(right):
        raise InputError(f"perturbed must be (n, k) for n = {len(right)} paraphrases, got shape {wrong.shape}")
    return np.exp(right - wrong.mean(1))


def truth_score(ratios: Sequence[float], *, forget: bool) -> float:
    """One number for many R: mean of min(R, 1/R) on a forget set, of max(0, 1 - R) elsewhere; in [0, 1].

    >>> truth_score([0.5, 2.0], forget=True), truth_score([0.5, 2.0], forget=False)
    (0.5, 0.25)
    """
    r = _numbers(ratios, "ratios")
    if (r <= 0).any():
        raise InputError("truth ratios must be above 0")
    return float((np.minimum(r, 1 / r) if forget else np.maximum(0.0, 1 - r)).mean())


def harmonic_mean(values: Sequence[float]) -> float:
    """n / sum(1/x); 0 if any value is 0. Raises InputError for a negative one, where it means nothing.

    >>> harmonic_mean([1.0, 0.5]).__round__(4), harmonic_mean([1.0, 0.0])
    (0.6667, 0.0)
    """
    x = _numbers(values, "values")
    if (x < 0).any():
        raise InputError("a harmonic mean needs values of 0 or more")
    return 0.0 if (x == 0).any() else float(len(x) / (1 / x).sum())


def tofu_utility(logs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """TOFU's model utility and its nine parts, from per-row losses.

    logs: for each of retain, real_authors and world_facts a mapping with `gt` (n,) losses of the answer, `perturbed` (n, k) of wrong
    answers, `paraphrased` (n,) of the paraphrase, and `rouge` (n,) ROUGE-L recalls.  Gives `utility`, and `SET/probability`,
    `SET/rouge`, `SET/truth_ratio`.

    >>> row = {"gt": [0.0], "perturbed": [[50.0]], "paraphrased": [0.0], "rouge": [1.0]}
    >>> round(tofu_utility({"retain": row, "real_authors": row, "world_facts": row})["utility"], 6)
    1.0
    """
    if absent := [name for name in UTILITY_SETS if name not in logs]:
        raise InputError(f"model utility needs the sets {', '.join(UTILITY_SETS)}; missing: {', '.join(absent)}")
    out = {}
    for name in UTILITY_SETS:
        log = logs[name]
        if name == "retain":
            out[f"{name}/probability"] = probability(log["gt"])
        else:
            out[f"{name}/probability"] = choice_probability(log["gt"], log["perturbed"])
        out[f"{name}/rouge"] = float(_numbers(log["rouge"], "rouge").mean())
        out[f"{name}/truth_ratio"] = truth_score(
            truth_ratios(log["paraphrased"], log["perturbed"]).tolist(), forget=False
        )
    return {"utility": harmonic_mean(list(out.values())), **out}


def forget_quality(unlearned: Sequence[float], oracle: Sequence[float] | None) -> dict[str, float | int | str | None]:
    """p and statistic of a two-sample Kolmogorov-Smirnov test on truth ratios: unlearned model against one that never saw the set.

    p depends on the number of rows: never compare it across forget sets. Near 0 it only says "different", also of a ruined model.
    Without an oracle both are None, with the reason.

    >>> forget_quality([0.1, 0.2], None)["p"] is None
    True
    """
    if oracle is None or not len(oracle):
        return {"p": None, "statistic": None, "n": len(unlearned), "why": "no model that never saw the forget set"}
    try:
        from scipy.stats import ks_2samp
    except ImportError:
        raise NeedsError("forget quality needs scipy: pip install 'davylamp[train]'") from None
    found: Any = ks_2samp(_numbers(unlearned, "unlearned"), _numbers(oracle, "oracle"))
    return {"p": float(found.pvalue), "statistic": float(found.statistic), "n": len(unlearned), "why": ""}


def exact_memorisation(answer: Sequence[int], said: Sequence[int]) -> float:
    """Share of an answer's places at which the model's likeliest token is the answer's.

    >>> exact_memorisation([1, 2, 3, 4], [1, 9, 3, 4])
    0.75
    """
    right = _match(answer, said)
    return sum(right) / len(right)


def extraction_strength(answer: Sequence[int], said: Sequence[int]) -> float:
    """1 - k/n, where k is the shortest prefix of the answer behind which every likeliest token is right.

    >>> extraction_strength([1, 2, 3, 4], [1, 9, 3, 4]), extraction_strength([1, 2], [1, 9])
    (0.5, 0.0)
    """
    right = _match(answer, said)
    wrong = [i for i, hit in enumerate(right) if not hit]
    return 1 - (wrong[-1] + 1 if wrong else 0) / len(right)


def min_k(logp: Sequence[float], *, share: float = 0.2) -> float:
    """Mean of the lowest `share` of a text's token log-probabilities (at least one); high for texts the model was trained on.

    >>> min_k([-1.0, -5.0, -2.0, -3.0, -4.0])
    -5.0
    """
    x = np.sort(_numbers(logp, "logp"))
    if not 0 < share <= 1:
        raise InputError(f"share must be above 0 and at most 1, got {share}")
    return float(x[: max(1, int(share * len(x)))].mean())


def min_k_plus(
    logp: Sequence[float], mean: Sequence[float], deviation: Sequence[float], *, share: float = 0.2
) -> float:
    """min-k of (ln p - mean) / deviation, both taken over the vocabulary, weighted by p, at each place (min-k++).

    >>> min_k_plus([-1.0], [-2.0], [0.5])
    2.0
    """
    sd = _numbers(deviation, "deviation")
    if (sd <= 0).any():
        raise InputError("deviations over the vocabulary must be above 0")
    return min_k(((_numbers(logp, "logp") - _numbers(mean, "mean")) / sd).tolist(), share=share)


def zlib_score(loss: float, text: str) -> float:
    """-loss of the whole text over the bytes it compresses to: a likely text that is not just repetitive. High for members."""
    return -loss / len(zlib.compress(text.encode("utf-8", "backslashreplace")))


def membership_auc(members: Sequence[float], others: Sequence[float]) -> float | None:
    """Area under the ROC curve of a membership score; 1 when the forget rows (`members`) look like training data, 0.5 at chance.

    >>> membership_auc([0.9, 0.8], [0.1, 0.2])
    1.0
    """
    values, places = np.unique(np.asarray([*members, *others], dtype=float), return_inverse=True)
    if not places.size:
        return None
    scaled = (places / max(1, len(values) - 1)).tolist()  # ties stay ties
    return roc_auc([1] * len(members) + [0] * len(others), scaled)


def priv_leak(auc_unlearned: float, auc_oracle: float) -> float | None:
    """100 ((1 - AUC) - (1 - AUC_oracle)) / (1 - AUC_oracle) (MUSE): 0 is as the oracle, negative shows traces. None at AUC_oracle = 1.

    >>> priv_leak(0.5, 0.5), priv_leak(0.75, 0.5)
    (0.0, -50.0)
    """
    for name, value in (("auc_unlearned", auc_unlearned), ("auc_oracle", auc_oracle)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} must be in [0, 1], got {value}")
    if auc_oracle == 1:
        return None
    return 100 * ((1 - auc_unlearned) - (1 - auc_oracle)) / (1 - auc_oracle)


def recovery(unlearned: float, oracle: float, base: float) -> float | None:
    """(unlearned - oracle) / (base - oracle), all after one and the same attack: 0 nothing came back, 1 all. None if base <= oracle.

    >>> recovery(0.5, 0.0, 1.0), recovery(0.5, 0.2, 0.2) is None
    (0.5, True)
    """
    return None if base <= oracle else (unlearned - oracle) / (base - oracle)


def relearning_cost(steps: Sequence[int], recovered: Sequence[float | None], *, at: float = 0.5) -> int | None:
    """The first step at which recovery reaches `at`; None if it never does.

    >>> relearning_cost([10, 20, 40], [0.1, 0.6, 0.9])
    20
    """
    if len(steps) != len(recovered):
        raise InputError(f"steps and recoveries must have one length, got {len(steps)} and {len(recovered)}")
    return next((step for step, value in zip(steps, recovered, strict=True) if value is not None and value >= at), None)


def resistance(steps: Sequence[int], recovered: Sequence[float]) -> float:
    """Area above the recovery curve on log steps, as a share: 1 nothing ever comes back, 0 all is back from the first look on.

    >>> resistance([1, 10, 100], [0.0, 0.5, 1.0])
    0.5
    """
    x, y = np.log(_numbers(steps, "steps")), _numbers(recovered, "recovered")
    if len(x) != len(y) or len(x) < 2 or (np.diff(x) <= 0).any():
        raise InputError("resistance needs two or more growing steps and as many recoveries")
    area = float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())
    return 1 - area / float(x[-1] - x[0])


def damage_ratio(base_neighbour: float, neighbour: float, base_forget: float, forget: float) -> float | None:
    """Neighbour accuracy lost for each point of forget accuracy lost; 0 is none. 1 - this is selectivity. None if nothing was forgotten.

    >>> damage_ratio(1.0, 0.5, 1.0, 0.0)
    0.5
    """
    lost = base_forget - forget
    return None if lost <= 0 else (base_neighbour - neighbour) / lost


def _match(answer: Sequence[int], said: Sequence[int]) -> list[bool]:
    if len(answer) != len(said) or not len(answer):
        raise InputError(f"answer and said must have one length above 0, got {len(answer)} and {len(said)}")
    return [a == b for a, b in zip(answer, said, strict=True)]


def _numbers(values: Any, name: str) -> np.ndarray:
    """The values as finite floats. Raises InputError."""
    x = np.asarray(values, dtype=float)
    if not x.size or not np.isfinite(x).all():
        raise InputError(f"{name} must be finite numbers, one or more, got {len(x) if x.ndim else values}")
    return x
