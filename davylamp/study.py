"""Runs a study and decides its claims on their intervals' ends."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.core.nouns import Record
from davylamp.core.record import keep, new_record, versions
from davylamp.core.registry import find


def run_study(
    name: str,
    *,
    size: str = "quick",
    seeds: str | None = None,
    options: Mapping[str, Any] | None = None,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """The study's record, with one claim row each: text, held (True, False, or None: no interval to decide on), value, low, high.

    options: the study's own. A study returns pairs (claim, estimate); with None for a claim the estimate is only shown. It may return
    (pairs, figures) instead, with figures as `report/figures.py` draws them.
    """
    entry = find("study", name)
    given: dict[str, Any] = {"size": size, **({"seeds": seeds} if seeds is not None else {}), **(options or {})}
    filled = entry.options(given)
    started = time.monotonic()
    observed = entry.load()(**filled)
    figures: list[dict[str, Any]] = []
    if isinstance(observed, tuple):
        observed, figures = observed
    shown: dict[str, Any] = {"figures": figures} if figures else {}
    record = new_record(
        "study",
        entry.name,
        {"study": {"name": entry.name, "version": entry.version, "options": filled, "files": _files(filled)}},
        command=list(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **versions(),
        **shown,
    )
    claims = [
        {
            "text": claim.text,
            "held": claim.held(estimate),
            "control": claim.control,
            "value": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "n": estimate.n,
            "unscored": estimate.unscored,
            "unit": estimate.unit,
            "method": estimate.method,
        }
        for claim, estimate in observed
        if claim is not None
    ]
    estimates = tuple(
        replace(estimate, name=estimate.name or claim.quantity, arm=estimate.arm or claim.arm) if claim else estimate
        for claim, estimate in observed
    )
    record = replace(
        record,
        status="finished",
        claims=tuple(claims),
        estimates=estimates,
        cost={"seconds": round(time.monotonic() - started, 3)},
    )
    folder = keep(runs, record)
    return folder, record


def _files(options: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files that options name, so that a record is of these rows and not only of this path."""
    named = {name: Path(value) for name, value in options.items() if isinstance(value, str) and value}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in named.items() if path.is_file()}
