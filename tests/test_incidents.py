"""Incidents after release: what they belong to, what nothing covers, and what closes them."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from davylamp.cli import main
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.incidents import take_in, text
from davylamp.studies._planted_registry import leave

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def rows(*given):
    return [(f"line {i}", {"id": str(i), **row}) for i, row in enumerate(given)]


def test_a_named_threat_stands_and_another_is_found_by_its_words():
    found = take_in(
        rows(
            {"text": "zzz qqq", "threat": "bias"},
            {"text": "The model refuses a harmless question"},
            {"text": "a cloned voice on the telephone"},
        )
    )
    assert [one.threat for one in found.incidents] == ["bias", "over-refusal", None]
    assert found.incidents[0].named and not found.incidents[1].named
    assert found.uncovered.value == pytest.approx(1 / 3) and found.proposals == []  # one is no cluster
    assert "deployment" in found.incidents[1].stages


def test_named_incidents_teach_how_people_speak():
    story = {"text": "the lift stopped between floors"}
    assert take_in(rows(story)).incidents[0].threat is None
    taught = take_in(rows({"text": "a lift stopped at the wrong floors", "threat": "agent"}, story))
    assert taught.incidents[1].threat == "agent"


def test_three_alike_are_proposed():
    texts = (
        "cloned voice telephoned grandmother",
        "grandmother heard cloned voice",
        "a grandmother, called by a cloned voice",
    )
    found = take_in(rows(*({"text": one} for one in texts), {"text": "solar panel stopped"}))
    ((words, ids),) = found.proposals
    assert set(words) >= {"cloned", "voice", "grandmother"} and ids == ("0", "1", "2")
    assert "a new threat? 3 uncovered incidents" in text(found) and "telephoned" not in text(found)


def test_only_a_newer_sound_run_closes(tmp_path):
    def run(days, **more):
        return leave(tmp_path, "overrefusal", created=(NOW + timedelta(days=days)).isoformat(), **more)

    given = rows({"text": "it refused me", "threat": "over-refusal", "date": "2026-03-01"})
    assert take_in(given).incidents[0].closed_by == ""
    assert take_in(given, [run(-1)]).incidents[0].closed_by == ""
    assert take_in(given, [run(1, n=5)]).incidents[0].closed_by == ""  # weak
    late = run(2)
    assert take_in(given, [late]).incidents[0].closed_by[:8] == late.name[-8:]
    assert take_in(rows({"text": "x", "threat": "agent", "date": "2026-03-01"}), [late]).incidents[0].closed_by == ""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no incidents"),
        ([("l", {"id": "1"})], "needs text"),
        ([("l", {"text": "x"})], "needs id"),
        (rows({"text": "x", "date": "yesterday"}), "date must be like"),
        ([*rows({"text": "x"}), *rows({"text": "y"})], "stands twice"),
    ],
)
def test_bad_input(given, says):
    with pytest.raises(InputError, match=says):
        take_in(given)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="jailbreak"):
        take_in(rows({"text": "x", "threat": "jailbrek"}))
    with pytest.raises(UnknownNameError, match="threat"):
        take_in(rows({"text": "x", "threats": "bias"}))


def test_the_command(tmp_path):
    file = tmp_path / "i.jsonl"
    file.write_text(
        json.dumps({"id": "1", "text": "it refused me", "threat": "over-refusal", "date": "2026-03-01"}) + "\n"
    )
    said = CliRunner().invoke(main, ["incidents", str(file)])
    assert said.exit_code == 1 and "1 open" in said.output
    run = leave(tmp_path / "runs", "overrefusal", created=NOW.replace(year=2027).isoformat())
    said = CliRunner().invoke(main, ["incidents", str(file), str(run), "--runs", str(tmp_path / "runs"), "--json"])
    assert said.exit_code == 0 and json.loads(said.output)["incidents"][0]["closed_by"]
