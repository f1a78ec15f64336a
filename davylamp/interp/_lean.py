"""The second half of a layer (norm and gated MLP) for many candidates, in less time than the library's modules take, up to rounding.

Most of the engine's time goes there. Two things make it cheaper where the layer is Llama's (Llama, Mistral, Qwen 2 and 3, …):

- A candidate differs from the plain pass by one head's change, which has the head's size and not the width: W(x + d P) = W x + d (P W),
  with W x from the plain pass, for all candidates, and P W, a small matrix a head. A root-mean-square norm only scales W's columns and
  each token.
- Rows go through the MLP some hundred at a time, each step in the memory of the one before, so that nothing leaves the core's cache.

Nothing is taken on trust: a layer's second half counts as known only if it gives back what the layer itself gave in the plain pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 256  # that go through an MLP at a time on a CPU: activations of some hundred kilobytes
CLOSE = 1e-5  # how near to the layer's own output, as a share of its largest entry


class SecondHalf:
    """x -> x + down(act(gate(norm x)) * up(norm x)) of one layer, in float32 and without biases; `of` says whether a layer has it."""

    def __init__(self, norm: Any, epsilon: float, mlp: Any):
        self.scale, self.epsilon, self.mlp = norm.weight, epsilon, mlp
        self.silu = type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        self.rows = ROWS if norm.weight.device.type == "cpu" else 2**31

    @classmethod
    def of(cls, layer: nn.Module, before: Tensor, after: Tensor) -> SecondHalf | None:
        """The second half of a layer, or None where it is of another kind. before, after: (…, width), of the plain pass at some tokens."""
        norm, mlp = getattr(layer, "post_attention_layernorm", None), getattr(layer, "mlp", None)
        epsilon = getattr(norm, "variance_epsilon", None)
        maps = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if epsilon is None or not hasattr(mlp, "act_fn") or not all(_bare(one) for one in maps):
            return None
        if any(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in (norm, mlp)):  # type: ignore[union-attr]
            return None
        half = cls(norm, epsilon, mlp)
        with torch.no_grad():
            off = (half.whole(before.flatten(0, -2)) - after.flatten(0, -2)).abs().max()
        return half if bool(off <= CLOSE * after.abs().max()) else None

    def _out(self, x: Tensor, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """Writes x + down(act(gate) * up) into `out`; gate is overwritten."""
        gate = F.silu(gate, inplace=True) if self.silu else self.mlp.act_fn(gate)
        torch.addmm(x, gate.mul_(up), self.mlp.down_proj.weight.T, out=out)

    def _spread(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)

    def whole(self, x: Tensor) -> Tensor:
        """The second half of (rows, width)."""
        out = torch.empty_like(x)
        gates, ups = self.projected(x)
        for at in range(0, len(x), self.rows):
            part = slice(at, at + self.rows)
            spread = self._spread(x[part])
            self._out(x[part], gates[part] * spread, ups[part] * spread, out[part])
        return out

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, width) through gate and up with the norm's weights, but not its division."""
        scaled = x * self.scale
        return self.mlp.gate_proj(scaled), self.mlp.up_proj(scaled)

    def changed(self, x: Tensor, ready: tuple[Tensor, Tensor], changes: Tensor, maps: Tensor) -> Tensor:
        """(candidates, rows, width): the second half of x + change @ map for each candidate. ready: `projected` of x, for all of them.

        changes: (candidates, rows, size).  maps: (candidates, size, width).
        """
        out = x.new_empty(len(changes), *x.shape)
        for change, through, mine in zip(changes, maps, out, strict=True):
            scaled = through * self.scale
            gate_map, up_map = self.mlp.gate_proj(scaled), self.mlp.up_proj(scaled)
            for at in range(0, len(x), self.rows):
                part = slice(at, at + self.rows)
                moved = torch.addmm(x[part], change[part], through)
                spread = self._spread(moved)
                small = change[part] * spread
                gate = (small @ gate_map).addcmul_(ready[0][part], spread)
                up = (small @ up_map).addcmul_(ready[1][part], spread)
                self._out(moved, gate, up, mine[part])
        return out

    def tiled(self, x: Tensor) -> Tensor:
        """The MLP alone, in the place of its own forward; (…, width), normed."""
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(flat)
        for at in range(0, len(flat), self.rows):
            part = flat[at : at + self.rows]
            gate = self.mlp.gate_proj(part)
            gate = F.silu(gate, inplace=True) if self.silu else self.mlp.act_fn(gate)
            torch.mm(gate.mul_(self.mlp.up_proj(part)), self.mlp.down_proj.weight.T, out=out[at : at + self.rows])
        return out.view(x.shape)


def _bare(module: Any) -> bool:
    """A plain linear map in float32, without a bias and without hooks."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and module.weight.dtype == torch.float32
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
