"""Evaluation cards: every suite has one, what they say is checked, and a card only decides on a measured judge and fresh rows."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from click.testing import CliRunner

from davylamp.cli import main
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.evaluate import load_suite
from davylamp.core.registry import entries
from davylamp.coverage import cover, figures
from davylamp.metrics.agreement import cohen_kappa
from davylamp.metrics.holdout import Budget, redacted
from davylamp.report.cards import FIELDS, cards, stated, validity
from davylamp.report.charts import Shades, cell
from davylamp.report.html import write_report
from davylamp.report.runs import gather
from davylamp.studies._planted_registry import leave

NOW = datetime(2026, 1, 1, tzinfo=UTC)
COUNTS = {"true_hits": 90, "positives": 100, "true_passes": 80, "negatives": 100}
OWN = """
[my_suite]
layer = "human interaction"
input = "text"
output = "text"
form = "user study"
goal = "track"
metric = "trust"
better = "lower"
limit = 0.2
holdout = "held out"
languages = ["de"]
gaps = "twelve people"
owner = "Kim"
half_life = 30
"""


def made(tmp_path, suite="organism_hazards", now=NOW, **more):
    folder = leave(tmp_path / "runs", suite, created=more.pop("created", NOW.isoformat()), **more)
    return next(card for card in cards(gather([folder]), now=now) if card.suite == suite)


def test_every_suite_has_a_whole_card_and_no_card_is_of_nothing():
    names = {entry.name for entry in entries("suite")}
    assert set(stated()) == names
    assert all(set(row) == set(FIELDS) for row in stated().values())
    assert [card.suite for card in cards()] == sorted(names)


def test_metric_and_direction_are_those_of_the_suites_that_can_be_loaded_here():
    for name in ("capability", "overrefusal", "organism_hazards", "organism_lookalikes", "organism_capability"):
        metrics = {metric.name: metric.higher_is_better for metric in load_suite(name, limit=4).suite.metrics}
        row = stated()[name]
        assert metrics[row["metric"]] == (row["better"] == "higher"), name


def test_what_a_card_needs_to_decide(tmp_path):
    assert made(tmp_path).weak == ()  # judged by an answer key
    assert made(tmp_path, n=19).weak == ("19 rows, of 20 needed",)
    assert made(tmp_path, judge="somebody").weak == ("its judge was not measured",)
    old = made(tmp_path, created=(NOW - timedelta(days=400)).isoformat())
    assert old.weak == ("400 days old, of 365 at most",) and old.freshness == pytest.approx(0.5 ** (400 / 365))
    poor = made(tmp_path, judge="poor", judge_error={"counts": {**COUNTS, "true_passes": 40}})
    assert "kappa may be" in poor.weak[0] and poor.kappa[0] == pytest.approx(0.3)
    assert next(card for card in cards() if card.suite == "multijail").weak[0] == "no run"


def test_the_worse_end_is_held_against_the_limit(tmp_path):
    """unsafe_rate 0.05: its upper end is 0.09 at n = 200 and 0.077 at 400, with limits 0.15 and 0.09."""
    assert made(tmp_path).against_limit == "within"
    own = {**stated()["organism_hazards"]}
    from dataclasses import replace

    card = made(tmp_path, n=400)
    assert 0.075 < card.ends[1] < 0.08
    assert replace(card, about={**own, "limit": 0.09}).against_limit == "near"
    assert replace(card, about={**own, "limit": 0.06}).against_limit == "beyond"
    assert replace(card, about={**own, "better": "higher", "limit": 0.01}).against_limit == "within"


def test_kappa_is_cohens(tmp_path):
    folder = leave(tmp_path / "runs", "organism_hazards", judge="j", judge_error={"counts": COUNTS})
    truth = [1] * 100 + [0] * 100
    said = [1] * 90 + [0] * 10 + [1] * 20 + [0] * 80
    value, low = validity(gather([folder])[0])
    assert value == pytest.approx(cohen_kappa(truth, said)) and 0.55 < low < 0.65


def test_the_least_difference_has_the_power_it_says():
    """By simulation: two rates apart by it are told apart in about 80 % of pairs of runs."""
    rng, n, p = np.random.default_rng(0), 200, 0.3
    card = cards()[0]
    from dataclasses import replace

    least = replace(card, n=n, value=p).least_difference
    a, b = (rng.binomial(n, rate, size=4000) / n for rate in (p - least / 2, p + least / 2))
    pooled = (a + b) / 2
    z = (b - a) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert 0.76 < (z > 1.96).mean() < 0.84


def test_own_cards(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    with pytest.raises(UnknownNameError, match="suite"):
        cards(own=path)  # no such suite, and no run of it
    run = leave(tmp_path / "runs", "my_suite")
    card = next(card for card in cards(gather([run]), own=path) if card.suite == "my_suite")
    assert card.entry is None and card.about["layer"] == "human interaction" and card.weak == ()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('better = "lower"\n', "", "needs better"),
        ("limit = 0.2\n", "", "needs limit"),
        ('holdout = "held out"\n', "", "needs holdout"),
        ('"user study"', '"user studies"', "Did you mean 'user study'"),
        ("limit = 0.2", 'limit = "low"', "must be a number"),
        ("half_life = 30", "half_life = 0", "more than 0"),
        ('["de"]', "[]", "list of names"),
        ('owner = "Kim"', 'owner = " "', "must be a text"),
        ('owner = "Kim"', 'owners = "Kim"', "owner"),
        ("[my_suite]", "my_suite = 3\n[x]", "must be a table"),
        ("[my_suite]", "[my_suite", "TOML"),
    ],
)
def test_bad_cards(tmp_path, old, new, says):
    path = tmp_path / "own.toml"
    path.write_text(OWN.replace(old, new, 1))
    with pytest.raises(InputError, match=says):
        stated(path)


def test_the_command_and_the_report(tmp_path):
    run = leave(tmp_path / "runs", "organism_hazards")
    said = CliRunner().invoke(main, ["cards", "--runs", str(tmp_path / "runs"), "--from", str(run), "--json"])
    rows = {row["suite"]: row for row in json.loads(said.output)}
    assert rows["organism_hazards"]["weak"] == [] and rows["multijail"]["languages"][0] == "en"
    whole = CliRunner().invoke(main, ["cards", "overrefusal"]).output
    assert "Can decide  no: no run" in whole and "held to 0.15" in whole
    short = CliRunner().invoke(main, ["cards"]).output
    assert "No card with layer human interaction, systemic impact." in short
    wrong = CliRunner().invoke(main, ["cards", "overefusal"])
    assert wrong.exit_code == 2 and "overrefusal" in wrong.output
    write_report(tmp_path / "r.html", [run], title="t")
    page = (tmp_path / "r.html").read_text()
    assert "Evaluation cards" in page and "counts half after 365 days" in page and 'href="#cards"' in page
    write_report(tmp_path / "r.html", [leave(tmp_path / "runs", "nobody_stated_anything")], title="t")
    assert "Evaluation cards" not in (tmp_path / "r.html").read_text()


# --- held-out rows ----------------------------------------------------------------------------------------------------------------------
def test_what_goes_back_is_coarse_and_holds_no_row():
    from davylamp.core.stats import rate

    canary = "a secret row"
    estimates = [
        rate(1, 400, name="unsafe_rate"),
        rate(12, 400, name="unsafe_rate", category="x/one"),
        rate(3, 19, name="unsafe_rate", category="x/small"),
        rate(0, 0, name="unsafe_rate", arm=canary),
    ]
    told = redacted(estimates, limits={"unsafe_rate": 0.06})
    assert [(row["category"], row["rate"], row["state"]) for row in told] == [
        (None, 0.0, "pass"),
        ("x/one", 0.05, "near"),
    ]
    assert set(told[0]) == {"metric", "category", "rate", "state"} and canary not in json.dumps(told)


def test_bad_budgets():
    for options in ({"answers": 0}, {"step": 0}):
        with pytest.raises(InputError):
            Budget(**options)
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        Budget()(1.2)


# --- levels in a heat map ---------------------------------------------------------------------------------------------------------------
def test_levels_are_shown_without_decimals():
    assert cell(1.0, Shades([0.0, 1.0]), "")["short"] == "1"
    assert cell(1.0, Shades([0.5, 1.0]), "")["short"] == "1.0"
    values = [x for line in figures(cover())[0]["values"] for x in line if x is not None]
    assert {cell(float(x), Shades([float(v) for v in values]), "")["short"] for x in values} <= {"0", "1"}
