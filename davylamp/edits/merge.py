"""Merge models in weight space: linear, average, SLERP, task arithmetic, TIES, DARE, DARE with TIES; a weight for all or by layer or name.

Sources: linear interpolation of an adapted and a safety-tuned model arXiv:2410.07571; model soups arXiv:2203.05482; task arithmetic
arXiv:2212.04089; TIES arXiv:2306.01708; DARE arXiv:2311.03099. Differs: TIES sums what agrees, with the constants of arXiv:2405.09055
(`combine="mean"` is the published rule); thresholds are exact over all tensors together.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.registry import edit
from davylamp.models import vectors
from davylamp.models import vectors_rules as rules
from davylamp.models.vectors import Part
from davylamp.models.vectors_plan import Plan
from davylamp.models.vectors_select import entries, kth_smallest

if TYPE_CHECKING:
    from numpy.random import Generator

METHODS = ("linear", "average", "slerp", "task_arithmetic", "ties", "dare", "dare_ties")
ON_VECTORS = ("task_arithmetic", "ties", "dare", "dare_ties")
#: The weight that is taken where none is given, for two or more tasks: the constants of the code of arXiv:2405.09055 for adapters.
#: One task comes unscaled there, but for DARE.
CONSTANTS = {"task_arithmetic": 0.3, "ties": 0.4, "dare": 0.3, "dare_ties": 0.4}


@edit(
    version=1,
    source="arXiv:2410.07571, arXiv:2212.04089, arXiv:2306.01708, arXiv:2311.03099",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning", "harmful-compliance", "over-refusal", "capability-loss"),
    needs="hf",
)
def merge(
    model: Any,
    *others: Any,
    rows: Sequence[Any] = (),
    tokenizer: Any = None,
    out: Path | None = None,
    rng: Generator,
    method: Literal["linear", "average", "slerp", "task_arithmetic", "ties", "dare", "dare_ties"] = "linear",
    weight: float | str | None = None,
    base: bool | None = None,
    density: float = 0.2,
    drop: float = 0.2,
    combine: Literal["sum", "mean"] = "sum",
    vision: Literal["keep", "merge"] = "keep",
    extrapolate: bool = False,
    allow_missing: bool = False,
    adapters: Literal["merge", "keep"] = "merge",
    adapter_base: str = "",
) -> Any:
    """Merge other models into a model: on models in memory in place, on folders streamed to `out`, with equal bytes.

    method: linear is (1 - w) model + w other; average the mean of all; slerp the same turn for every tensor from model to other;
        the rest act on task vectors: task_arithmetic model + w sum(other - model), ties with trimming and sign election, dare with random
        dropping, dare_ties with both.
    weight: a number, or rules such as "0-3:0.2,4-:0.7" or "*.mlp.*:0.5" (tensors that no rule fits stay the model's); one for all others,
        or one for each with ";" between. Without it: equal shares for linear, 0.5 for slerp, for task vectors the reference's constant.
    base: whether the model is the base that task vectors start from (True for task methods) or one more ingredient (False for the others).
        Without a base, task methods act on the numbers as they are: for adapters or residuals, which are differences already.
    density: share of the largest entries that ties keeps of each task vector over all tensors together, in (0, 1].
    drop: probability with which dare drops an entry, in [0, 1).
    combine: whether ties sums the entries that agree, as the code of arXiv:2405.09055, or takes their mean, as published.
    vision: keep the model's vision parts, or merge them as well.
    extrapolate: allow weights outside of [0, 1].
    allow_missing: keep the model's tensor where another has none.
    adapters: read an adapter folder as its base with the adapter in it, or merge the adapters' own tensors.
    adapter_base: folder of the adapters' base, if it is not where their configuration says.

    rows and tokenizer are not needed. Raises InputError for models that do not fit together and for options out of range.

    >>> import numpy as np
    >>> left, right = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    >>> left.config, left.weight.data, right.config, right.weight.data = {}, torch.zeros(1, 2), {}, torch.ones(1, 2)
    >>> merge(left, right, weight=0.25, rng=np.random.default_rng(0)).weight.tolist()
    [[0.25, 0.25]]
    """
    _check(method, others, density, drop, base)
    start_at_model = method in ON_VECTORS if base is None else base
    seed = int(rng.integers(2**62))
    options = {
        "method": method,
        "weight": weight,
        "base": start_at_model,
        "density": density,
        "drop": drop,
        "combine": combine,
        "vision": vision,
        "allow_missing": allow_missing,
        "adapters": adapters,
        **({"seed": seed} if method.startswith("dare") else {}),
    }
    recipe = _Recipe(method, weight, start_at_model, density, drop, combine, seed, len(others), extrapolate=extrapolate)
    return vectors.edit(
        model,
        others,
        recipe.rule,
        out=out,
        lineage={"operation": "merge", "options": options},
        only=(lambda name: not vectors.is_vision(name)) if vision == "keep" else None,
        blocks=True,
        before=recipe.before,
        missing="copy" if allow_missing else "error",
        adapters=adapters,
        base=Path(adapter_base) if adapter_base else None,
    )


def _check(method: str, others: Sequence[Any], density: float, drop: float, base: bool | None) -> None:
    if method not in METHODS:
        raise UnknownNameError("merge method", method, METHODS)
    if not others:
        raise InputError("merge needs the model and at least one other, got the model alone")
    if method == "slerp" and (len(others) != 1 or base):
        raise InputError(
            f"slerp turns one model towards one other, got {len(others)} others{' and a base' * bool(base)}"
        )
    if not 0 < density <= 1:
        raise InputError(f"density must be in (0, 1], got {density}")
    if not 0 <= drop < 1:
        raise InputError(f"drop must be in [0, 1), got {drop}")


class _Recipe:
    """One merge: its weights by tensor, and what it learns of all tensors before the first is written."""

    def __init__(
        self,
        method: str,
        weight: float | str | None,
        base: bool,
        density: float,
        drop: float,
        combine: Literal["sum", "mean"],
        seed: int,
        others: int,
        *,
        extrapolate: bool,
    ):
        self.method, self.base, self.density, self.drop, self.combine, self.seed = (
            method,
            base,
            density,
            drop,
            combine,
            seed,
        )
        self.given, self.others, self.extrapolate = weight, others, extrapolate
        self.weights: list[dict[str, float]] = []
        self.thresholds: list[float] = []
        self.factors: dict[str, tuple[float, float]] = {}
        self._majority: float | None = None
        self._finding = threading.Lock()

    def before(self, plan: Plan) -> None:
        """Weights, and the thresholds or angles that need all tensors."""
        names = [job.name for job in plan.jobs if job.inputs]
        self.plan = plan
        self.weights = self._weights(names)
        if self.method == "ties":
            count = entries(plan)
            rank = count - int(self.density * count)  # so int(density * count) + 1 entries stay, as in the reference
            self.thresholds = kth_smallest(plan, self._magnitudes, rank) if rank else [0.0] * self._many
        if self.method == "slerp":
            self.factors = self._turns(plan)

    @property
    def _many(self) -> int:
        """Number of vectors: the others, and the model too where it is no base."""
        return self.others + (not self.base)

    def _weights(self, names: list[str]) -> list[dict[str, float]]:
        many = self.others if self.base or self.method in ("linear", "slerp") else self._many
        given = self._default() if self.given is None else self.given
        parts = given.split(";") if isinstance(given, str) else [given]
        if len(parts) not in (1, many):
            raise InputError(
                f"weight has {len(parts)} parts with ';' between, for {many} models. Give one, or one for each"
            )
        out = [vectors.by_name(part, names, otherwise=0.0) for part in parts * (many if len(parts) == 1 else 1)]
        for name in names:
            each = [weights[name] for weights in out]
            if self.method == "linear" and not self.base:
                each.append(1 - math.fsum(each))  # the model's share
            if not self.extrapolate and any(not -1e-9 <= value <= 1 + 1e-9 for value in each):
                shares = ", ".join(f"{value:g}" for value in each)
                raise InputError(f"weights must be in [0, 1], got {shares} for {name}. Say extrapolate to go beyond")
        return out

    def _default(self) -> float:
        if self.method in CONSTANTS:
            # One vector comes back unscaled, but for DARE: as in the reference.
            return 1.0 if self._many == 1 and not self.method.startswith("dare") else CONSTANTS[self.method]
        if self.method == "slerp":
            return 0.5
        return 1 / (self.others + 1) if self.method == "linear" else 1.0

    def rule(self, part: Part, tensors: list[torch.Tensor]) -> torch.Tensor:
        weights = [weights[part.name] for weights in self.weights]
        if not any(weights) and (self.base or self.method in ("linear", "slerp")):
            return tensors[0]  # bit for bit, with the sign of its zeros
        if self.method in ("linear", "slerp") and weights == [1.0] and not self.base:
            return tensors[1]
        if self.method == "slerp":
            left, right = self.factors[part.name]
            return tensors[0].mul_(left).add_(tensors[1], alpha=right)
        if self.method == "linear" and not self.base:
            if len(weights) == 1:
                return tensors[0].lerp_(tensors[1], weights[0])
            total = tensors[0].mul_(1 - math.fsum(weights))
            for value, tensor in zip(weights, tensors[1:], strict=True):
                total.add_(tensor, alpha=value)
            return total
        return self._on_vectors(part, tensors, weights)

    def _on_vectors(self, part: Part, tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        found = self._prepared(part, self._vectors(tensors))
        equal = len(set(weights)) == 1
        if not equal:
            found = [vector.mul_(value) for vector, value in zip(found, weights, strict=True)]
        if self.method in ("ties", "dare_ties"):
            majority = self.majority() if rules.cancels(found) else 0.0
            merged = rules.consensus(found, majority=majority, combine=self.combine)
        else:
            merged = found[0]
            for vector in found[1:]:
                merged = merged.add_(vector)
            if self.method == "average":
                merged = merged.div_(len(found))
        scale = weights[0] if equal else 1.0
        return tensors[0].add_(merged, alpha=scale) if self.base else merged.mul_(scale)

    def _vectors(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.sub_(tensors[0]) for tensor in tensors[1:]] if self.base else tensors

    def _prepared(self, part: Part, found: list[torch.Tensor]) -> list[torch.Tensor]:
        """Trimmed (ties) or thinned (dare)."""
        if self.method == "ties":
            return [rules.trim(vector, limit) for vector, limit in zip(found, self.thresholds, strict=True)]
        if self.method.startswith("dare"):
            return [
                rules.drop_and_rescale(vector, self.drop, rules.generator(self.seed, part, task))
                for task, vector in enumerate(found)
            ]
        return found

    def _magnitudes(self, part: Part, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [vector.abs_() for vector in self._vectors(tensors)]

    def majority(self) -> float:
        """Sign of the sum of all elected signs. Another pass over everything, so only where an entry asks for it."""
        with self._finding:
            if self._majority is None:

                def signs(part: Part, tensors: list[torch.Tensor]) -> float:
                    weights = [weights[part.name] for weights in self.weights]
                    found = self._prepared(part, self._vectors(tensors))
                    if len(set(weights)) > 1:
                        found = [vector.mul_(value) for vector, value in zip(found, weights, strict=True)]
                    return float(rules.sign_total(found).sign_().sum(dtype=torch.float64))

                total = math.fsum(value for _, value in vectors.scan_plan(self.plan, signs))
                self._majority = (total > 0) - (total < 0)
            return self._majority

    def _turns(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """The factors of every tensor, from its inner product and norms in float64."""

        def products(part: Part, tensors: list[torch.Tensor]) -> tuple[float, float, float]:
            a, b = (tensor.reshape(-1).double() for tensor in tensors)
            return float(a @ b), float(a @ a), float(b @ b)

        sums: dict[str, list[list[float]]] = {}
        for part, values in vectors.scan_plan(plan, products):
            for column, value in zip(sums.setdefault(part.name, [[], [], []]), values, strict=True):
                column.append(value)
        out = {}
        for name, columns in sums.items():
            dot, left, right = (
                math.fsum(column) if all(map(math.isfinite, column)) else math.nan for column in columns
            )
            weight = self.weights[0][name]
            if weight in (0.0, 1.0):
                out[name] = (1 - weight, weight)
            else:
                out[name] = rules.turn(dot, math.sqrt(left), math.sqrt(right), weight, name)
        return out
