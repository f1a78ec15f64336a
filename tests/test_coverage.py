"""The coverage map: golden on a small registry made here, sane on the real one, and what does not count as evidence."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from davylamp.cli import main
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Estimate
from davylamp.core.record import folder_for, new_record, save
from davylamp.core.registry import STAGES, THREATS, entries, read
from davylamp.coverage import cover, register, run_coverage, text

THINGS = '''
from davylamp.core import guard, suite

@suite(version=1, source="x", licence="x", stage="evaluation", threats=("bias", "jailbreak"))
def asks(*, n: int = 3):
    """Ask."""

@guard(version=1, source="x", licence="x", stage="deployment", threats=("jailbreak",), measures="unsafe")
def stops():
    """Stop."""
'''
CREATED = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def things(tmp_path):
    path = tmp_path / "things.py"
    path.write_text(THINGS)
    return read(path)


def left(runs, name="asks", *, n=50, judge="exact", status="finished", seed=0, **about):
    from dataclasses import replace

    inputs = {"suite": {"name": name}, "target": {"name": "t"}, "judge": {"name": judge}, "seed": seed}
    record = new_record("eval", name, inputs, created=CREATED.isoformat(), **about)
    record = replace(record, status=status, estimates=(Estimate(0.1, 0.05, 0.2, n, name="unsafe_rate"),))
    folder = folder_for(runs, record)
    save(folder, record)
    return folder


def cell(found, threat, stage):
    (row,) = [one for one in found.threats if one.name == threat]
    return row, row.cells[STAGES.index(stage)]


def test_a_small_registry(things):
    found = cover(things=things)
    assert len(found.threats) == len(THREATS)
    row, here = cell(found, "jailbreak", "deployment")
    assert (here.state, here.tests, here.defences) == ("in place", (), ("stops",))
    assert row.gaps == ("nothing at post-training",)
    row, here = cell(found, "bias", "evaluation")
    assert (here.state, here.tests, row.gaps[0]) == ("in place", ("asks",), "no defence")
    assert cell(found, "agent", "evaluation")[1].state == "hole"
    assert cell(found, "agent", "data")[1].state == "not applicable"


def test_the_registry_alone_decides(things):
    """Taking a thing away empties exactly its cells."""
    whole, less = cover(things=things), cover(things=[one for one in things if one.name != "asks"])
    changed = {
        (row.name, here.stage)
        for row, other in [(r, next(o for o in less.threats if o.name == r.name)) for r in whole.threats]
        for here, there in zip(row.cells, other.cells, strict=True)
        if here != there
    }
    assert changed == {("bias", "evaluation"), ("jailbreak", "evaluation")}


def test_the_real_registry_is_all_there():
    found = cover()
    named = {name for row in found.threats for here in row.cells for name in (*here.tests, *here.defences)}
    wanted = {
        e.name for e in entries() if e.kind in ("suite", "attack", "interp", "study", "data", "train", "edit", "guard")
    }
    assert named == wanted


@pytest.mark.parametrize(
    ("given", "weak", "weight"),
    [
        ({}, (), 1.0),
        ({"n": 19}, ("at most 19 rows, of 20 needed",), 0.5),
        ({"judge": "refusal"}, ("its judge's error was not measured",), 0.5),
        ({"judge": "refusal", "judge_error": {"counts": {}, "rows": 9}}, (), 1.0),
        ({"status": "incomplete"}, ("the run is incomplete",), 0.5),
    ],
)
def test_what_makes_evidence_weak(tmp_path, things, given, weak, weight):
    found = cover([left(tmp_path / "runs", **given)], things=things)
    row, here = cell(found, "jailbreak", "evaluation")
    (evidence,) = here.evidence
    assert (evidence.weak, evidence.weight) == (weak, weight)
    assert here.state == ("weak evidence" if weak else "evidence")
    assert row.covered == weight
    assert cell(found, "over-refusal", "evaluation")[0].covered == 0  # the suite does not name it


def test_evidence_ages_and_moves_the_order(tmp_path, things):
    folder = left(tmp_path / "runs")
    fresh, old = (cover([folder], things=things, now=CREATED + timedelta(days=days)) for days in (0, 500))
    assert [row.name for row in cover(things=things).threats].index("jailbreak") < 3
    assert fresh.threats[-1].priority == cell(fresh, "jailbreak", "evaluation")[0].priority == 0
    assert 0 < cell(old, "jailbreak", "evaluation")[0].priority < 0.448
    weight = cell(old, "jailbreak", "evaluation")[1].evidence[0].weight
    assert weight == pytest.approx(0.5 * 0.5 ** (500 / 365))


def test_the_same_suite_twice_is_one_test(tmp_path, things):
    folders = [left(tmp_path / "runs", n=10, seed=seed) for seed in range(5)]
    assert cell(cover(folders, things=things), "jailbreak", "evaluation")[0].covered == 0.5


def test_a_run_of_nothing_named_is_said(tmp_path, things):
    found = cover([left(tmp_path / "runs", "stranger")], things=things)
    assert len(found.unmatched) == 1
    assert "counted nowhere" in text(found)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("[nonsense]\nseverity = 1", "nonsense"),
        ("[bias]\nseverty = 1", "severty"),
        ("[bias]\nseverity = 2", "[0, 1]"),
        ("[bias]\nseverity = true", "[0, 1]"),
        ('[bias]\nstages = ["nowhere"]', "nowhere"),
        ("bias = 3", "table"),
        ("[bias", "TOML"),
    ],
)
def test_bad_registers(tmp_path, rows, says):
    path = tmp_path / "own.toml"
    path.write_text(rows)
    with pytest.raises((InputError, UnknownNameError), match=r".*") as caught:
        register(path)
    assert says in str(caught.value)


def test_an_own_register_moves_the_priority(tmp_path, things):
    path = tmp_path / "own.toml"
    path.write_text("[energy-latency]\nseverity = 1\nlikelihood = 1\nexposure = 1\n")
    assert cover(own=path, things=things).threats[0].name == "energy-latency"


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = left(tmp_path / "runs", "simple_safety_tests")
    done = CliRunner().invoke(main, ["coverage", str(folder), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    (row,) = [one for one in found["threats"] if one["name"] == "harmful-compliance"]
    assert row["cells"][STAGES.index("evaluation")]["state"] == "evidence"
    page = next(tmp_path.glob("runs/*-coverage-*/report.html")).read_text()
    assert "What to do first" in page


def test_equal_runs_give_equal_ids(tmp_path):
    folder = left(tmp_path / "runs", "simple_safety_tests")
    first, again = (run_coverage([folder], runs=tmp_path / "out", now=CREATED)[1] for _ in range(2))
    assert first.id == again.id
