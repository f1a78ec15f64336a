"""What to know before an instruction residual is added: whether it fits, how small it can be stored, and what the other way would cost.

Source: arXiv:2410.10739 for the question; the measures are ours and are defined at each function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from davylamp.core.errors import InputError
from davylamp.models import vectors
from davylamp.models.vectors import Part
from davylamp.models.vectors_plan import differing_fields
from davylamp.models.vectors_residual import Encoder, Form
from davylamp.models.vectors_sources import Aligned, Residual

SUMS = 9  # numbers that are added up over the parts of a tensor


def compatibility(updated: Any, base: Any, instruct: Any, **options: Any) -> dict[str, Any]:
    """What stands in the way of adding instruct - base to an updated base; in plain types.

    instruct may be a residual folder instead. options: `missing`, `vocabularies`, `base` (of adapters), as of `vectors.edit_folder`.

    Of each tensor, each layer and all: `cosine` of residual r and update d; `residual` ||r|| / ||base||; `update` ||d|| / ||base||;
    `sign_conflict`, the share of entries moved by both that r and d move in opposite directions (0.5 = unrelated); `undone`,
    max(0, -<r, d> / <r, r>), the share of the residual that the update takes back: the interference to expect. None where undefined.
    Also the configuration fields that differ, what the vocabularies share, and `base_cosine` of base and updated base over the matrices:
    two models of one ancestor are near 1, unrelated ones near 0.

    >>> updated, base, instruct = (torch.nn.Linear(2, 1, bias=False) for _ in range(3))
    >>> for layer, numbers in ((updated, [[2.0, 0.0]]), (base, [[1.0, 1.0]]), (instruct, [[1.0, 2.0]])):
    ...     layer.config, layer.weight.data = {}, torch.tensor(numbers)
    >>> {name: round(value, 2) for name, value in compatibility(updated, base, instruct)["all"].items()}
    {'cosine': -0.71, 'residual': 0.71, 'update': 1.0, 'sign_conflict': 1.0, 'undone': 1.0, 'base_cosine': 0.71}
    """
    plan = vectors.make_plan(updated, [base, instruct], vocabulary_of=2, **options)
    try:
        inner = plan.sources[2].source if isinstance(plan.sources[2], Aligned) else plan.sources[2]
        stored = isinstance(inner, Residual)
        sums: dict[str, torch.Tensor] = {}
        for part, found in vectors.scan_plan(plan, lambda part, tensors: _sums(part, tensors, stored)):
            sums[part.name] = sums.get(part.name, torch.zeros(SUMS, dtype=torch.float64)) + found
        layers: dict[str, torch.Tensor] = {}
        for name, found in sums.items():
            layer = vectors.layer_of(name)
            key = str(layer) if layer is not None else "outside of layers"
            layers[key] = layers.get(key, torch.zeros(SUMS, dtype=torch.float64)) + found
        return {
            "all": _ratios(sum(sums.values(), torch.zeros(SUMS, dtype=torch.float64))),
            "layers": {
                key: _ratios(layers[key]) for key in sorted(layers, key=lambda key: (not key.isdigit(), key.zfill(9)))
            },
            "tensors": {name: _ratios(found) for name, found in sums.items()},
            "configurations differ": {
                "base": differing_fields(plan.sources[0].config, plan.sources[1].config),
                "instruct": differing_fields(plan.sources[0].config, plan.sources[2].config),
            },
            "model types": [str(source.config.get("model_type", "")) for source in plan.sources],
            "notes": plan.notes,
        }
    finally:
        plan.close()


def _sums(part: Part, tensors: list[torch.Tensor], stored: bool) -> torch.Tensor:
    updated, base, other = (tensor.reshape(-1).double() for tensor in tensors)
    r, d = other if stored else other - base, updated - base
    both = (r != 0) & (d != 0)
    pairs = ((r, d), (r, r), (d, d), (base, base))
    counts = [float((((r > 0) != (d > 0)) & both).sum()), float(both.sum())]
    kin = ((updated, updated), (base, base), (updated, base)) if len(part.shape) > 1 else ()
    found = [*(float(a @ b) for a, b in pairs), *counts, *(float(a @ b) for a, b in kin)]
    return torch.tensor(found + [0.0] * (SUMS - len(found)), dtype=torch.float64)


def _ratios(sums: torch.Tensor) -> dict[str, float | None]:
    rd, rr, dd, bb, opposite, both, uu, mm, um = sums.tolist()

    def over(top: float, bottom: float) -> float | None:
        return top / bottom if bottom > 0 else None

    return {
        "cosine": over(rd, math.sqrt(rr * dd)),
        "residual": over(math.sqrt(rr), math.sqrt(bb)),
        "update": over(math.sqrt(dd), math.sqrt(bb)),
        "sign_conflict": over(opposite, both),
        "undone": over(max(0.0, -rd), rr),
        "base_cosine": over(um, math.sqrt(uu * mm)),
    }


def variants(instruct: Any, base: Any, *, forms: Sequence[Form] | None = None, **options: Any) -> list[dict[str, Any]]:
    """A table of ways to store the residual: bytes, share of the full float32 size, and relative error ||stored - r|| / ||r||.

    forms: which ways; None: full in float32 and bfloat16, top_k and dare at a fifth and a half, low_rank 8, 32 and 128. Nothing is written.

    >>> left, right = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
    >>> left.config, left.weight.data, right.config, right.weight.data = {}, torch.ones(64, 64), {}, torch.zeros(64, 64)
    >>> table = variants(left, right, forms=[Form(), Form("low_rank", rank=1)])
    >>> [(row["variant"], row["bytes"], round(row["relative_error"], 3)) for row in table]
    [('dense', 16384, 0.0), ('low_rank', 512, 0.0)]
    """
    wanted = forms or [
        Form(),
        Form(dtype=torch.bfloat16),
        *(Form("top_k", density=share) for share in (0.2, 0.5)),
        *(Form("dare", drop=1 - share) for share in (0.2, 0.5)),
        *(Form("low_rank", rank=rank) for rank in (8, 32, 128)),
    ]
    plan = vectors.make_plan(instruct, [base], new_rows="zero", **options)
    try:
        out = []
        full = 4 * sum(math.prod(job.spec.shape) for job in plan.jobs if job.inputs and job.name == job.target)
        for form in wanted:
            encoder = Encoder(form, plan)
            size = sum(spec.bytes for spec in encoder.layout().values())
            found = [fact for _, fact in encoder.facts()]
            squares = math.fsum(fact.squares for fact in found)
            if not squares:
                raise InputError("residual is zero: these checkpoints are the same")
            out.append(
                {
                    "variant": form.variant,
                    **_knob(form),
                    "dtype": str(form.dtype).removeprefix("torch."),
                    "bytes": size,
                    "share": size / full,
                    "relative_error": math.sqrt(math.fsum(fact.errors for fact in found) / squares),
                }
            )
        return out
    finally:
        plan.close()


def _knob(form: Form) -> dict[str, float]:
    names = {"top_k": "density", "dare": "drop", "low_rank": "rank"}
    return {names[form.variant]: getattr(form, names[form.variant])} if form.variant in names else {}


def routes(
    *,
    parameters: float,
    update_tokens: float,
    tuning_tokens: float,
    flops_per_second: float = 4e14,
    bytes_per_second: float = 1e9,
    bytes_per_parameter: float = 2.0,
) -> dict[str, Any]:
    """What two ways to an updated chat model cost: pre-train the base on and add the residual, or pre-train it on and tune it again.

    parameters: of the model.  update_tokens: of continued pre-training.  tuning_tokens: of instruction tuning, all its stages.
    flops_per_second: what one accelerator really does (ours: 40 % of 1e15).  bytes_per_second: of the disk that the residual is added on.
    Training is 6 FLOPs for each parameter and token (arXiv:2001.08361); the addition reads three checkpoints and writes one.
    Hours are of one accelerator, or of the machine with the disk. `saved` is tuning over addition.

    >>> found = routes(parameters=8e9, update_tokens=1e9, tuning_tokens=1e9)
    >>> round(found["update_hours"], 1), round(found["tuning_hours"], 1), round(found["addition_hours"], 3), round(found["saved"])
    (33.3, 33.3, 0.018, 1875)
    """
    given = (parameters, update_tokens, tuning_tokens, flops_per_second, bytes_per_second, bytes_per_parameter)
    if not all(math.isfinite(value) and value > 0 for value in given):
        raise InputError(f"routes needs positive finite numbers, got {', '.join(f'{value:g}' for value in given)}")
    update, tuning = (6 * parameters * tokens / flops_per_second / 3600 for tokens in (update_tokens, tuning_tokens))
    addition = 4 * parameters * bytes_per_parameter / bytes_per_second / 3600
    small = parameters < 1.5e9  # below which the source found the residual much less effective
    return {
        "update_hours": update,
        "tuning_hours": tuning,
        "addition_hours": addition,
        "saved": tuning / addition,
        "route": "tune again" if small or addition >= tuning else "add the residual",
        "why": "below 1.5e9 parameters residuals were found much less effective"
        if small
        else "check refusals and skills either way",
    }
