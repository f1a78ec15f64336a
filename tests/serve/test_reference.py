"""docs/gateway.md and the policy's dataclasses say the same: every key stands there, and its examples are usable."""

import dataclasses
import re
import tomllib
from pathlib import Path

from davylamp.serve import config
from davylamp.serve.app import Gateway

TEXT = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")


def test_every_key_stands_in_the_reference_and_no_other():
    start = TEXT.index("### Every key")
    part = TEXT[start : TEXT.index("\n## ", start)]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
    tables = (getattr(config, field.name.title()) for field in dataclasses.fields(config.Policy))
    assert named == {field.name for table in tables for field in dataclasses.fields(table)}


def test_the_policies_of_the_page_are_usable(tmp_path):
    blocks = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        path = tmp_path / "policy.toml"
        path.write_text(block)
        policy = config.read_policy(path)
        assert [guard.name for guard in policy.guard] == [row["name"] for row in tomllib.loads(block)["guard"]]


def test_every_path_stands_there():
    policy = config.read_policy(upstream="http://127.0.0.1:1/v1", guards=["refusal"])
    for path in Gateway(policy).routes:
        assert f"`{path}`" in TEXT, path
