"""The encoder with the shipped adapter, ready to score: the part of `lamp` that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from davylamp.core import InputError
from davylamp.guards._lamp_encoder import encoder_hash, load_encoder
from davylamp.guards._lamp_hash import HAZARDS, read_weights
from davylamp.guards._lamp_text import Reading


class MiniLM:
    """Scores texts one at a time: a text's score never hangs on what else is asked at the same moment."""

    def __init__(self, folder: Path, weights: Path, *, precision: Literal["int8", "float"] = "int8"):
        if precision not in ("int8", "float"):
            raise InputError(f"precision must be int8 or float, got {precision!r}")
        arrays, about = read_weights(weights)
        self.encoder, self.sha256 = load_encoder(folder), encoder_hash(folder)
        if self.sha256 != about["encoder"]:
            raise InputError(
                f"{weights.name} was trained on another encoder than the one in {folder}. "
                "Train an adapter for it: davylamp guard train lamp --encoder FOLDER"
            )
        self.calibration = tuple(about["calibration"])
        self.head, self.bias = torch.from_numpy(arrays["head"]), torch.from_numpy(arrays["bias"])
        if self.head.shape != (1 + len(HAZARDS), self.encoder.width):
            raise InputError(f"the head in {weights.name} does not fit the encoder: {tuple(self.head.shape)}")
        names = sorted(name.removesuffix(".a") for name in arrays if name.endswith(".a"))
        self.encoder.adapter = {
            name: (torch.from_numpy(arrays[f"{name}.a"]).float(), torch.from_numpy(arrays[f"{name}.b"]).float())
            for name in names
        }
        self.encoder.merge()
        if precision == "int8":
            self.encoder.quantise()

    def scores(self, reads: Sequence[Reading]) -> list[list[float]]:
        """(1 + hazards) logits for each text, those of its most unsafe window."""
        out = []
        with torch.inference_mode():
            for read in reads:
                best: torch.Tensor | None = None
                for window in self.encoder.windows(read.text, read.context):
                    logits = F.linear(self.encoder.hidden(torch.tensor([window])), self.head, self.bias)[0]
                    if best is None or logits[0] > best[0]:
                        best = logits
                assert best is not None
                out.append(best.tolist())
        return out
