"""The commands of guards: what one says, what it is worth, how `lamp` is trained. The rest of the command line is in `cli.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from davylamp.cli import _await, _echo_json, _print, _report, json_option, main, runs_option


@main.group()
def guard() -> None:
    """Guards: what one says of a text, how far to trust it, and how to train the embedded one."""


@guard.command("check")
@click.argument("text")
@click.option("--guard", "name", default="lamp", show_default=True, help="The guard, with its options after a colon.")
@click.option("--reply-to", default="", help="The request, where TEXT is a reply to it.")
@click.option(
    "--role",
    type=click.Choice(["user", "assistant", "system", "tool"]),
    default="user",
    show_default=True,
    help="Who says TEXT.",
)
def guard_check(text: str, name: str, reply_to: str, role: str) -> None:
    """Let a guard judge one TEXT (`-`: standard input) and print its verdict as JSON."""
    from davylamp.guards_cli import check

    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    _echo_json(_await(check(name, text, reply_to=reply_to, role=role)))


@guard.command("bench")
@click.argument("name")
@click.argument("rows")
@click.option(
    "--fpr", type=float, default=0.02, show_default=True, help="Find the threshold that keeps the false alarms at this."
)
@click.option("--threshold", type=float, default=0.5, show_default=True, help="Scores at or above it count as unsafe.")
@click.option("--limit", type=int, help="Take only the first so many rows.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap intervals.")
@runs_option
@json_option
def guard_bench(name: str, rows: str, runs: Path, as_json: bool, **options: Any) -> None:
    """Measure guard NAME on labelled ROWS: a file, FORM:FILE, or FORM:OWNER/SET#SPLIT of the hub (answer 1 = unsafe).

    Quality at a threshold and over all, by category and language, the threshold for a stated rate of false alarms, and the time a message
    takes; each with its interval.
    """
    from davylamp.guards_cli import bench

    folder, record = _await(bench(name, rows, runs=runs, command=sys.argv[1:], **options))
    _report(folder, [folder], title=f"guard {record.name} on {Path(rows).stem}")
    _print(folder, record, as_json)


@guard.command("train")
@click.argument("name")
@click.option(
    "--rows", multiple=True, help="Labelled rows as for bench, `own` (our templates) or public:FOLDER; again for more."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the weights; new or empty.")
@click.option("--held", multiple=True, help="Rows to be measured on: near copies of them are left out; again for more.")
@click.option(
    "--encoder", default="auto", show_default=True, help="auto, hashed, or the folder of an all-MiniLM-L6-v2."
)
@click.option("--only", type=click.Choice(["hashed", "encoder"]), default=None, help="Train this head alone.")
@click.option("--start", default="", help="Weights the encoder's training goes on from: a folder, or `shipped`.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that is drawn.")
@click.option("--own-scale", type=float, default=1.0, show_default=True, help="Own rows, times what templates ask for.")
@click.option("--hash-epochs", type=int, default=3, show_default=True, help="Passes of the hashed head.")
@click.option("--encoder-epochs", type=float, default=1.5, show_default=True, help="Passes of the encoder's adapter.")
@click.option("--lenient", is_flag=True, help="Drop a row that cannot be read, with its reason, instead of stopping.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@runs_option
@json_option
def guard_train(
    name: str, rows: tuple[str, ...], out: Path, only: str | None, runs: Path, as_json: bool, **options: Any
) -> None:
    """Train guard NAME (only `lamp` can be trained so) on labelled rows and write its weights to --out."""
    from davylamp.guards_cli import train

    folder, record = train(name, rows, out, only=only or "", runs=runs, command=sys.argv[1:], **options)
    _print(folder, record, as_json)


@guard.command("label")
@click.argument("rows", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rater", required=True, help="Who labels: stands in every line.")
@click.option(
    "--guard", "name", default="", help="Show its score; of high_stakes also salient words and substitutions."
)
@click.option(
    "--proposals", default="roles", show_default=True, help="roles, or the folder of a masked language model."
)
@click.option("--port", type=int, default=8090, show_default=True, help="Port on 127.0.0.1.")
def guard_label(rows: Path, out: Path, rater: str, name: str, proposals: str, port: int) -> None:
    """Label the texts of ROWS on a local page, and rewrite them until the guard lets them pass; labels are appended to OUT."""
    from davylamp.label_page import run_label

    run_label(rows, out, rater=rater, guard=name, proposals=proposals, port=port)
