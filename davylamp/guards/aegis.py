"""AEGIS: several guards as experts, weighted online by feedback, with a regret guarantee on every stream.
Source: arXiv:2404.05993, the exponential-weights family of Cesa-Bianchi & Lugosi (2006); rate and loss are ours (see metrics/online.py)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, Literal, TypeVar

from davylamp.core import Case, InputError, Judge, Message, RunError, Verdict, guard
from davylamp.core.judges import load_judge
from davylamp.core.rows import digest
from davylamp.core.tally import look
from davylamp.guards._ledger import Event, Judged, Ledger, open_ledger
from davylamp.metrics.online import Learner, PageHinkley, Settings

T = TypeVar("T")
FREE = 20.0  # feedback of one tenant that always counts, whatever its share
SNAPSHOT_EVERY = 1000  # events


@guard(
    version=1,
    source="arXiv:2404.05993; Cesa-Bianchi & Lugosi 2006",
    licence="Apache-2.0",
    stage="deployment",
    threats=("harmful-compliance", "distribution-shift", "jailbreak"),
    measures="unsafe",
    systems=("26",),
)
def aegis(
    *,
    experts: str,
    state: str = "",
    method: Literal["hedge", "fixed_share", "discounted"] = "fixed_share",
    eta: float | None = None,
    horizon: int = 0,
    alpha: float = 0.01,
    gamma: float = 0.99,
    loss: Literal["absolute", "squared", "log", "zero_one"] = "absolute",
    threshold: float = 0.5,
    context: str = "",
    reference: str = "",
    floor: float = 0.0,
    influence: float = 1.0,
    timeout: float = 30.0,
    nobody: Literal["could_not_tell", "unsafe", "safe"] = "could_not_tell",
) -> Aegis:
    """How unsafe the last message is: the experts' forecasts, weighted by how well they did on earlier feedback.

    experts: guards joined by `+`, options of one parted by `;`, lists in them by `/`, as for `panel`. What an expert cannot tell leaves its
    weight as it is.  state: empty (in memory), a SQLite file, or a postgresql+DRIVER:// URL that several replicas share.
    method, eta, horizon, alpha, gamma, loss: how it learns (hedge: best single expert; fixed_share: follows changes; discounted: forgets).
    threshold: a value above it is labelled unsafe; c_fp / (c_fp + c_fn) for unequal costs.
    context: a case path such as `meta.tenant`: weights of its own for each value.
    reference, floor: this expert keeps at least the share `floor` of the vote, whatever feedback says.
    influence: the largest share of all feedback that counts from one tenant (`by`), beyond its first 20.
    timeout: seconds an expert may take.
    nobody: the verdict where all experts abstain (`no_decision`): could not tell, or closed (unsafe), or open (safe).

    `await guard.feedback(id, label)` teaches it: id is the judged case's id, or `item_id(messages)` where it was judged without a case.
    """
    names = [part.strip().replace(";", ",") for part in experts.split("+") if part.strip()]
    loaded = [load_judge(name) for name in names]
    short = [judge.name for judge in loaded]
    named = {
        judge.name if short.count(judge.name) == 1 else name: judge for name, judge in zip(names, loaded, strict=True)
    }
    if len(named) != len(names):
        raise InputError(f"the same expert is given twice: {experts}")
    wrong = [
        f"{judge.name} measures {judge.measures}" for judge in loaded if judge.measures not in ("unsafe", "complied")
    ]
    if wrong:
        raise InputError(f"an expert must measure unsafe (or complied): {', '.join(wrong)}")
    learning = Settings(method, eta, horizon, alpha, gamma, loss, threshold)
    return Aegis(
        named,
        learning,
        state=state,
        context=context,
        reference=reference,
        floor=floor,
        influence=influence,
        timeout=timeout,
        nobody=nobody,
    )


def item_id(messages: Sequence[Message]) -> str:
    """The id of a conversation that was judged without a case: a hash of it.

    >>> item_id([Message("user", "hello")]) == item_id([Message("user", "hello")])
    True
    """
    return digest([message.json() for message in messages])[:32]


class Aegis:
    """The guard itself. experts: name -> guard; everything else as in `aegis`. Options may also be given by `Aegis(...)` in Python.

    weights: name -> weight now.  feedback, discount, report, close: coroutines.  failures: expert -> how often it abstained, by reason.
    """

    measures = "unsafe"

    def __init__(
        self,
        experts: Mapping[str, Judge],
        settings: Settings | None = None,
        *,
        state: str = "",
        context: str = "",
        reference: str = "",
        floor: float = 0.0,
        influence: float = 1.0,
        timeout: float = 30.0,
        nobody: str = "could_not_tell",
    ):
        self.settings = settings or Settings()
        if not experts:
            raise InputError("aegis needs one expert or more. Expected experts=NAME+NAME, got none")
        if reference and reference not in experts:
            raise InputError(f"the reference must be one of {', '.join(experts)}, got {reference!r}")
        if not 0 <= floor < 1 or bool(floor) != bool(reference):
            raise InputError(f"floor must be in [0, 1) and come with a reference, got {floor} and {reference!r}")
        if not 0 < influence <= 1 or timeout <= 0:
            raise InputError(f"influence must be in (0, 1] and timeout above 0, got {influence} and {timeout}")
        if nobody not in ("could_not_tell", "unsafe", "safe"):
            raise InputError(f"nobody must be could_not_tell, unsafe or safe, got {nobody!r}")
        self.experts, self.context, self.reference, self.floor = dict(experts), context, reference, floor
        self.influence, self.timeout, self.nobody = influence, timeout, nobody
        self.identity: Mapping[str, Any] = {
            "experts": {name: dict(getattr(expert, "identity", {})) for name, expert in experts.items()},
            "learner": asdict(self.settings),
        }
        self.learners: dict[str, Learner] = {}
        self.tenants: dict[str, float] = {}  # weight of the feedback that counted, by tenant
        self.capped = 0
        self.failures: dict[str, Counter[str]] = {name: Counter() for name in experts}
        self.unrecorded = 0  # items judged while the state could not be written: they can get no feedback
        self.drift = PageHinkley()
        self.drifted = 0
        self.seq = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="davylamp-aegis")
        setup = {"experts": list(experts), "learner": asdict(self.settings), "influence": influence}
        self._ledger: Ledger = open_ledger(state, setup)
        self._restore()

    # --- judging ------------------------------------------------------------------------------------------------------------------------
    async def __call__(self, messages: Sequence[Message], case: Case | None = None) -> Verdict:
        verdicts = await asyncio.gather(*(self._ask(name, messages, case) for name in self.experts))
        where = str(look(case.json(), self.context) or "") if case is not None and self.context else ""
        p = tuple(None if verdict is None else verdict.value for verdict in verdicts)
        item = Judged(case.id if case is not None else item_id(messages), where, p, None)
        value, weights = await self._in_thread(lambda: self._decide(item))
        if value is None:
            filled = {"could_not_tell": None, "unsafe": 1.0, "safe": 0.0}[self.nobody]
            return Verdict(filled, label="no_decision", why="every expert abstained")
        said = [(name, v) for name, v in zip(self.experts, verdicts, strict=True) if v is not None]
        flagged = sorted(
            ((weights[name], v.categories) for name, v in said if (v.value or 0.0) > self.settings.threshold),
            key=lambda pair: -pair[0],
        )
        return Verdict(
            value,
            label="unsafe" if value > self.settings.threshold else "safe",
            categories=tuple(dict.fromkeys(node for _, nodes in flagged for node in nodes)),
            why=", ".join(f"{name} {v.value:.2g} (weight {weights[name]:.2f})" for name, v in said),
        )

    def _decide(self, item: Judged) -> tuple[float | None, dict[str, float]]:
        """The forecast and the weights it was made with. A state that cannot be used must not stop the judging: it is counted."""
        with contextlib.suppress(RunError):
            self._catch_up()
        value, weights = self._vote(item), self.weights_of(item.context)
        try:
            self._ledger.record(replace(item, given=value))
        except RunError:
            self.unrecorded += 1
        return value, weights

    async def _ask(self, name: str, messages: Sequence[Message], case: Case | None) -> Verdict | None:
        """The expert's verdict; None if it abstains, whatever the reason: one broken expert must not stop the others."""
        try:
            async with asyncio.timeout(self.timeout):
                verdict = await self.experts[name](messages, case)
        except TimeoutError:
            self.failures[name]["timed out"] += 1
        except Exception as problem:
            self.failures[name][f"raised {type(problem).__name__}"] += 1
        else:
            if not isinstance(verdict, Verdict):
                self.failures[name][f"gave a {type(verdict).__name__}"] += 1
            elif verdict.value is None:
                self.failures[name]["could not tell"] += 1
            else:
                return verdict
        return None

    def _vote(self, item: Judged) -> float | None:
        value = self._learner(item.context).forecast(item.forecasts)
        if value is not None and self.floor:
            kept = item.p[list(self.experts).index(self.reference)]
            if kept is not None:
                value = (1 - self.floor) * value + self.floor * kept
        return value

    # --- learning -----------------------------------------------------------------------------------------------------------------------
    async def feedback(self, id: str, label: int, *, propensity: float = 1.0, by: str = "") -> dict[str, Any]:
        """Teach it the right label (1 unsafe, 0 safe) of a judged item; when this returns, the feedback is stored for good.

        propensity: how likely, in (0, 1], this item was to be reviewed at all (people mostly review what was blocked): its loss counts
        1/propensity.  by: the tenant or person, for `influence`. Returns id, seq and the weights afterwards.
        Raises InputError for an unknown id, one that has had its feedback, or another label; RunError if it cannot be stored.
        """
        if isinstance(label, bool) or label not in (0, 1):
            raise InputError(f"a label must be 0 (safe) or 1 (unsafe), got {label!r}")
        if not isinstance(id, str) or not id:
            raise InputError(f"feedback needs the id of a judged item, got {id!r}")
        if isinstance(propensity, bool) or not 0 < propensity <= 1:
            raise InputError(f"propensity must be in (0, 1], got {propensity!r}")
        if self.influence < 1 and not by:
            raise InputError("with influence below 1, feedback must name its tenant in `by`")

        def work() -> dict[str, Any]:
            self._ledger.feedback(id, int(label), propensity=float(propensity), by=by)
            self._catch_up()
            return {"id": id, "seq": self.seq, "weights": self.weights}

        return await self._in_thread(work)

    async def discount(self, factor: float, *, context: str = "") -> None:
        """An operator's step after a change of policy: forget all (0) or part of what was learnt in a context. Stored like feedback."""
        if not 0 <= factor <= 1:
            raise InputError(f"the factor of a discount must be in [0, 1], got {factor}")

        def work() -> None:
            self._ledger.discount(context, factor)
            self._catch_up()

        await self._in_thread(work)

    @property
    def weights(self) -> dict[str, float]:
        """name -> weight; `context/name` where there are several contexts."""
        if len(self.learners) < 2:
            return self.weights_of(next(iter(self.learners), ""))
        return {f"{where}/{name}": w for where in self.learners for name, w in self.weights_of(where).items()}

    def weights_of(self, context: str) -> dict[str, float]:
        raw = self._learner(context, keep=False).weights().tolist()
        if not self.floor:
            return dict(zip(self.experts, raw, strict=True))
        return {
            name: (1 - self.floor) * w + self.floor * (name == self.reference)
            for name, w in zip(self.experts, raw, strict=True)
        }

    def report(self) -> dict[str, Any]:
        """Measured regret, its bound and their ratio in each context, weights, and what went wrong; plain types."""
        return {
            "events": self.seq,
            "contexts": {
                where: {**learner.report(), "weights": self.weights_of(where)}
                for where, learner in self.learners.items()
            },
            "failures": {name: dict(counts) for name, counts in self.failures.items()},
            "unrecorded": self.unrecorded,
            "capped": self.capped,
            "drift_alarms": self.drifted,
        }

    async def close(self) -> None:
        for expert in self.experts.values():
            closing = getattr(expert, "close", None)
            if closing is not None:
                await closing()
        await self._in_thread(self._ledger.close)
        self._thread.shutdown(wait=True)

    def _learner(self, context: str, *, keep: bool = True) -> Learner:
        found = self.learners.get(context)
        if found is None:
            found = Learner(len(self.experts), self.settings)
            if keep:
                self.learners[context] = found
        return found

    def _catch_up(self) -> None:
        """Fold the events that are new here, other replicas' too, in their order."""
        for event in self._ledger.since(self.seq):
            self._fold(event)
            self.seq = event.seq
            if self.seq % SNAPSHOT_EVERY == 0:
                self._ledger.keep(self.seq, self._state())

    def _fold(self, event: Event) -> None:
        if event.kind == "discount":
            self._learner(event.context).discount(event.factor)
            return
        item = event.judged
        assert item is not None
        weight = 1 / event.propensity
        had, all_ = self.tenants.get(event.by, 0.0), sum(self.tenants.values())
        if had + weight > FREE and had + weight > self.influence * (all_ + weight) + 1e-9:
            self.capped += 1
            return
        self.tenants[event.by] = had + weight
        learner = self._learner(event.context)
        learner.update(item.forecasts, event.label, propensity=event.propensity, given=item.given)
        if item.given is not None:
            self.drifted += self.drift.add(abs(item.given - event.label))

    def _state(self) -> dict[str, Any]:
        return {
            "learners": {where: learner.json() for where, learner in self.learners.items()},
            "tenants": self.tenants,
            "capped": self.capped,
            "drift": vars(self.drift),
            "drifted": self.drifted,
        }

    def _restore(self) -> None:
        found = self._ledger.snapshot()
        if found is not None:
            self.seq, state = found
            self.learners = {where: Learner.from_json(row) for where, row in state["learners"].items()}
            self.tenants, self.capped, self.drifted = dict(state["tenants"]), state["capped"], state["drifted"]
            for name, value in state["drift"].items():
                setattr(self.drift, name, value)
        self._catch_up()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
