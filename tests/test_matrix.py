"""The threat matrix: its rows are in order, a state is what runs make it, works go to their cells, and exports come back."""

import csv
import io
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from davylamp.cli import main
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.record import folder_for, new_record, save
from davylamp.core.registry import entries
from davylamp.matrix import as_csv, chosen, matrix, read, references, text

ROWS = """
[a-attack]
family = "language"
type = "jailbreak"
role = "attack"
access = ["black"]
categories = ["cipher"]
things = ["attack encoding"]

[a-defence]
family = "language"
type = "jailbreak"
role = "defence"
access = []
categories = ["output"]
things = ["guard lamp"]

[b-attack]
family = "vision"
type = "adversarial"
role = "attack"
access = ["white"]
categories = ["patch"]
things = []
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "m.toml"
    file.write_text(ROWS)
    return file


def ran(tmp_path, verb, kind, name):
    record = replace(new_record(verb, name, {kind: {"name": name}}), status="finished")
    folder = folder_for(tmp_path / "runs", record)
    save(folder, record)
    return folder


def states(cells):
    return {cell.id: cell.state for cell in cells}


def test_the_shipped_matrix_is_in_order():
    cells = matrix()
    assert len(cells) >= 40 and {cell.family for cell in cells} >= {"vision", "language", "diffusion", "agent"}
    assert {cell.type for cell in cells} >= {
        "adversarial",
        "backdoor",
        "jailbreak",
        "prompt-injection",
        "energy-latency",
    }
    assert all((cell.state == "catalogued") == (not cell.things) for cell in cells)
    assert all(cell.access for cell in cells if cell.role == "attack")


def test_runs_make_the_state(tmp_path, path):
    assert states(matrix(path=path)) == {"a-attack": "in place", "a-defence": "in place", "b-attack": "catalogued"}
    attack = ran(tmp_path, "attack", "attack", "encoding")
    found = matrix([attack], path=path)
    assert states(found) == {"a-attack": "executed", "a-defence": "in place", "b-attack": "catalogued"}
    both = matrix([attack, ran(tmp_path, "guard", "guard", "lamp")], path=path)
    assert states(both) == {"a-attack": "executed with defence", "a-defence": "executed", "b-attack": "catalogued"}
    assert states(matrix([ran(tmp_path, "attack", "attack", "gcg")], path=path))["a-attack"] == "in place"


def test_works_go_to_their_cells(tmp_path, path):
    bib = tmp_path / "w.bib"
    bib.write_text(
        "@comment{x}\n@article{k1,\n  title = {One {Work}\n of two lines},\n  year = 2024,\n  keywords = {a-attack, mine}\n}\n"
        '@misc{k2, title="Other", year={2023}, keywords={b-attack; a-attack}}\n'
    )
    found = {cell.id: cell.refs for cell in matrix(refs=bib, path=path)}
    assert found["a-attack"] == (("One Work of two lines", "2024"), ("Other", "2023"))
    assert found["b-attack"] == (("Other", "2023"),) and found["a-defence"] == ()
    listed = tmp_path / "w.json"
    listed.write_text(json.dumps([{"title": "T", "year": 2020, "cell": "b-attack"}]))
    assert references(listed, ["b-attack"]) == {"b-attack": [("T", "2020")]}


def test_exports_come_back(path):
    cells = matrix(path=path)
    rows = list(csv.DictReader(io.StringIO(as_csv(cells))))
    assert [(row["id"], row["access"], row["things"], row["state"]) for row in rows] == [
        (cell.id, "; ".join(cell.access), "; ".join(cell.things), cell.state) for cell in cells
    ]
    assert "2 in place" in text(cells) and "1 catalogued" in text(cells)


def test_filters(path):
    cells = matrix(path=path)
    assert [cell.id for cell in chosen(cells, role="attack", access="white")] == ["b-attack"]
    assert chosen(cells, family="language", state="executed") == []
    with pytest.raises(UnknownNameError, match="Did you mean 'language'"):
        chosen(cells, family="languages")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('role = "attack"', 'role = "attak"', "attack"),
        ('access = ["black"]', 'access = ["grey"]', "gray"),
        ('"attack encoding"', '"attack encodin"', "attack encoding"),
        ('family = "language"\n', "", "needs family"),
        ('categories = ["cipher"]', 'categories = "cipher"', "list of texts"),
        ('type = "jailbreak"', 'kind = "jailbreak"', "kind"),
        ("[a-attack]", "a = 1\n[a-attack]", "must be a table"),
        ("[a-attack]", "[a-attack", "TOML"),
    ],
)
def test_bad_rows(path, old, new, says):
    path.write_text(ROWS.replace(old, new, 1))
    with pytest.raises(InputError, match=says):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("w.json", '[{"title": "T", "year": 2020}]', "needs title, year and cell"),
        ("w.json", '[{"title": "T", "year": 2020, "cell": "a-atack"}]', "a-attack"),
        ("w.json", '{"title": "T"}', "list of works"),
        ("w.json", "[", "json list"),
        ("w.bib", "@misc{k, title={T", "not closed"),
    ],
)
def test_bad_works(tmp_path, path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says):
        matrix(refs=tmp_path / name, path=path)


def test_the_command(tmp_path):
    said = CliRunner().invoke(main, ["matrix", "--family", "language", "--json"])
    assert {row["family"] for row in json.loads(said.output)} == {"language"}
    assert "catalogued" in CliRunner().invoke(main, ["matrix"]).output
    assert CliRunner().invoke(main, ["matrix", "--role", "atack"]).exit_code == 2
    names = {f"{entry.kind} {entry.name}" for entry in entries()}
    assert all(thing in names for cell in matrix() for thing in cell.things)
