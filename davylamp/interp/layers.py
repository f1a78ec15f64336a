"""Which layers tell harmful requests from others, and how far two models differ, layer by layer.
Source: arXiv:2410.07571 (adaptation and safety layers), after arXiv:2408.17003 (the cosine gap). Differs: a stated rule for the band, and
probes scored on held-out groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from davylamp.core.errors import InputError, RunError
from davylamp.core.nouns import Case, Estimate
from davylamp.core.registry import interp
from davylamp.core.stats import bootstrap, clustered_rate
from davylamp.interp._effect import Replies, Speaker, rise
from davylamp.interp._prompts import encode, same_vocabulary, split
from davylamp.models.hooks import Anatomy, anatomy, capture

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDS = 5
RIDGE = 1e-2  # of the mean squared length of a state
TOKENS_AT_ONCE = 4096


@interp(
    version=1,
    source="arXiv:2410.07571",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning", "misalignment", "harmful-compliance"),
    needs="hf",
    systems=("09", "27"),
)
def layers(
    model: PreTrainedModel,
    rows: Sequence[Case],
    *,
    tokenizer: PreTrainedTokenizerBase,
    rng: Generator,
    other: PreTrainedModel | None = None,
    contrast: str = "",
    pairs: int = 1000,
    wrapper: str = "",
    judge: str = "",
    new_tokens: int = 128,
) -> dict[str, Any]:
    """Find the layers where harmful and benign requests part; with a second model, how far each layer's weights and states moved.

    rows: ten or more harmful and benign requests each (benign: meta.label safe or benign, meta.set benign, lookalikes or capability).
    other: the model before the change (the aligned one, say), of the same architecture.  contrast: a rows file of more benign requests.
    pairs: how many random pairs of requests the cosines are averaged over.  wrapper: a text with {prompt} in place of the chat template.
    judge: with `other`, a judge's name: each layer in turn is swapped for the other model's while the harmful rows are answered; shifts
    alone prove no cause.  new_tokens: of such an answer.
    """
    harmful, benign = split(rows, contrast)
    if len(harmful) < 10 or len(benign) < 10:
        raise InputError(f"layers needs 10 harmful and 10 benign prompts or more, got {len(harmful)} and {len(benign)}")
    if pairs < 10:
        raise InputError(f"pairs must be 10 or more, got {pairs}")
    if judge and other is None:
        raise InputError(
            "a judge is asked about swapped layers, so a second model is needed: give --other, or leave the judge out"
        )
    found = anatomy(model)
    cases = harmful + benign
    prompts = encode(model, tokenizer, cases, wrapper)
    states = last_states(model, prompts, names=[row.id for row in cases])
    bad = np.array([True] * len(harmful) + [False] * len(benign))
    groups = [row.group or row.id for row in cases]
    names = [f"layer {i}" for i in range(len(found.layers))]
    notes, gaps, estimates = [], [], []
    for name, at in zip(names, states, strict=True):
        same, across = cosine_pairs(at[~bad], at[bad], pairs, rng)
        gap = bootstrap((same - across).tolist(), rng=rng, unit="cosine", name="cosine_gap", arm=name)
        gaps.append(float((same - across).mean()))
        right = probe(at, bad, groups, rng)
        estimates += [gap, _probe_estimate(right, groups, name)]
    band = safety_band(gaps)
    out: dict[str, Any] = {
        "prompts": {"harmful": len(harmful), "benign": len(benign)},
        "cosine_gap": gaps,
        "probe_accuracy": [e.value for e in estimates if e.name == "probe_accuracy"],
        "band": band,
    }
    if band is None:
        notes.append("no safety band: the cosine gap grows in no layer")
    figures = [_curves("Where harmful and benign requests part", names, {"cosine gap": gaps, "probe accuracy": out["probe_accuracy"]},
                       "Last token of the request. Gap: mean cosine of benign pairs minus that of benign-harmful pairs. "
                       + ("No band." if band is None else f"The gap grows most from layer {band[0]} to layer {band[1]}."))]  # fmt: skip
    if other is not None:
        same_vocabulary(model, other)
        theirs = anatomy(other)
        _check_same(found, theirs)
        moved = weight_shift(found, theirs)
        far = last_states(other, prompts, names=[row.id for row in cases])
        turned = [float((1 - _cosines(a, b)).mean()) for a, b in zip(states, far, strict=True)]
        alike = [cka(a, b) for a, b in zip(states, far, strict=True)]
        out |= {"weight_shift": [m[0] for m in moved], "weight_cosine": [m[1] for m in moved]}
        out |= {
            "state_shift": turned,
            "state_cka": alike,
            "rank_correlation": rank_correlation(out["weight_shift"], gaps),
        }
        for name, (shift, _), turn in zip(names, moved, turned, strict=True):
            estimates.append(
                Estimate(shift, shift, shift, 1, method="exact", unit="ratio", name="weight_shift", arm=name)
            )
            estimates.append(
                Estimate(
                    turn,
                    None,
                    None,
                    len(cases),
                    method="mean over prompts",
                    unit="cosine",
                    name="state_shift",
                    arm=name,
                )
            )
        figures.append(_curves("How far each layer moved", names, {"weights, relative": out["weight_shift"], "states, 1 - cosine": turned},
                               "Against the second model. A shift proves no cause; swapping a layer back does."))  # fmt: skip
        if all(shift == 0 for shift, _ in moved):
            notes.append("the two models have equal weights in every layer")
        if judge:
            swapped, drawn = _swaps(
                Speaker(model, tokenizer, judge, new_tokens=new_tokens), harmful, found, theirs, names, rng
            )
            estimates += swapped
            figures.append(drawn)
    return {**out, "estimates": estimates, "figures": figures, "notes": notes}


# --- states -------------------------------------------------------------------------------------------------------------------------------
def last_states(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, names: Sequence[str] = ()) -> Any:
    """(layers, prompts, width) float64: the residual stream after each layer at the last token. Raises RunError where it is not finite."""
    found = anatomy(model)
    out = np.zeros((len(found.layers), len(prompts), found.width))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), capture(model, "layer") as seen:
            while order:
                length = len(prompts[order[0]])  # prompts of one length go together, so that none is padded
                part = [i for i in order if len(prompts[i]) == length][: max(1, TOKENS_AT_ONCE // length)]
                order = order[len(part) :]
                ids = torch.tensor([list(prompts[i]) for i in part], device=model.device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                for layer in range(len(found.layers)):
                    out[layer, part] = seen["layer", layer][:, -1].double().cpu().numpy()
    finally:
        model.train(training)
    wrong = ~np.isfinite(out).all((0, 2))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise RunError(f"prompt {names[first] if names else first + 1} gives states that are not finite")
    return out


def _cosines(a: Any, b: Any) -> Any:
    """Row-wise cosines of two (n, width) arrays; 0 for a row of zeros."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms > 0, norms, 1.0)


def cosine_pairs(normal: Any, harmful: Any, pairs: int, rng: Generator) -> tuple[Any, Any]:
    """(cosines of random pairs normal-normal, of pairs normal-harmful), `pairs` of each. A prompt is never paired with itself.

    normal, harmful: (n, width), two rows or more of the first.
    """
    n = len(normal)
    first = rng.integers(n, size=pairs)
    second = (first + rng.integers(1, n, size=pairs)) % n
    third = rng.integers(len(harmful), size=pairs)
    return _cosines(normal[first], normal[second]), _cosines(normal[first], harmful[third])


def safety_band(gaps: Sequence[float]) -> tuple[int, int] | None:
    """(first, last layer): from where the gap starts to grow without a break, to where its growth is largest; None if it never grows.

    >>> safety_band([0.0, 0.01, 0.01, 0.05, 0.20, 0.22])
    (3, 4)
    """
    growth = np.diff(np.asarray(gaps, dtype=float), prepend=gaps[0])
    last = int(growth.argmax())
    if growth[last] <= 0:
        return None
    first = last
    while first > 0 and growth[first - 1] > 0:
        first -= 1
    return first, last


def probe(states: Any, labels: Any, groups: Sequence[str], rng: Generator) -> Any:
    """(n,) whether a linear probe (ridge regression on +-1, centred) gets each row right, fitted without the row's fold.

    states: (n, width).  labels: (n,) bools.  groups: rows of one group stay in one fold.
    """
    order = list(dict.fromkeys(groups))
    folds = dict(
        zip((order[i] for i in rng.permutation(len(order))), (i % FOLDS for i in range(len(order))), strict=True)
    )
    fold = np.array([folds[group] for group in groups])
    right = np.zeros(len(labels), dtype=bool)
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        if not test.any():
            continue
        x, y = states[train], np.where(labels[train], 1.0, -1.0)
        middle = (x[y > 0].mean(0) + x[y < 0].mean(0)) / 2  # classes of unequal size weigh alike
        weight = np.where(y > 0, 1 / (y > 0).sum(), 1 / (y < 0).sum()) * len(y) / 2
        root = np.sqrt(weight)[:, None]
        a = (x - middle) * root
        kernel = a @ a.T  # the dual form: as many equations as rows
        solved = np.linalg.solve(kernel + RIDGE * np.trace(kernel) / len(y) * np.eye(len(y)), y * root[:, 0])
        right[test] = ((states[test] - middle) @ (a.T @ solved) > 0) == labels[test]
    return right


def _probe_estimate(right: Any, groups: Sequence[str], arm: str) -> Estimate:
    sums: dict[str, list[float]] = {}
    for value, group in zip(right, groups, strict=True):
        sums.setdefault(group, []).append(float(value))
    return clustered_rate(
        [sum(part) for part in sums.values()], [len(part) for part in sums.values()],
        name="probe_accuracy", arm=arm, higher_is_better=True,
    )  # fmt: skip


def cka(a: Any, b: Any) -> float:
    """Linear centred kernel alignment of two (n, width) arrays over the same rows, in [0, 1] (Kornblith et al. 2019, equation 5).

    >>> x = np.random.default_rng(0).normal(size=(20, 3))
    >>> round(cka(x, 2 * x), 6)
    1.0
    """
    a, b = a - a.mean(0), b - b.mean(0)
    below = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / below) if below > 0 else 0.0


# --- two models ---------------------------------------------------------------------------------------------------------------------------
def _check_same(ours: Anatomy, theirs: Anatomy) -> None:
    """Raises InputError, with the first differing names and shapes, if two models are not of one family."""
    a, b = ({name: tuple(p.shape) for name, p in found.backbone.named_parameters()} for found in (ours, theirs))
    wrong = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if wrong:
        lines = "; ".join(f"{name}: {a.get(name, 'absent')} and {b.get(name, 'absent')}" for name in wrong[:3])
        raise InputError(
            f"the two models are not of one family: {len(wrong)} parameters differ in name or shape. {lines}"
        )


def weight_shift(ours: Anatomy, theirs: Anatomy) -> list[tuple[float, float]]:
    """For each layer, over its matrices: (mean of ||W - W0|| / ||W0||, mean cosine of W and W0); W0 is the other model's."""
    out = []
    for layer, before in zip(ours.layers, theirs.layers, strict=True):
        shifts, cosines = [], []
        for (name, new), (_, old) in zip(layer.named_parameters(), before.named_parameters(), strict=True):
            if new.dim() < 2:
                continue
            a, b = new.detach().double().flatten().cpu(), old.detach().double().flatten().cpu()
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise RunError(f"{name} holds numbers that are not finite")
            size = float(b.norm())
            shifts.append(float((a - b).norm()) / size if size else 0.0)
            cosines.append(float(a @ b) / (float(a.norm()) * size) if size and float(a.norm()) else 0.0)
        out.append((float(np.mean(shifts)), float(np.mean(cosines))))
    return out


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, with mean ranks for ties; None for fewer than four layers or where one side is constant.

    >>> rank_correlation([1, 2, 3, 4], [10, 20, 30, 50])
    1.0
    """
    if len(a) < 4 or len(set(a)) == 1 or len(set(b)) == 1:
        return None

    def ranks(values: Sequence[float]) -> Any:
        x = np.asarray(values, dtype=float)
        return np.array([((x < v).sum() + (x <= v).sum() + 1) / 2 for v in x])

    return float(round(np.corrcoef(ranks(a), ranks(b))[0, 1], 12))


@contextmanager
def swapped(ours: Anatomy, theirs: Anatomy, layer: int) -> Iterator[None]:
    """While it lasts, our model runs with the other model's layer in place of its own; nothing is copied."""
    mine: Any = ours.backbone.layers if hasattr(ours.backbone, "layers") else ours.backbone.h
    kept = mine[layer]
    mine[layer] = theirs.layers[layer]
    try:
        yield
    finally:
        mine[layer] = kept


def _swaps(
    speaker: Speaker, harmful: Sequence[Case], ours: Anatomy, theirs: Anatomy, names: Sequence[str], rng: Generator
) -> tuple[list[Estimate], dict[str, Any]]:
    """Compliance with each layer in turn taken from the other model."""
    before: Replies = speaker.comply(harmful, [])
    estimates, values = [before.estimate("compliance", "no layer swapped", better=False)], []
    for i, name in enumerate(names):
        with swapped(ours, theirs, i):
            after = speaker.comply(harmful, [])
        estimates.append(after.estimate("compliance", f"{name} swapped", better=False))
        values.append(estimates[-1].value)
        estimates.append(rise(before, after, rng=rng, name="compliance_rise", arm=f"{name} swapped"))
    note = f"Without a swap: {'–' if estimates[0].value is None else round(estimates[0].value, 3)}. Judged by {speaker.judge.name}."
    return estimates, _curves(
        "Compliance with one layer taken from the second model", names, {"compliance": values}, note
    )


def _curves(title: str, names: Sequence[str], lines: dict[str, Any], note: str) -> dict[str, Any]:
    x = list(range(len(names)))
    series = [{"name": name, "x": x, "y": list(values)} for name, values in lines.items()]
    return {"kind": "curves", "title": title, "x_label": "layer", "y_label": "value", "series": series, "note": note}
