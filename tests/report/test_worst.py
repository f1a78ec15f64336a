"""Which rows are shown: the worst, one of each category before a second of any, found in one walk with little memory."""

import tracemalloc
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from davylamp.core.nouns import Case, Message, Metric, Verdict
from davylamp.core.rows import canonical, read_run
from davylamp.report import worst

UNSAFE = Metric("unsafe_rate")


def brute(rows, metrics, shown):
    """All rows ranked by badness, then by how many of their category came before, then by place; the first so many."""
    seen, ranked = Counter(), []
    for index, (category, value) in enumerate(rows):
        if value is None:
            continue
        found = worst.badness({"case": {"id": "x", "category": category}, "verdict": {"value": value}}, metrics)
        if found and found[0] > 0:
            seen[category] += found[0] >= 0.5
            ranked.append((-found[0], seen[category], index))
    return [index for *_, index in sorted(ranked)[:shown]]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.3, 0.5, 1.0, None])), max_size=40),
    st.integers(1, 12),
    st.booleans(),
)
def test_the_worst_rows_against_a_full_sort(tmp_path, rows, shown, better):
    metrics = [Metric("m", higher_is_better=better)]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            f'{{"key":"{i:032x}","case":{{"id":"{i}","category":"{category}","messages":[{{"role":"user","content":"q"}}]}},"seed":0,'
            f'"reply":[{{"role":"assistant","content":"r"}}],"verdict":{{"value":{"null" if value is None else value}}}}}\n'
            for i, (category, value) in enumerate(rows)
        )
    )
    found = worst.pick(path, metrics, shown)
    assert [int(row["facts"]["row"]) for row in found.worst] == brute(rows, metrics, shown)
    assert len(found.unscored) == min(5, sum(value is None for _, value in rows)) == min(5, found.counts["unscored"])


@pytest.mark.parametrize(
    ("metric", "label", "value", "wanted"),
    [
        (Metric("unsafe_rate"), "x", 0.9, 0.9),
        (Metric("accuracy", higher_is_better=True), "x", 0.9, 0.1),
        (Metric("over_refusal_rate", flip=True), "x", 0.9, 0.1),
        (Metric("helpful", flip=True, higher_is_better=True), "x", 0.9, 0.9),
        (Metric("a", where=(("meta.label", "y"),)), "x", 0.9, None),
        (Metric("a"), "x", None, None),
    ],
)
def test_badness(metric, label, value, wanted):
    found = worst.badness({"case": {"id": "1", "meta": {"label": label}}, "verdict": {"value": value}}, [metric])
    assert found == (None if wanted is None else (pytest.approx(wanted), metric.name))


def test_unscored_and_failed_rows_are_listed_with_their_totals(make_run, report):
    rows = [("a", None, "mumble")] * 9 + [("a", "failed", "")] * 2 + [("a", 1.0, "bad")] * 30
    page = report(make_run(rows))
    heads = [h.words for h in page.section("rows").all("h4")]
    assert heads == ["Worst verdicts 20 of 30", "Without a verdict 5 of 9", "Failed 2"]
    assert "Error: no answer" in page.section("rows").words
    assert page.section("rows").one("details", "more").all("summary")[0].words == "10 more"


def test_one_walk_with_little_memory(make_run):
    """Forty megabytes of rows, of which two dozen are kept: the peak is a few rows, not the file."""
    text = "word " * 20_000
    folder = make_run([("abc"[i % 3], float(i % 50 == 0), text) for i in range(400)])
    path = folder / "rows.jsonl"
    assert path.stat().st_size > 38e6
    tracemalloc.start()
    try:
        found = worst.pick(path, [UNSAFE], 5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.worst) == 5 and peak < 3e6


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["failed", "unjudged", None, 0.0, 1.0])), max_size=30),
    st.booleans(),
)
def test_rows_written_again_count_once_by_their_last_line(tmp_path, lines, torn):
    """Against `read_run`, on logs as the runner writes them: nothing follows a line with a verdict."""
    path, done = tmp_path / "rows.jsonl", set()
    with path.open("w") as file:
        for number, value in lines:
            if number in done:
                continue
            reply = None if value == "failed" else [{"role": "assistant", "content": "r"}]
            verdict = None if value in ("failed", "unjudged") else {"value": value}
            done |= {number} if verdict else set()
            case = {"id": str(number), "messages": [{"role": "user", "content": "q"}]}
            rest = canonical({"case": case, "seed": 0, "reply": reply, "verdict": verdict})
            file.write(f'{{"key":"{number:032x}",{rest[1:]}\n')
        file.write('{"key":"torn' if torn else "")
    last = list(read_run(path))
    found = worst.pick(path, [UNSAFE], 100)
    by = {"failed": [], "unscored": [], "worst": []}
    for row in last:
        value = row["verdict"] and row["verdict"]["value"]
        name = "failed" if row["verdict"] is None else "unscored" if value is None else "worst" if value else None
        if name:
            by[name].append(row["case"]["id"])
    for name, ids in by.items():
        shown = [row["facts"]["row"] for row in getattr(found, name)]
        assert shown == ids[: None if name == "worst" else worst.OTHERS_SHOWN] and found.counts[name] == len(ids)


def test_a_row_without_a_reply_shows_its_question(make_run, report):
    case = Case("7", (Message("user", "the question"),))
    page = report(make_run([(case, (), Verdict(1.0, why="silent"))]))
    assert "the question" in page.section("rows").words and not page.section("rows").all("article", "judged")
