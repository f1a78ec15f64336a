"""The engine of `davylamp attack` and `davylamp redteam`: attacks on cases through the plain runner, planned by a bandit, one log of rows.

A row is one attack on one case; what followed the case's messages is what the attack sent and the reply. The runner asks for the next row
when a call is free, so that a plan is made as late as it can be, and `rows.jsonl` is all there is to go on from after an interruption.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.random import Generator

from davylamp.attacks._ask import SUCCESS
from davylamp.core import Case, InputError, Judge, Message, Target, Verdict
from davylamp.core.nouns import Finding
from davylamp.core.registry import Entry
from davylamp.core.rows import RowLog, case_from, digest, message_from, read_run, verdict_from
from davylamp.core.run import Limits, Progress, collect


@dataclass(frozen=True, slots=True)
class Arm:
    """An attack ready to use. options: its own, with loaded targets where they name some; identity: the same as plain types."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    identity: Mapping[str, Any]


def arm_of(entry: Entry, options: Mapping[str, Any], *, helpers: Mapping[str, Any] | None = None) -> Arm:
    """The arm of a registry entry. helpers: loaded targets for options such as `attacker`, which then name them in the identity."""
    filled = entry.options(options)
    identity = {"name": entry.name, "version": entry.version, "options": dict(filled)}
    return Arm(entry.name, entry.load(), {**filled, **(helpers or {})}, identity)


@dataclass(frozen=True, slots=True)
class Scored(Verdict):
    """The verdict of a finding with what it cost, so that a row holds both."""

    queries: int = 0

    def json(self) -> dict[str, Any]:
        return {**Verdict.json(self), "queries": self.queries}


class Bandit:
    """Which attack on which category next: Thompson sampling on weaknesses found per question.

    A pair's chance of success has a Beta posterior whose prior is worth two trials at the attack's rate over all categories, so that what
    was learnt in one category speaks, softly, in the next. Next comes the largest draw over the pair's mean cost.
    `even` takes the pair that was tried least instead: the control.
    """

    def __init__(self, *, allowance: int, rng: Generator, even: bool = False):
        self.allowance, self.rng, self.even = allowance, rng, even
        self.trials: Counter[tuple[str, str, int]] = Counter()
        self.hits: Counter[tuple[str, str, int]] = Counter()
        self.cost: Counter[tuple[str, str, int]] = Counter()
        self.whole: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def learn(self, attack: str, category: str, round_: int, *, found: bool, queries: int) -> None:
        pair = (attack, category, round_)
        self.trials[pair] += 1
        self.hits[pair] += found
        self.cost[pair] += queries
        self.whole[attack, round_][0] += found
        self.whole[attack, round_][1] += 1

    def best(self, pairs: Sequence[tuple[str, str, int]], running: Mapping[tuple[str, str, int], int]) -> int:
        """Which of these (attack, category, round) to try next, by number.  running: trials that are not back yet; each counts as a miss
        until it is."""
        if self.even:
            tie = self.rng.random(len(pairs))
            return min(
                range(len(pairs)),
                key=lambda i: (pairs[i][2], self.trials[pairs[i]] + running.get(pairs[i], 0), tie[i]),
            )
        hits, misses, costs = [], [], []
        for pair in pairs:
            found, tried = self.whole[pair[0], pair[2]]
            # A second round on the same case starts low: the first one has failed there.
            mean = (found + (0.5 if pair[2] == 0 else 0.05)) / (tried + 1)
            hit, trials = self.hits.get(pair, 0), self.trials.get(pair, 0)
            hits.append(2 * mean + hit)
            misses.append(2 * (1 - mean) + trials - hit + running.get(pair, 0))
            costs.append((self.cost.get(pair, 0) + self.allowance) / (trials + 1))
        return int(np.argmax(self.rng.beta(hits, misses) / costs))


@dataclass(slots=True)
class State:
    """What is known of a campaign: questions spent, by-case outcome, and the curve of finds over questions."""

    spent: int = 0
    reserved: int = 0
    found: dict[str, str] = field(default_factory=dict)
    tries: Counter[tuple[str, str]] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    out: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    curve: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])


@dataclass(slots=True)
class Live(Progress):
    """Progress in the words of a campaign."""

    state: State = field(default_factory=State)
    budget: int = 0
    cases: int = 0

    def line(self) -> str:
        state = self.state
        best = Counter(state.found.values()).most_common(1)
        return (
            f"{state.spent}/{self.budget} questions  {len(state.found)} of {self.cases} cases broken"
            + (f"  most by {best[0][0]} ({best[0][1]})" if best else "")
            + (f"  {self.retries} retries" if self.retries else "")
            + (f"  {self.failed} failed" if self.failed else "")
        )


class Campaign:
    """Attacks (`arms`) on `cases` of one target within `budget` questions in all.

    allowance: most questions of one attack on one case.  rounds: how often one attack may try one case.  stop: a case that is broken is
    not attacked again.  even: plan by turns instead of by the bandit.  Raises InputError without arms or cases, or for a budget below 1.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        cases: Sequence[Case],
        judge: Judge,
        *,
        budget: int,
        allowance: int = 8,
        rounds: int = 1,
        stop: bool = True,
        even: bool = False,
        seed: int = 0,
    ):
        if not arms or not cases:
            raise InputError(f"a campaign needs attacks and cases, got {len(arms)} and {len(cases)}")
        for name, value in (("budget", budget), ("allowance", allowance), ("rounds", rounds)):
            if value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}")
        self.arms = {arm.name: arm for arm in arms}
        self.cases = {case.id: case for case in cases}
        if len(self.cases) < len(cases) or len(self.arms) < len(arms):
            raise InputError("a campaign's cases need different ids, and its attacks different names")
        for case in cases:
            if case.messages[-1].role != "user":
                raise InputError(f"row {case.id} must end in a user's turn, which is what an attack disguises")
        self.by_category: dict[str, list[Case]] = defaultdict(list)
        for case in cases:
            self.by_category[case.category or "all"].append(case)
        self.judge, self.budget, self.allowance, self.rounds, self.stop, self.seed = (
            judge,
            budget,
            allowance,
            rounds,
            stop,
            seed,
        )
        self.state = State()
        self.bandit = Bandit(allowance=allowance, rng=np.random.default_rng([seed, 1]), even=even)
        self._back: dict[str, tuple[Finding, int]] = {}
        self._queues: dict[tuple[str, str], deque[Case]] = {}  # by attack and category: the cases left to try

    async def run(
        self,
        target: Target,
        log: RowLog,
        *,
        settings: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        progress: Live | None = None,
    ) -> State:
        """Go on until the budget is spent or nothing is left to try. The log's own rows are learnt from first."""
        if log.size:
            for row in read_run(log.path):
                self._recall(row)
        for arm in self.arms:
            for category, cases in self.by_category.items():
                left = [case for case in cases if self.state.tries[arm, case.id] < self.rounds]
                self._queues[arm, category] = deque(sorted(left, key=lambda case: self.state.tries[arm, case.id]))
        progress = progress or Live()
        progress.state, progress.budget, progress.cases = self.state, self.budget, len(self.cases)
        before = -1
        while self.state.spent != before:
            before = self.state.spent
            work = _Plan(self._plan())
            if work.first is None:
                break
            await collect(
                work,
                target,
                self._said,
                log,
                seed=self.seed,
                settings=settings,
                play=self._play,
                limits=limits,
                progress=progress,
            )
        return self.state

    def _recall(self, row: Mapping[str, Any]) -> None:
        verdict = row.get("verdict")
        if verdict is None or row["case"]["meta"]["arm"] not in self.arms:
            return
        meta = row["case"]["meta"]
        self._learn(meta["arm"], self.cases[meta["case"]], meta["round"], verdict["value"], verdict["queries"])

    def _learn(self, arm: str, case: Case, round_: int, value: float | None, queries: int) -> None:
        found = (value or 0.0) >= SUCCESS
        self.state.spent += queries
        self.state.tries[arm, case.id] = max(self.state.tries[arm, case.id], round_ + 1)
        if found:
            self.state.found.setdefault(case.id, arm)
        self.bandit.learn(arm, case.category or "all", round_, found=found, queries=queries)
        self.state.curve.append((self.state.spent, len(self.state.found)))

    def _plan(self) -> Iterator[Case]:
        """The next attack on the next case, whenever the runner asks."""
        state = self.state
        while True:
            left = self.budget - state.spent - state.reserved
            if left < 1:
                return
            picked = self._pick()
            if picked is None:
                return
            arm, case, round_ = picked
            allowance = min(self.allowance, left)
            state.reserved += allowance
            state.running[case.id] += 1
            state.tries[arm, case.id] = round_ + 1
            state.out[arm, case.category or "all", round_] += 1
            meta = {**case.meta, "arm": arm, "case": case.id, "round": round_, "allowance": allowance}
            yield replace(case, id=f"{case.id}|{arm}|{round_}", group=case.group or case.id, meta=meta)

    def _pick(self) -> tuple[str, Case, int] | None:
        found = [
            (arm, category, case)
            for (arm, category), queue in self._queues.items()
            if (case := self._idle(queue)) is not None
        ]
        if not found:
            return None
        pairs = [(arm, category, self.state.tries[arm, case.id]) for arm, category, case in found]
        picked = self.bandit.best(pairs, self.state.out)
        (arm, category, round_), case = pairs[picked], found[picked][2]
        queue = self._queues[arm, category]
        queue.popleft()
        if round_ + 1 < self.rounds:
            queue.append(case)
        return arm, case, round_

    def _idle(self, queue: deque[Case]) -> Case | None:
        """The first case of a queue that may be attacked now, moved to its front. Two attacks at a time on one case would often pay twice
        for one weakness."""
        for _ in range(len(queue)):
            case = queue[0]
            if self.stop and case.id in self.state.found:
                queue.popleft()
            elif self.stop and self.state.running[case.id]:
                queue.rotate(-1)
            else:
                return case
        return None

    async def _play(self, asker: Target, case: Case, *, seed: int, **settings: Any) -> tuple[Message, ...]:
        meta = case.meta
        arm, plain = self.arms[meta["arm"]], self.cases[meta["case"]]
        counted = _Counted(asker, settings)
        rng = np.random.default_rng([seed, int(digest([case.id, plain.messages[-1].text])[:12], 16)])
        finding: Finding | None = None
        try:
            finding = await arm.function(counted, plain, self.judge, budget=meta["allowance"], rng=rng, **arm.options)
        finally:
            state = self.state
            state.reserved -= meta["allowance"]
            state.running[plain.id] -= 1
            state.out[arm.name, plain.category or "all", meta["round"]] -= 1
            if finding is None:
                state.spent += counted.asked  # it failed on the way: what was asked is spent all the same
        assert finding is not None
        self._learn(arm.name, plain, meta["round"], finding.verdict.value, counted.asked)
        self._back[case.id] = (finding, counted.asked)
        return finding.messages

    async def _said(self, messages: Sequence[Message], case: Case | None = None) -> Verdict:
        """The verdict that the attack has brought back; the runner asks for it right after `_play`."""
        assert case is not None
        finding, asked = self._back.pop(case.id)
        said = finding.verdict
        return Scored(said.value, label=said.label, categories=said.categories, why=said.why, queries=asked)


class _Plan:
    """A plan to be walked once; `first` is None if there is nothing in it. The first row is drawn early only to know that."""

    def __init__(self, rows: Iterator[Case]):
        self.rows = rows
        self.first = next(rows, None)

    def __iter__(self) -> Iterator[Case]:
        if self.first is not None:
            yield self.first
        yield from self.rows


class _Counted:
    """The target as an attack sees it: with the run's settings, and every question counted."""

    def __init__(self, target: Target, settings: Mapping[str, Any]):
        self.target, self.settings, self.asked = target, dict(settings), 0
        self.name, self.identity = target.name, target.identity

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        self.asked += 1
        return await self.target(messages, seed=seed, **{**self.settings, **settings})


@dataclass(frozen=True, slots=True)
class Found:
    """One broken case of a log: who broke it, what was sent, what came back, and at what cost."""

    case: Case
    attack: str
    sent: tuple[Message, ...]
    reply: Message
    verdict: Verdict
    queries: int

    def row(self, source: str = "") -> Case:
        """As a row that `davylamp eval` asks again: the messages as sent."""
        meta = {"attack": self.attack, "request": self.case.messages[-1].text, "case": self.case.id}
        return Case(
            f"{self.case.id}|{self.attack}",
            self.sent,
            category=self.case.category,
            answer=self.case.answer,
            group=self.case.group or self.case.id,
            meta={**meta, **({"source": source} if source else {})},
        )


def findings(log: RowLog, cases: Mapping[str, Case]) -> list[Found]:
    """Every successful attack of a log, in the order of its rows."""
    out = []
    with contextlib.suppress(FileNotFoundError):
        for row in read_run(log.path):
            verdict = verdict_from(row.get("verdict"))
            if verdict is None or (verdict.value or 0.0) < SUCCESS:
                continue
            meta = case_from(row["case"], f"row {row['key']}").meta
            messages = tuple(message_from(message, f"row {row['key']}") for message in row["reply"])
            out.append(
                Found(cases[meta["case"]], meta["arm"], messages[:-1], messages[-1], verdict, row["verdict"]["queries"])
            )
    return out
