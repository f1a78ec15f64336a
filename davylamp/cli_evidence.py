"""The commands over what exists and what was shown: coverage map, safety case, evaluation cards. The rest is in `cli.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from davylamp.cli import _echo_json, _report, json_option, main, runs_option

FILE = click.Path(path_type=Path, exists=False)


@main.command()
@click.argument("evidence", nargs=-1, metavar="[RUN]...")
@click.option("--register", "own", type=FILE, help="Your own severity, likelihood and exposure (TOML), over ours.")
@runs_option
@json_option
def coverage(evidence: tuple[str, ...], own: Path | None, runs: Path, as_json: bool) -> None:
    """Show which threat is tested, defended and shown at which stage of a model's life, and where nothing is.

    RUN...: the runs that count as evidence; a check stands for its runs. Writes a report with the map.
    """
    from davylamp.core.record import find_run
    from davylamp.coverage import run_coverage, text

    folders = [find_run(runs, name) for name in evidence]
    folder, record, found = run_coverage(folders, runs=runs, own=own, command=sys.argv[1:])
    _report(folder, [folder], title="Coverage: stage of life x threat")
    if as_json:
        _echo_json({**found.json(), "id": record.id, "folder": str(folder)})
    else:
        click.echo(text(found))
    click.echo(f"{folder}/report.html", err=True)


@main.command()
@click.argument("evidence", nargs=-1, required=True, metavar="RUN...")
@click.option("--model", default="", help="Which of the measured models: its name, or the start of its hash.")
@click.option("--product", default="chat", show_default=True, help="What the model is put to: chat, retrieval, agent.")
@click.option("--requirements", "wanted", type=FILE, help="What the model owes (TOML) [default: shipped].")
@click.option("--waivers", "waived", type=FILE, help="[[waiver]] tables: requirement, by, reason, until.")
@runs_option
@json_option
def case(
    evidence: tuple[str, ...],
    model: str,
    product: str,
    wanted: Path | None,
    waived: Path | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Assemble the safety case of a model from RUN...: what it owes, what these runs show, what is missing.

    Exit 0 if every requirement is met or waived, 1 if one failed, 3 if one cannot be decided.
    """
    from davylamp.case import FAIL, PASS
    from davylamp.case_view import run_case, text
    from davylamp.core.record import find_run, to_json

    folders = [find_run(runs, name) for name in evidence]
    folder, record, found = run_case(
        folders, runs=runs, model=model, wanted=wanted, waived=waived, product=product, command=sys.argv[1:]
    )
    _report(folder, [folder], title=f"Safety case: {record.name}")
    if as_json:
        _echo_json({**to_json(record), "folder": str(folder)})
    else:
        click.echo(text(found))
    click.echo(f"{folder}/report.html", err=True)
    if found.verdict != PASS:
        raise SystemExit(1 if found.verdict == FAIL else 3)


@main.command()
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option(
    "--from", "evidence", multiple=True, metavar="RUN", help="A run whose judge, number and age count (again for more)."
)
@click.option("--cards", "own", type=FILE, help="Your own cards (TOML), over ours.")
@runs_option
@json_option
def cards(suites: tuple[str, ...], evidence: tuple[str, ...], own: Path | None, runs: Path, as_json: bool) -> None:
    """Show what each suite measures, by which judge, how fresh, and whether it can decide anything; whole for each SUITE named."""
    from datetime import UTC, datetime

    from davylamp.core.record import find_run
    from davylamp.report.cards import cards as made
    from davylamp.report.cards import named, text
    from davylamp.report.runs import gather

    found = made(gather([find_run(runs, name) for name in evidence]), own=own, now=datetime.now(UTC))
    chosen = named(suites, found) if suites else found
    if as_json:
        _echo_json([card.json() for card in chosen])
    else:
        click.echo(text(chosen, whole=bool(suites)))


@main.command()
@click.argument("file", type=FILE)
@click.argument("evidence", nargs=-1, metavar="[RUN]...")
@click.option("--register", "own", type=FILE, help="Your own register of threats (TOML), over ours.")
@runs_option
@json_option
def incidents(file: Path, evidence: tuple[str, ...], own: Path | None, runs: Path, as_json: bool) -> None:
    """Put incidents after release (rows of id, text and if known threat and date) beside the threats and the RUNs since.

    Shows which threat each belongs to, what no threat covers, and which stay open until a newer sound run. Exit 1 if any is open.
    """
    from davylamp.core.record import find_run
    from davylamp.incidents import from_file, text

    found = from_file(file, [find_run(runs, name) for name in evidence], own=own)
    if as_json:
        _echo_json(found.json())
    else:
        click.echo(text(found))
    if found.open:
        raise SystemExit(1)


@main.command()
@click.argument("evidence", nargs=-1, metavar="[RUN]...")
@click.option("--family", default="", help="Only this family of models, such as language.")
@click.option("--type", "type_", default="", help="Only this type of attack, such as jailbreak.")
@click.option("--role", default="", help="Only attack, or defence.")
@click.option("--access", default="", help="Only what works with this access: white, gray or black.")
@click.option("--state", default="", help="Only cells in this state, such as catalogued.")
@click.option("--refs", type=FILE, help="Works to attach: a .bib file with cells as keywords, or a .json list.")
@click.option("--csv", "as_table", is_flag=True, help="Comma-separated instead of text.")
@runs_option
@json_option
def matrix(
    evidence: tuple[str, ...], family: str, type_: str, role: str, access: str, state: str, refs: Path | None,
    as_table: bool, runs: Path, as_json: bool,
) -> None:  # fmt: skip
    """Show which published kinds of attack and defence have something here that executes them, by family of models."""
    from davylamp.core.record import find_run
    from davylamp.matrix import as_csv, chosen, text
    from davylamp.matrix import matrix as made

    found = made([find_run(runs, name) for name in evidence], refs=refs)
    cells = chosen(found, family=family, type=type_, role=role, access=access, state=state)
    if as_json:
        _echo_json([cell.json() for cell in cells])
    else:
        click.echo(as_csv(cells).rstrip() if as_table else text(cells))
