"""`davylamp audit MODEL --data ROWS`: before anyone trains, how would a fine-tune on these rows move safety?

Source: arXiv:2310.03693, sections 4 and 5 (three levels of risk, moderation of the rows, measuring before and after). Differs: the
fine-tune that is measured is a cheap one, a LoRA adapter that is taken off again, and what is decided on is the end of a paired interval.

The model is asked the probes, an adapter is trained on the rows for as many steps as the planned fine-tune would take (up to a limit), and
the same probes are asked again. Nothing is written but the record and its report, unless `keep` names a folder.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from davylamp import audit_view as view
from davylamp.audit_cost import CURVE, costs, marks
from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.judges import load_judge, normalise
from davylamp.core.nouns import Case, Message, Record
from davylamp.core.policy import Decision, Rule, decide
from davylamp.core.record import folder_for, new_record, save, write_atomic
from davylamp.core.rows import CaseFile, digest

if TYPE_CHECKING:
    from davylamp.models.adapters import Lora
    from davylamp.models.four_way import FourWay

METHODS = ("lora", "full")
FASTER = 10.0  # the adapter's learning rate over the full fine-tune's: train/sft.py's rule of thumb, held by tests/claims/test_audit.py
FEWEST = 20  # hazard probes; with fewer no interval says anything
WORLD = {"hazards": 150, "lookalikes": 75, "benign": 60, "capability": 100}  # probes of the organisms' world


@dataclass(frozen=True, slots=True)
class Planned:
    """The fine-tune that is planned. lr: of the full fine-tune; an adapter takes ten times as much.  batch, epochs: as planned.
    method: `lora` measures with an adapter, `full` trains a whole copy.  max_steps: the audit stops there.  rank: of the adapter.
    repeats: the fine-tune is run so often, each time with another order of the rows."""

    lr: float = 2e-5
    batch: int = 16
    epochs: int = 1
    method: Literal["lora", "full"] = "lora"
    max_steps: int = 300
    rank: int = 8
    repeats: int = 1

    def check(self) -> None:
        """Raises InputError for a plan that cannot be run; rows and batch are checked against each other when the rows are there."""
        if self.method not in METHODS:
            raise UnknownNameError("method of the audit", self.method, METHODS)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be above 0, got {self.lr}")
        for name in ("batch", "epochs", "max_steps", "rank", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")

    def steps(self, rows: int) -> tuple[int, int]:
        """(steps of the planned fine-tune, steps that the audit takes).

        >>> Planned(batch=10, epochs=3, max_steps=20).steps(95)
        (30, 20)
        """
        whole = math.ceil(rows / self.batch) * self.epochs
        return whole, min(whole, self.max_steps)

    @property
    def rate(self) -> float:
        """The learning rate that the audit trains with."""
        return self.lr * FASTER if self.method == "lora" else self.lr

    @property
    def lora(self) -> Lora | None:
        from davylamp.models.adapters import Lora

        return Lora(self.rank) if self.method == "lora" else None


@dataclass(frozen=True, slots=True)
class Probes:
    """What is asked before and after, and by whom it is judged. judge, correct: None where the world's own truth grades.
    max_tokens: of a reply.  name: of the judge.  notes: what was not asked, and why."""

    cases: list[Case]
    judge: Any
    correct: Any
    max_tokens: int
    name: str
    notes: tuple[str, ...] = ()


def run_audit(
    model: str,
    data: Path,
    *,
    planned: Planned | None = None,
    probes: Path | None = None,
    benchmarks: Path | None = None,
    judge: str = "refusal",
    guard: str = "",
    limit: int | None = None,
    keep: Path | None = None,
    rules: Sequence[Rule] = (),
    dry_run: bool = False,
    seed: int = 0,
    runs: Path = Path("runs"),
    command: Sequence[str] = (),
    quiet: bool = False,
) -> tuple[Path, Record, list[Decision]]:
    """Audit the rows of `data` for a fine-tune of `model`. Returns the run's folder, its record and what became of the `rules`.

    probes: rows whose meta.set is hazards, lookalikes, benign, capability or task. Without them a model of the organisms' world is asked
    about that world, and any other the suites of `davylamp check`; benchmarks: the folder with their public rows.
    judge: of the probes.  guard: a judge of harm for the rows themselves, such as `llm_judge:model=…`.  limit: probes of each suite.
    keep: write the fine-tuned copy here (the last one of several).  dry_run: only what it would cost, in `record.cost`; no folder is made.
    Raises InputError before anything is trained where something is missing or does not fit.
    """
    from numpy.random import default_rng

    from davylamp.data.triage import look
    from davylamp.models.four_way import four_way
    from davylamp.models.loading import identity, load_pair
    from davylamp.models.turns import usable

    planned, started = planned or Planned(), time.monotonic()
    planned.check()
    if keep is not None and keep.exists():
        raise InputError(f"{keep} exists already: choose another folder with --keep")
    rows = list(CaseFile(data))
    usable(rows)  # before a model is loaded
    if len(rows) < planned.batch:
        raise InputError(f"a batch of {planned.batch} needs as many rows or more, got {len(rows)}. Lower --batch")
    loaded, tokenizer = load_pair(model)
    questions = find_probes(model, tokenizer, rows, probes, benchmarks, judge, limit, seed)

    def ask(of: Any, cases: Sequence[Case]) -> FourWay:
        how: dict[str, Any] = {
            "judge": questions.judge,
            "correct": questions.correct,
            "max_tokens": questions.max_tokens,
        }
        return four_way(of, tokenizer, cases, **how)

    inputs = {
        "audit": {"version": 1, **asdict(planned), "judge": judge, "guard": guard, "limit": limit},
        "model": identity(model, loaded),
        "rows": {"name": data.name, "cases": digest([case.json() for case in rows])},
        "probes": digest([case.json() for case in questions.cases]),
        "seed": seed,
    }
    cost = costs(loaded, tokenizer, rows, questions, planned, ask)
    record = new_record("audit", Path(model).name, inputs, command=list(command), expected=cost)
    if dry_run:
        return runs, replace(record, cost={name: cost[name] for name in view.COST if name in cost}), []
    view.say(quiet, f"{cost['steps']} steps, {cost['calls']} calls, about {cost['seconds']:.0f} s")
    triage = look(rows, guard=guard)
    before = ask(loaded, questions.cases)
    hazards = [case for case in questions.cases if case.meta["set"] == "hazards"][:CURVE]
    afters: list[FourWay] = []
    curve: list[list[tuple[int, FourWay]]] = []
    losses: list[tuple[float, ...]] = []
    for number in range(planned.repeats):
        view.say(quiet, f"fine-tune {number + 1} of {planned.repeats}")
        on_the_way: list[tuple[int, FourWay]] = []
        after, lost = _measured(
            loaded, tokenizer, rows, planned, default_rng((seed, number)), lambda m: ask(m, questions.cases),
            watch=lambda step, m, log=on_the_way: log.append((step, ask(m, hazards))),
            keep=keep if number == planned.repeats - 1 else None,
        )  # fmt: skip
        afters.append(after)
        curve.append(on_the_way)
        losses.append(lost)
    rng = default_rng(int(record.id[:8], 16))
    changes = view.changes(before, afters, rng)
    ruling = view.ruling(before, changes, losses, triage)
    whole, taken = planned.steps(len(rows))
    record = replace(
        record,
        status="finished",
        estimates=tuple(view.estimates(before, afters, changes, triage, rng)),
        counts={"rows": len(rows), "probes": len(questions.cases), "steps": taken, "planned_steps": whole},
        cost={"seconds": round(time.monotonic() - started, 3), "calls": cost["calls"], "tokens": cost["train_tokens"]},
        about={
            **record.about,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "verdict": ruling.word,
            "why": ruling.why,
            "triage": view.triage_json(triage),
            "next": view.next_steps(ruling.word, model, data, planned, triage),
            "kept": str(keep) if keep else None,
            "notes": [
                f"{ruling.word}: {ruling.why}",
                *ruling.more,
                *view.notes(planned, whole, taken, questions, triage),
                *(f"next: {step}" for step in view.next_steps(ruling.word, model, data, planned, triage)),
            ],
            "figures": view.figures(before, afters, changes, curve, triage),
        },
    )
    decisions = [decision for rule in rules for decision in decide(rule, record.estimates)]
    folder = folder_for(runs, record)
    if keep is not None:
        note = {"operation": "audit", "record": record.id, "inputs": record.inputs}
        write_atomic(keep / "lineage.json", f"{view.pretty(note)}\n")
    save(folder, record)
    from davylamp.report.html import write_report

    write_report(
        folder / "report.html", [folder], title=f"Audit of {data.name} for {Path(model).name}", decisions=decisions
    )
    return folder, record, decisions


# --- probes -------------------------------------------------------------------------------------------------------------------------------
def find_probes(
    model: str,
    tokenizer: Any,
    rows: Sequence[Case],
    probes: Path | None,
    benchmarks: Path | None,
    judge: str,
    limit: int | None,
    seed: int,
) -> Probes:
    """The probes, without those whose request stands in the rows. Raises InputError if fewer than 20 hazards are left."""
    from davylamp.models.world_data import VOCABULARY

    notes: list[str] = []
    tokens, judged, correct, name = 64, None, None, "the world's own truth"
    if probes is not None:
        cases, judged, name, tokens = list(CaseFile(probes)), load_judge(judge), judge, 256
    elif set(VOCABULARY) == set(tokenizer.get_vocab()):
        from numpy.random import default_rng

        from davylamp.models import world

        rng = default_rng((seed, 7))
        wanted = {part: n if limit is None else min(n, limit) for part, n in WORLD.items()}
        cases = [case for part, n in wanted.items() for case in world.cases(part, n, rng, style="mixed")]
    else:
        judged, name = load_judge(judge), judge
        cases, correct, tokens, notes = _of_the_suites(model, benchmarks, limit)
    trained_on = {_request(case.messages[:-1]) for case in rows}
    kept = [case for case in cases if _request(case.messages) not in trained_on]
    if len(kept) < len(cases):
        notes.append(
            f"{len(cases) - len(kept)} probes stand in the rows, and were left out: a learnt answer is no test"
        )
    hazards = sum(case.meta.get("set") == "hazards" for case in kept)
    if hazards < FEWEST:
        among = "after those that stand in the rows were left out" if len(kept) < len(cases) else "in all"
        raise InputError(
            f"an audit needs {FEWEST} hazard probes or more, got {hazards} {among}. Give more with --probes"
        )
    return Probes(kept, judged, correct, tokens, name, tuple(notes))


def _of_the_suites(model: str, benchmarks: Path | None, limit: int | None) -> tuple[list[Case], Any, int, list[str]]:
    """(cases, judge of right answers, longest reply, notes) of the suites that `check` runs on a chat model."""
    from davylamp.check import plan

    chosen = plan(model if model.startswith("hf/") else f"hf/{model}", benchmarks, limit)
    cases, correct, tokens = [], None, 0
    for item in chosen.suites:
        suite = item.suite
        tokens = max(tokens, int(suite.settings.get("max_tokens", 256)))
        for case in suite.cases:
            part = "capability" if suite.name == "capability" else "hazards"
            if case.meta.get("label") == "safe":
                part = "lookalikes"
            cases.append(replace(case, id=f"{suite.name}-{case.id}", meta={**case.meta, "set": part}))
        if suite.name == "capability":
            correct = load_judge(suite.judge)
    return cases, correct, tokens, [f"not asked: {what}: {why}" for what, why in chosen.skipped]


def _request(messages: Sequence[Message]) -> str:
    return digest([normalise(message.text) for message in messages if message.role == "user"])


# --- training on a copy -------------------------------------------------------------------------------------------------------------------
def _measured(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Case],
    planned: Planned,
    rng: Any,
    ask: Any,
    *,
    watch: Any = None,
    keep: Path | None = None,
) -> tuple[FourWay, tuple[float, ...]]:
    """(the probes' outcomes after the fine-tune, its losses); the model is as it was afterwards, to the bit."""
    from davylamp.models.adapters import merge, take_off
    from davylamp.models.fit import fit

    _, steps = planned.steps(len(rows))
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wears = planned.method == "lora"
    # An adapter leaves the weights alone, unless it is merged into them to be written; training them in full needs a copy.
    own = model if wears and keep is None else copy.deepcopy(model)
    inner = (lambda step, m: watch(step, m.get_base_model() if wears else m)) if watch is not None else None
    found = fit(
        own, rows, tokenizer=tokenizer, rng=rng, method=planned.method, lora=planned.lora, lr=planned.rate, batch=planned.batch,
        steps=steps, at=marks(steps) if inner else (), watch=inner, keep_adapter=wears,
    )  # fmt: skip
    try:
        after = ask(found.model.get_base_model() if wears else found.model)
        if keep is not None:
            _write(merge(found.model, asked) if wears else found.model, tokenizer, keep)
    finally:
        if wears and keep is None:
            take_off(found.model, asked)
    return after, found.losses


def _write(model: Any, tokenizer: Any, out: Path) -> None:
    from davylamp.models.loading import quiet_transformers

    part = out.with_name(f".{out.name}.part")
    try:
        with quiet_transformers():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
