"""Where adaptation and safety tuning moved a model, layer by layer: weights, angles between updates, conflicts, gradients.

Source: arXiv:2410.07571, section 5 (safety layers and the divergence of the two objectives). Shifts prove no cause; the layer swap of
`interp/layers.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.models import vision
from davylamp.models.vectors_names import layer_of

TOP = 0.2  # share of the largest entries of both updates that conflicts are counted among


def updates(before: Any, after: Any) -> dict[str, torch.Tensor]:
    """{name: after - before} of the matrices of the text layers of two models with equal names, in float64."""
    theirs = dict(after.named_parameters())
    out = {}
    for name, parameter in before.named_parameters():
        if parameter.dim() == 2 and layer_of(name) is not None:
            out[name] = (theirs[name].detach().double() - parameter.detach().double()).flatten()
    if not out:
        raise InputError(f"{type(before).__name__} has no text layers to compare")
    return out


def divergence(text: Any, adapted: Any, safe: Any) -> list[dict[str, float]]:
    """For each layer, means over its matrices of: `cosine` of adaptation (adapted - text) and safety tuning (safe - adapted), `conflict`
    (share of opposite signs among entries that belong to the largest 20 % of both; 0.5 by chance), `moved` (|adaptation| / |text|).

    Raises InputError where nothing was adapted, or nothing was tuned.
    """
    first, second = updates(text, adapted), updates(adapted, safe)
    weights = dict(text.named_parameters())
    if not any(bool(vector.any()) for vector in first.values()):
        raise InputError("the text model and the VL model are the same: nothing was adapted")
    if not any(bool(vector.any()) for vector in second.values()):
        raise InputError("the VL model and the safety-tuned one are the same: nothing was tuned")
    layers: dict[int, list[tuple[float, float, float]]] = {}
    for name, u in first.items():
        v, size = second[name], float(weights[name].detach().double().norm())
        layer = layer_of(name)
        assert layer is not None
        layers.setdefault(layer, []).append((cosine(u, v), conflict(u, v), float(u.norm()) / size if size else 0.0))
    return [
        dict(zip(("cosine", "conflict", "moved"), np.nanmean(np.array(layers[i]), axis=0).tolist(), strict=True))
        for i in sorted(layers)
    ]


def cosine(u: torch.Tensor, v: torch.Tensor) -> float:
    """Of two vectors; 0 where one is zero.

    >>> round(cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 3)
    0.707
    """
    size = float(u.norm()) * float(v.norm())
    return float(u @ v) / size if size else 0.0


def conflict(u: torch.Tensor, v: torch.Tensor) -> float:
    """Share of opposite signs among the entries in the top 20 % by magnitude of both; NaN where they share none.

    >>> conflict(torch.tensor([3.0, -2.0, 0.1, 0.1, 0.1]), torch.tensor([-3.0, 0.1, 0.1, 0.1, 0.1]))
    1.0
    """
    k = max(1, round(TOP * u.numel()))
    both = (u.abs() >= u.abs().kthvalue(u.numel() - k + 1).values) & (
        v.abs() >= v.abs().kthvalue(v.numel() - k + 1).values
    )
    both &= (u != 0) & (v != 0)
    return float((u[both] * v[both] < 0).double().mean()) if bool(both.any()) else float("nan")


def gradient_cosines(model: Any, tokenizer: Any, one: Sequence[Case], other: Sequence[Case]) -> list[float]:
    """For each layer, the mean over its matrices of the cosine of the gradients of two batches; the model is left as it was."""
    found = []
    for rows in (one, other):
        model.zero_grad(set_to_none=True)
        batch = vision.batch_of(model, tokenizer, vision.encode_rows(model, tokenizer, rows))
        (vision.losses_of(model, batch).sum() / int((batch["labels"] != vision.IGNORED).sum())).backward()
        found.append({n: p.grad.flatten().double() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    layers: dict[int, list[float]] = {}
    for name, gradient in found[0].items():
        layer = layer_of(name)
        if layer is not None and name in found[1] and dict(model.named_parameters())[name].dim() == 2:
            layers.setdefault(layer, []).append(cosine(gradient, found[1][name]))
    return [float(np.mean(layers[i])) for i in sorted(layers)]
