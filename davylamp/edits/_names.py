"""Which tensor of a checkpoint is which parameter of the loaded model: the same name, but for adapters, base-only files and experts.

transformers stacks a layer's experts into one parameter when it loads a model and takes them apart again when it saves it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from davylamp.core.errors import InputError

EXPERT = re.compile(
    r"(?P<layer>.*layers\.\d+)\..*experts\.(?P<expert>\d+)\.(?P<leaf>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight"
)
STACK = re.compile(r"(?P<layer>.*layers\.\d+)\..*experts\.(?P<leaf>gate_up_proj|down_proj)")
HALVES = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1, "w2": 0, "down_proj": 0}


class Slot(NamedTuple):
    """One tensor of a checkpoint and where it stands in the parameter. expert: None for a tensor that is the whole parameter."""

    file: str
    expert: int | None = None
    half: int | None = None

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The view of the parameter (or of anything of its shape) that this tensor is."""
        if self.expert is None:
            return whole
        one = whole[self.expert]
        return one if self.half is None else one.chunk(2)[self.half]


def file_map(parameters: Iterable[str], files: Sequence[str]) -> dict[str, list[Slot]]:
    """The checkpoint's tensors of each parameter, in the order in which their bytes follow one another in it.

    Raises InputError, with up to five names, for parameters that the files do not hold.

    >>> file_map(["model.layers.0.mlp.experts.down_proj"], ["model.layers.0.moe.experts.0.w2.weight"])
    {'model.layers.0.mlp.experts.down_proj': [Slot(file='model.layers.0.moe.experts.0.w2.weight', expert=0, half=None)]}
    """
    have = set(files)
    stacked: dict[tuple[str, str], list[Slot]] = {}
    for file in files:
        if found := EXPERT.fullmatch(file):
            down = found["leaf"] in ("w2", "down_proj")
            half = None if down else HALVES[found["leaf"]]
            place = (found["layer"], "down_proj" if down else "gate_up_proj")
            stacked.setdefault(place, []).append(Slot(file, int(found["expert"]), half))
    out: dict[str, list[Slot]] = {}
    absent = []
    for name in parameters:
        adapter = re.sub(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.[^.]+", r".\1", name)
        inside = name.partition(".")[2]  # files of the model without its head leave the first part out
        found = STACK.fullmatch(name)
        if plain := next((file for file in (name, adapter, inside) if file in have), None):
            out[name] = [Slot(plain)]
        elif found and (found["layer"], found["leaf"]) in stacked:
            out[name] = sorted(
                stacked[found["layer"], found["leaf"]], key=lambda slot: (slot.expert or 0, slot.half or 0)
            )
        else:
            absent.append(name)
    absent = [name for name in absent if not _renamed(name, files, out)]
    if absent:
        raise InputError(
            f"the checkpoint lacks {len(absent)} tensors: {', '.join(absent[:5])}. Is it of the same architecture?"
        )
    return out


def _renamed(name: str, files: Sequence[str], out: dict[str, list[Slot]]) -> bool:
    """Whether just one file tensor stands in that layer under the same last two parts (`block_sparse_moe.gate` for `mlp.gate`)."""
    found = re.match(r".*layers\.\d+\.", name)
    if not found:
        return False
    tail = "." + ".".join(name.rsplit(".", 2)[1:])
    taken = {slot.file for slots in out.values() for slot in slots}
    near = [file for file in files if file.startswith(found[0]) and file.endswith(tail) and file not in taken]
    if len(near) == 1:
        out[name] = [Slot(near[0])]
    return len(near) == 1


def check_same(ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]], what: str) -> None:
    """Raises InputError unless both have the same names and shapes; names up to five on each side. what: `task model 1`.

    >>> check_same({"embed.weight": (10, 4)}, {"embed.weight": (12, 4)}, "task model 1")
    Traceback (most recent call last):
    davylamp.core.errors.InputError: task model 1 has another vocabulary: embed.weight is [12, 4], not [10, 4]. Resize it first
    """
    here, there = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    if here or there:
        raise InputError(
            f"{what} does not hold the safe model's tensors. Only in the safe model: {', '.join(here[:5]) or 'none'}. "
            f"Only in the other: {', '.join(there[:5]) or 'none'}"
        )
    wrong = [name for name in ours if tuple(ours[name]) != tuple(theirs[name])]
    vocabulary = [name for name in wrong if "embed" in name or "lm_head" in name or name.endswith("wte.weight")]
    if vocabulary:
        name = vocabulary[0]
        raise InputError(
            f"{what} has another vocabulary: {name} is {list(theirs[name])}, not {list(ours[name])}. Resize it first"
        )
    if wrong:
        table = "; ".join(f"{name}: {list(theirs[name])}, not {list(ours[name])}" for name in wrong[:5])
        raise InputError(f"{what} has {len(wrong)} tensors of other shapes. {table}")
