"""The command line. It mirrors the Python: same names, same defaults. Results on stdout, talk on stderr.

Here stand what commands share, `check`, `eval` and `study`; the others in `cli_*.py`, by what they are about.
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
    "Attack": ("attack", "redteam", "astral"),
    "Look inside": ("interp", "explain", "scan"),
    "Change": ("audit", "data", "train", "edit", "repair"),
    "Guard": ("guard", "serve"),
    "Runs": ("report", "compare", "rejudge", "again", "coverage", "matrix", "case", "cards", "incidents"),
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
@click.option(
    "--profile", default="chat", show_default=True, help="Which suites: quick, chat, reasoning, multilingual, science."
)
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
import davylamp.cli_astral  # noqa: E402
import davylamp.cli_attack  # noqa: E402
import davylamp.cli_evidence  # noqa: E402
import davylamp.cli_guard  # noqa: E402
import davylamp.cli_help  # noqa: E402
import davylamp.cli_judge  # noqa: E402
import davylamp.cli_make  # noqa: E402
import davylamp.cli_runs  # noqa: E402, F401
