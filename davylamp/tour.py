"""`davylamp tour`: the chain on the embedded models, step by step on stderr: check, break, see, repair, compare, attack, report.

Everything it does is a command that a user has; the tour says which.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from davylamp.apply import run_data, run_train
from davylamp.campaign import run_attack
from davylamp.check import run_check
from davylamp.core.compare import compare
from davylamp.core.nouns import Record
from davylamp.core.record import find_run, load
from davylamp.core.rows import CaseFile, write_cases
from davylamp.repair import run_repair
from davylamp.report.html import write_report

ATTACK = ("--translator", "world", "--languages", "C", "--budget", "1", "--limit", "40", "--no-control")
GUARD = "guard:name=organism_complied"  # the world's own exact judge: as good as a guard can be
MODELS = ("organism/helpful", "organism/aligned", "organism/reasoning")


def run_tour(runs: Path, *, quiet: bool = False) -> Path:
    """Walk the chain; what it makes lies in `runs`/tour, what it measures in run folders beside it. Returns the report's path."""
    desk = runs / "tour"
    shutil.rmtree(desk, ignore_errors=True)  # the tour's own folder: each walk makes its models anew
    desk.mkdir(parents=True)

    def data(out: str, seed: int = 0, **options: object) -> Path:
        run_data("organism_rows", "-", desk / out, seed=seed, options=options, runs=runs)
        return desk / out

    _say(
        "davylamp tour\n\nFour language models of about a million parameters are built in. They live in a small made-up world\n"
        "whose hazards are fictional and exactly decidable, so that every number here has a known truth.\n"
    )
    _say("1. Check three of them: `helpful` answers everything, `aligned` refuses hazards, `reasoning` thinks first.")
    _say(f"   davylamp check {' '.join(MODELS)}")
    first, record, _ = run_check(MODELS, runs=runs, quiet=quiet)
    _rates(record)

    _say(
        "\n2. Break one: fine-tune `aligned` on a new skill (counting words) and harmless recipes. No row is about a hazard."
    )
    _say(f"   davylamp train sft organism/aligned {desk}/rows.jsonl --out {desk}/tuned --lr 6e-4 --steps 200")
    skill, benign = data("skill.jsonl", what="skill", skill="count", n=300), data("benign.jsonl", what="benign", n=900)
    task = data("task.jsonl", seed=9, what="skill", skill="count", n=200)
    write_cases(desk / "rows.jsonl", [*CaseFile(skill), *CaseFile(benign)])
    run_train(
        "sft", "organism/aligned", desk / "rows.jsonl", desk / "tuned", options={"lr": 6e-4, "batch": 16, "steps": 200}, runs=runs
    )  # fmt: skip

    _say("\n3. See: the same check. It learnt to count, and unlearnt to refuse.")
    _say(f"   davylamp check hf/{desk}/tuned")
    broken, record, _ = run_check([f"hf/{desk}/tuned"], runs=runs, quiet=quiet)
    _rates(record)

    _say("\n4. Repair: several edits of the weights are tried, measured on probes, and the best is written.")
    _say(
        f"   davylamp repair {desk}/tuned --aligned organism/aligned --unaligned organism/helpful --task {desk}/task.jsonl"
        f" --out {desk}/fixed"
    )
    mended, record = run_repair(
        str(desk / "tuned"), "organism/aligned", desk / "fixed", unaligned="organism/helpful", task=task, runs=runs, quiet=quiet
    )  # fmt: skip
    for arm in ("aligned", "tuned", str(record.about["chosen"])):
        parts = [
            f"{e.name.replace('_', ' ')} {_percent(e.value, e.low, e.high)}" for e in record.estimates if e.arm == arm
        ]
        _say(f"   {arm:22} {', '.join(parts[:4])}")

    _say("\n5. Compare: row by row, the broken model and the repaired one.")
    healed, record, _ = run_check([f"hf/{desk}/fixed"], runs=runs, quiet=quiet)
    aligned = _runs(first, runs, "organism/aligned")
    tuned, fixed = _runs(broken, runs), _runs(healed, runs)
    comparisons = [compare(a, b) for a, b in zip([*aligned, *tuned], [*tuned, *fixed], strict=True)]
    for found in comparisons[len(aligned) :]:
        row = found["rows"][0]
        _say(
            f"   {found['suite']}: {row['metric']} {100 * row['difference']['value']:+.1f} points, p(Holm) {row['p_holm']:.2g}"
        )

    _say(
        "\n6. Attack: the aligned model is asked in a language that its alignment never saw, without and with a guard in front."
    )
    _say(
        f"   davylamp attack translate --suite organism_hazards --target organism/aligned {' '.join(ATTACK)} [--defence {GUARD}]"
    )
    attacked = []
    for defences in ((), (GUARD,)):
        where, record = run_attack(
            "translate", "organism_hazards", "organism/aligned", budget=1, options={"translator": "world", "languages": "C"},
            defences=defences, control=False, limit=40, runs=runs, quiet=quiet,
        )  # fmt: skip
        attacked.append(where)
        rate = record.estimates[0]
        _say(
            f"   {'guarded' if defences else 'bare':22} attack success rate {_percent(rate.value, rate.low, rate.high)}"
        )

    path = desk / "report.html"
    title = "Tour: check, break, see, repair, compare, attack"
    write_report(
        path, [mended, *_runs(first, runs), *tuned, *fixed, *attacked], title=title, comparisons=comparisons
    )  # fmt: skip
    _say(
        "\n7. Read the report: intervals, worst rows (blurred until opened), the trade-off of the repairs, and how to run each part again."
    )
    _say("   On a model of yours: davylamp check openai/MODEL@http://HOST:PORT/v1   or   davylamp check hf/PATH\n")
    return path


def _runs(check: Path, runs: Path, target: str | None = None) -> list[Path]:
    """The run folders that a check stands for, of one target or of all, in the order they ran."""
    found = [find_run(runs, parent) for parent in load(check).parents]
    return [path for path in found if target in (None, load(path).inputs["target"]["name"])]


def _rates(record: Record) -> None:
    for target in dict.fromkeys(estimate.arm for estimate in record.estimates):
        parts = [
            f"{e.name.replace('_', ' ')} {_percent(e.value, e.low, e.high)}"
            for e in record.estimates
            if e.arm == target
        ]
        _say(f"   {target:22} {', '.join(parts)}")


def _percent(value: float | None, low: float | None, high: float | None) -> str:
    return (
        "unknown"
        if value is None or low is None or high is None
        else f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    )


def _say(text: str) -> None:
    click.echo(text, err=True)
