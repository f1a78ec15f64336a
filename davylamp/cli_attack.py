"""The commands that attack: `davylamp attack` and `davylamp redteam`. The rest of the command line is in `cli.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from davylamp.cli import (
    FREE,
    _decide,
    _extra,
    _gate,
    _limits,
    _print,
    _report,
    _rules,
    _settings,
    asks_target,
    json_option,
    main,
)


def _common(options: dict[str, Any]) -> dict[str, Any]:
    if options["epochs"] != 1:
        from davylamp.core.errors import InputError

        raise InputError("an attack has a budget of questions instead of epochs: raise --budget")
    return {
        "judge": options["judge"],
        "limit": options["limit"],
        "seed": options["seed"],
        "settings": _settings(options),
        "limits": _limits(options),
        "runs": options["runs"],
        "quiet": options["quiet"],
        "command": sys.argv[1:],
    }


defence_option: Callable[..., Any] = click.option(
    "--defence",
    "defences",
    multiple=True,
    help="hardening, reminder, perplexity:…, paraphrase:…, guard:name=…; again for more.",
)
judge_option: Callable[..., Any] = click.option(
    "--judge", "-j", help="Judge of success, measures complied or unsafe [default: the suite's]."
)


@main.command("attack", context_settings=FREE)
@click.argument("name")
@click.option("--suite", "-s", required=True, help="Requests to refuse: a suite's name or ROWS.jsonl.")
@click.option(
    "--target", "-t", required=True, help="What is attacked, e.g. openai/MODEL@URL, hf/PATH, organism/aligned."
)
@click.option("--budget", type=int, default=10, show_default=True, help="Questions a case.")
@judge_option
@defence_option
@click.option("--no-control", is_flag=True, help="Leave out plain repetition with as many questions.")
@asks_target
@json_option
@click.pass_context
def attack_command(
    ctx: click.Context, name: str, suite: str, target: str, budget: int, defences: tuple[str, ...], no_control: bool,
    as_json: bool, fail_if: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Attack every case of a suite by NAME, beside plain repetition with as many questions.

    NAME's own options follow it: `davylamp show NAME` lists them. What got through lies in findings.jsonl, for `davylamp eval`.
    """
    from davylamp.campaign import run_attack

    rules = _rules(fail_if)
    folder, record = run_attack(
        name, suite, target, budget=budget, options=_extra(ctx.args, name), defences=defences, control=not no_control,
        **_common(options),
    )  # fmt: skip
    decisions = _decide(rules, record)
    _report(folder, [folder], title=f"{name} on {target}", decisions=decisions)
    _print(folder, record, as_json)
    _gate(decisions)


@main.command("redteam")
@click.argument("target")
@click.option(
    "--suite",
    "-s",
    default="",
    help="Requests to refuse: a suite's name or ROWS.jsonl [default for organisms: theirs].",
)
@click.option("--attack", "attacks", multiple=True, help="Use only this attack; again for more.")
@click.option("--budget", type=int, default=500, show_default=True, help="Questions in all.")
@click.option("--per-case", type=int, default=8, show_default=True, help="Most questions of one attack on one case.")
@click.option("--rounds", type=int, default=2, show_default=True, help="How often one attack may try one case.")
@click.option("--attacker", default="", help="A target that writes prompts, for pair and tap.")
@click.option("--translator", default="", help="A target or .json word list, for translate and code_mix.")
@judge_option
@defence_option
@click.option("--transfer", multiple=True, help="Ask this target every finding too; again for more.")
@click.option("--benign", default="", help="A suite of harmless requests: what each defence costs.")
@click.option("--shorten", type=int, default=8, show_default=True, help="Questions to shorten each trick's prompt.")
@asks_target
@json_option
def redteam_command(target: str, as_json: bool, fail_if: tuple[str, ...], **options: Any) -> None:
    """Find what breaks TARGET within one budget: a bandit plans attacks on categories; one report of tricks, defences and transfer.

    The same command run again goes on. What got through lies in findings.jsonl, for `davylamp eval`.
    """
    from davylamp.campaign import run_redteam

    rules = _rules(fail_if)
    names = (
        "suite",
        "attacks",
        "budget",
        "per_case",
        "rounds",
        "attacker",
        "translator",
        "defences",
        "transfer",
        "benign",
        "shorten",
    )
    folder, record = run_redteam(target, **{name: options[name] for name in names}, **_common(options))
    decisions = _decide(rules, record)
    _report(folder, [folder], title=f"Red team of {target}", decisions=decisions)
    _print(folder, record, as_json)
    _gate(decisions)
