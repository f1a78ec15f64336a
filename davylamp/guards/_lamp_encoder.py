"""The embedding of `lamp`: a BERT encoder of the all-MiniLM-L6-v2 kind, read from its folder, with a low-rank adapter and small heads.

The forward pass is written out instead of taken from transformers because a guard pays it on every message: with the weights in int8 it
costs about a third of the CPU time (see benchmarks/lamp.py), it needs no transformers at run time, and the same code trains the adapter.
`tests/guards/test_lamp_encoder.py` holds it against transformers' own. Sources: arXiv:1810.04805 (BERT), arXiv:2002.10957 (MiniLM),
arXiv:2106.09685 (low-rank adapters), arXiv:1908.10084 (mean pooling).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from davylamp.core import InputError

Linear = Callable[[torch.Tensor], torch.Tensor]
#: The linear layers of a block that carry an adapter, with the names of their weights; query, key and value are one product.
PARTS = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
}
PIECES = 96  # word pieces of a window
STRIDE = 72  # so that neighbouring windows share 24 pieces
LARGEST = 63  # of an int8 weight: two products with activations up to 255 then fit the 16-bit sums of CPUs without VNNI
CONTEXT = 40  # word pieces of what was said before


class Encoder:
    """The encoder with its weights. adapter: name -> (A, B), added as x A' B' to the linear layer of that name."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], tokenizer: Tokenizer):
        self.width, self.heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        self.layers, self.eps = int(config["num_hidden_layers"]), float(config.get("layer_norm_eps", 1e-12))
        self.weights, self.tokenizer = dict(weights), tokenizer
        table = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        self.positions = table
        self.linear: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in range(self.layers):
            for part, names in PARTS.items():
                full = [f"encoder.layer.{layer}.{name}" for name in names]
                self.linear[f"{layer}.{part}"] = (
                    torch.cat([weights[f"{name}.weight"] for name in full]),
                    torch.cat([weights[f"{name}.bias"] for name in full]),
                )
        self.adapter: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.fast: dict[str, Linear] = {}

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name in self.fast:
            return self.fast[name](x)
        out = F.linear(x, *self.linear[name])
        if name in self.adapter:
            a, b = self.adapter[name]
            out = out + F.linear(F.linear(x, a), b)
        return out

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            x, (self.width,), self.weights[f"{name}.LayerNorm.weight"], self.weights[f"{name}.LayerNorm.bias"], self.eps
        )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first block reads: (rows, pieces) ids -> (rows, pieces, width)."""
        x = self.weights["embeddings.word_embeddings.weight"][ids] + self.positions[: ids.shape[1]]
        return self._norm("embeddings", x)

    def block(self, layer: int, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """One block. mask: (rows, 1, 1, pieces) bools, True = a piece to attend to; None = all."""
        rows, pieces, width = x.shape
        q, k, v = (
            self._linear(f"{layer}.qkv", x)
            .view(rows, pieces, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(rows, pieces, width)
        name = f"encoder.layer.{layer}"
        x = self._norm(f"{name}.attention.output", x + self._linear(f"{layer}.out", attended))
        return self._norm(f"{name}.output", x + self._linear(f"{layer}.down", F.gelu(self._linear(f"{layer}.up", x))))

    def blocks(
        self, x: torch.Tensor, lengths: Sequence[int] | None = None, *, first: int = 0, upto: int | None = None
    ) -> torch.Tensor:
        """(rows, pieces, width) through the blocks `first` to `upto` (all). lengths: pieces of each row, if some are shorter."""
        mask = _mask(x.shape[1], lengths)
        wide = None if mask is None else mask[:, None, None, :]
        for layer in range(first, self.layers if upto is None else upto):
            x = self.block(layer, x, wide)
        return x

    @staticmethod
    def pool(x: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """(rows, width): the mean over each row's pieces."""
        mask = _mask(x.shape[1], lengths)
        return x.mean(1) if mask is None else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def hidden(self, ids: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """(rows, pieces) ids -> (rows, width): what the heads read."""
        return self.pool(self.blocks(self.embed(ids), lengths), lengths)

    def windows(self, text: str, context: str = "") -> list[list[int]]:
        """The text's word pieces in overlapping windows, each with its marks, and with the end of the context before it; often one."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        first, last = self.marks
        before = [first]
        if context:
            before += [*self.tokenizer.encode(context, add_special_tokens=False).ids[-CONTEXT:], last]
        starts = range(0, max(1, len(ids) - PIECES + STRIDE), STRIDE)
        return [[*before, *ids[start : start + PIECES], last] for start in starts]

    @property
    def marks(self) -> tuple[int, int]:
        """The ids of [CLS] and [SEP]."""
        first, last = (self.tokenizer.token_to_id(mark) for mark in ("[CLS]", "[SEP]"))
        if first is None or last is None:
            raise InputError("the encoder's tokenizer has no [CLS] and [SEP]. Expected a BERT tokenizer")
        return first, last

    def merge(self) -> None:
        """Add the adapter into the weights, for good: the same output without its cost."""
        for name, (a, b) in self.adapter.items():
            weight, bias = self.linear[name]
            self.linear[name] = (weight + b @ a, bias)
        self.adapter = {}

    def quantise(self) -> None:
        """From now on the linear layers multiply int8 weights (by output row) with activations quantised as they come.

        Texts must go through one at a time after this: an activation's scale is taken over the whole tensor, so that in a batch the
        score of one text would hang on the others. Raises InputError where this build of torch has no such kernels.
        """
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the tensor type is called deprecated; the kernels have no successor in torch yet
            try:
                for name, (weight, bias) in self.linear.items():
                    scale = weight.abs().amax(1).clamp_min(1e-8).double() / LARGEST
                    zero = torch.zeros(len(weight), dtype=torch.long)
                    whole = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
                    self.fast[name] = _int8(torch.ops.quantized.linear_prepack(whole, bias))
            except (RuntimeError, AttributeError) as problem:
                self.fast = {}
                raise InputError(
                    f"this torch has no int8 kernels ({str(problem).splitlines()[0]}): use precision=float"
                ) from None


def _mask(pieces: int, lengths: Sequence[int] | None) -> torch.Tensor | None:
    """(rows, pieces) bools, True where there is a piece; None if all rows are full."""
    if lengths is None or min(lengths) == pieces:
        return None
    return torch.arange(pieces)[None, :] < torch.tensor(lengths)[:, None]


def _int8(packed: Any) -> Linear:
    multiply = torch.ops.quantized.linear_dynamic
    return lambda x: multiply(x, packed, reduce_range=False)


def load_encoder(folder: Path) -> Encoder:
    """The encoder in a folder of the sentence-transformers or transformers kind. Raises InputError if it is none that fits.

    Wanted: config.json (model_type bert, gelu), model.safetensors and tokenizer.json or vocab.txt.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as problem:
        raise InputError(f"{folder} is no encoder: {problem}. Expected config.json and model.safetensors") from None
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise InputError(
            f"{folder}: expected a BERT encoder with gelu, got {config.get('model_type')} with {config.get('hidden_act')}"
        )
    weights = {name.removeprefix("bert."): value.float() for name, value in weights.items()}
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.txt").is_file():
        from tokenizers.implementations import BertWordPieceTokenizer

        tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"))._tokenizer
    else:
        raise InputError(f"{folder} has neither tokenizer.json nor vocab.txt")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        return Encoder(config, weights, tokenizer)
    except KeyError as problem:
        raise InputError(f"{folder / 'model.safetensors'} lacks the weight {problem}") from None


def encoder_hash(folder: Path) -> str:
    """SHA-256 of the encoder's weights and tokenizer: the adapter fits this encoder and no other."""
    state = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            state.update(name.encode())
            with (folder / name).open("rb") as file:
                while block := file.read(2**20):
                    state.update(block)
    return state.hexdigest()
