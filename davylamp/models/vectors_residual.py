"""A residual on disk: the differences of two checkpoints, tensor by tensor, with a manifest and what a chat model needs beside its weights.

    residual.json        kind, hashes of both checkpoints, shape, dtype and L2 norm of every tensor, how it is stored
    residual-*.safetensors   NAME; or NAME.mask [rows, width / 8] and NAME.values; or NAME.left [rows, rank] and NAME.right [rank, width]
    exact.safetensors    the few entries whose difference float32 cannot hold: places, and both checkpoints' numbers

Two half-precision numbers of very different size have a difference that needs more than float32's 24 bits. Without the last file a base
that did not change would not give back the instruct model bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

import davylamp
from davylamp.core.errors import InputError
from davylamp.models import vectors
from davylamp.models import vectors_rules as rules
from davylamp.models.vectors_io import CODES, SIDE_FILES, ShardWriter, Spec, copy_file, need_space, side_files
from davylamp.models.vectors_out import Staged, folder_of, full_disk_is_an_error, hash_calls, source_entry
from davylamp.models.vectors_plan import Job, Plan
from davylamp.models.vectors_select import entries, kth_smallest
from davylamp.models.vectors_sources import MANIFEST
from davylamp.models.vectors_walk import BLOCK, Part, bundles, in_order, values

SHARD_BYTES = 4 << 30
HALF = (torch.float16, torch.bfloat16)
Variant = Literal["dense", "top_k", "dare", "low_rank"]


class Form(NamedTuple):
    """How a residual is stored. density: share that top_k keeps, over all tensors.  drop: probability of dare.  rank: of low_rank."""

    variant: Variant = "dense"
    density: float = 0.2
    drop: float = 0.2
    rank: int = 64
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for numbers out of range."""
        if not 0 < self.density <= 1:
            raise InputError(f"density must be in (0, 1], got {self.density}")
        if not 0 <= self.drop < 1:
            raise InputError(f"drop must be in [0, 1), got {self.drop}")
        if self.rank < 1:
            raise InputError(f"rank must be 1 or more, got {self.rank}")


class Facts(NamedTuple):
    """Sums over a part: of the squared difference, and of the squared error of storing it so."""

    squares: float
    errors: float


def low_rank(matrix: torch.Tensor, rank: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors [rows, rank] and [rank, width] of a float32 matrix: exact for small ones, by a random range finder for big ones
    (Halko et al. 2011, algorithms 4.4 and 5.1, two power iterations, 8 more columns).

    >>> left, right = low_rank(torch.outer(torch.arange(3.0), torch.ones(4)), 1, torch.Generator())
    >>> torch.allclose(left @ right, torch.outer(torch.arange(3.0), torch.ones(4)), atol=1e-5)
    True
    """
    rows, width = matrix.shape
    if min(rows, width) <= max(512, 2 * rank):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return (u[:, :rank] * s[:rank]).contiguous(), v[:rank].contiguous()
    probe = matrix @ torch.randn(width, rank + 8, generator=draw)
    for _ in range(2):
        probe = matrix @ (matrix.T @ torch.linalg.qr(probe).Q)
    basis = torch.linalg.qr(probe).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ (u[:, :rank] * s[:rank])).contiguous(), v[:rank].contiguous()


class Encoder:
    """Turns differences into what is stored, part by part."""

    def __init__(self, form: Form, plan: Plan):
        form.check()
        self.form, self.plan = form, plan
        self.jobs = [job for job in plan.jobs if job.inputs and job.name == job.target]
        self.blocks = form.variant != "low_rank"
        self.limit = 0.0
        self._first: dict[tuple[str, int], int] = {}
        if form.variant == "top_k":
            rank = entries(plan) - max(1, int(form.density * entries(plan))) + 1
            self.limit = kth_smallest(plan, lambda part, t: [t[0].sub_(t[1]).abs_()], rank)[0]

    def sparse(self, shape: tuple[int, ...]) -> bool:
        """Vectors are stored in full: they are small, and norms matter."""
        return self.form.variant in ("top_k", "dare") and len(shape) > 1

    def thin(self, spec: Spec) -> bool:
        smaller = self.form.rank * (spec.rows + spec.width) < spec.rows * spec.width
        return self.form.variant == "low_rank" and len(spec.shape) == 2 and smaller

    def layout(self) -> dict[str, Spec]:
        """{stored name: spec}; for sparse forms after a pass that counts."""
        counts: dict[str, int] = {}
        if self.form.variant in ("top_k", "dare"):
            for part, count in vectors.scan_plan(
                self.plan, lambda part, t: int(self._kept(part, t[0].sub_(t[1])).sum())
            ):
                self._first[part.name, part.start] = counts.setdefault(part.name, 0)
                counts[part.name] += count
        out: dict[str, Spec] = {}
        for job in self.jobs:
            spec = job.spec
            if self.sparse(spec.shape):
                out[f"{job.name}.mask"] = Spec(torch.uint8, (spec.rows, -(-spec.width // 8)))
                out[f"{job.name}.values"] = Spec(self.form.dtype, (counts[job.name],))
            elif self.thin(spec):
                out[f"{job.name}.left"] = Spec(self.form.dtype, (spec.rows, self.form.rank))
                out[f"{job.name}.right"] = Spec(self.form.dtype, (self.form.rank, spec.width))
            else:
                out[job.name] = Spec(self.form.dtype, spec.shape)
        return out

    def _kept(self, part: Part, difference: torch.Tensor) -> torch.Tensor:
        if not self.sparse(part.shape):
            return torch.ones(difference.shape, dtype=torch.bool)
        if self.form.variant == "top_k":
            return difference.abs() >= self.limit
        draw = rules.generator(self.form.seed, part, "residual")
        return torch.rand(difference.shape, generator=draw) >= self.form.drop

    def encode(
        self, job: Job, part: Part, difference: torch.Tensor
    ) -> tuple[list[tuple[str, int, torch.Tensor]], torch.Tensor]:
        """([(stored name, first row, rows)], the difference as it will be read back)."""
        dtype = self.form.dtype
        if self.sparse(part.shape):
            hit = self._kept(part, difference)
            found = difference[hit].div_(1 - self.form.drop if self.form.variant == "dare" else 1).to(dtype)
            bits = torch.from_numpy(np.packbits(hit.numpy(), axis=1))
            back = torch.zeros_like(difference)
            back[hit] = found.float()
            first = self._first.get((part.name, part.start), 0)
            return [(f"{job.name}.mask", part.start, bits), (f"{job.name}.values", first, found[:, None])], back
        if self.thin(job.spec):
            draw = rules.generator(self.form.seed, part, "residual")
            left, right = (factor.to(dtype) for factor in low_rank(difference, self.form.rank, draw))
            return [(f"{job.name}.left", 0, left), (f"{job.name}.right", 0, right)], left.float() @ right.float()
        stored = difference.to(dtype)
        return [(job.name, part.start, stored.view(-1, job.spec.width))], stored.float()

    def facts(self, put: Callable[[str, int, torch.Tensor], None] | None = None) -> list[tuple[Part, Facts]]:
        """Encode everything, hand it to `put`, and say how large the differences are and how far off what is stored is."""

        def work(bundle: list[tuple[Job, Part]]) -> list[tuple[Part, Facts]]:
            out = []
            for job, part in bundle:
                instruct, base = values(job, part, self.blocks)
                difference = instruct - base
                pieces, back = self.encode(job, part, difference)
                for name, start, rows in pieces:
                    if put is not None:
                        put(name, start, rows)
                self.look(job, part, instruct, base, difference)
                error = back - difference
                out.append((part, Facts(*(float((t * t).sum(dtype=torch.float64)) for t in (difference, error)))))
            return out

        return [fact for found in in_order(bundles(self.jobs, self.blocks), work, None) for fact in found]

    def look(self, job: Job, part: Part, instruct: torch.Tensor, base: torch.Tensor, difference: torch.Tensor) -> None:
        """For a subclass that keeps more."""


class _Exact(Encoder):
    """Keeps the entries of half-precision tensors for which base + difference, in float32, is not the instruct model's number again."""

    def __init__(self, form: Form, plan: Plan):
        super().__init__(form, plan)
        self.found: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def look(self, job: Job, part: Part, instruct: torch.Tensor, base: torch.Tensor, difference: torch.Tensor) -> None:
        stored = [source.tensors[name].dtype for source, name in job.inputs]
        if self.form.variant != "dense" or self.form.dtype != torch.float32 or not all(d in HALF for d in stored):
            return
        wrong = inexact(base, difference, instruct)
        if wrong is not None:
            places = wrong.view(-1).nonzero().view(-1)
            before, after = (t.reshape(-1)[places].to(d) for t, d in ((base, stored[1]), (instruct, stored[0])))
            self.found[part.name, part.start] = (places + part.start * job.spec.width, before, after)

    def tensors(self) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(name for name, _ in sorted(self.found)):
            parts = [self.found[key] for key in sorted(self.found) if key[0] == name]
            for label, column in zip(("place", "base", "instruct"), zip(*parts, strict=True), strict=True):
                out[f"{name}.exact_{label}"] = torch.cat(column)
        return out


def inexact(base: torch.Tensor, difference: torch.Tensor, instruct: torch.Tensor) -> torch.Tensor | None:
    """Where base + difference is not, bit for bit, instruct; None if nowhere. float32.

    >>> base, instruct = torch.tensor([1.0, 1.0]), torch.tensor([1e-9, 0.5])
    >>> inexact(base, instruct - base, instruct).tolist()
    [True, False]
    """
    again = base + difference
    if np.array_equal(again.numpy().view(np.int32), instruct.numpy().view(np.int32)):
        return None
    return again.view(torch.int32) != instruct.view(torch.int32)


def write_residual(
    instruct: Path, base: Path, out: Path, *, form: Form, missing: Literal["error", "copy"] = "error", **options: Any
) -> Path:
    """Extract instruct - base to the new folder `out`, streamed. Token rows that the base lacks are the instruct model's whole rows.

    options: `adapters`, `base` (of adapters), as of `vectors.edit_folder`. Raises InputError if the two are the same.
    """
    plan = vectors.make_plan(instruct, [base], new_rows="zero", missing=missing, **options)
    try:
        with Staged(out) as staged:
            encoder = _Exact(form, plan)
            layout = encoder.layout()
            need_space(staged.folder, sum(spec.bytes for spec in layout.values()))
            files = _shards(layout)
            place = {name: file for file, names in files.items() for name in names}
            hashes: dict[Path, str] = {}
            with full_disk_is_an_error(out):
                writers = {
                    file: ShardWriter(staged.folder / file, {name: layout[name] for name in names}, {"format": "pt"})
                    for file, names in files.items()
                }
                try:
                    found = encoder.facts(lambda name, start, rows: writers[place[name]].put(name, start, rows))
                    for _ in in_order(hash_calls(plan, hashes), lambda call: call(), None):
                        pass
                    for writer in writers.values():
                        writer.finish()
                finally:
                    for writer in writers.values():
                        writer.close()
                squares = [fact.squares for _, fact in found]
                if not any(squares):
                    sha = source_entry(plan.sources[1], hashes)["sha256"]
                    raise InputError(f"residual is zero: these checkpoints are the same (sha256 {sha})")
                _no_nan(found, plan)
                if exact := encoder.tensors():
                    save_file(exact, staged.folder / "exact.safetensors", {"format": "pt"})
                    files["exact.safetensors"] = list(exact)
                for file in side_files(folder_of(plan.sources[0]).path, SIDE_FILES):
                    copy_file(file, staged.folder / file.name)
                manifest = _manifest(plan, form, found, hashes, list(files))
                (staged.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return out
    finally:
        plan.close()


def _shards(layout: dict[str, Spec]) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in sorted(layout.items(), key=lambda item: -item[1].dtype.itemsize):
        if size and size + spec.bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.bytes
    many = len(groups)
    return {f"residual-{number:05}-of-{many:05}.safetensors": names for number, names in enumerate(groups, start=1)}


def _no_nan(found: Sequence[tuple[Part, Facts]], plan: Plan) -> None:
    for part, fact in found:
        if not math.isfinite(fact.squares):
            job = next(job for job in plan.jobs if job.name == part.name)
            for source, name in job.inputs:
                spec, bad = source.tensors[name], 0
                step = max(1, BLOCK // spec.width)
                for start in range(0, spec.rows, step):
                    bad += int((~torch.isfinite(source.raw(name, start, min(start + step, spec.rows)))).sum())
                if bad:
                    raise InputError(f"{source.where}: {name} has {bad} entries that are not finite")


def _manifest(
    plan: Plan, form: Form, found: Sequence[tuple[Part, Facts]], hashes: dict[Path, str], files: list[str]
) -> dict[str, Any]:
    squares: dict[str, float] = {}
    for part, fact in found:
        squares[part.name] = squares.get(part.name, 0.0) + fact.squares
    specs = {job.name: job.spec for job in plan.jobs}
    total = math.fsum(squares.values())
    instruct, base = (source_entry(source, hashes) for source in plan.sources)
    used = {"top_k": ("density",), "dare": ("drop", "seed"), "low_rank": ("rank", "seed")}.get(form.variant, ())
    warnings = [
        f"{role} was itself made by {entry['made by']['operation']}: this is not the residual of instruction tuning alone"
        for role, entry in (("instruct", instruct), ("base", base))
        if "made by" in entry
    ]
    return {
        "kind": "residual",
        "format": 1,
        "davylamp": davylamp.__version__,
        "base_sha256": base["sha256"],
        "instruct_sha256": instruct["sha256"],
        "tokenizer_sha256": instruct.get("tokenizer"),
        "scale_default": 1.0,
        "variant": form.variant,
        **{name: getattr(form, name) for name in used},
        "relative_error": math.sqrt(math.fsum(fact.errors for _, fact in found) / total),
        "l2": math.sqrt(total),
        "files": files,
        "tensors": {
            name: {"shape": list(specs[name].shape), "dtype": CODES[form.dtype], "l2": math.sqrt(value)}
            for name, value in squares.items()
        },
        "sources": [instruct, base],
        "notes": plan.notes,
        "warnings": warnings,
    }
