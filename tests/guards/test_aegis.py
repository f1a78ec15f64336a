"""The online guard: votes, abstentions, feedback late and missing, state that survives kill -9, replicas that agree."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from davylamp.core.errors import DavylampError, InputError, RunError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message, Verdict
from davylamp.guards import _ledger
from davylamp.guards.aegis import Aegis, item_id
from davylamp.metrics.online import Settings

HI = (Message("user", "hello"),)


def expert(answer):
    """A guard that says what `answer` (a value, or a function of the case) says."""

    async def judge(messages, case=None):
        value = answer(case) if callable(answer) else answer
        return value if isinstance(value, Verdict) or value is None else Verdict(value)

    return judge


def guard(*answers, settings=None, **options):
    return Aegis({f"e{i}": expert(answer) for i, answer in enumerate(answers)}, settings or Settings(), **options)


def case(number, **meta):
    return Case(str(number), HI, meta=meta)


def go(work):
    return asyncio.run(work)


async def teach(judge, rows, **more):
    for number, label in rows:
        await judge(HI, case(number))
        await judge.feedback(str(number), label, **more)


def test_the_vote_is_the_weighted_mean_and_follows_feedback():
    async def work():
        judge = guard(0.9, 0.2, settings=Settings(eta=1.0))
        verdict = await judge(HI, case("a"))
        assert (
            verdict.value == pytest.approx(0.55) and verdict.label == "unsafe" and "e0 0.9 (weight 0.50)" in verdict.why
        )
        answer = await judge.feedback("a", 1)
        raw = np.exp(-np.array([0.1, 0.8]))
        assert list(answer["weights"].values()) == pytest.approx(raw / raw.sum()) and answer["seq"] == 1
        assert judge.weights == answer["weights"]
        assert (await judge(HI, case("b"))).value == pytest.approx(raw @ [0.9, 0.2] / raw.sum())
        report = judge.report()["contexts"][""]
        assert report["regret"] <= report["bound"] and report["rounds"] == 1
        await judge.close()

    go(work())


def test_by_name_with_options_and_categories(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from davylamp.core import Verdict, guard\n"
        '@guard(version=1, source="x", licence="MIT", stage="deployment", threats=("jailbreak",), measures="unsafe")\n'
        "def mine(*, value: float = 0.8, name: str = 'violence'):\n"
        '    """A constant."""\n'
        "    async def judge(messages, case=None):\n"
        "        return Verdict(value, categories=('aegis/' + name,))\n"
        "    return judge\n"
    )
    judge = load_judge(
        f"aegis:experts={tmp_path}/mine.py+{tmp_path}/mine.py:value=0.9;name=threat+refusal,method=hedge,eta=0.5"
    )
    assert judge.measures == "unsafe" and judge.identity["learner"]["eta"] == 0.5

    async def work():
        verdict = await judge((*HI, Message("assistant", "I can't help with that.")))
        assert verdict.value == pytest.approx((0.8 + 0.9 + 0.0) / 3)
        assert verdict.categories == ("aegis/violence", "aegis/threat")
        assert len(judge.function.weights) == 3
        await judge.function.feedback(item_id((*HI, Message("assistant", "I can't help with that."))), 0)
        weights = judge.function.weights
        assert max(weights, key=weights.get) == "refusal"
        await judge.close()

    go(work())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aegis:experts=refusal+refusal", "given twice"),
        ("aegis:experts=+", "one expert or more"),
        ("aegis:experts=organism_refused", "must measure unsafe"),
        ("aegis:experts=refusal,eta=0", "eta must be"),
        ("aegis:experts=refusal,alpha=1", "alpha must be"),
        ("aegis:experts=refusal,reference=lamp,floor=0.1", "reference must be one of"),
        ("aegis:experts=refusal,floor=0.1", "come with a reference"),
        ("aegis:experts=refusal,influence=0", "influence must be"),
        ("aegis:experts=refusl", "Did you mean 'refusal'"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(InputError, match=message):
        load_judge(spec)


class Broken(Exception):
    pass


def breaks(case):
    raise Broken("no")


async def hangs(messages, case=None):
    await asyncio.sleep(60)


def test_experts_that_fail_abstain_and_are_counted():
    """Raises, hangs, gives NaN, gives no verdict, cannot tell: the others go on and the weight stays."""

    async def work():
        experts = {
            "good": expert(0.9),
            "raises": expert(breaks),
            "hangs": hangs,
            "nan": expert(lambda case: Verdict(math.nan)),
            "outside": expert(lambda case: Verdict(1.2)),
            "none": expert(Verdict(None)),
            "wrong": expert(lambda case: None),
        }
        judge = Aegis(experts, Settings(method="hedge", eta=1.0), timeout=0.05)
        verdict = await judge(HI, case(1))
        assert verdict.value == pytest.approx(0.9)
        await judge.feedback("1", 1)
        assert all(w == pytest.approx(1 / 7) for w in judge.weights.values()), "one speaker: nothing to learn"
        failures = judge.report()["failures"]
        assert failures["raises"] == {"raised Broken": 1} and failures["hangs"] == {"timed out": 1}
        assert failures["nan"] == {"raised InputError": 1} == failures["outside"]
        assert failures["none"] == {"could not tell": 1} and failures["wrong"] == {"gave a NoneType": 1}
        await judge.close()

    go(work())


@pytest.mark.parametrize(("nobody", "value"), [("could_not_tell", None), ("unsafe", 1.0), ("safe", 0.0)])
def test_nobody_can_tell(nobody, value):
    async def work():
        judge = guard(Verdict(None), breaks, nobody=nobody)
        verdict = await judge(HI, case(1))
        assert (verdict.value, verdict.label) == (value, "no_decision")
        await judge.feedback("1", 1)
        assert set(judge.weights.values()) == {0.5}

    go(work())


@pytest.mark.parametrize("place", ["", "state.sqlite"])
def test_feedback_that_is_refused(place, tmp_path):
    async def work():
        judge = guard(0.9, 0.1, state=str(tmp_path / place) if place else "")
        await judge(HI, case("a"))
        for id, label, more, message in (
            ("nope", 1, {}, "no judged item named 'nope'"),
            ("a", 2, {}, "label must be 0"),
            ("a", "1", {}, "label must be 0"),
            ("a", True, {}, "label must be 0"),
            ("a", None, {}, "label must be 0"),
            ("", 1, {}, "needs the id"),
            ("a", 1, {"propensity": 0}, "propensity must be in"),
            ("a", 1, {"propensity": 1.5}, "propensity must be in"),
        ):
            with pytest.raises(InputError, match=message):
                await judge.feedback(id, label, **more)
        assert judge.seq == 0
        await judge.feedback("a", 1)
        with pytest.raises(InputError, match="has had its feedback"):
            await judge.feedback("a", 1)
        await judge(HI, case("a"))  # judged again: one more may come
        await judge.feedback("a", 1)
        assert judge.seq == 2
        await judge.close()

    go(work())


def test_feedback_late_out_of_order_and_missing():
    async def work():
        judge = guard(lambda case: float(int(case.id) % 2), 0.5, settings=Settings(method="hedge", eta=2.0))
        for number in range(20):
            await judge(HI, case(number))
        for number in (17, 3, 9, 12):
            await judge.feedback(str(number), number % 2)
        assert judge.weights["e0"] > 0.85 and judge.report()["contexts"][""]["delay_cost"] > 0
        await judge.close()

    go(work())


def test_no_feedback_is_exactly_the_plain_mean():
    async def work():
        rng = np.random.default_rng(0)
        table = rng.random((50, 4))
        judge = guard(*[lambda case, i=i: float(table[int(case.id), i]) for i in range(4)])
        for number in range(50):
            assert (await judge(HI, case(number))).value == pytest.approx(table[number].mean(), abs=1e-12)
        await judge.close()

    go(work())


def test_contexts_learn_apart():
    async def work():
        judge = guard(1.0, 0.0, settings=Settings(eta=1.0), context="meta.tenant")
        for number in range(5):
            for tenant, label in (("a", 1), ("b", 0)):
                await judge(HI, case(f"{tenant}{number}", tenant=tenant))
                await judge.feedback(f"{tenant}{number}", label)
        assert judge.weights["a/e0"] > 0.9 and judge.weights["b/e1"] > 0.9
        assert (
            (await judge(HI, case("a", tenant="a"))).value > 0.9 > 0.1 > (await judge(HI, case("b", tenant="b"))).value
        )
        assert (await judge(HI, case("new", tenant="c"))).value == 0.5
        await judge.discount(0.0, context="a")
        assert judge.weights["a/e0"] == 0.5 and judge.weights["b/e1"] > 0.9
        await judge.close()

    go(work())


def test_a_tenant_cannot_steer_alone_and_the_reference_keeps_its_floor():
    """One tenant sends 400 false labels, four others 20 true ones each; with the cap the truth wins, without it (control) it loses."""

    async def work(influence):
        judge = guard(
            1.0, 0.0, settings=Settings(method="hedge", eta=0.2), influence=influence, reference="e1", floor=0.1
        )
        rows = [(f"good{i}", 1, f"good{i % 4}") for i in range(80)] + [(f"bad{i}", 0, "bad") for i in range(400)]
        for i in np.random.default_rng(0).permutation(len(rows)):
            name, label, by = rows[i]
            await judge(HI, case(name))
            await judge.feedback(name, label, by=by)
        return judge

    capped, free = go(work(0.3)), go(work(1.0))
    assert capped.weights["e0"] > 0.8 > 0.2 > free.weights["e0"]
    assert capped.weights["e1"] >= 0.1 and capped.capped > 300 and free.capped == 0
    with pytest.raises(InputError, match="must name its tenant"):
        go(capped.feedback("bad1", 0))


def test_drift_shows_in_the_report():
    async def work():
        judge = guard(0.95, 0.9)
        await teach(judge, [(i, 1) for i in range(200)])
        assert judge.report()["drift_alarms"] == 0
        await teach(judge, [(i, 0) for i in range(200, 260)])
        assert judge.report()["drift_alarms"] >= 1

    go(work())


# --- state --------------------------------------------------------------------------------------------------------------------------------
def wobbly(seed):
    """Three experts of different quality, decided by the case's number."""
    table = np.random.default_rng(seed).random((5000, 3))
    return [lambda case, i=i: float(table[int(case.id), i]) for i in range(3)]


@pytest.mark.parametrize("method", ["hedge", "fixed_share", "discounted"])
def test_a_restart_changes_nothing(tmp_path, method, monkeypatch):
    """Weights and report are the same to the last bit: never stopped, restarted half way, and folded from a snapshot."""
    monkeypatch.setattr("davylamp.guards.aegis.SNAPSHOT_EVERY", 7)
    rows = [(i, i % 2) for i in range(40)]
    settings = Settings(method=method)

    async def whole():
        judge = guard(*wobbly(1), settings=settings)
        await teach(judge, rows, propensity=0.7)
        return judge.weights, judge.report()["contexts"]

    async def halves():
        for part in (rows[:17], rows[17:]):
            judge = guard(*wobbly(1), settings=settings, state=str(tmp_path / "s.sqlite"))
            await teach(judge, part, propensity=0.7)
            await judge.close()
        judge = guard(*wobbly(1), settings=settings, state=str(tmp_path / "s.sqlite"))
        found = judge.weights, judge.report()["contexts"]
        assert judge._ledger.snapshot()[0] == 35
        await judge.close()
        return found

    assert go(whole()) == go(halves())


def test_another_list_of_experts_is_refused(tmp_path):
    place = str(tmp_path / "s.sqlite")
    go(guard(0.1, 0.2, state=place).close())
    with pytest.raises(InputError, match="other experts"):
        guard(0.1, 0.2, 0.3, state=place)
    with pytest.raises(InputError, match="other learner"):
        guard(0.1, 0.2, state=place, settings=Settings(eta=0.3))
    go(guard(0.9, 0.8, state=place).close())


def test_a_state_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="cannot be used"):
        guard(0.1, state=str(tmp_path / "no" / "folder" / "s.sqlite"))
    (tmp_path / "text.sqlite").write_text("not a database, but long enough to be taken for one " * 50)
    with pytest.raises(RunError, match="cannot be used"):
        guard(0.1, state=str(tmp_path / "text.sqlite"))
    with pytest.raises(InputError, match="no usable database") as caught:
        guard(0.1, state="postgresql+nodriver://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)

    async def work():
        judge = guard(0.9, 0.1, state=str(tmp_path / "s.sqlite"))

        def fails(*_, **__):
            raise RunError("the disk is full")

        monkeypatch.setattr(judge._ledger, "record", fails)
        monkeypatch.setattr(judge._ledger, "since", fails)
        assert (await judge(HI, case(1))).value == 0.5, "the judging goes on"
        assert judge.report()["unrecorded"] == 1
        await judge.close()

    go(work())


def test_two_replicas_on_one_file_agree(tmp_path):
    async def work():
        place = str(tmp_path / "s.sqlite")
        one, two = guard(*wobbly(2), state=place), guard(*wobbly(2), state=place)

        async def serve(judge, numbers):
            for number in numbers:
                await judge(HI, case(number))
                await judge.feedback(str(number), number % 2)

        await asyncio.gather(serve(one, range(0, 60, 2)), serve(two, range(1, 60, 2)))
        await one(HI, case(100))
        await two(HI, case(101))
        assert one.weights == two.weights and one.seq == two.seq == 60
        await two.feedback("100", 1)  # judged by the other
        with pytest.raises(InputError, match="has had its feedback"):
            await one.feedback("100", 1)
        third = guard(*wobbly(2), state=place)
        assert third.weights == two.weights
        for judge in (one, two, third):
            await judge.close()

    go(work())


WRITER = """
import asyncio, sys
from davylamp.core.nouns import Case, Message, Verdict
from davylamp.guards.aegis import Aegis

def expert(i):
    async def judge(messages, case=None):
        return Verdict(((int(case.id.split("-")[1]) * 7919 + i * 104729) % 1000) / 999)
    return judge

async def main(place, name):
    judge = Aegis({f"e{i}": expert(i) for i in range(3)}, state=place)
    hi = (Message("user", "hello"),)
    number = 0
    while True:
        id = f"{name}-{number}"
        await judge(hi, Case(id, hi))
        await judge.feedback(id, number % 2)
        print(id, flush=True)  # acknowledged
        number += 1

asyncio.run(main(*sys.argv[1:]))
"""


def writers(place, names):
    return [
        subprocess.Popen([sys.executable, "-c", WRITER, place, name], stdout=subprocess.PIPE, text=True)
        for name in names
    ]


def killed(running, wanted):
    """Acknowledged ids by the time both were killed with SIGKILL, in the middle of whatever they did."""
    acknowledged, ends = [], time.monotonic() + 60
    for process in running:
        while sum(id.startswith(process.args[-1]) for id in acknowledged) < wanted and time.monotonic() < ends:
            acknowledged.append(process.stdout.readline().strip())
    for process in running:
        process.send_signal(signal.SIGKILL)
    for process in running:
        acknowledged += [
            line.strip() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")
        ]
        process.stdout.close()
        process.wait()
    return acknowledged


def stored(place, setup=None):
    """(ids in the order of their events, weights) of a state, by a fresh guard."""

    async def nothing(messages, case=None):
        return Verdict(None)

    judge = Aegis({f"e{i}": nothing for i in range(3)}, state=place)
    events = judge._ledger.since(0)
    assert [event.seq for event in events] == list(range(1, len(events) + 1)), "numbered without a gap"
    found = [event.judged.id for event in events], judge.weights
    go(judge.close())
    return found


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path):
    place = str(tmp_path / "s.sqlite")
    acknowledged = killed(writers(place, ["a", "b"]), 40)
    ids, weights = stored(place)
    assert len(acknowledged) >= 80 and set(acknowledged) <= set(ids) and len(set(ids)) == len(ids)
    assert stored(place)[1] == weights
    acknowledged += killed(writers(place, ["c"]), 10)
    assert set(acknowledged) <= set(stored(place)[0])


@pytest.fixture
def postgres(tmp_path):
    """URL of an empty PostgreSQL server of our own, or of the one that DAVYLAMP_TEST_POSTGRES names; skipped where there is neither."""
    pytest.importorskip("psycopg")
    if url := os.environ.get("DAVYLAMP_TEST_POSTGRES"):
        yield url
        return
    initdb, server = (shutil.which(name) for name in ("initdb", "postgres"))
    if not initdb or not server:
        pytest.skip("no PostgreSQL here: install one, or set DAVYLAMP_TEST_POSTGRES")
    folder, root = tmp_path / "pg", os.geteuid() == 0
    as_user = {"user": "nobody"} if root else {}
    folder.mkdir()
    for path in (folder, tmp_path, *list(tmp_path.parents)[:3]):
        with contextlib.suppress(OSError):
            path.chmod(0o755)
    if root:
        shutil.chown(folder, "nobody")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **as_user}
    data = folder / "data"
    made = subprocess.run([initdb, "-D", str(data), "-A", "trust", "-U", "davylamp"], cwd="/", **quiet)
    if made.returncode:
        pytest.skip("PostgreSQL could not be set up here")
    running = subprocess.Popen(
        [server, "-D", str(data), "-k", str(folder), "-c", "listen_addresses="], cwd="/", **quiet
    )
    url = f"postgresql+psycopg://davylamp@/postgres?host={folder}"
    try:
        for _ in range(100):
            with contextlib.suppress(DavylampError):
                _ledger.SQLLedger(url, {"experts": []}).engine.dispose()
                break
            time.sleep(0.1)
        else:
            pytest.skip("PostgreSQL did not start here")
        import sqlalchemy

        engine = sqlalchemy.create_engine(url)
        with engine.begin() as connection:
            for table in ("states", "events", "judged", "setup"):
                connection.execute(sqlalchemy.text(f"DROP TABLE davylamp_{table}"))
        engine.dispose()
        yield url
    finally:
        running.send_signal(signal.SIGINT)  # a fast shutdown: clients are cut off
        running.wait(30)


@pytest.mark.slow
def test_replicas_on_postgresql(postgres):
    """Three processes write at once, and are killed; events have no gap, none is lost, all readers get the same weights."""
    acknowledged = killed(writers(postgres, ["a", "b", "c"]), 25)
    ids, weights = stored(postgres)
    assert len(acknowledged) >= 75 and set(acknowledged) <= set(ids) and len(set(ids)) == len(ids)
    assert stored(postgres)[1] == weights
    with pytest.raises(InputError, match="other experts"):
        guard(0.5, state=postgres)


def test_memory_forgets_the_oldest_items(monkeypatch):
    monkeypatch.setattr(_ledger, "KEPT_IN_MEMORY", 3)

    async def work():
        judge = guard(0.9, 0.1)
        for number in range(5):
            await judge(HI, case(number))
        with pytest.raises(InputError, match="no judged item"):
            await judge.feedback("0", 1)
        await judge.feedback("4", 1)

    go(work())


def test_state_is_plain_json():
    judge = guard(0.9, 0.1)
    go(teach(judge, [(1, 1)]))
    assert json.loads(json.dumps(judge._state())) == judge._state() and json.dumps(judge.report())
