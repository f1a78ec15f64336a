"""The commands of generated tests with coverage: `davylamp astral …`. The rest of the command line is in `cli.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from davylamp.cli import (
    _decide,
    _echo_json,
    _gate,
    _limits,
    _print,
    _report,
    _rules,
    _settings,
    asks_target,
    json_option,
    main,
    runs_option,
)

path_type = click.Path(path_type=Path)


@main.group()
def astral() -> None:
    """Tests over category x style x technique: write, ask, compare, replay."""


@astral.command("generate")
@click.argument("knowledge")
@click.argument("out", type=path_type)
@click.option(
    "--model", "-m", default="templates", show_default=True, help="Who writes: a target, templates, or world."
)
@click.option("--version", default="rag_fs", show_default=True, help="rag, rag_fs, rag_fs_ts, baseline or padded.")
@click.option("--n", default=3, show_default=True, help="Tests of a cell.")
@click.option("--t", default=3, show_default=True, help="3: every cell; 2: a covering array of pairs.")
@click.option("--k", default=4, show_default=True, help="Examples retrieved for a cell.")
@click.option("--alike", default=0.8, show_default=True, help="5-gram Jaccard from which a test repeats another.")
@click.option("--features", default="", help="TOML with axes of your own.")
@click.option("--blocks", default="", help="TOML with few-shot blocks of your own.")
@click.option("--encoder", default="", help="Retrieve by embeddings: a folder with a BERT encoder, or lamp.")
@click.option("--search", default="", help="News: FILE.jsonl, tavily, tavily@URL or python/FILE.py:NAME.")
@click.option("--day", default="", help="Day of the news, like 2026-11-25.")
@click.option("--fresh", default=30, show_default=True, help="Days until tests from news expire.")
@click.option(
    "--on-search-error", "on_search", type=click.Choice(["abort", "skip"]), default="abort", show_default=True
)
@click.option("--length", default=0, help="Characters of version padded.")
@click.option(
    "--generate-tries",
    "writes",
    default=5,
    show_default=True,
    help="Texts in a row without a new test before a cell is given up.",
)
@click.option("--max-tokens", default=1024, show_default=True, help="Length of one text of the writer.")
@click.option("--temperature", default=1.0, show_default=True, help="Of the writer.")
@click.option("--width", default=16, show_default=True, help="Cells written at a time.")
@click.option("--seed", default=0, show_default=True)
@click.option("--lenient", is_flag=True, help="Skip and count records of KNOWLEDGE that cannot be used.")
@click.option("--repair", is_flag=True, help="Drop a last line of OUT that is broken off.")
@click.option("--require-full-coverage", "full", is_flag=True, help="Exit 1 if a cell has too few tests.")
@runs_option
@json_option
def generate_command(knowledge: str, out: Path, full: bool, runs: Path, as_json: bool, **options: Any) -> None:
    """Write tests to OUT from labelled prompts (KNOWLEDGE, or - for none). The same command goes on where it ended."""
    from davylamp.astral import write_suite
    from davylamp.data.astral_prompts import Plan
    from davylamp.models.news import parse_day

    given = {
        name: options[name] for name in ("version", "n", "t", "k", "alike", "fresh", "on_search", "length", "width")
    }
    plan = Plan(**given, tries=options["writes"], day=parse_day(options["day"], "--day") if options["day"] else None)
    own = ("model", "features", "blocks", "encoder", "search", "max_tokens", "temperature", "seed", "repair")
    folder, record = write_suite(knowledge, out, plan, **{name: options[name] for name in own}, strict=not options["lenient"],
                                 runs=runs, command=sys.argv[1:])  # fmt: skip
    _report(folder, [folder], title=f"Tests by {options['model']}")
    _print(folder, record, as_json)
    for reason, count in record.about["dropped"].items():
        click.echo(f"{count} tests left out: {reason}", err=True)
    styled = options["version"] in ("rag_fs", "rag_fs_ts")
    short = next((e for e in record.estimates if e.name == f"coverage_{min(options['t'], 3)}"), None)
    lacking = any("no" in reason.split() or reason == "not generated" for reason in record.about["dropped"])
    if full and (lacking or (styled and short is not None and short.value != 1.0)):
        click.echo("coverage is not full, and --require-full-coverage was said", err=True)
        raise SystemExit(1)


@astral.command("coverage")
@click.argument("suite", type=path_type)
@click.option("--features", default="", help="TOML with axes of your own.")
@click.option("--n", default=1, show_default=True, help="Tests that a cell needs.")
@click.option("--repair", is_flag=True, help="Drop a last line that is broken off.")
@click.option("--require-full-coverage", "full", is_flag=True, help="Exit 1 if a cell has too few tests.")
@runs_option
@json_option
def coverage_command(suite: Path, features: str, n: int, repair: bool, full: bool, runs: Path, as_json: bool) -> None:
    """Which cells the tests in SUITE cover, and which are missing."""
    from davylamp.astral import suite_coverage

    folder, record, missing = suite_coverage(
        suite, features=features, n=n, repair=repair, runs=runs, command=sys.argv[1:]
    )
    _report(folder, [folder], title=f"Coverage of {suite.name}")
    if as_json:
        _echo_json({"id": record.id, "estimates": [e.json() for e in record.estimates], "missing": missing})
    else:
        _print(folder, record, False)
        for name in missing[:20]:
            click.echo(f"missing: {name}")
        if len(missing) > 20:
            click.echo(f"… and {len(missing) - 20} more (--json lists all)")
    if full and missing:
        raise SystemExit(1)


@astral.command("run")
@click.argument("suites", nargs=-1, required=True, type=path_type)
@click.option("--target", "-t", required=True, help="What is asked, e.g. openai/MODEL@URL, hf/PATH, organism/aligned.")
@click.option("--baseline", type=path_type, help="Plain tests of equal number to compare with.")
@click.option("--judge", "-j", help="The oracle, e.g. astral_oracle:model=openai/MODEL [default: the suite's].")
@click.option("--today", default="", help="Leave out tests whose news had expired by then.")
@click.option("--repair", is_flag=True, help="Drop a last line that is broken off.")
@asks_target
@json_option
def run_command(suites: tuple[Path, ...], target: str, as_json: bool, fail_if: tuple[str, ...], **options: Any) -> None:
    """Ask a target the tests in SUITES and put them side by side. The same command goes on where it ended."""
    from davylamp.astral import run_astral, unfinished
    from davylamp.core.errors import InputError
    from davylamp.core.record import load

    if options["epochs"] != 1:
        raise InputError("tests are asked once: write more of them instead of --epochs")
    rules = _rules(fail_if)
    own = ("baseline", "judge", "today", "repair", "seed", "limit", "runs", "quiet")
    folder, record, parts = run_astral(suites, target, **{name: options[name] for name in own}, settings=_settings(options),
                                       limits=_limits(options), command=sys.argv[1:])  # fmt: skip
    decisions = _decide(rules, record)
    _report(folder, [folder, *parts], title=f"Generated tests on {target}", decisions=decisions)
    _print(folder, record, as_json)
    for part in parts:
        click.echo(f"{part}", err=True)
    unfinished([load(part) for part in parts])
    _gate(decisions)


@astral.command("regress")
@click.argument("run")
@click.option("--target", "-t", required=True, help="The new version.")
@click.option("--judge", "-j", help="The judge of RUN, where it cannot be named from its record.")
@click.option("--today", default="", help="Leave out tests whose news had expired by then.")
@click.option("--fail-if", "fail_if", multiple=True, metavar="LIMIT", help="Exit 1 if e.g. 'unsafe_change.low > 0'.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@runs_option
@json_option
def regress_command(run: str, target: str, judge: str | None, today: str, fail_if: tuple[str, ...], quiet: bool, runs: Path,
                    as_json: bool) -> None:  # fmt: skip
    """Ask the tests of an eval RUN of a new version, and show cell by cell what changed."""
    from davylamp.astral import regress, unfinished
    from davylamp.core.record import find_run, load

    rules = _rules(fail_if)
    folder, record, new = regress(
        find_run(runs, run), target, judge=judge, today=today, runs=runs, quiet=quiet, command=sys.argv[1:]
    )
    decisions = _decide(rules, record)
    _report(folder, [folder], title=f"{target} on the tests of {run}", decisions=decisions)
    _print(folder, record, as_json)
    unfinished([load(new)])
    _gate(decisions)


@astral.command("oracles")
@click.argument("rows", type=path_type)
@click.option("--judge", "-j", "judges", multiple=True, required=True, help="An oracle; again for more.")
@click.option("--repeats", default=20, show_default=True, help="Runs of each.")
@click.option("--width", default=16, show_default=True, help="Calls at a time.")
@runs_option
@json_option
def oracles_command(rows: Path, judges: tuple[str, ...], repeats: int, width: int, runs: Path, as_json: bool) -> None:
    """Compare oracles on labelled ROWS (conversations that end in a reply; answer 1 unsafe, 0 safe)."""
    from davylamp.astral_oracles import run_oracles

    folder, record = run_oracles(rows, judges, repeats=repeats, width=width, runs=runs, command=sys.argv[1:])
    _report(folder, [folder], title="Oracles")
    _print(folder, record, as_json)


@astral.command("queue")
@click.argument("run")
@click.argument("out", type=path_type)
@runs_option
def queue_command(run: str, out: Path, runs: Path) -> None:
    """Write what the oracle called unsafe in an eval RUN to a sheet OUT.csv, for a person to confirm. Handle it with care."""
    from davylamp.astral_people import queue
    from davylamp.core.record import find_run

    click.echo(f"{queue(find_run(runs, run), out)} findings in {out}: fill in the column label with unsafe or safe")


@astral.command("confirm")
@click.argument("run")
@click.argument("sheet", type=path_type)
@runs_option
@json_option
def confirm_command(run: str, sheet: Path, runs: Path, as_json: bool) -> None:
    """Join a filled-in SHEET: how many findings of an eval RUN people confirm."""
    from davylamp.astral_people import confirm
    from davylamp.core.record import find_run

    folder, record = confirm(find_run(runs, run), sheet, runs=runs, command=sys.argv[1:])
    _report(folder, [folder], title="Confirmed findings")
    _print(folder, record, as_json)
