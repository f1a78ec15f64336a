"""The commands of judging: how far to trust a judge, what one says, labels by people. The rest of the command line is in `cli.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from davylamp.cli import _await, _echo_json, _print, json_option, main, runs_option


@main.group()
def judge() -> None:
    """Judges and guards: what they say and how far to trust them."""


@judge.command("bench")
@click.argument("name")
@click.argument("rows", type=click.Path(path_type=Path))
@runs_option
@json_option
def judge_bench(name: str, rows: Path, runs: Path, as_json: bool) -> None:
    """Measure judge NAME on labelled ROWS (conversations that end in a reply; answer 1 or 0 in the judge's own sense).

    The measured error is stored in the runs folder and corrects every later rate of exactly this judge.
    """
    from davylamp.core.evaluate import bench_judge

    folder, record = _await(bench_judge(name, rows, runs=runs, command=sys.argv[1:]))
    _print(folder, record, as_json)


@judge.command("ask")
@click.argument("name")
@click.argument("reply")
@click.option("--request", default="", help="The user's message before the reply.")
def judge_ask(name: str, reply: str, request: str) -> None:
    """Let judge NAME judge one REPLY and print its verdict as JSON."""
    from davylamp.core.judges import load_judge
    from davylamp.core.nouns import Message

    judging = load_judge(name)

    async def go() -> dict[str, Any]:
        messages = (*([Message("user", request)] if request else []), Message("assistant", reply))
        try:
            return (await judging(messages)).json()
        finally:
            await judging.close()

    _echo_json(_await(go()))


@main.group()
def annotate() -> None:
    """Let people (or judges) label the replies of a run, blind to target and arm."""


@annotate.command("export")
@click.argument("run", nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--annotators", type=int, default=2, show_default=True, help="Sheets to write, each in its own order.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order.")
@runs_option
def annotate_export(run: tuple[str, ...], out: Path, annotators: int, seed: int, runs: Path) -> None:
    """Write one blind, shuffled sheet per annotator for one or more RUNs into folder OUT.

    The sheets hold prompts and replies: handle with care.
    """
    from numpy.random import default_rng

    from davylamp.core.record import find_run
    from davylamp.data.annotate import export_sheets

    folders = [find_run(runs, name) for name in run]
    for path in export_sheets(folders, out, annotators=annotators, rng=default_rng(seed)):
        click.echo(str(path))


@annotate.command("import")
@click.argument("sheets", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--key", "key_file", required=True, type=click.Path(path_type=Path), help="The key file that export wrote."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Labelled rows, for `davylamp judge bench`."
)
def annotate_import(sheets: tuple[Path, ...], key_file: Path, out: Path) -> None:
    """Join filled-in SHEETS into gold labels with their agreement, printed as JSON."""
    from davylamp.data.annotate import import_votes

    _echo_json(import_votes(sheets, key_file, out))
