"""Writes the pages that are read from the code: docs/reference/*.md and docs/systems/index.md. `tests/test_docs.py` keeps them fresh.

python docs/generate.py
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from davylamp.cli import main
from davylamp.core.registry import FOLDERS, builtin
from davylamp.core.taxonomy import names, taxonomy
from davylamp.show import states, systems

DOCS = Path(__file__).parent


def commands() -> str:
    """Every command's --help, as it prints."""
    out = ["# Commands", "", "Exit codes: 0 done, 1 a claim or limit failed, 2 wrong usage, 3 could not run.", ""]

    def walk(command: click.Command, path: str) -> None:
        flags = ["-h", "--help"]  # as the real group has them; click remembers the first it was asked for
        context = click.Context(
            command, info_name=path, max_content_width=110, terminal_width=110, help_option_names=flags
        )
        out.extend([f"## {path}", "", "```text", command.get_help(context), "```", ""])
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                walk(command.commands[name], f"{path} {name}")

    walk(main, "davylamp")
    return "\n".join(out)


def registry() -> str:
    """Every thing with its options, from its source."""
    out = [
        "# Everything there is",
        "",
        "Read from the source by `davylamp list`; `davylamp show NAME` prints the same.",
        "",
    ]
    for kind in FOLDERS:
        things = [entry for entry in builtin() if entry.kind == kind]
        if not things:
            continue
        out += [f"## {kind}", ""]
        for entry in things:
            about = [
                f"version {entry.version}",
                f"stage {entry.stage}",
                f"threats {', '.join(entry.threats)}",
                f"source {entry.source}",
                f"licence {entry.licence}",
            ]
            about += [f"measures {entry.measures}"] if entry.measures else []
            about += [f"needs `davylamp[{entry.needs}]`"] if entry.needs else []
            about += [f"system {', '.join(entry.systems)}"] if entry.systems else []
            out += [f"### {entry.name}", "", _escape(entry.summary), "", " · ".join(about), ""]
            if entry.params:
                out += ["| option | type | default |", "|---|---|---|"]
                out += [
                    f"| `{param.name}` | `{param.type.replace('|', chr(92) + '|')}` | {'required' if param.required else f'`{param.default!r}`'} |"
                    for param in entry.params
                ]
                out.append("")
    return "\n".join(out)


def taxonomies() -> str:
    out = [
        "# Taxonomies",
        "",
        "A case's `category` is a node such as `aegis2/violence`. `=` same scope, `<` the source is narrower, `>` wider, `~` overlaps; the first code is primary.",
        "Conversions that lose scope are flagged; codes are always written with their namespace.",
        "",
    ]
    for name in names():
        found = taxonomy(name)
        out += [
            f"## {name}: {found.title}",
            "",
            f"Source: {found.source}",
            "",
            "| node | label | crosswalk |",
            "|---|---|---|",
        ]
        out += [
            f"| `{node.path}` | {_escape(node.label)} | {_escape(', '.join(f'{relation} {to}' for to, relation in node.crosswalk)) or '-'} |"
            for node in found.nodes
        ]
        out.append("")
    return "\n".join(out)


def systems_index() -> str:
    out = [
        "# The 36 systems",
        "",
        "What stands, read from the registry.",
        "",
        "| | system | paper | stage | parts |",
        "|---|---|---|---|---|",
    ]
    far, things = states(), builtin()
    for name, row in systems().items():
        parts = [f"{entry.kind} `{entry.name}`" for entry in things if row["number"] in entry.systems]
        page = f"{row['number']}-{name}.md"
        title = f"[{row['title']}]({page})" if (DOCS / "systems" / page).is_file() else row["title"]
        out.append(
            f"| {row['number']} | {title} | [arXiv:{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']}) | {row['stage']} | {far[row['number']]}{': ' if parts else ''}{', '.join(parts)} |"
        )
    return "\n".join(out) + "\n"


def organisms() -> str:
    """The cards of the embedded organisms, one after the other."""
    out = [
        "# Measured behaviour of the organisms",
        "",
        "From the card of each member; see [model organisms](../organisms.md).",
        "",
    ]
    for name in ("base", "helpful", "aligned", "reasoning"):
        card = (DOCS.parent / "davylamp" / "assets" / "organism" / name / "README.md").read_text(encoding="utf-8")
        out.append("## " + card.partition("# davylamp organism: ")[2])
    return "\n".join(out)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


PAGES = {
    "reference/commands.md": commands,
    "reference/registry.md": registry,
    "reference/taxonomies.md": taxonomies,
    "reference/organisms.md": organisms,
    "systems/index.md": systems_index,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(DOCS / name)
