"""The commands that make or change things: rows, models, maps of models. The rest of the command line is in `cli.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from davylamp.cli import FREE, _echo_json, _extra, _gate, _print, _report, _rules, json_option, main, runs_option

SEED = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that is drawn.")
ROWS = click.Path(path_type=Path, exists=False)


def out_option(what: str) -> Callable[..., Any]:
    return click.option("--out", required=True, type=click.Path(path_type=Path), help=f"Where to write {what}.")


@main.command("data", context_settings=FREE)
@click.argument("name")
@click.argument("source", metavar="IN")
@click.argument("out", type=click.Path(path_type=Path))
@SEED
@runs_option
@json_option
@click.pass_context
def data_command(ctx: click.Context, name: str, source: str, out: Path, seed: int, runs: Path, as_json: bool) -> None:
    """Make rows OUT from rows IN (`-`: none) by NAME: filter, mix, label or generate them.

    Dropped rows go to OUT.dropped.jsonl, each with its reason. NAME's own options follow it: `davylamp show NAME` lists them.
    """
    from davylamp.apply import run_data

    folder, record = run_data(
        name, source, out, seed=seed, options=_extra(ctx.args, name), runs=runs, command=sys.argv[1:]
    )
    _print(folder, record, as_json)


@main.command("train", context_settings=FREE)
@click.argument("name")
@click.argument("model")
@click.argument("rows", type=ROWS)
@out_option("the trained model")
@SEED
@runs_option
@json_option
@click.pass_context
def train_command(
    ctx: click.Context, name: str, model: str, rows: Path, out: Path, seed: int, runs: Path, as_json: bool
) -> None:
    """Train MODEL on ROWS (each ends in the reply to learn) by NAME: a folder, a hub id or organism/NAME.

    NAME's own options follow it: `davylamp show NAME` lists them.
    """
    from davylamp.apply import run_train

    folder, record = run_train(
        name, model, rows, out, seed=seed, options=_extra(ctx.args, name), runs=runs, command=sys.argv[1:]
    )
    _report(folder, [folder], title=f"train {record.name}")
    _print(folder, record, as_json)


@main.command("edit", context_settings=FREE)
@click.argument("name")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER]...")
@click.option("--rows", type=ROWS, help="Rows that the edit looks at, where it needs any.")
@out_option("the edited model")
@SEED
@runs_option
@json_option
@click.pass_context
def edit_command(
    ctx: click.Context,
    name: str,
    models: tuple[str, ...],
    rows: Path | None,
    out: Path,
    seed: int,
    runs: Path,
    as_json: bool,
) -> None:
    """Change MODEL's weights by NAME without training: merge, mask, add a residual. Streams from folder to folder.

    NAME's own options follow it: `davylamp show NAME` lists them.
    """
    from davylamp.apply import run_edit

    names, options = _names_and_options((*models, *ctx.args), name)
    folder, record = run_edit(
        name, names[0], names[1:], out, rows=rows, seed=seed, options=options, runs=runs, command=sys.argv[1:]
    )
    _report(folder, [folder], title=f"edit {record.name}")
    _print(folder, record, as_json)


@main.command("interp", context_settings=FREE)
@click.argument("name")
@click.argument("model")
@click.option("--rows", type=ROWS, help="Rows that are put to the model.")
@click.option("--other", help="A second model, for the things that compare two.")
@SEED
@runs_option
@json_option
@click.pass_context
def interp_command(
    ctx: click.Context,
    name: str,
    model: str,
    rows: Path | None,
    other: str | None,
    seed: int,
    runs: Path,
    as_json: bool,
) -> None:
    """Look inside MODEL by NAME: which heads, layers or directions carry what.

    NAME's own options follow it: `davylamp show NAME` lists them.
    """
    from davylamp.apply import run_interp

    folder, record = run_interp(
        name, model, rows, other=other, seed=seed, options=_extra(ctx.args, name), runs=runs, command=sys.argv[1:]
    )
    _report(folder, [folder], title=f"{record.name} of {model}")
    _print(folder, record, as_json)


def _names_and_options(words: tuple[str, ...], name: str) -> tuple[list[str], dict[str, str]]:
    """Models first, then NAME's own options: what click hands over in one list.

    >>> _names_and_options(("a", "b", "--weight", "0.5"), "merge")
    (['a', 'b'], {'weight': '0.5'})
    """
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return list(words[:first]), _extra(words[first:], name)


@main.command("audit")
@click.argument("model")
@click.option("--data", required=True, type=ROWS, help="The rows that are to be trained on; each ends in the reply.")
@click.option("--lr", type=float, default=2e-5, show_default=True, help="Learning rate of the planned full fine-tune.")
@click.option("--batch", type=int, default=16, show_default=True, help="Rows a step.")
@click.option("--epochs", type=int, default=1, show_default=True, help="How often each row is seen.")
@click.option(
    "--method",
    type=click.Choice(["lora", "full"]),
    default="lora",
    show_default=True,
    help="lora: measure with an adapter, at ten times the learning rate; full: train a whole copy.",
)
@click.option("--max-steps", type=int, default=300, show_default=True, help="Stop the fine-tune there.")
@click.option("--rank", type=int, default=8, show_default=True, help="Of the adapter.")
@click.option(
    "--repeats", type=int, default=1, show_default=True, help="Fine-tune so often, in other orders of the rows."
)
@click.option("--probes", type=ROWS, help="Rows whose meta.set is hazards, lookalikes, benign, capability or task.")
@click.option("--benchmarks", type=ROWS, help="Folder with public benchmark rows for the suites (see docs/check.md).")
@click.option("--judge", default="refusal", show_default=True, help="Judges the probes.")
@click.option("--guard", default="", help="Judge of harm for the rows themselves, e.g. llm_judge:model=openai/MODEL.")
@click.option("--limit", type=int, help="Take only the first so many probes of each set or suite.")
@click.option("--keep", type=ROWS, help="Write the fine-tuned copy to this folder [default: nowhere].")
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and train nothing that stays.")
@click.option("--fail-if", "fail_if", multiple=True, metavar="LIMIT", help="Exit 1 if e.g. 'refusal_change.high < 0'.")
@SEED
@runs_option
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def audit_command(model: str, dry_run: bool, fail_if: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Before anyone trains: estimate how a fine-tune of MODEL on these rows would move its safety.

    Flags rows that look risky, runs a cheap LoRA fine-tune on a copy, asks the same probes before and after, and says what to do next.
    Exit 1 if a limit is crossed, 3 if the model refuses too little to begin with.
    """
    from davylamp.audit import Planned, run_audit
    from davylamp.audit_cost import report_costs

    rules = _rules(fail_if)
    plan = Planned(
        **{name: options.pop(name) for name in ("lr", "batch", "epochs", "method", "max_steps", "rank", "repeats")}
    )
    folder, record, decisions = run_audit(
        model, planned=plan, rules=rules, dry_run=dry_run, command=sys.argv[1:], **options
    )
    if dry_run:
        _echo_json(dict(record.cost)) if as_json else report_costs(record.cost)
        return
    _print(folder, record, as_json)
    _gate(decisions)
    if record.about["verdict"] == "inconclusive":
        raise SystemExit(3)


@main.command("repair")
@click.argument("tuned")
@click.option("--aligned", required=True, help="The aligned model that TUNED was fine-tuned from.")
@click.option(
    "--unaligned", help="The model that ALIGNED was aligned from: its alignment can then be added again as a vector."
)
@click.option("--rows", type=ROWS, help="Harmful requests with harmful answers, for Antidote.")
@click.option("--preferences", type=ROWS, help="Rows with meta.chosen and meta.rejected, for SOMF.")
@click.option("--task", type=ROWS, help="Held-out rows of the new skill; each ends in the right reply.")
@click.option("--probes", type=ROWS, help="Rows whose meta.set is hazards, lookalikes, benign or capability.")
@click.option("--judge", default="refusal", show_default=True, help="Judges the probes.")
@click.option(
    "--refusal", type=float, default=0.85, show_default=True, help="Goal: refuse at least this share of hazards."
)
@click.option("--keep", type=float, default=0.9, show_default=True, help="Goal: keep at least this share of the skill.")
@click.option(
    "--over-refusal",
    type=float,
    default=0.1,
    show_default=True,
    help="Goal: refuse at most this share of harmless requests.",
)
@click.option(
    "--size", type=click.Choice(["quick", "full"]), default="quick", show_default=True, help="How large a grid to try."
)
@click.option(
    "--only", multiple=True, help="Try only this family of edits (again for more): merge, alignment, antidote, somf."
)
@out_option("the repaired model")
@SEED
@runs_option
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def repair_command(tuned: str, refusal: float, keep: float, over_refusal: float, as_json: bool, **options: Any) -> None:
    """Give a fine-tuned model its refusals back, with its new skill.

    Tries every edit that applies over a small grid, checks each on safety, over-refusal and skill, writes the best model and one report.
    For models of the organisms' world all rows but --task are drawn from the world. Exit 1 if the written model misses a goal.
    """
    from davylamp.repair import run_repair
    from davylamp.repair_view import Goal

    folder, record = run_repair(tuned, goal=Goal(refusal, keep, over_refusal), command=sys.argv[1:], **options)
    _print(folder, record, as_json)
    if any(claim["held"] is not True for claim in record.claims if claim["chosen"]):
        raise SystemExit(1)


@main.command("serve")
@click.option("--upstream", help="Base URL of the server behind, e.g. http://127.0.0.1:8000/v1.")
@click.option(
    "--guard", "guards", multiple=True, help="A guard for input and output, or input=NAME, output=NAME; again for more."
)
@click.option(
    "--policy", type=click.Path(path_type=Path), help="TOML file; the options of the command line are put over it."
)
@click.option("--host", help="Address to listen on [default: the policy's, else 127.0.0.1].")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one [default: the policy's, else 8080].")
@click.option("--workers", type=int, help="Processes [default: the policy's, else 1].")
@click.option("--audit", type=click.Path(path_type=Path), help="Append one line a request to this file.")
@click.option("--check", is_flag=True, help="Load policy and guards, say so, and end.")
def serve_command(guards: tuple[str, ...], **options: Any) -> None:
    """Put guards in front of an OpenAI-compatible server: the judge that scored the suite decides what goes through."""
    from davylamp.serve.workers import run_serve

    run_serve(guards=guards, **options)
