"""What `list`, `show`, `new` and `doctor` print, and how a record looks on a terminal."""

from __future__ import annotations

import json
import sys
import textwrap
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import click

from davylamp.core.errors import DavylampError, InputError, UnknownNameError
from davylamp.core.needs import EXTRAS, missing
from davylamp.core.nouns import Estimate, Record
from davylamp.core.record import write_atomic
from davylamp.core.registry import FOLDERS, Entry, entries, read

ASSETS = Path(__file__).parent / "assets"
PLURALS = {
    "data": "data",
    "train": "train",
    "edit": "edits",
    "interp": "interp",
    "suite": "suites",
    "attack": "attacks",
    "guard": "guards",
    "judge": "judges",
    "study": "studies",
}

CASE = """A case is one line of a .jsonl file:
  {"id": "1", "messages": [{"role": "user", "content": "…"}], "category": "aegis2/violence", "answer": "B", "group": "seed-1", "meta": {}}
id and messages are required. role is system, user, assistant or tool; content is text.
category: a taxonomy node, rates are broken down by it.   answer: the key, for judges that need one.
group: rows that belong together (paraphrases, arms); intervals are clustered by it.   meta: anything else."""

TARGETS = """What can be asked:
  openai/MODEL             any OpenAI-compatible server; OPENAI_BASE_URL and OPENAI_API_KEY as in the openai client
  openai/MODEL@URL         the same with the server named, e.g. openai/llama@http://127.0.0.1:8000/v1
  hf/PATH-OR-ID            a transformers model                                  pip install 'davylamp[hf]'
  organism/NAME            a built-in model: base, helpful, aligned, reasoning   pip install 'davylamp[hf]'
  inspect/PROVIDER/MODEL   any provider of inspect_ai                            pip install 'davylamp[inspect]'
  file/REPLIES.jsonl       replies made elsewhere: rows of prompt and reply, or messages that end in the reply
  python/FILE.py:FUNCTION  your own function (messages, *, seed, **settings) -> text or Message
  diffusion/PATH:OPTIONS   a text-to-image pipeline of diffusers                 pip install 'davylamp[diffusion]'
  think/STRATEGY/TARGET    any of them under a thinking strategy: zero, less, more"""


@cache
def systems() -> dict[str, dict[str, str]]:
    """The 36 systems by slug: number, title, arxiv, stage; `missing` says what a system with measured claims still lacks."""
    return tomllib.loads((ASSETS / "systems.toml").read_text(encoding="utf-8"))


def states() -> dict[str, str]:
    """How far each system is, by number: `built`, `in part` or `not yet`.

    Built: a study holds its claims beside their controls, and nothing is `missing`.

    >>> [states()[number] for number in ("08", "30", "33")]
    ['built', 'in part', 'not yet']
    """
    kinds: dict[str, set[str]] = {row["number"]: set() for row in systems().values()}
    for entry in entries():
        for number in entry.systems:
            kinds.setdefault(number, set()).add(entry.kind)
    whole = {row["number"] for row in systems().values() if "study" in kinds[row["number"]] and "missing" not in row}
    return {
        number: "built" if number in whole else "in part" if found else "not yet" for number, found in kinds.items()
    }


def list_entries(kind: str | None, as_json: bool) -> None:
    if kind == "systems":
        far = states()
        rows: list[dict[str, Any]] = [
            {"name": name, **row, "built": far[row["number"]] == "built", "state": far[row["number"]]}
            for name, row in systems().items()
        ]
        if as_json:
            click.echo(json.dumps(rows, indent=1))
        else:
            for row in rows:
                click.echo(f"{row['number']}  {row['state']:7}  {row['name']:28} {row['title'][:70]}")
        return
    singular = {plural: name for name, plural in PLURALS.items()} | {name: name for name in FOLDERS}
    if kind is not None and kind not in singular:
        raise UnknownNameError("kind", kind, [*PLURALS.values(), "systems"])
    chosen = list(entries(singular[kind] if kind else None))
    if as_json:
        click.echo(json.dumps([entry.json() for entry in chosen], indent=1))
        return
    for entry in chosen:
        click.echo(f"{entry.kind:7} {entry.name:26} {textwrap.shorten(entry.summary, 90, placeholder=' …')}")
    if not chosen:
        click.echo(f"no {kind} yet", err=True)


def show_name(name: str, as_json: bool, runs: Path) -> None:
    """A thing of the registry, a system's number or name, a run, `case` or `targets`. Raises UnknownNameError."""
    if name in ("case", "targets"):
        click.echo(CASE if name == "case" else TARGETS)
        return
    known = systems()
    found = [entry for entry in entries() if entry.name == name]
    path, _, inner = name.partition(".py:") if ".py:" in name else (name.removesuffix(".py"), "", "")
    if name.endswith(".py") or inner:
        if not Path(path + ".py").is_file():
            raise InputError(f"no file {path}.py")
        found = [entry for entry in read(Path(path + ".py")) if inner in ("", entry.name)]
    system = next(
        (slug for slug, row in known.items() if name in (row["number"], row["number"].lstrip("0"), slug)), None
    )
    if system is not None:
        _show_system(system, known[system], found, as_json)
    elif found:
        if as_json:
            click.echo(json.dumps([entry.json() for entry in found] if len(found) > 1 else found[0].json(), indent=1))
        else:
            click.echo("\n\n".join(_entry_text(entry) for entry in found))
    else:
        from davylamp.core.record import find_run, load, to_json

        try:
            record = load(find_run(runs, name))
        except InputError:
            names = [entry.name for entry in entries()] + list(known) + ["case", "targets"]
            raise UnknownNameError("thing, system or run", name, names, see="davylamp list") from None
        if as_json:
            click.echo(json.dumps(to_json(record), indent=1))
        else:
            print_record(record)


def _show_system(name: str, row: dict[str, str], same_name: list[Entry], as_json: bool) -> None:
    state = states()[row["number"]]
    parts = [entry for entry in entries() if row["number"] in entry.systems]
    parts += [entry for entry in same_name if entry not in parts]
    if as_json:
        click.echo(
            json.dumps(
                {
                    "name": name,
                    **row,
                    "built": state == "built",
                    "state": state,
                    "parts": [entry.json() for entry in parts],
                },
                indent=1,
            )
        )
        return
    click.echo(
        f"{row['number']}  {row['title']}\narXiv:{row['arxiv']}   stage: {row['stage']}"
        + (f"   page: docs/systems/{row['number']}-{name}.md" if state == "built" or "missing" in row else "")
    )
    if not parts:
        click.echo("not built yet")
    elif state == "in part":
        click.echo(f"built in part: {row.get('missing', 'these parts work, its claims are not measured yet')}")
    for entry in parts:
        click.echo("")
        click.echo(f"{entry.kind} {entry.name}: {entry.summary}")
        click.echo(f"    {_command(entry)}")
        for param in entry.params:
            click.echo(f"    --{param.name.replace('_', '-')}  {param.type}  [{param.default!r}]")


def _command(entry: Entry) -> str:
    return {
        "suite": f"davylamp eval {entry.name} --target T",
        "guard": f'davylamp judge ask {entry.name} "reply"',
        "judge": f"davylamp eval ROWS.jsonl --target T --judge {entry.name}",
        "study": f"davylamp study {entry.name}",
        "attack": f"davylamp attack {entry.name} --suite S --target T",
    }.get(entry.kind, f"davylamp {entry.kind} {entry.name}")


def _entry_text(entry: Entry) -> str:
    lines = [f"{entry.kind} {entry.name}  (version {entry.version})", "", entry.doc or "(no description)", ""]
    lines += [
        f"  --{param.name.replace('_', '-')}  {param.type}  "
        + ("required" if param.required else f"[{param.default!r}]")
        for param in entry.params
    ]
    lines += [
        "",
        f"measures: {entry.measures}" if entry.measures else "",
        f"stage: {entry.stage}   threats: {', '.join(entry.threats)}",
        f"source: {entry.source}   licence: {entry.licence}"
        + (f"   needs: davylamp[{entry.needs}]" if entry.needs else ""),
        f"command: {_command(entry)}",
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or (i and lines[i - 1]))


def print_record(record: Record) -> None:
    """The estimates as a table, then claims and counts."""
    click.echo(f"{record.verb} {record.name}  {record.id[:8]}  {record.status}")
    for estimate in record.estimates:
        click.echo("  " + estimate_line(estimate))
    for claim in record.claims:
        word = {True: "held", False: "NOT HELD", None: "NOT DECIDABLE"}[claim["held"]]
        got = (
            "no interval" if claim["low"] is None else f"{claim['value']:.3f} [{claim['low']:.3f}, {claim['high']:.3f}]"
        )
        click.echo(f"  {word:13} {'control ' if claim.get('control') else ''}{claim['text']}   got {got}")
    for note in record.about.get("notes", ()):
        click.echo(f"  note: {note}")
    if record.counts.get("failed") or record.counts.get("missing"):
        click.echo(
            f"  {record.counts.get('failed', 0)} rows failed, {record.counts.get('missing', 0)} missing: run it again to ask only those"
        )


def estimate_line(estimate: Estimate) -> str:
    """One estimate in one line.

    >>> from davylamp.core.stats import rate
    >>> estimate_line(rate(7, 50, 10, name="unsafe_rate"))
    'unsafe_rate                                    14.0 % [7.0, 26.2]  n 50, 10 unscored (worst 11.7 to 28.3)'
    """
    part = " ".join(word for word in (estimate.category, estimate.arm) if word)
    label = f"{estimate.name}{f' [{part}]' if part else ''}"
    scale, unit = (
        (1.0, "")
        if estimate.unit not in ("rate", "difference")
        else (100.0, " pp" if estimate.unit == "difference" else " %")
    )
    if estimate.value is None:
        text = "no scored rows"
    else:
        text = f"{scale * estimate.value:.1f}{unit}" if unit else f"{estimate.value:.4g}"
        if estimate.low is not None and estimate.high is not None:
            text += (
                f" [{scale * estimate.low:.1f}, {scale * estimate.high:.1f}]"
                if unit
                else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
            )
    text += f"  n {estimate.n}"
    if estimate.unscored:
        text += f", {estimate.unscored} unscored"
        if estimate.worst:
            text += f" (worst {100 * estimate.worst[0]:.1f} to {100 * estimate.worst[1]:.1f})"
    if estimate.corrected:
        text += "  corrected {:.1f} [{:.1f}, {:.1f}]".format(*(100 * number for number in estimate.corrected))
    if estimate.p is not None:
        text += f"  p {estimate.p:.3g}"
    return f"{label:46} {text}"


def new_files(kind: str, name: str, folder: Path) -> list[Path]:
    """Write NAME.py and test_NAME.py from the templates. Never overwrites."""
    if not name.isidentifier() or name != name.lower():
        raise InputError(f"a name must be lower case letters, digits and _, got {name!r}")
    paths = [folder / f"{name}.py", folder / f"test_{name}.py"]
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists already: choose another name or --folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, template in zip(paths, (f"{kind}.py.txt", f"test_{kind}.py.txt"), strict=True):
        write_atomic(path, (ASSETS / "new" / template).read_text(encoding="utf-8").replace("NAME", name))
    return paths


def doctor(as_json: bool) -> None:
    """Python, extras, registry and plug-ins; every line says what to do."""
    rows: list[dict[str, Any]] = [{"what": "python", "ok": sys.version_info >= (3, 11), "say": sys.version.split()[0]}]
    for extra in EXTRAS:
        absent = missing(extra)
        rows.append(
            {
                "what": f"davylamp[{extra}]",
                "ok": not absent,
                "say": f"missing {', '.join(absent)}: pip install 'davylamp[{extra}]'" if absent else "installed",
            }
        )
    try:
        rows.append({"what": "registry", "ok": True, "say": f"{sum(1 for _ in entries())} things"})
    except DavylampError as error:
        rows.append({"what": "registry", "ok": False, "say": str(error)})
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        for row in rows:
            click.echo(f"{'ok ' if row['ok'] else '-- '} {row['what']:20} {row['say']}")
