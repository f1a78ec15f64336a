"""Runs benchmarks and writes what they measured into docs/performance.md, each between its own marks.

python benchmarks/write.py [NAME...]        NAME: a file here without .py; none: all that the page names
"""

import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"


def machine():
    """What the figures were measured on, in words; no host name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return f"{len(names) or '?'} x {names[0] if names else platform.machine()}, Python {platform.python_version()}"


def table(name, words, figures):
    command = " ".join(["python", f"benchmarks/{name}.py", *words])
    rows = [f"| `{figure}` | {value:,} |" for figure, value in figures.items()]
    return "\n".join(
        [f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {machine()}", "", "| figure | value |", "|---|---|", *rows]
    )


def main(names):
    text = PAGE.read_text(encoding="utf-8")
    marks = dict(re.findall(r"<!-- begin (\w+)((?: [^>]*?)?) -->", text))
    for name in names or marks:
        if name not in marks:
            raise SystemExit(f"docs/performance.md has no mark for {name!r}; it has {', '.join(marks)}")
        words = marks[name].split()
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), *words, "--json"], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(f"{name} failed")
        figures = json.loads(done.stdout.splitlines()[-1])["figures"]
        new = f"<!-- begin {name}{marks[name]} -->\n{table(name, words, figures)}\n<!-- end {name} -->"
        start, end = text.index(f"<!-- begin {name}"), text.index(f"<!-- end {name} -->")
        text = text[:start] + new + text[end + len(f"<!-- end {name} -->") :]
        PAGE.write_text(text, encoding="utf-8")
        print(new, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
