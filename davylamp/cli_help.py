"""The commands that help: what there is, one thing whole, something new, the tour. The rest of the command line is in `cli.py`."""

from __future__ import annotations

from pathlib import Path

import click

from davylamp.cli import json_option, main, runs_option


@main.command("list")
@click.argument("kind", required=False)
@json_option
def list_command(kind: str | None, as_json: bool) -> None:
    """List what there is: suites, judges, guards, studies, …, systems. Without KIND, all."""
    from davylamp.show import list_entries

    list_entries(kind, as_json)


@main.command()
@click.argument("name")
@json_option
@runs_option
def show(name: str, as_json: bool, runs: Path) -> None:
    """Show one thing whole: a suite, judge, guard or study, a system's number (08), a run, `case`, or `targets`."""
    from davylamp.show import show_name

    show_name(name, as_json, runs)


@main.command()
@click.argument("kind", type=click.Choice(["suite", "guard"]))
@click.argument("name")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Where to write [default: here]."
)
def new(kind: str, name: str, folder: Path) -> None:
    """Write a working suite or guard NAME, and its test, to start from."""
    from davylamp.show import new_files

    for path in new_files(kind, name, folder):
        click.echo(str(path))


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what is installed, what is missing, and what to type."""
    from davylamp.show import doctor as examine

    examine(as_json)


@main.command()
@runs_option
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def tour(runs: Path, quiet: bool) -> None:
    """Walk through the product on the embedded models: about two minutes, ends with one HTML report."""
    from davylamp.tour import run_tour

    click.echo(str(run_tour(runs, quiet=quiet)))
