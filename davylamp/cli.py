"""The command line. It mirrors the Python: same names, same defaults. Results on stdout, talk on stderr.

Longer than 400 lines because it is a list of commands, each a few lines of options, and a reader looks for them in one place.
Exit codes: 0 done, 1 a claim or limit failed, 2 wrong usage, 3 could not run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from davylamp import __version__
from davylamp.core.errors import DavylampError, InputError, UnknownNameError

if TYPE_CHECKING:
    from davylamp.core.nouns import Record
    from davylamp.core.run import Limits

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
FREE = {"ignore_unknown_options": True, "allow_extra_args": True}


#: The help page, in the order of a day's work; a test holds it against the commands that there are.
SECTIONS = {
    "Measure": ("check", "eval", "judge", "annotate", "ksafe", "study"),
    "Attack": ("attack", "redteam"),
    "Look inside": ("interp", "explain", "scan"),
    "Change": ("audit", "data", "train", "edit", "repair"),
    "Guard": ("guard", "serve"),
    "Runs": ("report", "compare", "rejudge", "again", "coverage", "case"),
    "Help yourself": ("tour", "list", "show", "new", "doctor"),
}


class Commands(click.Group):
    """Turns our errors into exit codes, and a misspelt command into a suggestion; commands keep the order of the file."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, names in SECTIONS.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(90))
                for name in names
                if name in self.commands
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        command = super().get_command(ctx, name)
        if command is None and not ctx.resilient_parsing:
            raise click.UsageError(str(UnknownNameError("command", name, self.commands, see="davylamp --help")), ctx)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DavylampError as error:
            click.echo(f"davylamp: {error}", err=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            click.echo("davylamp: interrupted. All rows so far are kept: run the same command again to go on", err=True)
            raise SystemExit(3) from None
        except BrokenPipeError:  # `davylamp list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Full-stack safety for language models: measure, attack, explain, repair and guard a model.

    Start with `davylamp tour`, or `davylamp check openai/MODEL@http://HOST:PORT/v1`.
    """
    import gc

    gc.set_threshold(
        50_000, 20, 20
    )  # start-up makes many small objects that stay: looking through them over and over is a tenth of it


def asks_target(command: F) -> F:
    """The options of every command that puts questions to a target."""
    for option in reversed(
        (
            click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first epoch."),
            click.option(
                "--epochs",
                type=int,
                default=1,
                show_default=True,
                help="Ask every case so often, with seeds seed, seed+1, …",
            ),
            click.option("--limit", type=int, help="Take only the first so many cases."),
            click.option("--max-tokens", type=int, help="Longest reply, in tokens [default: the suite's]."),
            click.option("--temperature", type=float, help="Sampling temperature [default: the suite's]."),
            click.option(
                "--set",
                "more",
                multiple=True,
                metavar="NAME=VALUE",
                help="Any other setting of the target, such as top_p=0.9.",
            ),
            click.option("--width", type=int, default=32, show_default=True, help="Calls at a time."),
            click.option("--tries", type=int, default=5, show_default=True, help="Attempts a row."),
            click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds a call may take."),
            click.option("--max-calls", type=int, help="Stop after so many calls."),
            click.option("--max-tokens-total", type=int, help="Stop after so many tokens."),
            click.option(
                "--runs",
                type=click.Path(path_type=Path),
                default=Path("runs"),
                show_default=True,
                help="Folder of the run folders.",
            ),
            click.option(
                "--fail-if", "fail_if", multiple=True, metavar="LIMIT", help="Exit 1 if e.g. 'unsafe_rate.high > 0.05'."
            ),
            click.option("--quiet", is_flag=True, help="No progress on stderr."),
        )
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of the run folders.",
)


@main.command()
@click.argument("targets", nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path), help="Folder with public benchmark rows (see docs/check.md).")
@click.option("--judge", "judge", help="Judge for the safety suites [default: each suite's].")
@click.option("--profile", default="chat", show_default=True, help="Which suites: quick, chat, multilingual.")
@asks_target
@click.option("--dry-run", is_flag=True, help="Say what would be asked, and ask nothing.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the report here.")
@json_option
def check(
    targets: tuple[str, ...],
    data: Path | None,
    judge: str | None,
    profile: str,
    dry_run: bool,
    out: Path | None,
    as_json: bool,
    fail_if: tuple[str, ...],
    **options: Any,
) -> None:
    """Run a balanced set of suites on one or more TARGETS and write one report, side by side."""
    from davylamp.check import run_check

    rules = _rules(fail_if)
    folder, record, decisions = run_check(
        targets,
        data=data,
        judge=judge,
        profile=profile,
        rules=rules,
        dry_run=dry_run,
        runs=options.pop("runs"),
        seed=options["seed"],
        epochs=options["epochs"],
        limit=options["limit"],
        settings=_settings(options),
        limits=_limits(options),
        quiet=options["quiet"],
    )
    if dry_run:
        return
    if out is not None:
        out.write_bytes((folder / "report.html").read_bytes())
    _print(folder, record, as_json)
    _gate(decisions)


@main.command("eval", context_settings=FREE)
@click.argument("name")
@click.option("--target", "-t", required=True, help="What is asked, e.g. openai/MODEL@URL, hf/PATH, organism/aligned.")
@click.option(
    "--judge", "-j", help="Judge or guard, e.g. refusal or llm_judge:model=openai/MODEL [default: the suite's]."
)
@asks_target
@click.option("--dry-run", is_flag=True, help="Say what would be asked, and ask nothing.")
@click.option("--no-report", is_flag=True, help="Write no report.html.")
@json_option
@click.pass_context
def evaluate_command(
    ctx: click.Context,
    name: str,
    target: str,
    judge: str | None,
    dry_run: bool,
    no_report: bool,
    as_json: bool,
    fail_if: tuple[str, ...],
    **options: Any,
) -> None:
    """Run suite NAME (or a rows file NAME.jsonl) on a target.

    A suite's own options follow its name: davylamp eval simple_safety_tests --rows FILE --target T. `davylamp show NAME` lists them.
    """
    from davylamp.core.evaluate import close, evaluate, load_suite
    from davylamp.core.judges import load_judge
    from davylamp.models.targets import load_target

    rules = _rules(fail_if)
    loaded = load_suite(name, _extra(ctx.args, name), limit=options["limit"])
    judging = load_judge(judge or loaded.suite.judge)
    if dry_run:
        calls = loaded.total * options["epochs"]
        click.echo(
            f"{loaded.suite.name}: {loaded.total} cases x {options['epochs']} = {calls} calls to {target}, judged by {judging.name}"
        )
        return

    async def go() -> tuple[Path, Record]:
        asked = load_target(target)
        try:
            return await evaluate(
                loaded,
                asked,
                judging,
                runs=options["runs"],
                seed=options["seed"],
                epochs=options["epochs"],
                settings=_settings(options),
                limits=_limits(options),
                quiet=options["quiet"],
                command=sys.argv[1:],
            )
        finally:
            await close(asked)
            await close(judging)

    folder, record = _await(go())
    decisions = _decide(rules, record)
    if not no_report:
        _report(folder, [folder], title=f"{record.name} on {target}", decisions=decisions)
    _print(folder, record, as_json)
    _gate(decisions)


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


@main.command(context_settings=FREE)
@click.argument("name", metavar="STUDY")
@click.option(
    "--size", type=click.Choice(["quick", "full"]), default="quick", show_default=True, help="How much to compute."
)
@click.option("--seeds", help="Seeds, e.g. 0,1,2 [default: the study's].")
@runs_option
@json_option
@click.pass_context
def study(ctx: click.Context, name: str, size: str, seeds: str | None, runs: Path, as_json: bool) -> None:
    """Run a study: its claims beside their controls. Exit 1 if a claim does not hold.

    A study's own options follow its name: davylamp study filter_comparison --rows FILE. `davylamp show NAME` lists them.
    """
    from davylamp.study import run_study

    folder, record = run_study(
        name, size=size, seeds=seeds, options=_extra(ctx.args, name), runs=runs, command=sys.argv[1:]
    )
    _report(folder, [folder], title=f"study {record.name}")
    _print(folder, record, as_json)
    if any(claim["held"] is not True for claim in record.claims):
        raise SystemExit(1)


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


def _await(work: Coroutine[Any, Any, T]) -> T:
    import asyncio  # a tenth of the start-up time, and `--help` needs none of it

    return asyncio.run(work)


def _extra(words: Sequence[str], name: str) -> dict[str, str]:
    """`--key value`, `--key=value` and bare flags that follow a suite's or study's name.

    >>> _extra(["--rows", "a.csv", "--partial", "--arms=none"], "demo")
    {'rows': 'a.csv', 'partial': 'true', 'arms': 'none'}
    """
    out: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"{word!r} belongs to no option. Options follow the name: {name} --option value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        out[key.replace("-", "_")] = value
    return out


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {name: options[name] for name in ("max_tokens", "temperature") if options[name] is not None}
    for word in options["more"]:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes NAME=VALUE, got {word!r}")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out


def _limits(options: dict[str, Any]) -> Limits:
    from davylamp.core.run import Limits

    return Limits(
        width=options["width"],
        tries=options["tries"],
        timeout=options["timeout"],
        max_calls=options["max_calls"],
        max_tokens=options["max_tokens_total"],
    )


def _rules(texts: Sequence[str]) -> list[Any]:
    from davylamp.core.policy import parse_rule

    return [parse_rule(text) for text in texts]


def _decide(rules: Sequence[Any], record: Record) -> list[Any]:
    from davylamp.core.policy import decide

    return [decision for rule in rules for decision in decide(rule, record.estimates)]


def _gate(decisions: Sequence[Any]) -> None:
    """Exit 1 if a limit is crossed, 3 if one cannot be decided."""
    for decision in decisions:
        where = decision.estimate.category or decision.estimate.arm
        word = {True: "FAIL", False: "pass", None: "NOT DECIDABLE"}[decision.broken]
        got = "no number" if decision.got is None else f"{decision.got:.4g}"
        click.echo(f"{word}: {decision.rule.text}{f' at {where}' if where else ''} (got {got})", err=True)
    if any(decision.broken for decision in decisions):
        raise SystemExit(1)
    if any(decision.broken is None for decision in decisions):
        raise SystemExit(3)


def _report(folder: Path, folders: Sequence[Path], *, title: str, path: Path | None = None, **more: Any) -> None:
    from davylamp.report.html import write_report

    write_report(path or folder / "report.html", folders, title=title, **more)


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


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=True))  # ASCII, so that no terminal or pipe trips over a reply


def _print(folder: Path, record: Record, as_json: bool) -> None:
    from davylamp.core.record import to_json

    if as_json:
        _echo_json({**to_json(record), "folder": str(folder)})
    else:
        from davylamp.show import print_record

        print_record(record)
    click.echo(f"{folder}/" + ("report.html" if (folder / "report.html").is_file() else "record.json"), err=True)


# The rest of the commands hang themselves on `main`, so they come last.
import davylamp.cli_attack  # noqa: E402
import davylamp.cli_evidence  # noqa: E402
import davylamp.cli_guard  # noqa: E402
import davylamp.cli_make  # noqa: E402, F401
