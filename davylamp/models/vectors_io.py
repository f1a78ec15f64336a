"""Checkpoints as bags of named rows: safetensors folders, and the writer of new shards.

Files are read with `preadv` into a buffer of the calling thread and not mapped: a file that shrinks while it is read is then an error
and not a crash, and resident memory stays that of the buffers, whatever the checkpoint's size.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from davylamp.core.errors import InputError, RunError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ADDED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what arithmetic is done on; the rest is copied
INDEX = "model.safetensors.index.json"
# What is copied beside the weights: all that says how to use them. Not the model card, which describes other weights.
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
NEVER_COPIED = ("*.index.json", "lineage.json", "trainer_state.json", "compatibility.json", "residual.json")
TALKING_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)  # these go together: the tokenizer, its chat template, and where a reply ends


class Spec(NamedTuple):
    """Stored dtype and shape of a tensor, and how it is cut: `rows` x `width` (a vector has rows of width 1)."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """A bag of named tensors that is read in rows."""

    @property
    def where(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Spec]: ...

    def raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows in the stored dtype, [stop - start, width]; a view or a copy."""

    def fill(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Rows into `out`, [stop - start, width], converted to its dtype."""

    def close(self) -> None: ...


class _Scratch(threading.local):
    """Buffers of each thread, one for each use. Views of them are kept as well: making them costs more than small blocks do."""

    LIMIT = 8 << 20  # bytes; bigger ones are made and let go

    def __init__(self) -> None:
        self._buffers: dict[object, torch.Tensor] = {}
        self._views: dict[object, tuple[torch.Tensor, memoryview]] = {}

    def get(self, use: object, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, memoryview]:
        """A tensor with any content, and its memory; the same memory at the next call for this use."""
        key = (use, shape, dtype)
        found = self._views.get(key)
        if found is None:
            count = math.prod(shape) * dtype.itemsize
            if count > self.LIMIT:
                tensor = torch.empty(shape, dtype=dtype)
                return tensor, as_bytes(tensor)
            if use not in self._buffers or len(self._views) > 500:
                self._buffers.setdefault(use, torch.empty(self.LIMIT, dtype=torch.uint8))
                self._views.clear()
            tensor = self._buffers[use][:count].view(dtype).view(shape)
            found = self._views[key] = (tensor, as_bytes(tensor))
        return found


scratch = _Scratch()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def pread_into(file: int, view: memoryview, offset: int, where: str) -> None:
    """Read exactly the bytes of `view`. Raises InputError where the file ends early."""
    done = os.preadv(file, [view], offset)
    while done < len(view):
        got = os.preadv(file, [view[done:]], offset + done)
        if got == 0:
            raise InputError(f"{where} ended while it was read: it is shorter than its header says")
        done += got


def pwrite_from(file: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)


# --- safetensors files ------------------------------------------------------------------------------------------------------------------
class Shard:
    """One safetensors file, its header checked against its size."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise InputError(f"no file {path}. The checkpoint is not whole: fetch or copy it again") from None
        size = os.fstat(self.file).st_size
        try:
            self.metadata, self.places = self._header(size)
        except BaseException:
            self.close()
            raise

    def _header(self, size: int) -> tuple[dict[str, str] | None, dict[str, tuple[Spec, int]]]:
        broken = f"{self.path} is not a safetensors file, or it is cut off"
        head = os.pread(self.file, 8, 0)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise InputError(f"{broken}: {size} bytes")
        try:
            header = json.loads(os.pread(self.file, length, 8))
            metadata = header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            places, at = {}, 0
            for name, entry in entries:
                if entry["dtype"] not in DTYPES:
                    raise InputError(
                        f"{self.path}: {name} is stored as {entry['dtype']}, which is not read here. Give the unquantised checkpoint"
                    )
                spec, (start, stop) = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"])), entry["data_offsets"]
                if start != at or stop - start != spec.bytes:
                    raise InputError(f"{self.path}: the header's place of {name} does not fit its shape")
                places[name], at = (spec, 8 + length + start), stop
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{broken}: its header cannot be read") from None
        if size != 8 + length + at:
            raise InputError(
                f"{self.path} is cut off or damaged: {size} bytes, its header promises {8 + length + at}. Fetch or copy it again"
            )
        return metadata, places

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


class Folder:
    """A checkpoint folder: `model.safetensors`, or shards with their index; or an adapter's `adapter_model.safetensors`.

    Raises InputError for a missing or damaged shard, a missing index, weights in another format, and quantised weights.
    """

    def __init__(self, path: Path, *, adapter: bool = False):
        self.path, self.where = path, str(path)
        self.index: dict[str, Any] | None = None
        if not path.is_dir():
            raise InputError(f"there is no folder {path}. Expected one written by save_pretrained")
        self.config: dict[str, Any] = {}
        if adapter:
            self.config, files = read_json(path / "adapter_config.json"), ["adapter_model.safetensors"]
        else:
            if (path / "config.json").is_file():
                self.config = read_json(path / "config.json")
            files = self._files()
        if "quantization_config" in self.config:
            raise InputError(
                f"{path} is quantised; its numbers are codes and cannot be added. Give the unquantised checkpoint"
            )
        self.shards: dict[str, Shard] = {}
        self.tensors: dict[str, Spec] = {}
        self._place: dict[str, tuple[Shard, int]] = {}
        try:
            for file in files:
                shard = self.shards[file] = Shard(path / file)
                for name, (spec, offset) in shard.places.items():
                    if name in self._place:
                        raise InputError(
                            f"{name} stands in two shards of {path}: {self._place[name][0].path.name}, {file}"
                        )
                    self.tensors[name], self._place[name] = spec, (shard, offset)
            for name, file in (self.index["weight_map"] if self.index else {}).items():
                if name not in self.shards[file].places:
                    raise InputError(f"the index of {path} places {name} in {file}, which does not hold it")
        except BaseException:
            self.close()
            raise

    def _files(self) -> list[str]:
        if (self.path / INDEX).is_file():
            self.index = read_json(self.path / INDEX)
            placed = self.index.get("weight_map")
            if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
                raise InputError(f"{self.path / INDEX} has no weight_map")
            return sorted(set(placed.values()))
        found = sorted(file.name for file in self.path.glob("*.safetensors"))
        if "model.safetensors" in found:
            return ["model.safetensors"]
        if len(found) == 1 and "adapter_model.safetensors" not in found:
            return found
        if len(found) > 1:
            raise InputError(f"{self.path} holds {len(found)} shards but no {INDEX}. Fetch or copy it again")
        other = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in self.path.glob(pattern)]
        hint = f"; found {other[0]}: load it with transformers and save_pretrained it first" if other else ""
        raise InputError(f"{self.path} holds no safetensors{hint}")

    def raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        spec = self.tensors[name]
        out = torch.empty((stop - start, spec.width), dtype=spec.dtype)
        self.read_rows(name, spec, start, as_bytes(out))
        return out

    def fill(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        spec = self.tensors[name]
        if spec.dtype == out.dtype:
            self.read_rows(name, spec, start, as_bytes(out))
            return
        stored, memory = scratch.get("raw", (stop - start, spec.width), spec.dtype)
        self.read_rows(name, spec, start, memory)
        out.copy_(stored)

    def read_rows(self, name: str, spec: Spec, start: int, view: memoryview) -> None:
        """The stored bytes from row `start` on, as many as fit `view`."""
        shard, offset = self._place[name]
        if len(view):
            pread_into(shard.file, view, offset + start * spec.width * spec.dtype.itemsize, str(shard.path))

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()


# --- writing ----------------------------------------------------------------------------------------------------------------------------
class ShardWriter:
    """A new safetensors file whose tensors and sizes are known beforehand, written at any place in any order by several threads."""

    def __init__(self, path: Path, tensors: Mapping[str, Spec], metadata: Mapping[str, str] | None):
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        self.path, self._offset, at = path, {}, 0
        for name, spec in tensors.items():
            header[name] = {
                "dtype": CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.bytes],
            }
            self._offset[name], at = (at, spec), at + spec.bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        pwrite_from(self._file, memoryview(struct.pack("<Q", len(text)) + text), 0)
        os.ftruncate(self._file, self._data + at)

    def put(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Rows of a tensor, in its stored dtype, from row `start` on."""
        offset, spec = self._offset[name]
        if rows.numel():
            pwrite_from(self._file, as_bytes(rows), self._data + offset + start * spec.width * spec.dtype.itemsize)

    def finish(self) -> None:
        os.fsync(self._file)
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def copy_file(source: Path, target: Path) -> None:
    """A small file's bytes."""
    target.write_bytes(source.read_bytes())


def side_files(folder: Path, patterns: Iterable[str] = SIDE_FILES) -> list[Path]:
    """The files of a checkpoint folder, other than weights, that match a pattern."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    unwanted = {file for pattern in NEVER_COPIED for file in folder.glob(pattern)}
    return sorted(found - unwanted)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def need_space(folder: Path, count: int) -> None:
    """Raises RunError where fewer than `count` bytes are free."""
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < count:
        raise RunError(
            f"{folder} has {free / 1e9:.1f} GB free, the result takes {count / 1e9:.1f} GB. Nothing was written"
        )
