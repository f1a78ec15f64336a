"""`data`, `train`, `edit`, `interp` from the command line, with things of our own in lone files and a model made on the spot."""

import json
import sys

import pytest
from click.testing import CliRunner

from davylamp.cli import main
from davylamp.core.record import find_run, load
from davylamp.core.rows import CaseFile

pytest.importorskip("torch")

THINGS = '''
from dataclasses import replace

import torch

from davylamp.core import data, edit, interp, train
from davylamp.core.rows import Dropped


@data(version=2, source="x", licence="x", stage="data", threats=("bias",))
def short(rows, *, rng, most: int = 3):
    """Keep rows of at most `most` characters."""
    for case in rows:
        yield case if len(case.messages[0].text) <= most else Dropped(case, "too long")


@train(version=1, source="x", licence="x", stage="post-training", threats=("fine-tuning",))
def nudge(model, rows, *, tokenizer, rng, by: float = 1.0):
    """Add `by` to the final norm."""
    with torch.no_grad():
        model.model.norm.weight += by * len(rows)
    return model


@edit(version=1, source="x", licence="x", stage="post-training", threats=("fine-tuning",))
def same(model, *others, rows=(), tokenizer=None, out=None, rng=None, tag: str = "none"):
    """Copy a folder."""
    import shutil

    assert len(others) == 1 and tokenizer is not None
    return shutil.copytree(model, out)


@interp(version=1, source="x", licence="x", stage="evaluation", threats=("backdoor",))
def size(model, rows, *, tokenizer, rng, other=None):
    """Count parameters."""
    from davylamp.core.stats import rate

    n = sum(p.numel() for p in model.parameters())
    figure = {"kind": "table", "title": "size", "columns": ["n"], "rows": [[n]], "note": ""}
    return {"parameters": n, "other": other is not None, "estimates": [rate(1, 2, name="half")], "figures": [figure]}
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "things.py").write_text(THINGS)
    rows = [{"id": str(i), "messages": [{"role": "user", "content": "a" * i}]} for i in range(1, 7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from davylamp.models import organism

    folder = tmp_path_factory.mktemp("model") / "tiny"
    organism.new_model(0).save_pretrained(folder)
    organism.tokenizer().save_pretrained(folder)
    return folder


def run(monkeypatch, *words):
    words = [str(word) for word in words]
    monkeypatch.setattr(sys, "argv", ["davylamp", *words])
    return CliRunner().invoke(main, words, catch_exceptions=False)


def test_data_keeps_what_it_dropped_and_why(here, monkeypatch):
    found = run(monkeypatch, "data", "things.py:short", "rows.jsonl", "out.jsonl", "--most", "4", "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["counts"] == {"rows": 6, "written": 4, "dropped": 2} and record["about"]["dropped"] == {"too long": 2}
    assert [case.id for case in CaseFile("out.jsonl")] == ["1", "2", "3", "4"]
    assert [case.meta["dropped"] for case in CaseFile("out.dropped.jsonl")] == ["too long"] * 2
    again = run(monkeypatch, "data", "things.py:short", "rows.jsonl", "out.jsonl")
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_data_that_raises_writes_nothing(here, monkeypatch):
    (here / "bad.jsonl").write_text('{"id": "1", "messages": [{"role": "user", "content": "a"}]}\n{"id": "2"}\n')
    found = run(monkeypatch, "data", "things.py:short", "bad.jsonl", "out.jsonl")
    assert found.exit_code == 2 and "bad.jsonl line 2" in found.stderr
    assert sorted(path.name for path in here.iterdir()) == ["bad.jsonl", "rows.jsonl", "things.py"]


def test_a_chain_of_models_is_a_chain_of_records(here, model, monkeypatch):
    found = run(monkeypatch, "train", "things.py:nudge", model, "rows.jsonl", "--out", "tuned", "--by", "0.5")
    assert found.exit_code == 0, found.output
    found = run(monkeypatch, "edit", "things.py:same", "tuned", model, "--out", "fixed", "--tag", "x")
    assert found.exit_code == 0, found.output
    trained, edited = (load(find_run(here / "runs", json.loads((here / name / "lineage.json").read_text())["record"]))
                       for name in ("tuned", "fixed"))  # fmt: skip
    assert trained.inputs["train"]["options"] == {"by": 0.5} and edited.parents == (trained.id,)
    assert edited.inputs["model"]["sha256"] == trained.about["sha256"]

    from davylamp.models.loading import load_pair

    assert float(load_pair("fixed")[0].model.norm.weight.detach().mean()) == pytest.approx(1 + 0.5 * 6)
    refused = run(monkeypatch, "train", "things.py:nudge", model, "rows.jsonl", "--out", "tuned")
    assert refused.exit_code == 2 and "exists already" in refused.stderr


def test_interp_leaves_scores_and_a_report(here, model, monkeypatch):
    found = run(monkeypatch, "interp", "things.py:size", model, "--rows", "rows.jsonl", "--other", model, "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    folder = here / record["folder"]
    assert json.loads((folder / "scores.json").read_text())["other"] is True
    assert record["estimates"][0]["name"] == "half" and record["about"]["figures"][0]["kind"] == "table"
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "things.py:nudge", "nowhere/at/all", "rows.jsonl", "--out", "x"), "there is no folder"),
        (("train", "things.py:nudge", ".", "rows.jsonl", "--out", "x"), "holds no config.json"),
        (("edit", "things.py:same", "org/model", "org/other", "--out", "x"), "download it first"),
        (("edit", "nothing_such", "a", "--out", "x"), "no edit named"),
        (("data", "things.py:short", "rows.jsonl", "y.jsonl", "--mots", "3"), "Did you mean 'most'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(here, monkeypatch, words, says):
    found = run(monkeypatch, *words)
    assert found.exit_code == 2 and says in found.stderr, found.stderr
    assert not (here / "x").exists() and not (here / "runs").exists()


def test_the_help_page_shows_every_command():
    from davylamp.cli import SECTIONS

    shown = [name for names in SECTIONS.values() for name in names]
    assert not set(main.commands) - set(shown), "a command stands in no section of the help page"
