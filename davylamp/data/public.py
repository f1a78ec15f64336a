"""Rows of a public benchmark: from the user's file, else from the set's home on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from davylamp.core import InputError, RunError
from davylamp.core.needs import need
from davylamp.core.rows import read_objects

Row = tuple[str, Mapping[str, Any]]


def rows_of(
    rows: str, who: str, home: str, *, split: str, config: str | None = None, revision: str | None = None
) -> Iterator[Row]:
    """(place, row) of the .csv or .jsonl file `rows`; of the set `home` where it is empty. who: what needs them, for messages.

    Raises InputError for a file that cannot be read or is of another kind, NeedsError without `datasets`, RunError where the set cannot
    be had.
    """
    if rows:
        path = Path(rows)
        if path.suffix not in (".csv", ".jsonl"):
            raise InputError(f"rows of {who} must be a .csv or .jsonl file, got {rows!r}")
        for number, row in read_objects(path):
            yield f"{path.name} line {number}", row
        return
    need("data", f"{who} without --rows FILE")
    from datasets import load_dataset

    try:
        found = load_dataset(home, config, split=split, **({"revision": revision} if revision else {}))
    except Exception as problem:  # the hub's client raises many kinds; all mean that there are no rows
        raise RunError(f"could not fetch {home} ({type(problem).__name__}). Give your copy: --rows FILE") from None
    for number, row in enumerate(found, 1):
        yield f"{home} row {number}", row
