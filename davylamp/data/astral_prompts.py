"""ASTRAL's generator: test prompts for every cell of category x writing style x persuasion technique, from labelled examples and the news.
Source: arXiv:2501.17132, section 3.2. Differs: plain chat calls and an index of our own instead of a hosted assistant; near-duplicates are
dropped; a cell that stays empty is named; news come only from a search that was asked for, with a day that is given."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from davylamp.core import Case, InputError, Message, RunError, TargetError, UnknownNameError, data
from davylamp.core.judges import load_judge
from davylamp.core.rows import Dropped, canonical
from davylamp.data import _astral_templates as rules
from davylamp.data._astral_suite import SCHEMA, Knowledge, cell_of, document_of, published
from davylamp.data._astral_write import Job, Model, Rules, Writer, lines_of, load_blocks
from davylamp.metrics import coverage_criterion
from davylamp.metrics.coverage_criterion import Cell, Criterion
from davylamp.metrics.near import Seen
from davylamp.models.news import Article, Search, load_search, parse_day

if TYPE_CHECKING:
    from numpy.random import Generator

Version = Literal["rag", "rag_fs", "rag_fs_ts", "baseline", "padded"]
VERSIONS = ("rag", "rag_fs", "rag_fs_ts", "baseline", "padded")
MOST = 1000  # tests of a cell
OFFLINE = ("templates", "world")
BATCH = 10  # tests that a language model is asked for at a time


@dataclass(frozen=True, slots=True)
class Plan:
    """How a suite is to be written. n: tests of a cell of the full product; versions without style and technique get as many a category.

    t: 3 for the full product, 2 or 1 for a covering array.  k: examples shown.  tries: texts in a row without a new test
    before a cell is given up.  alike: Jaccard of character 5-grams from which a test repeats another; 1 drops equal texts
    only.  day: of the news.  fresh: days after which a test from news expires.
    on_search: what a search that fails does.  length: characters of `padded`.
    """

    version: str = "rag_fs"
    n: int = 3
    t: int = 3
    k: int = 4
    tries: int = 5
    alike: float = 0.8
    day: date | None = None
    fresh: int = 30
    on_search: Literal["abort", "skip"] = "abort"
    length: int = 0
    width: int = 16

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise UnknownNameError("version of the generator", self.version, VERSIONS)
        if isinstance(self.n, bool) or not isinstance(self.n, int) or not 1 <= self.n <= MOST:
            raise InputError(f"n must be a whole number from 1 to {MOST} (tests a cell), got {self.n!r}")
        if self.tries < 1 or self.k < 0 or self.fresh < 1 or self.width < 1:
            raise InputError("tries, fresh and width must be 1 or more, and k 0 or more")
        if self.version == "rag_fs_ts" and self.day is None:
            raise InputError(
                "version rag_fs_ts needs the day of its news: --day 2026-11-25. The clock is not read, so that a suite can be made again"
            )
        if self.version == "padded" and self.length < 1:
            raise InputError(
                "version padded needs --length, the mean number of characters of the suite it is compared with"
            )

    def jobs(self, criterion: Criterion, rng: Generator) -> list[tuple[Cell, int]]:
        """(cell, tests wanted) in order."""
        if self.version in ("rag_fs", "rag_fs_ts"):
            whole = self.t >= len(criterion.axes)
            return [(cell, self.n) for cell in (criterion.cells() if whole else criterion.sample(self.t, rng=rng))]
        values = criterion.axes["category"]
        return [((category, None, None), self.n * (criterion.size // len(values))) for category in values]


@data(
    version=1,
    source="arXiv:2501.17132",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance", "jailbreak"),
    systems=("25",),
)
def astral_prompts(
    rows: Iterable[Case],
    *,
    rng: Generator,
    model: str = "templates",
    version: Version = "rag_fs",
    n: int = 3,
    t: int = 3,
    k: int = 4,
    tries: int = 5,
    alike: float = 0.8,
    features: str = "",
    blocks: str = "",
    search: str = "",
    day: str = "",
    fresh: int = 30,
    on_search: Literal["abort", "skip"] = "abort",
    length: int = 0,
    max_tokens: int = 1024,
    temperature: float = 1.0,
    width: int = 16,
) -> Iterator[Case | Dropped]:
    """A balanced suite of test prompts. rows: labelled prompts to retrieve from (`-` for none). `davylamp astral generate` does the
    same and writes as it goes.

    model: the target that writes, such as openai/NAME; or `templates` (English, by rule) or `world` (the organisms' language, by rule).
    version: rag (category alone), rag_fs (with style and technique), rag_fs_ts (with news), and to compare with: baseline (plain prompts as
    they stand in rows), padded (these between harmless sentences, `length` characters).  n: tests a cell, 1 to 1000; rag and the baselines
    get as many a category.  t: 3 for every cell, 2 for a covering array of pairs.  k: examples shown.
    tries: texts in a row without a new test before a cell is given up.  alike: Jaccard of 5-grams from which a test repeats
    another.  features: TOML of axes.  blocks: TOML of few-shot texts.  search: news, FILE.jsonl or tavily or python/FILE.py:NAME.
    day: of the news.  fresh: days until its tests expire.  on_search: abort or skip the cell.

    Dropped: `not generated` (one marker for each test that a cell lacks), `repeats` (near-duplicate), `refused` (the writer declined).

    >>> suite = [x for x in astral_prompts((), rng=np.random.default_rng(0), n=1, t=2) if isinstance(x, Case)]
    >>> len(suite), suite[0].meta["version"], suite[0].meta["generator"]
    (84, 'rag_fs', 'templates')
    """
    criterion = criterion_for(features, model)
    knowledge = Knowledge([document_of(case, criterion) for case in rows])
    plan = Plan(version, n, t, k, tries, alike, parse_day(day, "day") if day else None, fresh, on_search, length, width)
    writer = load_writer(model, blocks, max_tokens=max_tokens, temperature=temperature)
    news = load_search(search) if search else None

    async def go() -> list[Case | Dropped]:
        try:
            return [item async for item in generated(plan, criterion, knowledge, writer, news, rng=rng)]
        finally:
            await closed(writer, news)

    yield from asyncio.run(go())


def criterion_for(features: str, model: str) -> Criterion:
    """The axes of a file, or the published ones; the organisms' language has its kinds of hazard as categories."""
    if features:
        return coverage_criterion.load(Path(features))
    published_axes = coverage_criterion.astral().axes
    if model != "world":
        return Criterion(published_axes)
    from davylamp.models import world_cells

    return Criterion({**published_axes, "category": world_cells.CATEGORIES})


def load_writer(model: str, blocks: str = "", *, max_tokens: int = 1024, temperature: float = 1.0) -> Writer:
    """The rules by name, or a target with its blocks."""
    if model in OFFLINE:
        return Rules(model)
    from davylamp.models.targets import load_target

    return Model(load_target(model), load_blocks(blocks), max_tokens=max_tokens, temperature=temperature)


async def closed(*things: Any) -> None:
    for thing in things:
        if (closing := getattr(thing, "close", None)) is not None:
            await closing()


async def generated(
    plan: Plan,
    criterion: Criterion,
    knowledge: Knowledge,
    writer: Writer,
    search: Search | None = None,
    *,
    rng: Generator,
    have: Sequence[Case] = (),
) -> AsyncIterator[Case | Dropped]:
    """The suite, test by test in the order of its cells; `have`: tests that are there already, which are not written again.

    Cells are written side by side (`width`), each with random numbers of its own, so that their order changes nothing. Raises TargetError
    where the writer fails, RunError where the search does and `on_search` is abort: a test is never called news-based without its news.
    """
    if plan.version == "rag_fs_ts" and search is None:
        raise InputError("version rag_fs_ts needs --search: FILE.jsonl, tavily, or python/FILE.py:NAME")
    root = int(rng.integers(2**31))
    jobs = plan.jobs(criterion, rng)
    counts = Counter(cell_of(case) for case in have)
    maker = _Maker(plan, knowledge, writer, search)
    for case in have:
        maker.seen.add(case.messages[-1].text)
    gate = asyncio.Semaphore(plan.width)
    starts = [np.random.default_rng((root, number, counts[cell])) for number, (cell, _) in enumerate(jobs)]

    async def first(number: int) -> _Round:
        cell, wanted = jobs[number]
        async with gate:
            return await maker.ask(cell, wanted - counts[cell], starts[number], ())

    open_jobs = [number for number, (cell, wanted) in enumerate(jobs) if counts[cell] < wanted]
    tasks: dict[int, asyncio.Task[_Round]] = {}
    try:
        for place, number in enumerate(open_jobs):
            for ahead in open_jobs[place : place + 2 * plan.width]:
                if ahead not in tasks:
                    tasks[ahead] = asyncio.create_task(first(ahead))
            cell, wanted = jobs[number]
            async for item in maker.cell(cell, wanted - counts[cell], await tasks.pop(number), starts[number]):
                yield item
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Round:
    """What one question to the writer gave. trouble: why there is nothing, where the search failed."""

    lines: tuple[str, ...]
    news: tuple[Article, ...] = ()
    seconds: float = 0.0
    trouble: str = ""


class _Maker:
    """Writes the tests of a cell: asks, reads, drops what repeats or declines, and asks again, a bounded number of times."""

    def __init__(self, plan: Plan, knowledge: Knowledge, writer: Writer, search: Search | None):
        self.plan, self.knowledge, self.writer, self.search = plan, knowledge, writer, search
        self.seen, self.refusal, self.lost = Seen(alike=plan.alike), load_judge("refusal"), 0

    async def ask(self, cell: Cell, n: int, rng: Generator, avoid: Sequence[str]) -> _Round:
        category, style, technique = str(cell[0]), cell[1], cell[2]
        if self.plan.version in ("baseline", "padded"):
            return _Round(tuple(self._plain(category, n, rng)))
        news: list[Article] = []
        if self.plan.version == "rag_fs_ts":
            assert self.search is not None and self.plan.day is not None
            try:
                news = await self.search(rules.label(category).replace(",", ""), day=self.plan.day)
            except TargetError as problem:
                if self.plan.on_search == "abort":
                    raise RunError(f"the news search failed and no test was written in its place: {problem}") from None
                return _Round((), trouble=f"no news: {problem}")
            if not news:
                return _Round((), trouble="no news up to that day")
        pool = self.knowledge.examples(category, max(1, 3 * self.plan.k)) if self.plan.k else []
        n = n if isinstance(self.writer, Rules) else min(n, BATCH)
        shown = [pool[i] for i in sorted(rng.permutation(len(pool))[: self.plan.k].tolist())]
        day = self.plan.day.isoformat() if self.plan.day else ""
        started = time.perf_counter()
        text = await self.writer(Job(category, style, technique, n, shown, news, day, avoid), rng=rng)
        seconds = 0.0 if isinstance(self.writer, Rules) else round(time.perf_counter() - started, 3)
        return _Round(tuple(lines_of(text)), tuple(news), seconds)

    def _plain(self, category: str, n: int, rng: Generator) -> list[str]:
        """Prompts as they stand in the rows; by rule, plain ones that are made up."""
        known = self.knowledge.of(category)
        if known:
            texts = [known[i] for i in rng.permutation(len(known))[:n]]
        elif isinstance(self.writer, Rules):
            write = self.writer.write
            texts = [write(category, None, None, (), (), rng) for _ in range(n)]
        else:
            texts = []
        return (
            texts if self.plan.version == "baseline" else [rules.padded(text, self.plan.length, rng) for text in texts]
        )

    async def cell(self, cell: Cell, wanted: int, found: _Round, rng: Generator) -> AsyncIterator[Case | Dropped]:
        kept: list[str] = []
        fruitless = 0
        while fruitless < self.plan.tries:
            before = len(kept)
            for line in found.lines:
                if len(kept) == wanted:
                    return
                declined = not isinstance(self.writer, Rules) and await self._declines(line)
                if declined or self.seen.add(line) is not None:
                    self.lost += 1
                    yield Dropped(
                        self._case(cell, line, found, f"lost-{self.lost}"), "refused" if declined else "repeats"
                    )
                    continue
                kept.append(line)
                yield self._case(cell, line, found)
            if len(kept) == wanted:
                return
            fruitless = 0 if len(kept) > before else fruitless + 1
            if fruitless < self.plan.tries:
                found = await self.ask(cell, wanted - len(kept), rng, kept[-20:])
        reason = found.trouble or "not generated"
        for number in range(wanted - len(kept)):
            name = " x ".join(value for value in cell if value)
            yield Dropped(
                self._case(cell, f"({name}, test {number + 1})", found, f"absent {name} {number + 1}"), reason
            )

    async def _declines(self, line: str) -> bool:
        return (await self.refusal((Message("assistant", line),))).value == 0.0

    def _case(self, cell: Cell, text: str, found: _Round, name: str = "") -> Case:
        category, style, technique = str(cell[0]), cell[1], cell[2]
        meta: dict[str, Any] = {
            "schema": SCHEMA,
            "version": self.plan.version,
            "generator": str(self.writer.identity["name"]),
        }
        meta |= {key: value for key, value in (("style", style), ("technique", technique)) if value is not None}
        if found.seconds:
            meta["seconds"] = found.seconds
        if found.news and self.plan.day is not None:
            meta["news"] = [
                {"date": one.day.isoformat(), "url": one.url, "title": one.title[:200]} for one in found.news
            ]
            meta["day"] = self.plan.day.isoformat()
            meta["expires"] = (self.plan.day + timedelta(days=self.plan.fresh)).isoformat()
        id_ = (
            name
            or hashlib.sha256(
                canonical([*cell, self.plan.version, text]).encode("utf-8", "backslashreplace")
            ).hexdigest()[:32]
        )
        case = Case(
            id_,
            (Message("user", text),),
            published(category),
            meta=meta,
        )
        return case if name or self.writer.identity["name"] != "world" else _in_world(case)


def _in_world(case: Case) -> Case:
    """A test of the organisms' world, grouped by the item it asks about, with what a helpful model would answer."""
    from davylamp.models import world

    ask = world.read(case.messages)
    if ask is None or ask.item is None:
        return case
    more: Mapping[str, Any] = {"set": "hazards", "language": "A", "item": ask.item, "kind": world.kind_of(ask.item)}
    return replace(case, answer=world.answer(ask), group=ask.item, meta={**case.meta, **more})
