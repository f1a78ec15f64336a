"""What a reader must know beside the numbers: what is unfinished, how far the numbers carry, how good the judge is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from davylamp.core.rows import digest
from davylamp.core.stats import wilson
from davylamp.report import plots
from davylamp.report.runs import JUDGE, SUITE, TARGET, Run


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the whole report is about, for its head: (name, text)."""
    parts = {
        "Targets": [run.name(TARGET) for run in runs],
        "Suites": [run.name(SUITE) for run in runs],
        "Runs": [run.suite for run in runs if not run.name(SUITE)],
        "Models": [run.name("model") for run in runs],
        "Judges": [run.name(JUDGE) for run in runs],
        "Dates": [str(run.record.about.get("created") or "")[:10] for run in runs],
    }
    out = []
    for name, values in parts.items():
        found = list(dict.fromkeys(filter(None, values)))
        if found:
            out.append((name if len(found) > 1 else name.removesuffix("s"), ", ".join(found)))
    rows = sum(int(run.record.counts.get("rows", 0)) for run in runs)
    return [*out, ("Rows", f"{rows:,}")] if rows else out


def notices(runs: Sequence[Run]) -> list[str]:
    """What is unfinished, said at the top."""
    out = []
    for run in runs:
        counts = run.record.counts
        words = {"failed": "failed", "missing": "not asked"}
        parts = [f"{plots.many(counts[name], 'row')} {text}" for name, text in words.items() if counts.get(name)]
        if run.record.status != "finished" or parts:
            detail = f": {', '.join(parts)}" if parts else ""
            mend = (
                " The same command again asks only those." if parts else " The same command again goes on from there."
            )
            out.append(f"{run.title} is {run.record.status}{detail}.{mend}")
    return out


def caveats(runs: Sequence[Run], sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far the numbers carry, said with the numbers of this report."""
    out = []
    tiles = [(table, lane["estimate"]) for section in sections for table in section["tables"] for lane in table["tile"]]
    for table, estimate in tiles:
        if estimate.unit == "rate" and estimate.value == float(estimate.higher_is_better) and estimate.low is not None:
            end = plots.number(estimate.low if estimate.higher_is_better else estimate.high, estimate.unit)
            kind = "lower end" if estimate.higher_is_better else "upper end"
            out.append(
                f"{plots.number(estimate.value)} {table['name']} is not proof: with {estimate.n:,} rows, its {kind} is {end}."
            )
    small = sorted({estimate.n for _, estimate in tiles if 0 < estimate.n < 30})
    if small:
        out.append(f"A headline here rests on only {small[0]} rows. Read its interval, not its value.")
    unscored = sum(int(run.record.counts.get("unscored", 0)) + int(run.record.counts.get("failed", 0)) for run in runs)
    if unscored:
        out.append(
            f"{unscored:,} rows have no verdict. They are in no rate; the worst-case range shows how far they could move it."
        )
    if len(runs) > 1 or any(e.arm for run in runs for e in run.record.estimates):
        out.append(
            "Two numbers that differ may differ by noise. Only a tested difference, in a comparison table, is a difference."
        )
    if max((table["slices"] for section in sections for table in section["tables"]), default=0) > 6:
        out.append(
            "Of twenty intervals, about one misses its truth. The most striking slice of many is the likeliest to be that one."
        )
    if any(run.part(JUDGE) and run.record.verb == "eval" and not run.record.about.get("judge_error") for run in runs):
        out.append("The error of a judge used here was not measured, so its mistakes are inside the numbers.")
    if any(run.record.claims for run in runs):
        out.append(
            "A claim is decided on the end of its interval, for these seeds, sizes and inputs, and says nothing beyond them."
        )
    if any(run.record.verb == "eval" for run in runs):
        out.append(
            "These are replies to these questions, under these settings. They say little about questions that were not asked."
        )
    return list(dict.fromkeys(out))


def judges(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Each judge and its measured error, in words."""
    out: dict[str, dict[str, str]] = {}
    for run in runs:
        name, error = run.name(JUDGE), run.record.about.get("judge_error") or {}
        counts = error.get("counts") or run.record.about.get("confusion") or {}
        if not name:
            continue
        if not counts:
            text = f"Error not measured. Measure it: davylamp judge bench {name} ROWS.jsonl"
        else:
            found = [(counts["true_hits"], counts["positives"]), (counts["true_passes"], counts["negatives"])]
            rates = [
                f"{plots.number(a / b)} {plots.interval(*wilson(a, b))} of {b:,}" if b else "none" for a, b in found
            ]
            source = f" Measured on {error['rows']} (record {str(error['from'])[:8]})." if error.get("rows") else ""
            text = f"Says yes on {rates[0]} labelled yes, and no on {rates[1]} labelled no.{source}"
        out[digest(dict(run.part(JUDGE)))] = {
            "name": name,
            "version": str(run.part(JUDGE).get("version", "?")),
            "text": text,
        }
    return list(out.values())
