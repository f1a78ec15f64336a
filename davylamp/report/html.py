"""The report: run folders in, one self-contained HTML file out. No script, no request, readable on paper.

Every text that reaches the page goes through `visible` and the template's autoescaping, so that what a model wrote stays text.
`page.html` is the template and `page.css` its style; a record of any verb fits them, and parts that it does not have are left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from davylamp.core.errors import InputError
from davylamp.core.policy import Decision
from davylamp.core.record import write_atomic
from davylamp.core.tally import metric_from
from davylamp.report import caveats, claims, plots, results, worst
from davylamp.report.runs import SUITE, Run, gather, provenance

GATE_WORDS = {"fail": "crossed", "unsure": "not decidable", "pass": "kept"}
CLAIM_WORDS = {"fail": "not held", "unsure": "not decidable", "pass": "held"}


def write_report(
    path: Path,
    folders: Sequence[Path],
    *,
    title: str,
    decisions: Sequence[Decision] = (),
    comparisons: Sequence[Mapping] = (),
    skipped: Sequence[tuple[str, str]] = (),
    rows_shown: int = 20,
    sensitive: bool = True,
) -> None:
    """Write the report of these run folders to `path`: one HTML file that needs nothing else.

    One folder gives the report of a run, several stand side by side by suite and target. decisions: gates, from `core.policy.decide`.
    comparisons: from `core.compare.compare`.  skipped: (what, why) of what was not run.  rows_shown: worst rows kept for each run.
    sensitive: blur excerpts of replies until they are opened.  Equal input gives equal bytes.
    Raises InputError without folders, for rows that cannot be read, and for `about["figures"]` that `report/figures.py` does not know.
    """
    if not folders:
        raise InputError("a report needs at least one run folder, got none")
    if rows_shown < 0:
        raise InputError(f"rows_shown must be 0 or more, got {rows_shown}")
    runs = gather(folders)
    for run in runs:
        run.rows = _rows(run, rows_shown)
    gates = results.gates(runs, decisions)
    sections = results.sections(runs, gates)
    claimed = [(run.title, claims.claims(run)) for run in runs if run.record.claims]
    found = [claim for _, groups in claimed for group in groups for claim in group["rows"]]
    controls = [claim["state"] for claim in found if claim["control"]]
    verdicts = (
        results.verdict([gate["view"]["state"] for gate in gates], "limit", GATE_WORDS),
        results.verdict([claim["state"] for claim in found if not claim["control"]], "claim", CLAIM_WORDS),
        results.verdict(controls, "control", CLAIM_WORDS),
    )
    page = {
        "title": title,
        "runs": [provenance(run) for run in runs],
        "facts": caveats.facts(runs),
        "gates": sorted((gate["view"] for gate in gates), key=lambda view: list(GATE_WORDS).index(view["state"])),
        "verdicts": [verdict for verdict in verdicts if verdict],
        "sections": sections,
        "claimed": claimed,
        "notices": caveats.notices(runs),
        "caveats": caveats.caveats(runs, sections),
        "comparisons": [results.comparison(item) for item in comparisons],
        "skipped": list(skipped),
        "judges": caveats.judges(runs),
        "rows": [
            {"title": run.title, "picked": run.rows, "arms": len(_arms(run)) > 1} for run in runs if run.rows.counts
        ],
        "rows_open": 10 if len(runs) == 1 else 5,
        "named": results.category,
        "sensitive": sensitive,
        "version": runs[0].record.about.get("davylamp", ""),
        "gate_words": GATE_WORDS,
        "claim_words": CLAIM_WORDS,
        "style": Markup(_beside("page.css")),
        "plots": plots,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _template().render(page))


def _rows(run: Run, shown: int) -> worst.Picked:
    metrics = [metric_from(row) for row in run.part(SUITE).get("metrics", ())]
    try:
        return worst.pick(run.folder / "rows.jsonl", metrics, shown)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{run.folder / 'rows.jsonl'} holds a line that is not a row of a run: {error!r:.80}"
        ) from None


def _arms(run: Run) -> set[str | None]:
    return {row["facts"].get("arm") for row in (*run.rows.worst, *run.rows.unscored, *run.rows.failed)}


@functools.cache
def _template() -> Any:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["coded"] = coded
    return environment.from_string(_beside("page.html"))


def coded(text: str) -> Markup:
    """Text of a note, with what stands between backticks as code.

    >>> print(coded("see `a < b`"))
    see <code>a &lt; b</code>
    """
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(plots.visible(text)))))


def _shown(value: Any) -> Any:
    """Whatever the template prints: drawn pictures and counts as they are, nothing for None, all else as visible text."""
    if isinstance(value, Markup | int):
        return value
    return "" if value is None else plots.visible(str(value))


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
