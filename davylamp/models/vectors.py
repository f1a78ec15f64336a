"""Weight-space arithmetic by parameter name, on any architecture: an edit writes one rule, and it runs on models in memory or on folders.

    from davylamp.models.vectors import Part, edit, names, read, scan

A source is a `PreTrainedModel` (or a `PeftModel`: then its adapter's tensors), a folder of safetensors (one file or shards), or a LoRA
adapter folder. Tensors have the names that `save_pretrained` writes, in both forms, and both forms walk the same blocks in the same
arithmetic (float32, rounded once at the end), so that both give equal bytes. Folders are streamed: what is in memory is a block, or a
tensor, of each source, whatever the checkpoint's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from davylamp.core.errors import InputError
from davylamp.models import vectors_plan as planning
from davylamp.models.vectors_io import Source, Spec
from davylamp.models.vectors_names import by_name as by_name
from davylamp.models.vectors_names import is_vision as is_vision
from davylamp.models.vectors_names import layer_of as layer_of
from davylamp.models.vectors_out import Staging, lineage_file, refuse_used
from davylamp.models.vectors_plan import Job, Plan
from davylamp.models.vectors_plan import open_source as open_source
from davylamp.models.vectors_sources import Aligned, Model
from davylamp.models.vectors_walk import Part as Part
from davylamp.models.vectors_walk import Rule as Rule
from davylamp.models.vectors_walk import bundles, in_order, worker
from davylamp.models.vectors_walk import scan_plan as scan_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Edited = Any  # a PreTrainedModel or a Path, as the edit was given


def names(source: PreTrainedModel | Path | Source) -> list[str]:
    """Names of all tensors, as `save_pretrained` writes them; a tied tensor once.

    >>> import transformers
    >>> config = transformers.GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    >>> names(transformers.GPT2LMHeadModel(config))[:2]
    ['transformer.h.0.attn.c_attn.bias', 'transformer.h.0.attn.c_attn.weight']
    """
    opened = planning.open_source(source, adapters="keep")
    try:
        return sorted(opened.tensors)
    finally:
        if opened is not source:
            opened.close()


def read(source: PreTrainedModel | Path | Source, name: str) -> torch.Tensor:
    """One tensor in its stored dtype. Of a model in memory it is a view of the parameter where the files hold it in one piece.

    Raises InputError for an unknown name.
    """
    opened = planning.open_source(source, adapters="keep")
    try:
        if name not in opened.tensors:
            raise InputError(
                f"{opened.where} has no tensor {name}. The first of {len(opened.tensors)} is {min(opened.tensors)}"
            )
        if isinstance(opened, Model):
            return opened.view(name)
        spec = opened.tensors[name]
        return opened.raw(name, 0, spec.rows).view(spec.shape)
    finally:
        if opened is not source:
            opened.close()


def scan(
    model: PreTrainedModel | Path | Source,
    others: Sequence[PreTrainedModel | Path | Source],
    look: Callable[[Part, list[torch.Tensor]], T],
    *,
    only: Callable[[str], bool] | None = None,
    blocks: bool = True,
    threads: int | None = None,
    **plan: Any,
) -> Iterator[tuple[Part, T]]:
    """What `look` returns for every part, in a fixed order: a first pass for thresholds, norms and reports. Nothing is written.

    A tied tensor is looked at once. plan: `missing`, `vocabulary_of`, `vocabularies`, `adapters`, `base`, as in `edit_folder`.

    >>> layer = torch.nn.Linear(2, 2)
    >>> layer.config = {}
    >>> [(part.name, n) for part, n in scan(layer, [layer], lambda part, tensors: tensors[0].numel())]
    [('weight', 4), ('bias', 2)]
    """
    made = make_plan(model, others, only=only, **plan)
    try:
        yield from scan_plan(made, look, blocks=blocks, threads=threads)
    finally:
        made.close()


def edit_model(
    model: PreTrainedModel,
    others: Sequence[PreTrainedModel],
    rule: Rule,
    *,
    only: Callable[[str], bool] | None = None,
    blocks: bool = False,
    before: Callable[[Plan], Any] | None = None,
    threads: int | None = None,
    **plan: Any,
) -> PreTrainedModel:
    """`rule` on every floating-point tensor whose name `only` takes (None: all). The model is changed in place, after all went
    well, and returned; meanwhile the new tensors are held beside the old ones.

    blocks: the rule looks at each row alone (element-wise and row-wise rules do), so that big tensors come in row blocks.
    before: called with the plan first, for what the rule must know of all tensors (`scan_plan`).
    plan: `missing`, `vocabulary_of`, `vocabularies`, as in `edit_folder`; without vocabularies the folders that the models came from
    are asked. A model whose vocabulary grows is resized. Raises InputError for models that do not fit, and for non-finite results.
    """
    made = make_plan(model, others, only=only, **plan)
    if before is not None:
        before(made)
    first = made.sources[0]
    moved = first.moved if isinstance(first, Aligned) else ()
    jobs = [job for job in made.jobs if job.inputs or job.name in moved]
    fresh = {job.target: torch.empty((job.spec.rows, job.spec.width), dtype=job.spec.dtype) for job in jobs}

    def keep(job: Job, part: Part, value: torch.Tensor) -> None:
        fresh[job.target][part.start : part.stop] = value.view(-1, job.spec.width)

    for _ in in_order(bundles(jobs, blocks), worker(first, rule, keep, blocks), threads):
        pass
    if moved:
        model.resize_token_embeddings(made.vocabulary, mean_resizing=False)
    target = Model(model)
    for name, value in fresh.items():
        target.write(name, value)
    return model


def edit_folder(
    folder: Path,
    others: Sequence[Path],
    rule: Rule,
    out: Path,
    *,
    lineage: Mapping[str, Any],
    only: Callable[[str], bool] | None = None,
    blocks: bool = False,
    before: Callable[[Plan], Any] | None = None,
    after: Callable[[Path], Any] | None = None,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    check: bool | None = None,
    threads: int | None = None,
    **plan: Any,
) -> Path:
    """The same, streamed from folders to the new folder `out` with the shards of `folder`; nothing half-written is left behind. Tensors
    that `only` does not take, and integer and buffer tensors, are copied byte by byte.

    lineage: {"operation": name, "options": {...}}: all that determines the result besides the sources. Written with their SHA-256 and
    the tensor counts to `out`/lineage.json; a run that was killed goes on from its finished shards if lineage and sources are the same.
    before: called with the plan first.  after: called with the folder before it gets its name.
    dtype: the stored dtype of edited tensors (None: as they were).  config: fields to change in config.json.
    check: load the result and ask for finite logits (None: if it takes less than 256 MiB).
    plan: `missing` ("error", or "copy" what a source lacks from `folder`), `vocabulary_of` (number of the source whose tokens, tokenizer,
    chat template and generation settings the result has; 0 = folder), `new_rows`, `vocabularies`, `adapters` ("merge" or "keep"), `base`.

    Raises InputError for sources that do not fit, damaged files and non-finite values; RunError where the disk is full.
    """
    made = make_plan(folder, others, only=only, **plan)
    try:
        if dtype is not None:
            jobs = [j._replace(spec=Spec(dtype, j.spec.shape)) if j.inputs else j for j in made.jobs]
            made = made._replace(jobs=tuple(jobs))
        refuse_used(out)
        if before is not None:
            before(made)
        with Staging(out, made, lineage, talks_like=plan.get("vocabulary_of", 0)) as staging:
            left = [job for job in made.jobs if not staging.finished(job)]

            def write(job: Job, part: Part, value: torch.Tensor) -> None:
                staging.put(job, part.start, value)
                staging.done(job, part.stop - part.start)

            work = worker(made.sources[0], rule, write, blocks)
            for _ in in_order(bundles(left, blocks), work, threads, beside=staging.hash_sources()):
                pass
            staging.write_side_files(config)
            if after is not None:
                after(staging.folder)
            staging.check_logits(check)
            lineage_file(staging, made, lineage)
        return out
    finally:
        made.close()


def edit(
    model: PreTrainedModel | Path,
    others: Sequence[PreTrainedModel | Path],
    rule: Rule,
    *,
    out: Path | None = None,
    lineage: Mapping[str, Any],
    **options: Any,
) -> Any:
    """`edit_folder` for folders (needs `out`), `edit_model` for models in memory. options: of both.

    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> layer.config = {}
    >>> before = layer.weight.detach().clone()
    >>> half = edit(layer, [], lambda part, tensors: tensors[0] * 0.5, lineage={"operation": "halve", "options": {}})
    >>> torch.equal(half.weight, before * 0.5)
    True
    """
    on_disk = [isinstance(source, str | Path) for source in (model, *others)]
    if all(on_disk):
        if out is None:
            raise InputError("an edit of a folder needs out, the folder to write")
        return edit_folder(Path(model), [Path(other) for other in others], rule, Path(out), lineage=lineage, **options)  # type: ignore[arg-type]
    if any(on_disk):
        raise InputError("all models must be of one sort: all folders, or all in memory")
    if out is not None:
        raise InputError("out is for folders; a model in memory is changed in place. Save it with save_pretrained")
    return edit_model(model, others, rule, **options)  # type: ignore[arg-type]


def make_plan(
    model: Any,
    others: Sequence[Any],
    *,
    only: Callable[[str], bool] | None = None,
    adapters: Literal["merge", "keep"] = "merge",
    base: Path | None = None,
    **plan: Any,
) -> Plan:
    """Open the sources and check that they fit together, for `scan_plan` and the like; options as of `edit_folder`. Close it after use."""
    opened: list[Source] = []
    try:
        for source in (model, *others):
            opened.append(planning.open_source(source, adapters=adapters, base=base))
        return planning.make(opened, only=only, **plan)
    except BaseException:
        for source in opened:
            source.close()
        raise
