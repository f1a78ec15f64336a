"""Claims as the page shows them: effect and control side by side, each with its limit drawn on the scale of its quantity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from davylamp.core.nouns import Estimate, Record
from davylamp.report import plots
from davylamp.report.runs import Run

#: A claim's text as `Claim.text` writes it: quantity: arm - against >= 0.3 | <= 0.3 | in [0.1, 0.3]
_TEXT = re.compile(r"(.*?): (.*) (?:>= (\S+)|<= (\S+)|in \[(\S+), (\S+)\])", re.DOTALL)


def matched(record: Record) -> list[int | None]:
    """For each claim of a record the index of its estimate, or None where the record does not hold it.

    Estimates mostly stand in the claims' order, so the next one with the claim's numbers is looked for first, then any.
    """
    numbers = [(e.value, e.low, e.high, e.n) for e in record.estimates]
    out: list[int | None] = []
    start = 0
    for claim in record.claims:
        wanted = (claim.get("value"), claim.get("low"), claim.get("high"), claim.get("n"))
        places = [index for index, found in enumerate(numbers) if found == wanted]
        index = next((index for index in places if index >= start), places[0] if places else None)
        out.append(index)
        start = start if index is None else index + 1
    return out


def beyond_claims(record: Record) -> list[Estimate]:
    """The estimates for the tables: all but those metrics whose every estimate is shown by a claim already."""
    shown = set(matched(record))
    kept = {(e.name, e.unit) for index, e in enumerate(record.estimates) if index not in shown}
    return [estimate for estimate in record.estimates if (estimate.name, estimate.unit) in kept]


def claims(run: Run) -> list[dict[str, Any]]:
    """The claims of a run in groups of one quantity and unit, so that an effect and its control share a scale."""
    record = run.record
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for claim, index in zip(record.claims, matched(record), strict=True):
        estimate = _estimate(claim, None if index is None else record.estimates[index])
        quantity, words, limits = read(str(claim.get("text", "")))
        view = {
            "words": words,
            "limit": _limit(limits, estimate.unit),
            "limits": [x for x in limits if x is not None],
            "state": {True: "pass", False: "fail"}.get(claim.get("held"), "unsure"),  # type: ignore[arg-type]
            "control": bool(claim.get("control")),
            "estimate": estimate,
        }
        groups.setdefault((quantity, estimate.unit), []).append(view)
    out = []
    for (quantity, _), rows in groups.items():
        axis = plots.axis_for([row["estimate"] for row in rows], [x for row in rows for x in row["limits"]])
        for row in rows:
            row["svg"] = plots.lane_svg(
                row["estimate"],
                axis,
                series=1 if row["control"] else 0,
                limits=row["limits"],
                label=f"{quantity}, {row['words']}",
            )
        out.append({"title": quantity.replace("_", " "), "rows": rows, "axis": plots.axis_svg(axis)})
    return out


def read(text: str) -> tuple[str, str, tuple[float | None, float | None]]:
    """Quantity, arms and (at least, at most) of a claim's text; a text of another form is kept whole.

    >>> read("unsafe_rate: top head off - random head off >= 0.3")
    ('unsafe_rate', 'top head off − random head off', (0.3, None))
    >>> read("it works")
    ('', 'it works', (None, None))
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        return "", text, (None, None)
    quantity, arms, least, most, low, high = match.groups()
    try:
        ends = [None if end is None else float(end) for end in (least or low, most or high)]
    except ValueError:
        return "", text, (None, None)
    return quantity, arms.replace(" - ", " − "), (ends[0], ends[1])


def _limit(limits: tuple[float | None, float | None], unit: str) -> str:
    low, high = (None if x is None else plots.number(x, unit) for x in limits)
    if low is not None and high is not None:
        return f"between {low} and {high}"
    return f"at least {low}" if low is not None else f"at most {high}" if high is not None else ""


def _estimate(claim: Mapping[str, Any], estimate: Estimate | None) -> Estimate:
    """The claim's estimate; where the record does not hold it, what the claim itself says of it."""
    if estimate is not None:
        return estimate
    value, low, high = (claim.get(name) for name in ("value", "low", "high"))
    method, unit = (str(claim.get(name) or "") for name in ("method", "unit"))
    return Estimate(value, low, high, int(claim.get("n") or 0), method=method, unit=unit)
