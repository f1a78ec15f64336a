"""The whole training of `lamp` as one seeded call: rows in, a folder of weights and a card's numbers out. See docs/guards.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from davylamp.core import Case, InputError
from davylamp.core.rows import digest
from davylamp.guards._lamp_encoder import encoder_hash, load_encoder
from davylamp.guards._lamp_fit import encoder_scores, fit_encoder, fit_hash, hash_scores, platt
from davylamp.guards._lamp_hash import HashHead, read_weights, write_weights
from davylamp.guards._lamp_rows import Sentence, balance, bucket, mixtures, near_copies, pieces, sentences, strangers
from davylamp.guards._lamp_text import latin

Say = Callable[[str], None]
PARTS = 10  # one of so many groups is held out for the calibration
HASH_MIXTURE, ENCODER_MIXTURE = 0.3, 0.15  # rows of several sentences, as a share of the others
CALIBRATED = (
    800  # held-out rows that the encoder is asked for its calibration: its time is dear, and two numbers need no more
)
CAUTION = 0.6  # log-odds that the point of equal errors is moved up: on own contrast pairs and prose, alarms fell by a third and F1 stayed
STRANGERS = 0.3  # rows of made-up words, likewise


def train(
    cases: Sequence[Case],
    out: Path,
    *,
    held: Sequence[Case] = (),
    extra: Sequence[Case] = (),
    encoder: Path | None = None,
    start: Path | None = None,
    hashed: bool = True,
    seed: int = 0,
    hash_epochs: int = 3,
    encoder_epochs: float = 1.5,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Train on `cases` and write `hashed.npz`, and with an encoder `minilm.npz`, into `out`. Returns what was used, in plain types.

    held: rows that the guard will be measured on; near copies of them are taken out.  extra: more rows for the hashed head alone, which
    needs many and takes them cheaply.
    start: a folder whose `minilm.npz` the encoder's training goes on from.  hashed: False leaves the hashed head as it
    is.  Each head has its own stream of random numbers.
    Raises InputError if a class is absent.
    """
    texts = [case.messages[-1].text for case in held]
    facts: dict[str, Any] = {"seed": seed, "torch": torch.__version__}
    out.mkdir(parents=True, exist_ok=True)
    if hashed:
        rng = np.random.default_rng([seed, 0])
        used, kept_out, about = _split(sentences([*cases, *extra]), texts, say)
        used += mixtures(used, round(HASH_MIXTURE * len(used)), rng=rng)
        used = balance(pieces([*used, *strangers(used, round(STRANGERS * len(used)), rng=rng)]))
        arrays = fit_hash(used, rng=rng, epochs=hash_epochs, say=say)
        scores = hash_scores(HashHead(arrays), kept_out)
        about |= {"calibration": _scale(scores, kept_out), "epochs": hash_epochs}
        write_weights(out / "hashed.npz", arrays, {**facts, **about})
        facts["hashed"] = about
    if encoder is not None:
        rng = np.random.default_rng([seed, 1])
        rows = [row for row in sentences(cases) if latin(row.text)]
        used, kept_out, about = _split(rows, texts, say)
        used += mixtures(used, round(ENCODER_MIXTURE * len(used)), rng=rng)
        model, before = load_encoder(encoder), None
        if start is not None:
            before, earlier = read_weights(start / "minilm.npz")
            if earlier["encoder"] != encoder_hash(encoder):
                raise InputError(f"{start / 'minilm.npz'} was trained on another encoder")
            about["start"] = earlier["rows"]
        arrays = fit_encoder(model, used, rng=rng, epochs=encoder_epochs, start=before, say=say)
        asked = [kept_out[i] for i in sorted(rng.permutation(len(kept_out))[:CALIBRATED].tolist())]
        scores = encoder_scores(model, arrays, asked)
        about |= {"calibration": _scale(scores, asked), "epochs": encoder_epochs}
        about["encoder"] = encoder_hash(encoder)
        write_weights(out / "minilm.npz", arrays, {**facts, **about})
        facts["minilm"] = about
    return facts


def _scale(scores: Sequence[float], rows: Sequence[Sentence]) -> tuple[float, float]:
    """Slope and shift that put a head's logits on the common scale."""
    slope, shift = platt(scores, [row.label for row in rows])
    return slope, shift - CAUTION


def _split(
    rows: list[Sentence], held: Sequence[str], say: Say
) -> tuple[list[Sentence], list[Sentence], dict[str, Any]]:
    """Training rows, rows held out by group for the calibration, and what they are in plain types."""
    near = near_copies([row.text for row in rows], held) if held else set()
    rows = [row for i, row in enumerate(rows) if i not in near]
    kept_out = [row for row in rows if bucket(row.group, PARTS) == 0]
    used = [row for row in rows if bucket(row.group, PARTS) != 0]
    for part, name in ((used, "training"), (kept_out, "calibration")):
        if {row.label for row in part} != {0, 1}:
            raise InputError(
                f"the {name} rows must hold safe and unsafe ones, got {len(part)} rows of one label or none"
            )
    say(f"{len(used)} rows to train on, {len(kept_out)} held out, {len(near)} near copies of measured rows left out")
    about = {
        "rows": digest([[row.text, row.context, row.label] for row in used]),
        "counts": {
            f"{source} {label}": n for (source, label), n in sorted(Counter((r.source, r.label) for r in used).items())
        },
        "held_out": len(kept_out),
        "near_copies_left_out": len(near),
    }
    return used, kept_out, about
