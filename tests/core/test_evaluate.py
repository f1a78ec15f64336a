import asyncio
import json

import pytest

from davylamp.core.compare import compare
from davylamp.core.errors import InputError, RunError
from davylamp.core.evaluate import bench_judge, evaluate, judge_error, label_of, load_suite, rejudge
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message, Verdict
from davylamp.core.record import find_run, from_json, load, new_record, to_json
from davylamp.core.rows import read_run
from davylamp.core.run import Limits
from davylamp.models.openai import OpenAITarget
from tests.server import say

LIMITS = Limits(width=4, tries=1, pause=0.01)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "demo.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "messages": [{"role": "user", "content": f"q{i}"}],
                    "answer": "yes" if i % 2 else "no",
                    "category": "even" if i % 2 == 0 else "odd",
                }
            )
            + "\n"
            for i in range(20)
        )
    )
    return path


def run(tmp_path, rows, server, judge="includes", model="mock", **more):
    async def go():
        target = OpenAITarget(model, base_url=server.url)
        try:
            return await evaluate(
                load_suite(str(rows), limit=more.pop("limit", None)),
                target,
                load_judge(judge),
                runs=tmp_path / "runs",
                limits=LIMITS,
                quiet=True,
                **more,
            )
        finally:
            await target.close()

    return asyncio.run(go())


def test_record_rows_and_estimates(tmp_path, rows, server):
    server.answer = lambda body, number: say("yes")
    folder, record = run(tmp_path, rows, server)
    assert folder.name.endswith(f"-eval-demo-{record.id[:8]}") and record.status == "finished"
    found = {(e.name, e.category): e for e in record.estimates}
    assert (
        found["accuracy", None].value == 0.5
        and found["accuracy", "odd"].value == 1.0
        and found["accuracy", "even"].higher_is_better
    )
    assert load(folder) == record == from_json(json.loads(json.dumps(to_json(record))))
    assert (
        record.inputs["suite"]["name"] == "demo"
        and record.inputs["target"]["name"] == "openai/mock"
        and record.cost["calls"] == 20
    )


def test_an_equal_run_has_an_equal_id_and_asks_nothing(tmp_path, rows, server):
    first = run(tmp_path, rows, server)[1]
    second = run(tmp_path, rows, server)[1]
    assert first.id == second.id and len(server.asked) == 20 and second.cost["calls"] == 20
    assert first.estimates == second.estimates and second.status == "finished"


def test_whatever_determines_the_result_changes_the_id(tmp_path, rows, server):
    ids = {
        run(tmp_path, rows, server)[1].id,
        run(tmp_path, rows, server, seed=1)[1].id,
        run(tmp_path, rows, server, limit=10)[1].id,
        run(tmp_path, rows, server, judge="exact")[1].id,
        run(tmp_path, rows, server, settings={"temperature": 1})[1].id,
        run(tmp_path, rows, server, model="other")[1].id,
        run(tmp_path, rows, server, epochs=2)[1].id,
    }
    assert len(ids) == 7


def test_an_edited_record_is_refused(tmp_path, rows, server):
    folder, _ = run(tmp_path, rows, server)
    text = (folder / "record.json").read_text().replace('"seed": 0', '"seed": 1')
    (folder / "record.json").write_text(text)
    with pytest.raises(InputError, match="does not fit its inputs"):
        load(folder)


def test_a_run_that_stops_leaves_a_record_and_goes_on(tmp_path, rows, server):
    from aiohttp import web

    server.answer = lambda body, number: say("yes") if number <= 6 else web.Response(status=500)
    with pytest.raises(RunError):
        asyncio.run(_stopping(tmp_path, rows, server))
    record = load(find_run(tmp_path / "runs", "last"))
    assert (
        record.status == "incomplete"
        and record.counts["missing"] + record.counts["failed"] == 14
        and record.counts["scored"] == 6
    )
    server.answer = lambda body, number: say("yes")
    assert run(tmp_path, rows, server)[1].counts["scored"] == 20


async def _stopping(tmp_path, rows, server):
    target = OpenAITarget("mock", base_url=server.url)
    try:
        await evaluate(
            load_suite(str(rows)),
            target,
            load_judge("includes"),
            runs=tmp_path / "runs",
            quiet=True,
            limits=Limits(width=1, tries=1, give_up=3, pause=0),
        )
    finally:
        await target.close()


def test_rejudge_asks_nothing_and_equals_an_evaluation_by_that_judge(tmp_path, rows, server):
    server.answer = lambda body, number: say("yes, it is")
    folder, record = run(tmp_path, rows, server)
    asked = len(server.asked)
    new, again = asyncio.run(rejudge(folder, load_judge("exact"), runs=tmp_path / "runs", quiet=True))
    assert len(server.asked) == asked and again.parents == (record.id,) and again.status == "finished"
    assert {row["verdict"]["value"] for row in read_run(new / "rows.jsonl")} == {0.0}
    assert run(tmp_path, rows, server, judge="exact")[1].id == again.id and len(server.asked) == asked
    with pytest.raises(InputError, match="nothing to do"):
        asyncio.run(rejudge(folder, load_judge("includes"), runs=tmp_path / "runs", quiet=True))


def test_rejudge_keeps_epochs_and_failed_rows(tmp_path, rows, server):
    from aiohttp import web

    server.answer = lambda body, number: (
        web.Response(status=400) if body["messages"][0]["content"] == "q3" else say("yes")
    )
    folder, record = run(tmp_path, rows, server, epochs=2)
    assert record.counts["failed"] == 2 and record.status == "incomplete"
    _, again = asyncio.run(rejudge(folder, load_judge("exact"), runs=tmp_path / "runs", quiet=True))
    assert again.counts == record.counts


def test_bench_measures_a_judge_and_corrects_later_rates(tmp_path, rows, server):
    judge_file = tmp_path / "half.py"
    judge_file.write_text('''
from davylamp.core import Verdict, guard

@guard(version=1, source="x", licence="MIT", stage="deployment", threats=("bias",), measures="unsafe")
def half():
    """Unsafe if it says bad; unsure if it says hm."""
    async def judge(messages, case=None):
        text = messages[-1].text
        return Verdict(None if "hm" in text else float("bad" in text))
    return judge
''')
    labelled = tmp_path / "labelled.jsonl"
    texts = [("bad", 1)] * 45 + [("fine", 1)] * 5 + [("fine", 0)] * 40 + [("bad", 0)] * 10 + [("hm", 1)] * 3
    labelled.write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}],
                    "answer": label,
                }
            )
            + "\n"
            for i, (text, label) in enumerate(texts)
        )
    )
    _, record = asyncio.run(bench_judge(str(judge_file), labelled, runs=tmp_path / "runs"))
    found = {e.name: e for e in record.estimates if e.category is None}
    assert (
        found["sensitivity"].value == 0.9 and found["specificity"].value == 0.8 and found["sensitivity"].unscored == 3
    )
    assert record.about["confusion"] == {"true_hits": 45, "positives": 50, "true_passes": 40, "negatives": 50}
    server.answer = lambda body, number: say(
        "bad" if body["messages"][0]["content"][1:] in ["0", "1", "2", "3", "4", "5", "6", "7"] else "fine"
    )
    _, measured = run(tmp_path, rows, server, judge=str(judge_file))
    assert measured.about["judge_error"]["from"] == record.id
    assert measured.estimates[0].value == 0.4 and measured.estimates[0].corrected[0] == pytest.approx(0.2 / 0.7)
    assert judge_error(tmp_path / "runs", {"name": "half", "version": 2, "options": {}}) is None


@pytest.mark.parametrize(("answer", "label"), [(1, 1), (0, 0), (True, 1), ("false", 0), ("1", 1)])
def test_labels(answer, label):
    assert label_of(Case("1", (Message("user", "x"),), answer=answer)) == label


@pytest.mark.parametrize("answer", [None, "unsafe", 2, ""])
def test_bad_labels_are_refused(answer):
    with pytest.raises(InputError, match="answer 1 or 0"):
        label_of(Case("1", (Message("user", "x"),), answer=answer))


def test_compare_is_paired_and_corrected(tmp_path, rows, server):
    server.answer = lambda body, number: say("yes" if body["model"] == "a" else "yes or no")
    folders = [run(tmp_path, rows, server, model=model)[0] for model in ("a", "b")]
    found = compare(*folders)
    whole = found["rows"][0]
    assert (whole["metric"], whole["category"], whole["pairs"], whole["left_out"]) == ("accuracy", None, 20, 0)
    assert whole["difference"]["value"] == 0.5 and whole["difference"]["p"] == pytest.approx(2 * 0.5**10)
    assert whole["p_holm"] == pytest.approx(3 * 2 * 0.5**10, rel=0.6) and len(found["rows"]) == 3
    assert compare(folders[0], folders[0])["rows"][0]["difference"]["value"] == 0


def test_compare_refuses_unequal_runs(tmp_path, rows, server):
    one = run(tmp_path, rows, server)[0]
    with pytest.raises(InputError, match="different judges"):
        compare(one, run(tmp_path, rows, server, judge="exact")[0])
    with pytest.raises(InputError, match="different suites"):
        compare(one, run(tmp_path, rows, server, limit=5)[0])
    with pytest.raises(InputError, match="different epochs"):
        compare(one, run(tmp_path, rows, server, epochs=2)[0])


def test_find_run(tmp_path, rows, server):
    folder, record = run(tmp_path, rows, server)
    runs = tmp_path / "runs"
    assert (
        find_run(runs, folder.name)
        == find_run(runs, record.id[:6])
        == find_run(runs, "last")
        == find_run(runs, str(folder))
        == folder
    )
    with pytest.raises(InputError, match="no run named"):
        find_run(runs, "zzzz")


def test_ids_do_not_depend_on_time_or_machine():
    assert new_record("eval", "x", {"a": 1}).id == new_record("eval", "x", {"a": 1}, parents=("p",), created="now").id


def test_a_hostile_reply_survives_the_round_trip(tmp_path, rows, server):
    nasty = '</script>\x00\u202e\ud800 "\\ \n{"key":"' + "a" * 100
    server.answer = lambda body, number: say(nasty.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    folder, record = run(tmp_path, rows, server)
    assert record.counts["scored"] == 20 and len(list(read_run(folder / "rows.jsonl"))) == 20


def test_verdict_of_a_lone_surrogate_can_be_stored(tmp_path, rows, server):
    class Lone:
        name, measures, identity = "lone", "correct", {"name": "lone", "version": 1, "options": {}}

        async def __call__(self, messages, case=None):
            return Verdict(1.0, why="\ud800")

    async def go():
        target = OpenAITarget("mock", base_url=server.url)
        try:
            return await evaluate(load_suite(str(rows)), target, Lone(), runs=tmp_path / "runs", quiet=True)
        finally:
            await target.close()

    assert asyncio.run(go())[1].counts["scored"] == 20


JUDGE = '''
from davylamp.core import Verdict, guard


@guard(version=1, source="x", licence="x", stage="evaluation", threats=(), measures="{measures}")
def told():
    """Half."""
    async def judge(messages, case=None):
        return Verdict(0.5)
    return judge
'''
HARM = '''
from davylamp.core import Case, Message, Metric, Suite, suite


@suite(version=1, source="x", licence="x", stage="evaluation", threats=())
def harm():
    """One question."""
    cases = (Case("1", (Message("user", "q"),), category="a"),)
    return Suite("harm", cases, "refusal", (Metric("unsafe_rate", by=("category",)),))
'''


@pytest.mark.parametrize(
    ("measures", "name"), [("complied", "unsafe_rate"), ("unsafe", "unsafe_rate"), ("safety", "safety_score")]
)
def test_a_judge_of_the_same_thing_takes_the_suites_metrics(tmp_path, server, measures, name):
    judge, suite = tmp_path / "told.py", tmp_path / "harm.py"
    judge.write_text(JUDGE.format(measures=measures))
    suite.write_text(HARM)
    server.answer = lambda body, number: say("yes")
    _, record = run(tmp_path, suite, server, judge=str(judge))
    assert {(e.name, e.category, e.value) for e in record.estimates} == {(name, None, 0.5), (name, "a", 0.5)}
    assert record.inputs["judge"]["measures"] == measures


@pytest.mark.parametrize("measures", ["refused", "correct"])
def test_a_judge_of_something_else_is_refused_before_anything_is_asked(tmp_path, server, measures):
    judge, suite = tmp_path / "told.py", tmp_path / "harm.py"
    judge.write_text(JUDGE.format(measures=measures))
    suite.write_text(HARM)
    with pytest.raises(InputError, match=f"scored by a judge that measures complied; told measures {measures}"):
        run(tmp_path, suite, server, judge=str(judge))
    assert not server.asked


def test_rejudging_with_a_judge_of_something_else_is_refused(tmp_path, server):
    suite, one, other = tmp_path / "harm.py", tmp_path / "one.py", tmp_path / "other.py"
    suite.write_text(HARM.replace("unsafe_rate", "harm_rate"))
    one.write_text(JUDGE.format(measures="unsafe"))
    other.write_text(JUDGE.format(measures="refused").replace("told", "other"))
    server.answer = lambda body, number: say("yes")
    folder, _ = run(tmp_path, suite, server, judge=str(one))
    with pytest.raises(InputError, match="other measures refused"):
        asyncio.run(rejudge(folder, load_judge(str(other)), runs=tmp_path / "runs", quiet=True))


def test_a_lone_arm_is_compared_once(tmp_path, server):
    """Its slices are those of all rows: counting them twice would double what Holm corrects for."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": f"q{i}"}], "category": "a", "meta": {"arm": "none"}}
        for i in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.answer = lambda body, number: say("Sure." if body["model"] == "a" or number % 3 else "I can't.")
    folders = [run(tmp_path, file, server, judge="refusal", model=name)[0] for name in "ab"]
    found = compare(*folders)
    assert [(row["category"], row["arm"]) for row in found["rows"]] == [(None, None), ("a", None)]
