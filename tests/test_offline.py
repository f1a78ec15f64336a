"""Nothing leaves the machine unless a remote target was named."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "davylamp"
GUARD = """
import socket, sys
def refuse(*a, **k): raise SystemExit("REACHED FOR THE NETWORK")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list"],
        ["show", "case"],
        ["doctor"],
        ["judge", "ask", "refusal", "no"],
        ["check", "openai/x", "--dry-run"],
        ["eval", "capability", "--target", "openai/x", "--dry-run"],
    ],
    ids=" ".join,
)
def test_commands_that_need_no_target_stay_here(tmp_path, words):
    code = GUARD + f"from davylamp.cli import main\nmain({words!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr


def test_no_address_stands_in_the_code_but_the_default_api():
    import re

    found = {
        (path.name, url)
        for path in ROOT.rglob("*.py")
        for url in re.findall(r"https?://[\w.-]+\.\w{2,}", path.read_text(encoding="utf-8"))
    }
    # Each is asked only where the user names what speaks to it: a target, the guard `http_score`, `--search tavily`.
    asked_for = {"api.openai.com", "commentanalyzer.googleapis.com", "api.tavily.com"}
    allowed = {*asked_for, "example.com", "schema.org", "www.w3.org"}
    assert not {(name, url) for name, url in found if url.split("//")[1] not in allowed}


def test_the_api_key_is_not_part_of_an_identity(monkeypatch):
    from davylamp.models.openai import OpenAITarget

    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    assert "very-secret" not in repr(OpenAITarget("m").identity)
