"""Other bags of named rows: a model in memory, a base with an adapter merged in, a source in another vocabulary's order."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from davylamp.core.errors import InputError
from davylamp.models.vectors_io import DTYPES, Folder, Source, Spec, as_bytes, read_json

MANIFEST = "residual.json"
ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class Model:
    """A `PreTrainedModel` under the names and in the layout of its files; of a peft model, the adapter's tensors.

    Where the files split what memory holds fused (the experts of a Mixtral), rows are gathered and scattered by index.
    """

    def __init__(self, model: Any):
        self.where, self.model = f"the {type(model).__name__} in memory", model
        self.config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
        self._views: dict[str, torch.Tensor] = {}
        self._indices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.tensors: dict[str, Spec] = {}
        ours, layout = _state(model), _file_layout(model)
        by_storage = {tensor.untyped_storage().data_ptr(): tensor for tensor in ours.values()}
        gathered = {}
        for name, tensor in layout(ours).items():
            if tensor.is_meta:
                raise InputError(f"{name} of {self.where} holds no numbers (meta device). Load the model whole first")
            self.tensors[name] = Spec(tensor.dtype, tuple(tensor.shape))
            if tensor.untyped_storage().data_ptr() in by_storage and tensor.is_contiguous():
                self._views[name] = tensor
            else:
                gathered[name] = tensor
        if gathered:
            self._gather(ours, layout, gathered)

    def _gather(self, ours: dict[str, torch.Tensor], layout: Any, gathered: Mapping[str, torch.Tensor]) -> None:
        """For each file tensor that is no view: the one parameter it comes from, and the place there of each of its entries."""
        flat, numbered, first = [], {}, 0
        for name, tensor in ours.items():
            numbered[name] = torch.arange(first, first + tensor.numel()).view(tensor.shape)
            flat.append((first, tensor))
            first += tensor.numel()
        starts = torch.tensor([start for start, _ in flat])
        for name, places in layout(numbered).items():
            if name not in gathered:
                continue
            owners = torch.searchsorted(starts, places.reshape(-1), right=True).sub_(1)
            if owners.numel() == 0 or places.shape != gathered[name].shape or int(owners.min()) != int(owners.max()):
                raise InputError(
                    f"{name} is made from several parameters of {self.where}. Save the model and edit its folder"
                )
            start, tensor = flat[int(owners[0])]
            self._indices[name] = (tensor.view(-1), places.reshape(-1) - start)

    def view(self, name: str) -> torch.Tensor:
        """The tensor of that name: a view of the parameter where there is one, else a copy."""
        if name in self._views:
            return self._views[name]
        flat, places = self._indices[name]
        return flat[places].view(self.tensors[name].shape)

    def raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        spec = self.tensors[name]
        if name in self._views:
            return self._views[name].view(spec.rows, spec.width)[start:stop]
        flat, places = self._indices[name]
        return flat[places[start * spec.width : stop * spec.width]].view(stop - start, spec.width)

    def fill(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self.raw(name, start, stop))

    def write(self, name: str, value: torch.Tensor) -> None:
        """Put a whole new tensor in place of the old one."""
        if name in self._views:
            self._views[name].copy_(value.view(self._views[name].shape))
        else:
            flat, places = self._indices[name]
            flat[places] = value.reshape(-1).to(flat.device)

    def close(self) -> None: ...


def _is_peft(model: Any) -> bool:
    return hasattr(model, "get_base_model")  # a PeftModel; the model inside it has a peft_config as well


def _state(model: Any) -> dict[str, torch.Tensor]:
    if not hasattr(model, "save_pretrained"):  # a plain module
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if _is_peft(model):
        from peft import get_peft_model_state_dict

        return {name: tensor.detach() for name, tensor in get_peft_model_state_dict(model).items()}
    state = model.state_dict()
    wrapped = [name for name in state if ".lora_" in name or ".base_layer." in name]
    if wrapped:
        raise InputError(f"{type(model).__name__} holds adapter layers ({wrapped[0]}). Call merge_and_unload() first")
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    state = {name: tensor.detach() for name, tensor in state.items() if name not in ignored}
    try:
        from transformers.modeling_utils import remove_tied_weights_from_state_dict
    except ImportError:  # transformers 4
        first: dict[tuple[int, int], str] = {}
        for name, tensor in state.items():
            first.setdefault((tensor.untyped_storage().data_ptr(), tensor.storage_offset()), name)
        return {name: state[name] for name in first.values()}
    return remove_tied_weights_from_state_dict(state, model)


def _file_layout(model: Any) -> Any:
    """A function from a state dict to the tensors that `save_pretrained` would write."""
    if hasattr(model, "save_pretrained") and not _is_peft(model):
        with suppress(ImportError):  # transformers 4 writes what it holds
            from transformers.core_model_loading import revert_weight_conversion

            return lambda state: revert_weight_conversion(model, dict(state))
    return lambda state: state


class Merged:
    """A base folder with a LoRA adapter merged in as it is read: W + (alpha / r) B A, in float32.

    Raises InputError for what is no plain LoRA (DoRA, trained biases), or was made for another base.
    """

    def __init__(self, base: Folder, adapter: Folder):
        self.base, self.adapter, self.config = base, adapter, base.config
        self.where, self.path, self.index, self.shards = (
            f"{adapter.where} on {base.where}",
            base.path,
            base.index,
            base.shards,
        )
        self.tensors: dict[str, Spec] = dict(base.tensors)
        settings = adapter.config
        if settings.get("peft_type") != "LORA" or settings.get("use_dora") or settings.get("bias", "none") != "none":
            raise InputError(
                f"{adapter.where} is no plain LoRA adapter. Merge it with peft's merge_and_unload() and give the folder"
            )
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor, float, bool]] = {}
        self._replaced: dict[str, str] = {}
        for name in adapter.tensors:
            module = name.removeprefix("base_model.model.")
            if ".lora_A." in module or ".lora_embedding_A" in module:
                self._add(name, module)
            elif ".lora_" not in module:
                target = self._base_name(
                    module.replace(".modules_to_save", "").replace(".base_layer", ""), adapter.tensors[name].shape
                )
                self._replaced[target] = name
        if not self._factors and not self._replaced:
            raise InputError(f"{adapter.where} holds no LoRA tensors")

    def _add(self, name: str, module: str) -> None:
        embedding = ".lora_embedding_A" in module
        path = module.split(".lora_")[0]
        up = name.replace("lora_embedding_A", "lora_embedding_B") if embedding else name.replace("lora_A", "lora_B")
        if up not in self.adapter.tensors:
            raise InputError(f"{self.adapter.where}: {name} stands without {up}")
        down, up_spec = self.adapter.tensors[name], self.adapter.tensors[up]
        transposed = bool(self.adapter.config.get("fan_in_fan_out")) and not embedding
        # An embedding's A is [r, tokens] and its B [width, r]; the weight is [tokens, width].
        shape = (down.shape[1], up_spec.shape[0]) if transposed or embedding else (up_spec.shape[0], down.shape[1])
        target = self._base_name(f"{path}.weight", shape)
        a, b = (self.adapter.raw(key, 0, self.adapter.tensors[key].rows).float() for key in (name, up))
        self._factors[target] = (a, b, self._scale(path, down.shape[0]), transposed or embedding)

    def _scale(self, path: str, rank: int) -> float:
        settings = self.adapter.config
        alpha = settings.get("lora_alpha", rank)
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if path == pattern or path.endswith("." + pattern):
                alpha = value
        return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank

    def _base_name(self, name: str, shape: Sequence[int]) -> str:
        """The base's name of a module's weight; where files name it otherwise than memory does, by its last parts, if only one fits."""
        found = [name] if name in self.base.tensors else []
        tail = name
        while not found and "." in tail:
            tail = tail.partition(".")[2]
            found = [known for known in self.base.tensors if known.endswith("." + tail)]
        if len(found) != 1:
            raise InputError(f"{self.adapter.where} was made for another base: {self.base.where} has no {name}")
        if self.base.tensors[found[0]].shape != tuple(shape):
            raise InputError(
                f"{name}: base {self.base.tensors[found[0]].shape}, adapter {tuple(shape)}. The adapter was made for another base"
            )
        return found[0]

    def raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        spec = self.tensors[name]
        if name not in self._factors and name not in self._replaced:
            return self.base.raw(name, start, stop)
        out = torch.empty((stop - start, spec.width), dtype=torch.float32)
        self.fill(name, start, stop, out)
        return out.to(spec.dtype)

    def fill(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        if name in self._replaced:
            self.adapter.fill(self._replaced[name], start, stop, out)
        else:
            self.base.fill(name, start, stop, out)
        if name in self._factors:
            a, b, scale, transposed = self._factors[name]
            out.add_(a[:, start:stop].T @ b.T if transposed else b[start:stop] @ a, alpha=scale)

    def close(self) -> None:
        self.base.close()
        self.adapter.close()


class Residual(Folder):
    """The folder of a residual: differences stored in full, as mask and values, or as two thin factors. See `vectors_residual.py`.

    manifest: `residual.json`.  exact: {name: (places, base's numbers, instruct's)} of the entries whose difference float32 cannot hold.
    """

    def __init__(self, path: Path):
        self.manifest = read_json(path / MANIFEST)
        if self.manifest.get("kind") != "residual" or self.manifest.get("format") != 1:
            raise InputError(f"{path / MANIFEST} is not of a residual, or of a newer format")
        super().__init__(path)
        self.stored = self.tensors
        self._firsts: dict[str, torch.Tensor] = {}
        self._right: dict[str, torch.Tensor] = {}
        self._guard = threading.Lock()
        try:
            self.tensors = {
                name: Spec(DTYPES[about["dtype"]], tuple(about["shape"]))
                for name, about in self.manifest["tensors"].items()
            }
            self.exact = {
                whole: (self._whole(name), self._whole(f"{whole}.exact_base"), self._whole(f"{whole}.exact_instruct"))
                for name in self.stored
                if (whole := name.removesuffix(".exact_place")) != name
            }
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path / MANIFEST} does not describe the tensors beside it") from None

    def _files(self) -> list[str]:
        return list(self.manifest["files"])

    def _whole(self, name: str) -> torch.Tensor:
        return self._stored(name, 0, self.stored[name].rows).view(self.stored[name].shape)

    def _stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        spec = self.stored[name]
        out = torch.empty((stop - start, spec.width), dtype=spec.dtype)
        self.read_rows(name, spec, start, as_bytes(out))
        return out

    def raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        spec = self.tensors[name]
        out = torch.empty((stop - start, spec.width), dtype=torch.float32)
        self.fill(name, start, stop, out)
        return out.to(spec.dtype)

    def fill(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        if name in self.stored:
            out.copy_(self._stored(name, start, stop))
        elif f"{name}.left" in self.stored:
            left = self._stored(f"{name}.left", start, stop).to(out.dtype)
            torch.matmul(left, self._right_factor(name).to(out.dtype), out=out)
        else:
            firsts = self._first_values(name)
            bits = self._stored(f"{name}.mask", start, stop).numpy()
            hit = np.unpackbits(bits, axis=1, count=out.shape[1]).view(np.bool_)
            values = self._stored(f"{name}.values", int(firsts[start]), int(firsts[stop]))
            out.zero_()[torch.from_numpy(hit)] = values.view(-1).to(out.dtype)

    def _right_factor(self, name: str) -> torch.Tensor:
        with self._guard:
            if name not in self._right:
                if len(self._right) >= 8:  # threads are never many tensors apart
                    self._right.clear()
                self._right[name] = self._whole(f"{name}.right").float()
            return self._right[name]

    def _first_values(self, name: str) -> torch.Tensor:
        """[rows + 1] place of each row's first value."""
        with self._guard:
            if name not in self._firsts:
                spec = self.stored[f"{name}.mask"]
                counts = [torch.zeros(1, dtype=torch.int64)]
                for start in range(0, spec.rows, 4096):
                    bits = self._stored(f"{name}.mask", start, min(start + 4096, spec.rows)).numpy()
                    counts.append(torch.from_numpy(ONES[bits].sum(1, dtype=np.int64)))
                self._firsts[name] = torch.cat(counts).cumsum(0)
            return self._firsts[name]


class Aligned:
    """A source with its token rows in the order of another vocabulary.

    rows: {name: (for each new row the old one, or -1; the new spec)}.  lacking: (source, {name: its name}) that gives the rows
    which are lacking; None: they are zero.
    """

    def __init__(
        self,
        source: Source,
        rows: Mapping[str, tuple[torch.Tensor, Spec]],
        lacking: tuple[Source, Mapping[str, str]] | None = None,
    ):
        self.source, self.where, self.config, self._lacking = source, source.where, source.config, lacking
        self.path = getattr(source, "path", None)
        self._rows = {name: places for name, (places, _) in rows.items()}
        self.tensors = {**source.tensors, **{name: spec for name, (_, spec) in rows.items()}}

    @property
    def moved(self) -> frozenset[str]:
        """Names of the tensors whose rows are elsewhere than in the source."""
        return frozenset(self._rows)

    def raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._rows:
            return self.source.raw(name, start, stop)
        spec = self.tensors[name]
        out = torch.empty((stop - start, spec.width), dtype=spec.dtype)
        self.fill(name, start, stop, out)
        return out

    def fill(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        if name not in self._rows:
            self.source.fill(name, start, stop, out)
            return
        places = self._rows[name][start:stop]
        # Vocabularies mostly agree, so rows come in long runs: one read for each.
        cuts = (torch.where(places[1:] != places[:-1] + 1)[0] + 1).tolist()
        for at, end in zip([0, *cuts], [*cuts, len(places)], strict=True):
            first = int(places[at])
            if first >= 0:
                self.source.fill(name, first, first + end - at, out[at:end])
            elif self._lacking is not None:
                self._lacking[0].fill(self._lacking[1][name], start + at, start + end, out[at:end])
            else:
                out[at:end] = 0

    def close(self) -> None:
        self.source.close()
