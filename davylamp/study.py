"""Runs a study and decides its claims on their intervals' ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davylamp.core.nouns import Record
from davylamp.core.record import folder_for, new_record, save, versions
from davylamp.core.registry import find


def run_study(
    name: str, *, size: str = "quick", seeds: str | None = None, runs: Path = Path("runs"), command: Sequence[str] = ()
) -> tuple[Path, Record]:
    """The study's record, with one claim row each: text, held (True, False, or None: no interval to decide on), value, low, high."""
    entry = find("study", name)
    given: dict[str, Any] = {"size": size, **({"seeds": seeds} if seeds is not None else {})}
    options = entry.options(given)
    started = time.monotonic()
    observed = entry.load()(**options)
    record = new_record(
        "study",
        entry.name,
        {"study": {"name": entry.name, "version": entry.version, "options": options}},
        command=list(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **versions(),
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
            "method": estimate.method,
        }
        for claim, estimate in observed
    ]
    estimates = tuple(
        replace(estimate, name=estimate.name or claim.quantity, arm=estimate.arm or claim.arm)
        for claim, estimate in observed
    )
    record = replace(
        record,
        status="finished",
        claims=tuple(claims),
        estimates=estimates,
        cost={"seconds": round(time.monotonic() - started, 3)},
    )
    folder = folder_for(runs, record)
    save(folder, record)
    return folder, record
