"""One torch thread, no network but loopback, and the folder of public rows where there is one."""

import os
import socket
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("OPENAI_API_KEY", None)
os.environ.pop("OPENAI_BASE_URL", None)

import pytest

from tests.server import Server

LOOPBACK = ("127.", "::1", "localhost")


def pytest_collection_modifyitems(items):
    """Claims that take minutes each run in `make claims` alone, so that `make test` stays within its twenty minutes."""
    if os.environ.get("DAVYLAMP_LONG") != "1":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make claims runs it"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the network fails."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def server():
    """A local OpenAI-compatible server that can be told to misbehave."""
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def public_rows() -> Path:
    """The folder with public benchmark rows: DAVYLAMP_TEST_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("DAVYLAMP_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not (folder / "SOURCES.md").is_file():
        pytest.skip("no folder with public rows: set DAVYLAMP_TEST_DATA")
    return folder
