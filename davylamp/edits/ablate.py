"""Ablation by mask: zero some weights, or put some of a fine-tune back to its base: at random, or as a mask file says.
Source: this repository. The control of every edit that chooses which weights to touch: the same number, chosen by nobody."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.registry import edit
from davylamp.models import vectors
from davylamp.models import vectors_rules as rules
from davylamp.models.vectors import Part
from davylamp.models.vectors_io import Shard, Spec, pread_into
from davylamp.models.vectors_out import file_sha256
from davylamp.models.vectors_plan import Plan
from davylamp.models.vectors_walk import BLOCK

if TYPE_CHECKING:
    from numpy.random import Generator

WAYS = ("row", "tensor", "global")
LIMIT = 10**9  # what numpy's hypergeometric draw takes


@edit(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning", "harmful-compliance", "capability-loss"),
    needs="hf",
)
def ablate(
    model: Any,
    *others: Any,
    rows: Sequence[Any] = (),
    tokenizer: Any = None,
    out: Path | None = None,
    rng: Generator,
    fraction: float = 0.1,
    by: Literal["row", "tensor", "global"] = "row",
    mask: str = "",
    like: bool = False,
    rescale: bool = False,
    targets: tuple[str, ...] = (),
    adapters: Literal["merge", "keep"] = "merge",
    adapter_base: str = "",
) -> Any:
    """Zero a random share of the weights, or those that a mask file marks; with a second model, put them back to that model's instead.

    others: none, or the base whose values the masked weights take: then what is ablated is the difference from the base.
    fraction: share that is masked, in [0, 1]; exact: n - int(n (1 - fraction)) of the n entries of each row, or of each tensor or of all
        together int(fraction n). How a global number falls on tensors is drawn as well.
    by: whether each row, each tensor, or all of them together give up that share.
    mask: a safetensors file with a bool or uint8 tensor for each masked weight: 1 = masked. Replaces fraction and by.
    like: mask at random as many as the mask file does, in each row or each tensor, by `by`: a control of equal size.
    rescale: divide what is left (of the difference from the base, if there is one) by the share that is kept in its tensor.
    targets: shell patterns of names; without any, all matrices inside the layers of the text model.
    adapters: read an adapter folder as its base with the adapter in it, or ablate the adapter's own tensors.
    adapter_base: folder of the adapter's base, if it is not where its configuration says.

    rows and tokenizer are not needed. Raises InputError for a fraction out of range, and for a mask of other tensors or shapes.

    >>> layer = torch.nn.Linear(4, 2, bias=False)
    >>> layer.config, layer.weight.data = {}, torch.ones(2, 4)
    >>> ablate(layer, fraction=0.5, targets=("*",), rng=np.random.default_rng(0)).weight.sum(1).tolist()
    [2.0, 2.0]
    """
    if by not in WAYS:
        raise UnknownNameError("way of masking", by, WAYS)
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction must be in [0, 1], got {fraction}")
    if like and (not mask or by == "global"):
        raise InputError("like needs a mask file, and by row or tensor")
    if len(others) > 1:
        raise InputError(f"ablate takes one base at most, got {len(others)} other models")
    chosen = _FromFile(Path(mask)) if mask else None
    seed = int(rng.integers(2**62))
    only = chosen.takes if chosen is not None and not targets else _targets(targets)
    drawn: _Drawn | None = None
    if chosen is None or like:
        drawn = _Drawn(fraction, by, np.random.default_rng(seed), seed, chosen)

    def before(plan: Plan) -> None:
        if chosen is not None:
            chosen.check({job.name: job.spec for job in plan.jobs if job.inputs})
        if drawn is not None:
            drawn.share_out(plan)

    def rule(part: Part, tensors: list[torch.Tensor]) -> torch.Tensor:
        hit = (drawn or chosen).part(part, tensors[0].shape)  # type: ignore[union-attr]
        kept = (drawn or chosen).kept(part.name) if rescale else 1.0  # type: ignore[union-attr]
        if len(tensors) == 1:
            left = tensors[0].div_(kept) if rescale and kept else tensors[0]
            return left.masked_fill_(hit, 0.0)
        if rescale and kept:
            tensors[0] = tensors[0].sub_(tensors[1]).div_(kept).add_(tensors[1])
        return torch.where(hit, tensors[1], tensors[0])

    options = {
        "fraction": fraction,
        "by": by,
        "mask": file_sha256(Path(mask)) if mask else "",
        "like": like,
        "rescale": rescale,
        "targets": list(targets),
        "adapters": adapters,
        **({"seed": seed} if drawn else {}),
    }
    return vectors.edit(
        model,
        others,
        rule,
        out=out,
        lineage={"operation": "ablate", "options": options},
        only=only,
        blocks=True,
        before=before,
        adapters=adapters,
        base=Path(adapter_base) if adapter_base else None,
    )


def _targets(patterns: Sequence[str]) -> Callable[[str], bool]:
    if patterns:
        return lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    # Matrices of layers: names alone tell it, since norms and biases are the vectors there.
    return lambda name: (
        vectors.layer_of(name) is not None
        and not name.endswith(".bias")
        and "norm" not in name
        and not name.endswith((".ln_1.weight", ".ln_2.weight", "relative_attention_bias.weight"))
    )


class _FromFile:
    """A mask file: bool or uint8 tensors by the names of the weights."""

    def __init__(self, path: Path):
        self.path, self.shard = path, Shard(path)
        for name, (spec, _) in self.shard.places.items():
            if spec.dtype not in (torch.bool, torch.uint8):
                raise InputError(f"{path}: the mask of {name} must be bool or uint8, got {spec.dtype}")
        self._hits: dict[str, int] = {}

    def takes(self, name: str) -> bool:
        return name in self.shard.places

    def check(self, specs: dict[str, Spec]) -> None:
        """Raises InputError where the mask is for other tensors."""
        lost = sorted(set(self.shard.places) - set(specs))
        bare = sorted(set(specs) - set(self.shard.places))
        if lost or bare:
            raise InputError(
                f"{self.path} masks {len(lost)} tensors that are not edited ({', '.join(lost[:5])}) and lacks {len(bare)} that are "
                f"({', '.join(bare[:5])}). It was made for another model, or the targets differ"
            )
        for name, spec in specs.items():
            if spec.shape != self.shard.places[name][0].shape:
                raise InputError(
                    f"{self.path}: the mask of {name} is {self.shard.places[name][0].shape}, the tensor {spec.shape}"
                )

    def part(self, part: Part, shape: torch.Size) -> torch.Tensor:
        spec, offset = self.shard.places[part.name]
        room = torch.empty((part.stop - part.start) * spec.width, dtype=torch.uint8)
        pread_into(self.shard.file, room.numpy().data, offset + part.start * spec.width, str(self.path))
        return room.view(shape) != 0

    def rows(self, part: Part) -> torch.Tensor:
        """Number of masked entries in each row."""
        width = self.shard.places[part.name][0].width
        return self.part(part, torch.Size((part.stop - part.start, width))).sum(1)

    def hits(self, name: str) -> int:
        """Number of masked entries of a tensor."""
        if name not in self._hits:
            spec, _ = self.shard.places[name]
            step, total = max(1, BLOCK // spec.width), 0
            for start in range(0, spec.rows, step):
                total += int(self.rows(Part(name, spec.shape, start, min(start + step, spec.rows))).sum())
            self._hits[name] = total
        return self._hits[name]

    def kept(self, name: str) -> float:
        return 1 - self.hits(name) / max(1, math.prod(self.shard.places[name][0].shape))


class _Drawn:
    """A random mask whose counts are exact. What falls on a block is drawn beforehand; which entries, from the block's own seed."""

    def __init__(self, fraction: float, by: str, rng: Generator, seed: int, like: _FromFile | None):
        self.fraction, self.by, self.rng, self.seed, self.like = fraction, by, rng, seed, like
        self._counts: dict[tuple[str, int], int] = {}
        self._hits: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def share_out(self, plan: Plan) -> None:
        """The number of masked entries of every tensor and block."""
        specs = {job.name: job.spec for job in plan.jobs if job.inputs and job.name == job.target}
        self._sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
        if self.like:
            self._hits = {name: self.like.hits(name) for name in specs}
        elif self.by == "global":
            sizes = list(self._sizes.values())
            self._hits = dict(zip(specs, self._fall(int(self.fraction * sum(sizes)), sizes), strict=True))
        else:
            self._hits = {
                name: self._each(spec.width) * spec.rows if self._by_row(spec.shape) else int(self.fraction * size)
                for (name, spec), size in zip(specs.items(), self._sizes.values(), strict=True)
            }
        for name, spec in specs.items():
            if not self._by_row(spec.shape):
                step = max(1, BLOCK // spec.width)
                starts = range(0, spec.rows, step)
                parts = [(min(start + step, spec.rows) - start) * spec.width for start in starts]
                for start, count in zip(starts, self._fall(self._hits[name], parts), strict=True):
                    self._counts[name, start] = count

    def _by_row(self, shape: tuple[int, ...]) -> bool:
        return self.by == "row" and len(shape) > 1  # a vector is one row

    def _each(self, width: int) -> int:
        return width - int(width * (1 - self.fraction))

    def _fall(self, hits: int, sizes: list[int]) -> list[int]:
        """How `hits` entries, drawn without replacement, fall on parts of these sizes."""
        out, left = [], sum(sizes)
        for size in sizes:
            if left >= LIMIT:  # so many that the share itself is as good as a draw: its error is below one in 30,000
                count = min(size, round(hits * size / left))
            else:
                count = int(self.rng.hypergeometric(hits, left - hits, size)) if size else 0
            out.append(count)
            hits, left = hits - count, left - size
        return out

    def part(self, part: Part, shape: torch.Size) -> torch.Tensor:
        draw = rules.generator(self.seed, part, "mask")
        if self._by_row(part.shape):
            order = torch.rand((part.stop - part.start, part.shape[-1]), generator=draw).argsort(1).argsort(1)
            many = self.like.rows(part)[:, None] if self.like else self._each(part.shape[-1])
            return (order < many).view(shape)
        hit = torch.zeros(shape.numel(), dtype=torch.bool)
        hit[torch.randperm(shape.numel(), generator=draw)[: self._counts[part.name, part.start]]] = True
        return hit.view(shape)

    def kept(self, name: str) -> float:
        return 1 - self._hits[name] / max(1, self._sizes[name])
