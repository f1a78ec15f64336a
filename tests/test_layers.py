"""Who may import whom. The tree is the design; this keeps it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "davylamp"
LEVEL = {
    "core": 0,
    "metrics": 1,
    "models": 1,
    "envs": 1,
    "data": 1,
    "guards": 2,
    "suites": 2,
    "attacks": 2,
    "edits": 2,
    "train": 2,
    "interp": 2,
    "studies": 3,
    "serve": 4,
    "report": 4,
}
FILES = sorted(path for path in ROOT.rglob("*.py"))
#: Systems 01, 03 and 14 are queries over the registry and over runs, so their studies stand on the queries; no query imports a study.
QUERIES = {"coverage", "case", "incidents", "report"}
OF_QUERIES = {"full_stack.py", "threat_coverage.py", "holistic.py"}
LIGHT = {"core", "suites", "report", "metrics"}
TORCH_FREE = {"cli", "check", "show", "study", "__init__", "__main__"}
HEAVY = {"torch", "transformers", "datasets", "sklearn", "scipy", "inspect_ai", "peft", "trl", "diffusers"}


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path, *, top_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path):
    ours = part(path)
    if ours not in LEVEL:  # cli, check, show, study and the bridge stand on top
        return
    for name in imported(path):
        if name == "davylamp" or not name.startswith("davylamp."):
            continue
        other = name.split(".")[1]
        if path.name in OF_QUERIES and other in QUERIES:
            continue
        assert other in LEVEL, f"{path.name} imports {name}: nothing imports the top"
        assert (
            other == ours
            or LEVEL[other] < LEVEL[ours]
            or (ours, other) in {("metrics", "models")}
            or (LEVEL[other] == LEVEL[ours] == 1)
        ), f"{ours} imports {other}: {path.name}"
        if LEVEL[ours] == 2:
            assert not (LEVEL[other] == 2 and other != ours)


@pytest.mark.parametrize(
    "path", [path for path in FILES if part(path) in LIGHT | TORCH_FREE], ids=lambda path: str(path.relative_to(ROOT))
)
def test_heavy_libraries_stay_in_leaves(path):
    assert not {name.split(".")[0] for name in imported(path, top_only=True)} & HEAVY


def test_no_file_is_longer_than_400_lines_without_a_reason():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400 or "Longer than 400 lines because" in text, path
