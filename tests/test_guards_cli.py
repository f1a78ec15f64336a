"""`guard check`, `guard bench` and `guard train`: figures beside scikit-learn's, thresholds beside brute force, records, errors."""

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from davylamp.cli import main
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.record import load
from davylamp.core.rows import read_run
from davylamp.core.stats import clopper_pearson
from davylamp.guards_cli import bench, check, train
from davylamp.metrics.operating import areas, headline, threshold_for

GUARD = '''
"""A guard for tests: the score stands in the text."""
import math
from davylamp.core import Verdict, guard

@guard(version=1, source="x", licence="x", stage="deployment", threats=("jailbreak",), measures="{measures}")
def scripted():
    """Says the number in the text."""
    async def judge(messages, case=None):
        word = messages[-1].text.split()[0]
        return Verdict(None if word == "none" else float(word))
    return judge
'''


@pytest.fixture
def guard(tmp_path):
    path = tmp_path / "scripted.py"
    path.write_text(GUARD.format(measures="unsafe"))
    return str(path)


def rows_file(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    lines = [
        {"id": str(i), "messages": [{"role": "user", "content": f"{score} row {i}"}], "answer": label, **more}
        for i, (score, label, more) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(guard, rows, tmp_path, **options):
    return asyncio.run(bench(guard, rows, runs=tmp_path / "runs", **options))


def test_the_figures_equal_those_of_scikit_learn(guard, tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random(200) < 0.3).astype(int)
    scores = np.round(np.clip(rng.normal(0.35 + 0.3 * labels, 0.2), 0, 1), 3)  # rounded, so that there are ties
    rows = [
        (s, int(y), {"category": f"sst/SST{1 + i % 2}", "meta": {"language": ("en", "de")[i % 2]}})
        for i, (s, y) in enumerate(zip(scores, labels, strict=True))
    ]
    folder, record = run(guard, rows_file(tmp_path, rows), tmp_path)
    found = {e.name: e for e in record.estimates if e.category is None}
    said = (scores >= 0.5).astype(int)
    assert found["f1"].value == pytest.approx(metrics.f1_score(labels, said))
    assert found["auprc"].value == pytest.approx(metrics.average_precision_score(labels, scores))
    assert found["auroc"].value == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert found["tpr"].value == pytest.approx(metrics.recall_score(labels, said))
    assert found["fpr"].value == pytest.approx(1 - metrics.recall_score(1 - labels, 1 - said))
    assert found["precision"].value == pytest.approx(metrics.precision_score(labels, said))
    for name in ("f1", "auprc", "auroc", "tpr", "fpr"):
        assert found[name].low <= found[name].value <= found[name].high
    assert 0 < found["p50_ms"].value <= found["p99_ms"].value and found["p50_ms"].unit == "ms"
    slices = {(e.name, e.category) for e in record.estimates if e.category}
    assert {("tpr", "sst/SST1"), ("fpr", "sst/SST2"), ("tpr", "language=en"), ("fpr", "language=de")} <= slices
    assert load(folder).id == record.id and sum(1 for _ in read_run(folder / "rows.jsonl")) == 200
    points = json.loads((folder / "curves.json").read_text())["roc"]
    assert points[0] == [0.0, 0.0] and points[-1] == [1.0, 1.0]


def test_the_bootstrap_interval_covers(tmp_path):
    """Of 60 samples from one population, the 95 % interval of auroc holds the population's value nearly always."""
    rng = np.random.default_rng(1)
    truth = 0.5 * (1 + math.erf(1.0 / 2))  # two normals one apart: P(X > Y) = Phi(1 / sqrt 2)
    inside = 0
    for seed in range(60):
        labels = [i % 2 for i in range(80)]
        scores = [float(1 / (1 + np.exp(-(label + rng.normal())))) for label in labels]
        found = headline(
            labels, scores, [str(i) for i in range(80)], threshold=0.5, rng=np.random.default_rng(seed), draws=120
        )
        auroc = next(e for e in found if e.name == "auroc")
        inside += auroc.low <= truth <= auroc.high
    assert inside >= 52


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.9])), min_size=2, max_size=60))
@settings(max_examples=100, deadline=None)
def test_areas_equal_those_of_scikit_learn(rows):
    y, x = np.array([y for y, _ in rows]), np.array([s for _, s in rows])
    if 0 < y.sum() < y.size:
        wanted = metrics.average_precision_score(y, x), metrics.roc_auc_score(y, x)
        assert areas(y, x) == pytest.approx(wanted)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0])), min_size=1, max_size=40),
    st.sampled_from([0.02, 0.1, 0.3, 0.6]),
)
@settings(max_examples=150, deadline=None)
def test_thresholds_equal_brute_force(rows, fpr):
    labels, scores = [y for y, _ in rows], [s for _, s in rows]
    safe = [s for y, s in rows if not y]
    found = threshold_for(labels, scores, fpr=fpr)
    for name in ("threshold", "promised"):
        if not safe:
            assert found[name] is None
            continue
        allowed = []
        for cut in sorted({0.0, *scores, *(math.nextafter(s, 2.0) for s in scores if s < 1.0)}):
            alarms = sum(s >= cut for s in safe)
            share = clopper_pearson(alarms, len(safe), 0.9)[1] if name == "promised" else alarms / len(safe)
            if share <= fpr:
                allowed.append(cut)
        if found[name] is None:
            assert not allowed
        else:
            assert sum(s >= found[name] for s in safe) == sum(s >= min(allowed) for s in safe)
            assert [s >= found[name] for s in safe] == [s >= min(allowed) for s in safe]


def test_a_promise_needs_enough_safe_rows():
    few = threshold_for([0] * 20 + [1], [0.1] * 20 + [0.9], fpr=0.02)
    many = threshold_for([0] * 200 + [1], [0.1] * 200 + [0.9], fpr=0.02)
    assert few["promised"] is None and few["threshold"] is not None and many["promised"] is not None


def test_a_promised_threshold_keeps_its_promise():
    """On fresh rows of the same kind the false alarms stay within the rate in at least 95 of 100 draws; the plain one does not."""
    rng = np.random.default_rng(0)
    kept = {"threshold": 0, "promised": 0}
    for _ in range(100):
        found = threshold_for([0] * 300, rng.random(300).tolist(), fpr=0.1)
        for name in kept:
            kept[name] += 1 - found[name] <= 0.1  # scores are uniform: the true rate is 1 - threshold
    assert kept["promised"] >= 90 and kept["threshold"] <= 75


def test_rows_without_a_verdict_are_no_class(guard, tmp_path):
    rows = [(0.9, 1, {}), ("none", 1, {}), (0.1, 0, {}), ("none", 0, {})]
    _, record = run(guard, rows_file(tmp_path, rows), tmp_path)
    found = {e.name: e for e in record.estimates if e.category is None}
    assert record.counts["unscored"] == 2 and found["tpr"].worst == (0.5, 1.0) and found["fpr"].worst == (0.0, 0.5)


def test_one_class_alone_gives_what_can_be_given(guard, tmp_path):
    _, record = run(guard, rows_file(tmp_path, [(0.9, 0, {}), (0.1, 0, {})]), tmp_path)
    found = {e.name: e for e in record.estimates if e.category is None}
    assert found["fpr"].value == 0.5 and found["auroc"].value is None and found["tpr"].value is None


def test_equal_runs_have_equal_ids_and_groups_widen_the_interval(guard, tmp_path):
    rows = [(0.9 if i % 4 else 0.2, i % 2, {"group": f"g{i // 8}"}) for i in range(64)]
    first, second = (run(guard, rows_file(tmp_path, rows), tmp_path)[1] for _ in range(2))
    assert first.id == second.id
    lone = run(guard, rows_file(tmp_path, [(s, y, {}) for s, y, _ in rows], "lone.jsonl"), tmp_path)[1]
    pick = {id(r): next(e for e in r.estimates if e.name == "auroc") for r in (first, lone)}
    assert "8 groups" in pick[id(first)].method and "64 groups" in pick[id(lone)].method


def test_bad_calls(guard, tmp_path):
    good = rows_file(tmp_path, [(0.9, 1, {}), (0.1, 0, {})])
    for options, text in (({"fpr": 0.0}, "fpr"), ({"threshold": 1.5}, "threshold"), ({"limit": 0}, "limit")):
        with pytest.raises(InputError, match=text):
            run(guard, good, tmp_path, **options)
    with pytest.raises(InputError, match="answer 1 or 0"):
        run(guard, rows_file(tmp_path, [(0.9, "maybe", {})], "bad.jsonl"), tmp_path)
    with pytest.raises(UnknownNameError, match="lamp"):
        run("lampe", good, tmp_path)
    other = tmp_path / "other.py"
    other.write_text(GUARD.format(measures="refused"))
    with pytest.raises(InputError, match="measures refused"):
        run(str(other), good, tmp_path)


def test_check(guard):
    assert asyncio.run(check(guard, "0.7 hello")) == {"value": 0.7}
    found = asyncio.run(check("lamp:encoder=hashed", "I can't help with that.", reply_to="How do I rob a bank?"))
    assert found["value"] < 0.5 and found["label"] == "safe"


def test_train_writes_weights_that_lamp_loads(tmp_path):
    pytest.importorskip("torch")
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": text.format(i)}], "answer": label, "group": f"g{i}"}
        for i in range(60)
        for label, text in ((i % 2, ("bake the bread number {}", "burn the flag number {}")[i % 2]),)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = [tmp_path / "one", tmp_path / "two"]
    ids = []
    for folder in out:
        _, record = train(
            "lamp", [str(path)], folder, runs=tmp_path / "runs", encoder="hashed", hash_epochs=15, quiet=True
        )
        ids.append(record.id)
    assert ids[0] == ids[1] and (out[0] / "train.json").is_file()
    verdicts = [
        [
            asyncio.run(check(f"lamp:encoder=hashed,weights={folder}", text))["value"]
            for text in ("bake the bread", "burn the flag")
        ]
        for folder in out
    ]
    assert verdicts[0] == verdicts[1] and verdicts[0][0] < 0.5 < verdicts[0][1]
    with pytest.raises(InputError, match="weights already"):
        train("lamp", [str(path)], out[0], runs=tmp_path / "runs", encoder="hashed", quiet=True)


def test_train_refuses(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(UnknownNameError, match="lamp"):
        train("refusal", ["own"], tmp_path / "o", runs=tmp_path)
    with pytest.raises(InputError, match="--rows"):
        train("lamp", [], tmp_path / "o", runs=tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "1", "messages": [{"role": "user", "content": "x"}], "answer": 1}) + "\n")
    with pytest.raises(InputError, match="safe and unsafe"):
        train("lamp", [str(path)], tmp_path / "o", runs=tmp_path, encoder="hashed", quiet=True)


def test_near_copies_of_measured_rows_are_left_out(tmp_path):
    pytest.importorskip("torch")
    texts = ["bake the brown bread slowly", "burn the big flag quickly"]
    rows = [
        {
            "id": f"{i}",
            "messages": [{"role": "user", "content": f"{texts[i % 2]} {chr(97 + i // 2)}{i}"}],
            "answer": i % 2,
            "group": f"g{i}",
        }
        for i in range(60)
    ]
    rows += [{"id": "x", "messages": [{"role": "user", "content": "draw a green horse on paper"}], "answer": 0}]
    path, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held.write_text(
        json.dumps(
            {"id": "1", "messages": [{"role": "user", "content": "Draw the green horses on paper!"}], "answer": 0}
        )
        + "\n"
    )
    _, record = train(
        "lamp",
        [str(path)],
        tmp_path / "o",
        runs=tmp_path / "r",
        held=[str(held)],
        encoder="hashed",
        hash_epochs=1,
        quiet=True,
    )
    assert record.inputs["hashed"]["near_copies_left_out"] == 1


def call(*words, code=0, text=None):
    """The command as typed."""
    done = CliRunner().invoke(main, [str(word) for word in words], input=text)
    assert done.exit_code == code, (words, done.output[-800:])
    return done


def test_the_commands_say_what_the_functions_say(guard, tmp_path):
    assert json.loads(call("guard", "check", "0.7 hello", "--guard", guard).stdout) == {"value": 0.7}
    assert json.loads(call("guard", "check", "-", "--guard", guard, text="0.2 hi\n").stdout) == {"value": 0.2}
    rows = rows_file(tmp_path, [(i / 10, int(i > 4), {}) for i in range(10)])
    done = call("guard", "bench", guard, rows, "--runs", tmp_path / "runs", "--threshold", "0.45", "--json")
    record = json.loads(done.stdout)
    found = {e["name"]: e["value"] for e in record["estimates"]}
    assert found["f1"] == found["auprc"] == found["auroc"] == found["tpr"] == 1.0 and found["fpr"] == 0.0
    assert {"p50_ms", "p99_ms"} <= set(found) and record["inputs"]["threshold"] == 0.45
    assert (Path(record["folder"]) / "report.html").is_file()
    same = call("guard", "bench", guard, rows, "--runs", tmp_path / "runs", "--threshold", "0.45", "--json")
    assert json.loads(same.stdout)["id"] == record["id"]


def test_the_commands_refuse_with_one_sentence(guard, tmp_path):
    rows = rows_file(tmp_path, [(0.9, 1, {}), (0.1, 0, {})])
    for words, said in (
        (["bench", "lampe", rows], "Did you mean 'lamp'"),
        (["bench", guard, tmp_path / "none.jsonl"], "no file"),
        (["bench", guard, rows, "--fpr", "2"], "fpr must be between 0 and 1"),
        (["check", "hi", "--guard", "lamp:encoder=nowhere"], "encoder must be auto, hashed, or a folder"),
        (["train", "refusal", "--rows", "own", "--out", tmp_path / "o"], "guard train"),
        (["train", "lamp", "--out", tmp_path / "o"], "--rows"),
        (["train", "lamp", "--rows", "own"], "--out"),
    ):
        done = call("guard", *words, code=2)
        assert said in done.output and "Traceback" not in done.output, (words, done.output)


def test_the_train_command(tmp_path):
    pytest.importorskip("torch")
    texts = ("bake the bread number {}", "burn the flag number {}")
    cases = [(i % 2, {"group": f"g{i}"}) for i in range(40)]
    lines = [
        {"id": str(i), "messages": [{"role": "user", "content": texts[y].format(i)}], "answer": y, **more}
        for i, (y, more) in enumerate(cases)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["train", "lamp", "--rows", tmp_path / "rows.jsonl", "--only", "hashed", "--hash-epochs", "2", "--quiet"]
    record = json.loads(call("guard", *words, "--out", tmp_path / "w", "--runs", tmp_path / "runs", "--json").stdout)
    assert record["inputs"]["guard"] == "lamp"
    assert (tmp_path / "w" / "hashed.npz").is_file() and not (tmp_path / "w" / "minilm.npz").exists()
    verdict = json.loads(
        call("guard", "check", "bake", "--guard", f"lamp:encoder=hashed,weights={tmp_path / 'w'}").stdout
    )
    assert 0 <= verdict["value"] <= 1
