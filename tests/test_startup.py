"""What a fresh interpreter loads. Time itself is measured in benchmarks/startup.py."""

import subprocess
import sys

import pytest

FORBIDDEN = (
    "torch",
    "transformers",
    "aiohttp",
    "numpy",
    "jinja2",
    "datasets",
    "inspect_ai",
    "sklearn",
    "scipy",
    "asyncio",
)


@pytest.mark.parametrize(
    "words", [["--help"], ["list"], ["list", "--json"], ["show", "08"], ["eval", "--help"], ["doctor"]], ids=" ".join
)
def test_light_commands_load_nothing_heavy(words):
    code = f"""
import sys
from davylamp.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", sorted(set(sys.modules) & set({FORBIDDEN!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("LOADED []"), done.stdout[-300:]
