"""The folder that an edit writes: built beside its final place, made durable, and only then given its name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

import davylamp
from davylamp.core.errors import InputError, RunError
from davylamp.core.rows import canonical, digest
from davylamp.models.vectors_io import (
    INDEX,
    SIDE_FILES,
    TALKING_FILES,
    Folder,
    ShardWriter,
    Source,
    copy_file,
    need_space,
    read_json,
    side_files,
    sync_folder,
)
from davylamp.models.vectors_plan import Job, Plan
from davylamp.models.vectors_sources import MANIFEST, Aligned, Merged

LINEAGE = "lineage.json"
HASHED = ("config.json", "adapter_config.json", "tokenizer.json", MANIFEST)
CHECKED_BY_ITSELF = 256 << 20  # bytes of a result that is loaded and tried without being asked
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def folder_of(source: Source) -> Folder | Merged:
    """The folder that a source reads."""
    inner = source.source if isinstance(source, Aligned) else source
    if not isinstance(inner, (Folder, Merged)):
        raise InputError(f"{source.where} is no folder")
    return inner


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces.

    >>> file_sha256(Path(os.devnull))[:12]
    'e3b0c44298fc'
    """
    state, room = hashlib.sha256(), bytearray(1 << 18)  # stays in the second-level cache
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(room):
            state.update(memoryview(room)[:got])
    return state.hexdigest()


def folder_sha256(files: Mapping[str, str]) -> str:
    """One hash for a checkpoint from those of its weight files: the file's own if there is one, else that of the list.

    >>> folder_sha256({"model.safetensors": "ab"})
    'ab'
    """
    return next(iter(files.values())) if len(files) == 1 else digest(dict(files))


def weights_sha256(folder: Path) -> str:
    """The hash by which lineages and manifests know a checkpoint folder."""
    opened = Folder(folder)
    try:
        return folder_sha256({file: file_sha256(folder / file) for file in opened.shards})
    finally:
        opened.close()


@contextmanager
def full_disk_is_an_error(what: Path) -> Iterator[None]:
    """Turn the system's word for a full disk into RunError."""
    try:
        yield
    except OSError as problem:
        if problem.errno in NO_ROOM:
            raise RunError(f"the disk is full; {what} was not written and nothing of it was left") from None
        raise RunError(f"{what} could not be written: {problem.strerror}. Nothing of it was left") from None


def refuse_used(out: Path) -> None:
    """Raises InputError where a result would overwrite something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty. Name a new folder")


class Staged:
    """`.NAME.part` beside the folder NAME. Leaving it without an error gives it its name; with one, removes it."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out.parent / f".{out.name}.part"

    def __enter__(self) -> Self:
        refuse_used(self.out)
        with full_disk_is_an_error(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RunError(f"{self.out} is being written by another process") from None
        try:
            with full_disk_is_an_error(self.out):
                self._prepare()
        except BaseException:
            self._remove()
            raise
        return self

    def _prepare(self) -> None:
        """What a killed process left is cleared away."""
        for path in list(self.folder.iterdir()):
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _complete(self) -> None:
        """What is left to do when all went well; weights are durable after it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._remove()
            return
        try:
            with full_disk_is_an_error(self.out):
                self._complete()
                (self.folder / "lock").unlink()
                for path in self.folder.iterdir():
                    if path.suffix != ".safetensors":
                        sync_folder(path)
                sync_folder(self.folder)
                if self.out.exists():
                    self.out.rmdir()
                self.folder.rename(self.out)
                sync_folder(self.out.parent)
        except BaseException:
            self._remove()
            raise
        os.close(self._lock)

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


class Staging(Staged):
    """The new checkpoint of a plan, shard by shard. What a killed process finished of the same plan is kept."""

    def __init__(self, out: Path, plan: Plan, lineage: Mapping[str, Any], *, talks_like: int = 0):
        super().__init__(out)
        self.plan, self._talks_like = plan, talks_like
        self.source = folder_of(plan.sources[0])
        self.hashes: dict[Path, str] = {}
        self.check = "not asked for"
        self._jobs = {job.target: job for job in plan.jobs}
        self._shard_of = {name: file for file, shard in self.source.shards.items() for name in shard.places}
        self._left = dict.fromkeys(self.source.shards, 0)
        for job in plan.jobs:
            self._left[self._shard_of[job.target]] += job.spec.rows
        self._writers: dict[str, ShardWriter] = {}
        self._kept: set[str] = set()
        self._counting = threading.Lock()
        stamps = [
            [file, (stat := shard.path.stat()).st_size, stat.st_mtime_ns]
            for source in plan.sources
            for file, shard in sorted(folder_of(source).shards.items())
        ]
        shapes = [[job.target, str(job.spec.dtype), list(job.spec.shape), bool(job.inputs)] for job in plan.jobs]
        self._id = digest([davylamp.__version__, dict(lineage), stamps, shapes])

    def _prepare(self) -> None:
        note = self.folder / "plan"
        same = note.is_file() and note.read_text(encoding="utf-8") == self._id
        for path in list(self.folder.iterdir()):
            if same and path.name in self._left:
                self._kept.add(path.name)
            elif path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        need_space(self.folder, sum(job.spec.bytes for job in self.plan.jobs if not self.finished(job)))
        for file, shard in self.source.shards.items():
            if file in self._kept:
                continue
            # Bigger dtypes first, as safetensors itself writes them, so that every tensor stays aligned.
            order = sorted(shard.places, key=lambda name: -self._jobs[name].spec.dtype.itemsize)
            tensors = {name: self._jobs[name].spec for name in order}
            self._writers[file] = ShardWriter(
                self.folder / f"{file}.writing", tensors, shard.metadata or {"format": "pt"}
            )
        note.write_text(self._id, encoding="utf-8")

    def finished(self, job: Job) -> bool:
        """Whether a killed run before this one has written the tensor."""
        return self._shard_of[job.target] in self._kept

    def put(self, job: Job, start: int, rows: torch.Tensor) -> None:
        """Rows of a tensor in its stored dtype."""
        with full_disk_is_an_error(self.out):
            self._writers[self._shard_of[job.target]].put(job.target, start, rows)

    def done(self, job: Job, rows: int) -> None:
        """So many more rows of a tensor are written; a shard that is whole is made durable."""
        file = self._shard_of[job.target]
        with self._counting:
            self._left[file] -= rows
            whole = self._left[file] == 0
        if whole:
            self._finish(file)

    def _finish(self, file: str) -> None:
        with full_disk_is_an_error(self.out):
            self._writers[file].finish()
            (self.folder / f"{file}.writing").rename(self.folder / file)

    def hash_sources(self) -> list[Callable[[], None]]:
        """One call for each source file; together they fill `hashes`."""
        return hash_calls(self.plan, self.hashes)

    def write_side_files(self, changes: Mapping[str, Any] | None) -> None:
        """Configuration, tokenizer, template and generation settings, each from its source; and the index of shards."""
        with full_disk_is_an_error(self.out):
            speaker = folder_of(self.plan.sources[self._talks_like])
            patterns = SIDE_FILES
            talking = {path.name for path in side_files(self.source.path, TALKING_FILES)}
            for file in side_files(self.source.path, patterns):
                if speaker is self.source or file.name not in talking:
                    copy_file(file, self.folder / file.name)
            if speaker is not self.source:
                for file in side_files(speaker.path, TALKING_FILES):
                    copy_file(file, self.folder / file.name)
            changed = {**_token_fields(self.source.config, speaker.config), **(changes or {})}
            if changed:
                merged = _changed(self.source.config, changed)
                text = json.dumps(merged, indent=2, ensure_ascii=False) + "\n"
                (self.folder / "config.json").write_text(text, encoding="utf-8")
            if self.source.index is not None:
                (self.folder / INDEX).write_text(self._index(), encoding="utf-8")

    def _index(self) -> str:
        index: dict[str, Any] = dict(self.source.index or {})
        about = dict(index.get("metadata") or {})
        about["total_size"] = sum(job.spec.bytes for job in self.plan.jobs)
        if "total_parameters" in about:
            grown = [(job.spec.shape, self.source.tensors[job.target].shape) for job in self.plan.jobs]
            about["total_parameters"] += sum(_count(new) - _count(old) for new, old in grown)
        index["metadata"] = about
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def check_logits(self, wanted: bool | None) -> None:
        """Load the result and ask for finite logits on a short prompt. Raises InputError where they are not."""
        size = sum(job.spec.bytes for job in self.plan.jobs)
        if wanted is False or (wanted is None and size > CHECKED_BY_ITSELF):
            self.check = f"not run: {size / 1e9:.1f} GB" if wanted is None else "not asked for"
        else:
            self.check = _logits_are_finite(self.folder)

    def _complete(self) -> None:
        for file in self._left:
            if not (self.folder / file).is_file():  # a shard of empty tensors
                self._finish(file)
        (self.folder / "plan").unlink()

    def _remove(self) -> None:
        for writer in self._writers.values():
            writer.close()
        super()._remove()


def hash_calls(plan: Plan, into: dict[Path, str]) -> list[Callable[[], None]]:
    """One call for each file of a plan's sources, which puts its SHA-256 into a dictionary."""
    paths = {}
    for source in plan.sources:
        for opened in _parts(folder_of(source)):
            for file in (*opened.shards, *HASHED):
                if (opened.path / file).is_file():
                    paths[opened.path / file] = True

    def hashing(path: Path) -> Callable[[], None]:
        return lambda: into.__setitem__(path, file_sha256(path))

    return [hashing(path) for path in paths]


def lineage_file(staging: Staging, plan: Plan, lineage: Mapping[str, Any]) -> None:
    """`lineage.json`: what was done to what, with the sources' hashes. Equal edits write equal files."""
    edited = [job for job in plan.jobs if job.inputs]
    content = {
        "format": 1,
        "davylamp": davylamp.__version__,
        **lineage,
        "sources": [source_entry(source, staging.hashes) for source in plan.sources],
        "tensors": {
            "edited": len(edited),
            "copied": len(plan.jobs) - len(edited),
            "entries edited": sum(_count(job.spec.shape) for job in edited),
        },
        "notes": plan.notes,
        "logits": staging.check,
    }
    canonical(content)  # plain types only, and no NaN
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with full_disk_is_an_error(staging.out):
        (staging.folder / LINEAGE).write_text(text, encoding="utf-8")


def _parts(source: Folder | Merged) -> Sequence[Folder]:
    return (source.base, source.adapter) if isinstance(source, Merged) else (source,)


def source_entry(source: Source, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """What a lineage says of a source: name, hashes, and what it was made by and from, where it has a lineage of its own."""
    entries = []
    for opened in _parts(folder_of(source)):
        files = {file: hashes[opened.path / file] for file in sorted(opened.shards)}
        beside = {file.partition(".")[0]: hashes[opened.path / file] for file in HASHED if opened.path / file in hashes}
        entry: dict[str, Any] = {"name": opened.path.name, "sha256": folder_sha256(files), "files": files, **beside}
        if (opened.path / LINEAGE).is_file():
            before = read_json(opened.path / LINEAGE)
            entry["made by"] = {name: before.get(name) for name in ("operation", "options")}
            entry["made from"] = [parent.get("sha256") for parent in before.get("sources") or ()]
        entries.append(entry)
    return entries[0] if len(entries) == 1 else {**entries[0], "adapter": entries[1]}


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _token_fields(model: Mapping[str, Any], speaker: Mapping[str, Any]) -> dict[str, Any]:
    if model is speaker:
        return {}
    ours, theirs = (config.get("text_config") or config for config in (model, speaker))
    fields = ("vocab_size", *TOKEN_FIELDS)
    return {name: theirs[name] for name in fields if name in theirs and theirs[name] != ours.get(name)}


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with fields changed where they stand: at the top, or in the text model's part."""
    out, inner = dict(config), dict(config.get("text_config") or {})
    for name, value in changes.items():
        if name in inner or (inner and name in ("vocab_size", *TOKEN_FIELDS) and name not in out):
            inner[name] = value
        if name in out or not inner:
            out[name] = value
    return {**out, "text_config": inner} if inner else out


def _logits_are_finite(folder: Path) -> str:
    import transformers
    from transformers.utils import logging

    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    known = [getattr(transformers, name, None) for name in config.get("architectures") or ()]
    if not known or known[0] is None:
        return "not run: transformers has no class for this architecture"
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # bfloat16 has the range of float32, so it is read as it lies; float16 could overflow where the model does not
        stored = str(config.get("dtype") or config.get("torch_dtype") or "")
        wide = torch.bfloat16 if stored.endswith("bfloat16") else torch.float32
        model = known[0].from_pretrained(folder, dtype=wide).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as problem:
        raise InputError(f"the result does not load: {str(problem).strip().splitlines()[0]}") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(1, 9).remainder(size)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        logits = model(**inputs).logits
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).sum())
        raise InputError(f"the result gives {bad} of {logits.numel()} logits that are not finite on a short prompt")
    return "finite on a short prompt"
