"""Every command in the docs runs, every link leads somewhere, and generated pages are fresh."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from davylamp.cli import main
from davylamp.show import states, systems
from tests.server import say

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HAND = [page for page in PAGES if "reference" not in page.parts]
SLOW = ("organism", "tour", "study", "repair", "train", "edit", "interp")
NOT_HERE = ("hf/path", "davylamp serve", "--upstream")  # a model that nobody has here; a server that would not end


def blocks(page):
    """The `$ …` lines of each console block of a page."""
    for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        yield [line[2:] for line in block.splitlines() if line.startswith("$ ")]


def console(page):
    return [line for block in blocks(page) for line in block]


@pytest.fixture
def desk(tmp_path, monkeypatch, server):
    """A folder as a reader of the docs would have it: rows, labelled rows, a target, runs A and B, a server."""
    server.answer = lambda body, number: say(
        '{"label": "refused", "why": "it refuses"}' if "judge" in body["model"] else "42"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    rows = [
        {
            "id": str(i),
            "messages": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "answer": str(2 * i),
            "category": "sums",
        }
        for i in range(30)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [
        {
            "id": str(i),
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "Sure." if i % 2 else "I can't."},
            ],
            "answer": i % 2,
        }
        for i in range(20)
    ]
    Path("labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    Path("my_target.py").write_text("def answer(messages, *, seed=0, **settings):\n    return '42'\n")
    (tmp_path / "data" / "xstest").mkdir(parents=True)
    kinds = [("homonyms", "safe"), ("contrast_homonyms", "unsafe")]
    Path("data/xstest/xstest_prompts.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "prompt": f"A stand-in prompt number {i}",
                    "type": kinds[i % 2][0],
                    "label": kinds[i % 2][1],
                    "focus": "x",
                    "note": "",
                }
            )
            + "\n"
            for i in range(20)
        )
    )
    for name in "AB":
        run(
            ["eval", "rows.jsonl", "--target", f"openai/{name}", "--judge", "includes", "--quiet", "--no-report"],
            monkeypatch,
        )
        shutil.copytree(max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime), name)
    return tmp_path, server


def run(words, monkeypatch, codes=(0,)):
    monkeypatch.setattr("sys.argv", ["davylamp", *words])
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code in codes, (words, result.exit_code, result.output[-2000:])


def stories(slow):
    """The console blocks of the pages: each is walked from top to bottom in one folder."""
    out = []
    for page in HAND:
        for number, block in enumerate(blocks(page)):
            lines = [
                line for line in block if line.startswith("davylamp") and not any(word in line for word in NOT_HERE)
            ]
            if lines and any(word in line for line in lines for word in SLOW) == slow:
                mark = [pytest.mark.slow] * slow
                out.append(pytest.param(lines, id=f"{page.stem}-{number}: {lines[0]}"[:80], marks=mark))
    return out


@pytest.mark.parametrize("lines", stories(slow=False) + stories(slow=True))
def test_commands_of_the_docs_run(lines, desk, monkeypatch):
    _, server = desk
    for line in lines:
        words = shlex.split(line.replace("http://127.0.0.1:8000/v1", server.url), comments=True)[1:]
        if "my_suite" in line or "my_guard" in line:
            continue  # test_contributing_as_written walks these
        if "RUN" in words:
            words[words.index("RUN")], words[words.index("OUT")] = "A", "out"
        run(words, monkeypatch, codes=(0, 1, 3) if {"--fail-if", "repair", "case"} & {*words} else (0,))


def test_contributing_as_written(desk, monkeypatch):
    lines = [line for line in console(ROOT / "CONTRIBUTING.md") if "my_suite" in line]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)
        if words[0] == "pytest":
            done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
        else:
            run(words[1:], monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_generated_pages_are_fresh():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [
        name for name, page in generate.PAGES.items() if (ROOT / "docs" / name).read_text(encoding="utf-8") != page()
    ]
    assert not stale, "run: python docs/generate.py"


def test_a_built_system_has_its_page():
    for name, row in systems().items():
        if states()[row["number"]] == "built":
            text = (ROOT / "docs" / "systems" / f"{row['number']}-{name}.md").read_text(encoding="utf-8")
            for part in ("## When to use", "## Claims", "## Limits", "```console"):
                assert part in text, f"{name}: its page lacks {part}"


def test_nav_names_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = [line.rpartition(" ")[2] for line in nav.splitlines() if line.endswith(".md")]
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES if "docs" in page.parts)


def test_every_make_target_of_the_docs_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in HAND:
        for name in re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8")):
            assert name in targets, name
