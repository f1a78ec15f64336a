"""SOMF's mask: relaxed Bernoulli variables over task vectors, learnt by preference optimisation; and the file that keeps them.
Source: arXiv:2405.09055, section 3, and its code; the relaxation is arXiv:1611.00712 (Concrete), equation 10, temperature 0.5."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from davylamp.core.errors import InputError
from davylamp.core.rows import canonical

Shape = Literal["entry", "row", "rank", "block", "tensor"]
SHAPES = ("entry", "row", "rank", "block", "tensor")
MODES = ("probability", "threshold", "soft", "binary")
TINY = 1e-8  # a mean below this is no mask but a closed door
BLOCK = 16  # rows and columns of a block


class Masked(torch.autograd.Function):
    """(tau_1 M r, tau_2 M r, …) with M = sigmoid((phi + noise) / temperature), r = min(1 / mean M, cap), and its gradient for phi.

    noise = ln u - ln(1 - u), it becomes M in place. One kernel instead of six saved tensors a step: M and the vectors are all that is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, phi: torch.Tensor, noise: torch.Tensor, temperature: float, cap: float, *taus: torch.Tensor
    ) -> Any:
        mask = noise.add_(phi).div_(temperature).sigmoid_()
        mean = float(mask.mean().clamp_min(TINY))
        scale = min(1 / mean, cap)
        ctx.save_for_backward(mask, *taus)
        ctx.scale, ctx.free, ctx.temperature = scale, 1 / mean <= cap, temperature
        return tuple((tau * mask).mul_(scale) for tau in taus)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        mask, *taus = ctx.saved_tensors
        slope = grads[0] * taus[0]
        for grad, tau in zip(grads[1:], taus[1:], strict=True):
            slope.addcmul_(grad, tau)
        # d out / d M is tau r, and where the mean is free to move, - (sum of slope M) r^2 / entries for every entry.
        shift = float((slope * mask).sum()) * ctx.scale / mask.numel() if ctx.free else 0.0
        slope.sub_(shift).mul_(ctx.scale / ctx.temperature).mul_(mask).mul_(1 - mask)
        return (slope, None, None, None, *[None] * len(taus))


def logit_noise(shape: Sequence[int], generator: torch.Generator | None, device: Any = None) -> torch.Tensor:
    """ln u - ln(1 - u), u uniform and kept a float32 epsilon away from 0 and 1: what torch's RelaxedBernoulli draws from the generator."""
    eps = torch.finfo(torch.float32).eps
    u = torch.rand(tuple(shape), generator=generator, device=device).clamp_(eps, 1 - eps)
    return u.logit_()


def logit_shape(name: str, shape: Sequence[int], coarse: str) -> tuple[int, ...]:
    """How many logits a tensor gets: one an entry, row (first index), LoRA rank, block of 16 x 16, or tensor.

    >>> logit_shape("a.lora_A.weight", (8, 64), "rank"), logit_shape("w", (20, 64), "block")
    ((8, 1), (2, 4))
    """
    if coarse not in SHAPES:
        raise InputError(f"coarse must be one of {', '.join(SHAPES)}, got {coarse!r}")
    shape = tuple(int(side) for side in shape)
    if coarse == "tensor":
        return (1,) * len(shape)
    if coarse == "rank":
        if "lora_A" not in name and "lora_B" not in name:
            raise InputError(f"coarse=rank needs LoRA's A and B, got {name}. Use row or block")
        return (shape[0], 1) if "lora_A" in name else (1, shape[1])
    if coarse == "entry" or len(shape) < 2:
        return shape
    if coarse == "row":
        return (shape[0], *[1] * (len(shape) - 1))
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))


def widen(values: torch.Tensor, shape: Sequence[int], coarse: str) -> torch.Tensor:
    """The values of logits, one for each entry of the tensor (a view where it can be)."""
    if coarse == "block" and len(shape) >= 2:
        values = values.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
        return values.repeat_interleave(BLOCK, -1)[..., : shape[-1]]
    return values.expand(tuple(shape))


def masked_vectors(
    phi: Mapping[str, torch.Tensor],
    taus: Sequence[Mapping[str, torch.Tensor]],
    *,
    noise: Callable[[str, Sequence[int]], torch.Tensor],
    coarse: str = "entry",
    temperature: float = 0.5,
    cap: float = 10.0,
) -> dict[str, tuple[torch.Tensor, ...]]:
    """One soft draw: for each tensor the tasks' vectors times M over its mean; gradients reach phi. noise: (name, shape) -> logit noise.

    With one logit a tensor the mean of a tensor would undo it; there the mean is taken over all tensors, weighted by their size.
    """
    out: dict[str, tuple[torch.Tensor, ...]] = {}
    if coarse == "entry":
        for name, logits in phi.items():
            out[name] = Masked.apply(logits, noise(name, logits.shape), temperature, cap, *(tau[name] for tau in taus))
        return out
    masks = {n: torch.sigmoid((logits + noise(n, logits.shape)) / temperature) for n, logits in phi.items()}
    sizes = {name: taus[0][name].numel() for name in phi}
    whole = sum((masks[n].mean() * sizes[n] for n in phi), torch.zeros(())) / sum(sizes.values())
    for name, mask in masks.items():
        wide = widen(mask, taus[0][name].shape, coarse)
        mean = (whole if coarse == "tensor" else wide.mean()).clamp_min(TINY)
        scale = (1 / mean).clamp_max(cap)
        out[name] = tuple(tau[name] * wide * scale for tau in taus)
    return out


@dataclass
class Mask:
    """A learnt mask. logits: by tensor name, as stored (float16 values in float32).  shapes: of the tensors.  coarse: what a logit covers.

    drawn: for the sampled modes the draw itself, so that two loads of one file give one model.  about: seeds, hashes, options, plain types.
    """

    logits: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    coarse: str = "entry"
    temperature: float = 0.5
    cap: float = 10.0
    drawn: dict[str, torch.Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def values(self, name: str, mode: str) -> torch.Tensor:
        """The mask of one tensor in logit shape, before the rescale. Sampled modes need `draw` first."""
        if mode == "probability":
            return self.logits[name].sigmoid()
        if mode == "threshold":
            return (self.logits[name] > 0).float()
        if mode not in MODES:
            raise InputError(f"mode of a mask must be one of {', '.join(MODES)}, got {mode!r}")
        if name not in self.drawn:
            raise InputError(f"mode {mode} needs a draw, and this mask has none. Use probability, or draw with a seed")
        return self.drawn[name]

    def draw(self, mode: str, noise: Callable[[str, Sequence[int]], torch.Tensor]) -> Mask:
        """The same mask with one draw of it: M itself (soft, as float16 holds it) or M > 0.5 (binary)."""
        if mode not in ("soft", "binary"):
            raise InputError(f"only soft and binary are drawn, got {mode!r}")
        drawn = {}
        for name, logits in self.logits.items():
            soft = torch.sigmoid((logits + noise(name, logits.shape)) / self.temperature)
            drawn[name] = (soft > 0.5).float() if mode == "binary" else soft.half().float()
        return Mask(
            self.logits, self.shapes, self.coarse, self.temperature, self.cap, drawn, {**self.about, "drawn": mode}
        )

    def wide(self, name: str, mode: str) -> torch.Tensor:
        """The mask of one tensor, of its shape."""
        return widen(self.values(name, mode), self.shapes[name], self.coarse)

    def means(self, mode: str) -> dict[str, float]:
        """The mean of each tensor's mask; with one logit a tensor, the mean over all for every one."""
        out = {name: float(self.wide(name, mode).double().mean()) for name in self.logits}
        if self.coarse == "tensor":
            sizes = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
            whole = sum(out[name] * sizes[name] for name in out) / sum(sizes.values())
            return dict.fromkeys(out, whole)
        return out

    def scales(self, mode: str) -> dict[str, float]:
        """What each masked vector is multiplied with: 1 / mean, at most `cap`; 0 for a tensor that is masked whole."""
        return {name: 0.0 if mean < TINY else min(1 / mean, self.cap) for name, mean in self.means(mode).items()}

    def rounded(self) -> Mask:
        """With logits as the file will hold them, so that what is evaluated is what is stored."""
        logits = {
            name: values.detach().clamp(-60000, 60000).half().float().cpu() for name, values in self.logits.items()
        }
        return Mask(logits, self.shapes, self.coarse, self.temperature, self.cap, self.drawn, self.about)


def save_mask(mask: Mask, path: Path) -> Path:
    """Logits and a soft draw as float16, a binary draw as packed bits, the manifest in the header. Whole or not at all."""
    tensors: dict[str, torch.Tensor] = {
        f"logits/{name}": values.half().contiguous() for name, values in mask.logits.items()
    }
    for name, values in mask.drawn.items():
        if mask.about.get("drawn") == "binary":
            tensors[f"drawn/{name}"] = torch.from_numpy(np.packbits(values.bool().numpy().reshape(-1)))
        else:
            tensors[f"drawn/{name}"] = values.half().contiguous()
    head = {"coarse": mask.coarse, "temperature": mask.temperature, "cap": mask.cap, "about": mask.about,
            "shapes": {name: list(shape) for name, shape in mask.shapes.items()}}  # fmt: skip
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata={"davylamp_somf": canonical(head)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load_mask(path: Path) -> Mask:
    """Read what `save_mask` wrote. Raises InputError for any other file."""
    if not path.is_file():
        raise InputError(f"no mask file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            head = json.loads((file.metadata() or {})["davylamp_somf"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as problem:  # safetensors raises its own types
        raise InputError(f"{path} is not a mask that davylamp wrote: {type(problem).__name__}") from None
    logits = {name[7:]: values.float() for name, values in tensors.items() if name.startswith("logits/")}
    drawn = {}
    for name, values in tensors.items():
        if name.startswith("drawn/"):
            shape = logits[name[6:]].shape
            if values.dtype == torch.uint8:
                bits = np.unpackbits(values.numpy(), count=int(np.prod(shape)))
                drawn[name[6:]] = torch.from_numpy(bits).reshape(shape).float()
            else:
                drawn[name[6:]] = values.float()
    shapes = {name: tuple(shape) for name, shape in head["shapes"].items()}
    return Mask(logits, shapes, head["coarse"], head["temperature"], head["cap"], drawn, head["about"])
