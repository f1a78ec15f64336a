"""The commands over runs that are there: report, compare, judge again, run again. The rest of the command line is in `cli.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from davylamp.cli import _await, _echo_json, _print, _report, json_option, main, runs_option
from davylamp.core.errors import InputError

if TYPE_CHECKING:
    from davylamp.core.nouns import Record


@main.command()
@click.argument("run", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where to write [default: report.html in the first run's folder]."
)
@click.option("--title", help="Headline of the report.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "eval"]),
    default="html",
    show_default=True,
    help="eval: a log for `inspect view`, run.eval in each run's folder.",
)
@runs_option
def report(run: tuple[str, ...], out: Path | None, title: str | None, form: str, runs: Path) -> None:
    """Write the HTML report, or inspect logs, of one or more RUNs (folder, start of an id, or last)."""
    from davylamp.core.record import find_run, load

    folders = [find_run(runs, name) for name in run]
    if form == "eval":
        for path in _logs(folders, out, title):
            click.echo(str(path))
        return
    path = out or folders[0] / "report.html"
    _report(path.parent, folders, title=title or load(folders[0]).name, path=path)
    click.echo(str(path))


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--out", type=click.Path(path_type=Path), help="Also write an HTML report here.")
@runs_option
@json_option
def compare(a: str, b: str, out: Path | None, runs: Path, as_json: bool) -> None:
    """Compare two runs of one suite, B minus A: paired by row, clustered by group, Holm-corrected."""
    from davylamp.core.compare import compare as compare_runs
    from davylamp.core.record import find_run

    folders = find_run(runs, a), find_run(runs, b)
    found = compare_runs(*folders)
    if out is not None:
        _report(
            out.parent,
            list(folders),
            title=f"{found['suite']}: {found['a']['target']} and {found['b']['target']}",
            path=out,
            comparisons=[found],
        )
    if as_json:
        _echo_json(found)
        return
    click.echo(f"{found['suite']}: B {found['b']['target']} minus A {found['a']['target']}")
    for row in found["rows"]:
        difference = row["difference"]
        shown = "no pairs" if difference["value"] is None else f"{100 * difference['value']:+.1f} pp"
        if difference["low"] is not None:
            shown += f" [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
        p = "" if row["p_holm"] is None else f"  p(Holm) {row['p_holm']:.3g}"
        slice_ = f"[{row['category'] or row['arm']}]" if row["category"] or row["arm"] else ""
        click.echo(f"  {row['metric'] + slice_:45} {shown:28}{p}  {row['pairs']} pairs, {row['left_out']} left out")


@main.command()
@click.argument("run")
@click.option("--judge", "-j", "name", required=True, help="The judge that judges anew.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@runs_option
@json_option
def rejudge(run: str, name: str, quiet: bool, runs: Path, as_json: bool) -> None:
    """Judge the replies of RUN again, without asking the target again."""
    from davylamp.core.evaluate import rejudge as judge_again
    from davylamp.core.judges import load_judge
    from davylamp.core.record import find_run

    judging = load_judge(name)

    async def go() -> tuple[Path, Record]:
        try:
            return await judge_again(find_run(runs, run), judging, runs=runs, quiet=quiet, command=sys.argv[1:])
        finally:
            await judging.close()

    folder, record = _await(go())
    _report(folder, [folder], title=record.name)
    _print(folder, record, as_json)


@main.command()
@click.argument("run", nargs=-1, required=True)
@runs_option
@json_option
def ksafe(run: tuple[str, ...], runs: Path, as_json: bool) -> None:
    """Safe@1, Safe@K, ConsSafe@K of one or more RUNs, thought and answer apart (run with --epochs K)."""
    from davylamp.core.record import find_run
    from davylamp.ksafe import k_report, k_table

    folders = [find_run(runs, name) for name in run]
    if as_json:
        _echo_json({str(folder): [e.json() for e in k_report(folder)[0]] for folder in folders})
    else:
        click.echo(k_table(folders))


@main.command()
@click.argument("run")
@click.option("--target", help="Put the same questions to another target.")
@runs_option
def again(run: str, target: str | None, runs: Path) -> None:
    """Run the command of RUN again: finishes what is missing, or with --target asks another target the same."""
    from davylamp.core.record import find_run, load

    command = [str(word) for word in load(find_run(runs, run)).about.get("command", ())]
    if not command:
        raise InputError(f"run {run} was not started from the command line, so there is no command to run again")
    if target is not None:
        names = [i for i, word in enumerate(command) if word in ("--target", "-t")]
        if command[0] != "eval" or not names:
            raise InputError(f"--target fits eval runs, and {run} is a {command[0]} run")
        command[names[0] + 1] = target
    click.echo("davylamp " + " ".join(command), err=True)
    sys.argv[1:] = command  # the record shall hold the command that it is a record of
    main(args=command, standalone_mode=False)


def _logs(folders: Sequence[Path], out: Path | None, title: str | None) -> list[Path]:
    """Each run as an inspect log; a `check` stands for its runs."""
    from davylamp.core.needs import need

    need("inspect", "report --format eval")
    from davylamp.inspect_bridge import write_log
    from davylamp.report.runs import gather

    found = [run.folder for run in gather(folders)]
    if title is not None or (out is not None and len(found) != 1):
        what = "no --title" if title is not None else f"one run with --out, got {len(found)}"
        raise InputError(f"--format eval takes {what}")
    return [write_log(folder, out or folder / "run.eval") for folder in found]
