"""Instruction residual: after a base model was pre-trained on, add what instruction tuning had changed in its former self.

Source: arXiv:2410.10739, section 3: residual = instruct - base; restored = updated base + scale * residual, every parameter, scale 1 inside
a family. Differs: token rows meet by token string; arithmetic in float32 with the few entries that it cannot hold kept exactly, so that a
base which did not change gives back the instruct model bit for bit; sparse and low-rank residuals, and scales by layer or name, are ours.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.registry import edit
from davylamp.models import vectors
from davylamp.models.vectors import Part
from davylamp.models.vectors_names import has_token_rows
from davylamp.models.vectors_out import TOKEN_FIELDS, weights_sha256
from davylamp.models.vectors_plan import Plan
from davylamp.models.vectors_reports import compatibility
from davylamp.models.vectors_residual import HALF, Form, inexact, write_residual
from davylamp.models.vectors_sources import MANIFEST, Aligned, Residual

if TYPE_CHECKING:
    from numpy.random import Generator

VARIANTS = ("dense", "top_k", "dare", "low_rank")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPORT = "compatibility.json"


@edit(
    version=1,
    source="arXiv:2410.10739",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning", "capability-loss", "harmful-compliance", "over-refusal"),
    needs="hf",
    systems=("36",),
)
def instruction_residual(
    model: Any,
    *others: Any,
    rows: Sequence[Any] = (),
    tokenizer: Any = None,
    out: Path | None = None,
    rng: Generator,
    step: Literal["apply", "extract"] = "apply",
    scale: float | str | None = None,
    token_rows: bool = True,
    variant: Literal["dense", "top_k", "dare", "low_rank"] = "dense",
    density: float = 0.2,
    drop: float = 0.2,
    rank: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    report: bool = False,
    allow_missing: bool = False,
    force: bool = False,
    adapter_base: str = "",
) -> Any:
    """Restore instruction following (and refusals) of an updated base model, without data and without a training step.

    step apply: model is the updated base; others are (base, instruct), or (residual folder,), or (residual folder, base). The result has
        the instruct model's tokenizer, chat template and generation settings. In memory: (base, instruct).
    step extract: model is the instruct model, others the base; `out` becomes the residual folder.
    scale: a number, or rules such as "0-3:0.5,4-:1" or "*.mlp.*:0.8" (tensors that no rule fits get 1). Without it the default, 1.
    token_rows: add to embeddings and heads too. Without it they stay the updated base's, with zero rows for new tokens.
    variant: how extract stores it: in full, the largest entries of all tensors, a random part rescaled, or matrices in thin factors.
    density: share of entries that top_k keeps, in (0, 1].
    drop: probability with which dare drops an entry, in [0, 1).
    rank: of the factors of low_rank.
    dtype: of the stored residual. bfloat16 halves it; the manifest holds the error of that.
    report: write compatibility.json beside the result (needs the base): what `compatibility` gives.
    allow_missing: keep the updated base's tensor, and drop its tokens, where the residual has none.
    force: go on though the given base is not the one that the residual was made from.
    adapter_base: folder of an adapter's base; adapters are merged into it as they are read.

    rows and tokenizer are not needed. Raises InputError where the checkpoints do not fit, where base and instruct are the same, and for a
    scale that is not finite.

    >>> import numpy as np
    >>> updated, base, instruct = (torch.nn.Linear(2, 1, bias=False) for _ in range(3))
    >>> for layer, number in ((updated, 3.0), (base, 1.0), (instruct, 1.5)):
    ...     layer.config, layer.weight.data = {}, torch.full((1, 2), number)
    >>> instruction_residual(updated, base, instruct, rng=np.random.default_rng(0)).weight.tolist()
    [[3.5, 3.5]]
    """
    if variant not in VARIANTS:
        raise UnknownNameError("residual variant", variant, VARIANTS)
    if dtype not in DTYPES:
        raise UnknownNameError("dtype of a residual", dtype, DTYPES)
    missing: Literal["error", "copy"] = "copy" if allow_missing else "error"
    on_adapters = {"base": Path(adapter_base)} if adapter_base else {}
    if step == "extract":
        if len(others) != 1 or not isinstance(model, str | Path) or out is None:
            raise InputError("extract needs two folders, the instruct model and its base, and out")
        form = Form(variant, density, drop, rank, DTYPES[dtype], int(rng.integers(2**62)))
        return write_residual(Path(model), Path(others[0]), Path(out), form=form, missing=missing, **on_adapters)
    if step != "apply":
        raise UnknownNameError("step", step, ("apply", "extract"))
    stored = bool(others) and isinstance(others[0], str | Path) and (Path(others[0]) / MANIFEST).is_file()
    if not (stored and len(others) in (1, 2)) and len(others) != 2:
        raise InputError(
            f"apply needs the updated base and then base and instruct model, or a residual folder, got {len(others)} others"
        )
    if stored and len(others) == 2:
        _same_base(Path(others[0]), Path(others[1]), force=force)
    if report and (len(others) < 2 or out is None):
        raise InputError("report needs folders, and the base beside the residual")
    used = others[:1] if stored else others
    adding = _Adding(scale, token_rows)
    lineage = {
        "operation": "instruction_residual",
        "options": {
            "scale": adding.given(used[0] if stored else None),
            "token_rows": token_rows,
            "allow_missing": allow_missing,
        },
    }
    plan: dict[str, Any] = {"missing": missing, **on_adapters}
    options = {**plan, "vocabulary_of": len(used)}
    if out is not None:
        options["after"] = lambda folder: _finish(folder, adding, model, others, report=report, **plan)
    result = vectors.edit(
        model, used, adding.rule, out=out, lineage=lineage, blocks=True, before=adding.before, **options
    )
    if out is None:
        adding.refuse_zero(None)
        _speak_like(model, others[1])
    return result


def _same_base(residual: Path, base: Path, *, force: bool) -> None:
    wanted = Residual(residual)
    wanted.close()
    found, known = weights_sha256(base), wanted.manifest.get("base_sha256")
    if found != known and not force:
        raise InputError(
            f"{residual} was made from a base with sha256 {known}, but {base} has {found}. Say force to use it all the same"
        )


def _finish(
    folder: Path, adding: _Adding, updated: Any, others: Sequence[Any], *, report: bool, **options: Any
) -> None:
    adding.refuse_zero(others)
    if report:
        base, other = (others[1], others[0]) if adding.residual is not None else others
        found = compatibility(updated, base, other, **options)
        (folder / REPORT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _speak_like(model: Any, instruct: Any) -> None:
    """In memory, where a reply ends comes from the instruct model too; the tokenizer is the caller's."""
    if hasattr(instruct, "generation_config"):
        model.generation_config = copy.deepcopy(instruct.generation_config)
        for name in TOKEN_FIELDS:
            if hasattr(instruct.config, name):
                setattr(model.config, name, getattr(instruct.config, name))


class _Adding:
    """updated + scale * (instruct - base), from the two checkpoints or from a stored residual, with equal results for half precision."""

    def __init__(self, scale: float | str | None, token_rows: bool):
        self._scale, self._token_rows = scale, token_rows
        self.scales: dict[str, float] = {}
        self.residual: Residual | None = None
        self.moved_anything = False
        self._half: dict[str, bool] = {}

    def given(self, residual: Any) -> float | str:
        """The scale, or the residual's default."""
        if self._scale is None and residual is not None:
            opened = Residual(Path(residual))
            opened.close()
            self._scale = float(opened.manifest.get("scale_default", 1.0))
        if self._scale is None:
            self._scale = 1.0
        if isinstance(self._scale, int | float) and not math.isfinite(self._scale):
            raise InputError(f"scale must be finite, got {self._scale}")
        return self._scale

    def before(self, plan: Plan) -> None:
        names = [job.name for job in plan.jobs if job.inputs]
        self.scales = vectors.by_name(self.given(None), names, otherwise=1.0, what="scale")
        source = plan.sources[1].source if isinstance(plan.sources[1], Aligned) else plan.sources[1]
        self.residual = source if isinstance(source, Residual) else None
        for job in plan.jobs:
            if job.inputs:
                self._half[job.name] = all(other.tensors[name].dtype in HALF for other, name in job.inputs[1:])
                if not self._token_rows and has_token_rows(job.name, job.spec.shape, plan.vocabulary):
                    self.scales[job.name] = 0.0

    def rule(self, part: Part, tensors: list[torch.Tensor]) -> torch.Tensor:
        scale = self.scales[part.name]
        if scale == 0.0:
            self.moved_anything = True  # not asked
            return tensors[0]
        if len(tensors) == 2:
            return self._stored(part, tensors[0], tensors[1], scale)
        updated, base, instruct = tensors
        if not self._half[part.name]:  # float64 holds every difference of float32 numbers of about equal size
            difference = instruct.double() - base.double()
            self.moved_anything = self.moved_anything or bool(difference.any())
            return _exactly(updated, base, instruct, difference, scale)
        difference = instruct - base
        self.moved_anything = self.moved_anything or bool(difference.any())
        wrong = inexact(base, difference, instruct)
        if wrong is not None:
            right = _exactly(updated[wrong], base[wrong], instruct[wrong], None, scale).float()
        result = updated.add_(difference, alpha=scale)
        if wrong is not None:
            result[wrong] = right
        return result

    def _stored(self, part: Part, updated: torch.Tensor, difference: torch.Tensor, scale: float) -> torch.Tensor:
        self.moved_anything = True  # a stored residual is not zero
        exact = self.residual.exact.get(part.name) if self.residual is not None else None
        if exact is None:
            return updated.add_(difference, alpha=scale)
        width = part.shape[-1] if len(part.shape) > 1 else 1
        low, high = (int(torch.searchsorted(exact[0], row * width)) for row in (part.start, part.stop))
        places = exact[0][low:high] - part.start * width
        base, instruct = (numbers[low:high].float() for numbers in exact[1:])
        right = _exactly(updated.view(-1)[places], base, instruct, None, scale).float()
        result = updated.add_(difference, alpha=scale)
        result.view(-1)[places] = right
        return result

    def refuse_zero(self, others: Sequence[Any] | None) -> None:
        """Raises InputError where instruct and base were the same."""
        if not self.moved_anything:
            sha = f" (sha256 {weights_sha256(Path(others[0]))})" if others is not None else ""
            raise InputError(f"residual is zero: these checkpoints are the same{sha}")


def _exactly(
    updated: torch.Tensor, base: torch.Tensor, instruct: torch.Tensor, difference: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """In float64; the instruct model's own number, sign of zero and all, where nothing was updated and the scale is 1."""
    if difference is None:
        difference = instruct.double() - base.double()
    result = updated.double() + scale * difference
    return torch.where(updated == base, instruct.double(), result) if scale == 1.0 else result
