"""Votes, the split rule, the jury: against brute force, simulation and an independent library; what is not decided is never guessed."""

import asyncio
import itertools
import json

import numpy as np
import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import Dropped
from davylamp.data.jury import (
    annotate_response,
    count_votes,
    derive_labels,
    fleiss_kappa,
    jury,
    jury_report,
    load_jury,
    majority_error,
    majority_labels,
    reading,
)
from tests.server import say

TALK = (Message("user", "open the lamp"), Message("assistant", "like this"))


# --- people -------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("votes", "status", "label"),
    [
        (["safe"] * 3, "decided", "safe"),
        (["unsafe", "unsafe", "safe"], "decided", "unsafe"),
        (["unsafe", "needs caution", "safe"], "decided", "needs caution"),
        (["unsafe", "safe", "safe", None], "decided", "safe"),
        (["unsafe", "safe"], "adjudicate", None),
        (["unsafe", "unsafe", None], "adjudicate", None),
        ([], "adjudicate", None),
        (["unsafe", "unsafe", "safe", "safe"], "adjudicate", None),
        (["safe", "safe", "unsafe", "needs caution"], "adjudicate", None),
    ],
)
def test_votes_on_a_dialogue(votes, status, label):
    found = count_votes(votes)
    assert (found.status, found.label) == (status, label) and bool(found.why) == (label is None)


def test_categories_are_in_the_order_of_votes():
    votes = ["unsafe", "unsafe", "safe", "unsafe"]
    named = [["a", "b"], ["b", "b"], ["c"], ["c", "b"]]
    assert count_votes(votes, named).categories == ("b", "a", "c"), "those of a safe vote do not count"
    with pytest.raises(InputError, match="every vote or for none"):
        count_votes(votes, named[:2])
    with pytest.raises(UnknownNameError, match="'unsafe'"):
        count_votes(["unsave", "safe", "safe"])


def test_label_sets_and_their_readings():
    assert majority_labels([["Safe"], ["Safe"], ["Threat"]]) == ("Safe",)
    assert majority_labels([["Needs Caution"], ["Needs Caution"], ["Safe"]]) == ("Needs Caution",)
    assert majority_labels([["Threat"], ["Safe"]]) == ("Threat",), "half of them is enough for a category"
    for wrong in ([], [["Safe"]] * 6):
        with pytest.raises(InputError, match="one to five"):
            majority_labels(wrong)
    assert [reading(["Needs Caution"], policy) for policy in ("permissive", "defensive")] == [0, 1]
    assert reading(["Safe"], "defensive") == 0


def by_hand(table):
    """Fleiss' kappa by counting all ordered pairs of votes, one by one."""
    rows = [[v for v in row if v is not None] for row in table]
    rows = [row for row in rows if len(row) > 1]
    agree = [np.mean([a == b for a, b in itertools.permutations(row, 2)]) for row in rows]
    every = [v for row in rows for v in row]
    chance = sum((every.count(label) / len(every)) ** 2 for label in set(every))
    return None if chance == 1 else (np.mean(agree) - chance) / (1 - chance)


@pytest.mark.parametrize(
    "table",
    [
        [["a", "a", "a"], ["b", "b", "b"]],
        [["a", "b", "c"], ["b", "c", "a"]],
        [["a", "a"], ["b", "b", "a"], ["a", "b", "b", "b"]],
        [["a", None, "a"], ["b", "a", None], ["a", None, None]],
        [["a", "a"], ["a", "a"]],
        [],
    ],
)
def test_kappa_on_hand_cases(table):
    """All agree, all disagree, unequal numbers of raters, one label only, nothing."""
    wanted = by_hand(table) if table else None
    assert fleiss_kappa(table) == (None if wanted is None else pytest.approx(wanted, abs=1e-12))


def test_kappa_on_random_tables():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = rng.choice(["a", "b", "c"], size=(15, 4)).tolist()
        assert fleiss_kappa(table) == pytest.approx(by_hand(table), abs=1e-12)
    assert fleiss_kappa([["a", "a", "a"], ["b", "b", "b"]]) == 1.0
    # Fleiss 1971 as it is in the textbooks: 10 subjects, 14 raters, 5 categories, kappa 0.210
    counts = "0 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2|6 5 2 1 0|0 2 2 3 7"
    table = [[str(i) for i, n in enumerate(map(int, row.split())) for _ in range(n)] for row in counts.split("|")]
    assert fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)


# --- the split rule -----------------------------------------------------------------------------------------------------------------------
def test_the_split_rule_on_a_thousand_dialogues():
    """Against the rule written down as a table, for every mix of votes, response and jury."""
    rng, seen = np.random.default_rng(1), set()
    for _ in range(1000):
        votes = rng.choice(["safe", "unsafe"], size=3, p=[0.5, 0.5]).tolist()
        has, said = bool(rng.random() < 0.7), [None, "safe", "unsafe"][rng.integers(3)]
        unsafe = votes.count("unsafe") > 1
        if not has:
            wanted = ("unsafe" if unsafe else "safe", None, None)
        elif not unsafe:
            wanted = ("safe", "safe", "human")
        else:
            wanted = ("unsafe", said, "llm_jury" if said else None)
        found = derive_labels(count_votes(votes), has_response=has, jury=said)
        assert (found.prompt, found.response, found.response_by) == wanted and found.prompt_by == "human"
        seen.add(wanted)
    assert len(seen) == 5, "every outcome of the rule has come up"
    assert derive_labels(count_votes(["safe"]), has_response=True).prompt is None
    with pytest.raises(InputError):
        derive_labels(count_votes(["safe"] * 3), has_response=True, jury="maybe")
    caution = count_votes(["needs caution"] * 3)
    assert derive_labels(caution, has_response=False).prompt == "unsafe"
    assert derive_labels(caution, has_response=False, defensive=False).prompt == "safe"


# --- the jury -----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("votes", "label", "why"),
    [
        (["unsafe", "unsafe", "safe"], "unsafe", ""),
        (["safe", None, "safe"], "safe", ""),
        (["safe", None, "unsafe"], None, "a tie"),
        ([None, None, "unsafe"], None, "1 of 3 judges"),
        ([None, None, None], None, "0 of 3 judges"),
    ],
)
def test_majority_and_abstentions(votes, label, why):
    found = annotate_response(dict(zip("abc", votes, strict=True)))
    assert found.label == label and found.why.startswith(why)


def test_majority_error_by_enumeration():
    assert majority_error([0.1] * 3) == pytest.approx(3 * 0.01 - 2 * 0.001)
    assert majority_error([0.3]) == 0.3
    with pytest.raises(InputError, match="odd"):
        majority_error([0.1, 0.2])


def answers(server, words):
    """The model named a, b, c answers with its word."""
    server.answer = lambda body, number: say(words[body["model"]])


def spec(server, models="abc"):
    return "+".join(f"llm_judge:model=openai/{name}@{server.url}" for name in models)


def test_the_jury_over_http(server):
    answers(
        server,
        {"a": '{"label": "unsafe"}', "b": '{"label": "unsafe"}', "c": "I would rather not say"},
    )
    rows = [Case("1", TALK, meta={"x": 1}), Case("2", TALK[:1]), Case("3", (*TALK[:1], Message("assistant", " ")))]
    found = list(jury(rows, rng=np.random.default_rng(0), judges=spec(server)))
    assert found[0].answer == 1 and found[0].meta["response_label_source"] == "llm_jury" and found[0].meta["x"] == 1
    assert sorted(map(str, found[0].meta["votes"].values())) == ["None", "unsafe", "unsafe"]
    assert [row.reason for row in found[1:]] == ["no reply to judge"] * 2 and all(
        isinstance(r, Dropped) for r in found[1:]
    )
    json.dumps(found[0].json())


def test_a_jury_that_does_not_decide_drops_the_row(server):
    answers(server, {"a": '{"label": "unsafe"}', "b": '{"label": "safe"}', "c": "hm"})
    (row,) = jury([Case("1", TALK)], rng=np.random.default_rng(0), judges=spec(server))
    assert isinstance(row, Dropped) and row.reason == "a tie" and len(row.case.meta["votes"]) == 3
    answers(server, {"a": '{"label": "unsafe"}', "b": "?", "c": "hm"})
    (row,) = jury([Case("1", TALK)], rng=np.random.default_rng(0), judges=spec(server))
    assert row.reason == "too few judges"


def test_a_judge_out_of_reach_abstains_and_is_counted(server, monkeypatch):
    async def at_once(seconds):
        return None

    monkeypatch.setattr("davylamp.models.retry.asyncio.sleep", at_once)
    answers(server, {"a": '{"label": "safe"}', "b": '{"label": "safe"}'})
    gone = spec(server, "ab") + "+llm_judge:model=openai/c@http://127.0.0.1:9/v1"
    bench = load_jury(gone)

    async def go():
        found = await bench(TALK)
        await bench.close()
        return found

    assert asyncio.run(go()).label == "safe" and sum(bench.failures.values()) == 1


@pytest.mark.parametrize(
    ("models", "message"), [("ab", "three judges or more"), ("aba", "the same"), ("", "three judges or more")]
)
def test_a_jury_is_three_different_models(server, models, message):
    with pytest.raises(InputError, match=message):
        load_jury(spec(server, models) if models else "")
    with pytest.raises(InputError, match="must measure unsafe"):
        load_jury(spec(server, "ab") + "+refusal")


def test_the_report_finds_planted_errors_and_their_correlation():
    """Independent errors .2/.15/.1; beside it a jury of copies, whose errors go together and whose vote gains nothing."""
    rng, n = np.random.default_rng(3), 20_000
    truth = rng.integers(2, size=n)
    wrong = rng.random((n, 3)) < (0.2, 0.15, 0.1)
    words = np.array(["safe", "unsafe"])
    people = words[truth].tolist()

    def report(errors):
        table = words[truth[:, None] ^ errors]
        return jury_report([dict(zip("abc", row, strict=True)) for row in table.tolist()], people)

    found = report(wrong)
    assert [found["errors"][name]["value"] for name in "abc"] == pytest.approx([0.2, 0.15, 0.1], abs=0.01)
    assert found["majority_error"]["value"] == pytest.approx(majority_error([0.2, 0.15, 0.1]), abs=0.01)
    assert max(abs(value) for value in found["error_correlation"].values()) < 0.03
    copies = report(np.repeat(wrong[:, :1], 3, axis=1))
    assert copies["majority_error"]["value"] == copies["errors"]["a"]["value"]
    assert list(copies["error_correlation"].values()) == pytest.approx([1.0] * 3) and copies["fleiss_kappa"] == 1.0


def test_report_on_bad_input():
    with pytest.raises(InputError, match="no verdict"):
        jury_report([])
    with pytest.raises(InputError, match="same judges"):
        jury_report([{"a": "safe"}, {"b": "safe"}])
    with pytest.raises(InputError, match="as many as"):
        jury_report([{"a": "safe", "b": "safe"}], ["safe", "safe"])
