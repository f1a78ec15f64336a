"""What an online guard remembers: an append-only list of judged items and of events (feedback, discounts), in memory or in a database.

A database is SQLite (a file) or PostgreSQL (a URL), both through SQLAlchemy. Events are numbered 1, 2, 3, … without a gap, each written
whole in one transaction under a lock, so that every replica folds the same events in the same order into the same weights, and what was
acknowledged survives a kill -9. Nothing is changed or deleted afterwards.
"""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from davylamp.core.errors import InputError, NeedsError, RunError, UnknownNameError
from davylamp.core.rows import canonical

KEPT_IN_MEMORY = 10_000  # judged items that still wait for feedback; older ones are forgotten


@dataclass(frozen=True, slots=True)
class Judged:
    """One item as it was judged. p: each expert's forecast, None = abstained.  given: the forecast that was given (None: nobody spoke)."""

    id: str
    context: str
    p: tuple[float | None, ...]
    given: float | None

    @property
    def forecasts(self) -> list[float]:
        return [math.nan if value is None else value for value in self.p]


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the log. kind: feedback (label, propensity, by, judged) | discount (factor).  seq: its number, 0 until written."""

    kind: str
    context: str
    judged: Judged | None = None
    label: int = 0
    propensity: float = 1.0
    by: str = ""
    factor: float = 1.0
    seq: int = 0


class Ledger(Protocol):
    """Where items and events go. All calls may block: the guard makes them in a thread of its own."""

    def record(self, item: Judged) -> None:
        """Remember a judged item; a later one of equal id takes its place for feedback."""

    def feedback(self, id: str, label: int, *, propensity: float, by: str) -> None:
        """Append a feedback. Raises InputError if the id is unknown or has had its feedback."""

    def discount(self, context: str, factor: float) -> None: ...

    def since(self, seq: int) -> list[Event]:
        """The events after number `seq`, in order."""

    def snapshot(self) -> tuple[int, dict[str, Any]] | None:
        """(seq, state) of the newest stored state, or None."""

    def keep(self, seq: int, state: Mapping[str, Any]) -> None:
        """Store the state after event `seq`, so that a start need not fold all events again."""

    def close(self) -> None: ...


class MemoryLedger:
    """For one process, gone when it ends."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.waiting: OrderedDict[str, Judged | None] = OrderedDict()  # None: had its feedback

    def record(self, item: Judged) -> None:
        self.waiting.pop(item.id, None)
        self.waiting[item.id] = item
        if len(self.waiting) > KEPT_IN_MEMORY:
            self.waiting.popitem(last=False)

    def feedback(self, id: str, label: int, *, propensity: float, by: str) -> None:
        if id not in self.waiting:
            raise _unknown(id)
        item = self.waiting[id]
        if item is None:
            raise InputError(f"item {id!r} has had its feedback: a second one is not counted")
        self.waiting[id] = None
        self._add(Event("feedback", item.context, item, label, propensity, by))

    def discount(self, context: str, factor: float) -> None:
        self._add(Event("discount", context, factor=factor))

    def _add(self, event: Event) -> None:
        self.events.append(replace(event, seq=len(self.events) + 1))

    def since(self, seq: int) -> list[Event]:
        return self.events[seq:]

    def snapshot(self) -> tuple[int, dict[str, Any]] | None:
        return None

    def keep(self, seq: int, state: Mapping[str, Any]) -> None:
        return None

    def close(self) -> None:
        return None


class SQLLedger:
    """A SQLite file, or a PostgreSQL database for replicas on several machines.

    place: a path, or an SQLAlchemy URL such as postgresql+psycopg://host/name (the password from the driver's own environment or file).
    setup: what the events are folded with (experts and learner); a database that was begun with another one is refused.
    SQLite runs in WAL mode with full synchronisation: an acknowledged feedback is on the disk.
    """

    def __init__(self, place: str, setup: Mapping[str, Any]):
        try:
            import sqlalchemy as sa
        except ImportError:
            raise NeedsError("a guard's state in a database needs sqlalchemy: pip install 'davylamp[guard]'") from None
        self.sa = sa
        url = place if "://" in place else f"sqlite:///{Path(place).expanduser().absolute()}"
        self.sqlite = url.startswith("sqlite")
        try:
            self.name = sa.make_url(url).render_as_string(hide_password=True)
            self.engine = sa.create_engine(url, **({"connect_args": {"timeout": 30}} if self.sqlite else {}))
        except ImportError as problem:
            raise NeedsError(f"the state {self.name} needs a driver: pip install {problem.name}") from None
        except sa.exc.ArgumentError:
            shown = url.partition("://")[0] + "://…"
            raise InputError(
                f"{shown} is no usable database. Expected a path, or postgresql+psycopg://host/name"
            ) from None
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _open_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
        tables, number = sa.MetaData(), sa.BigInteger().with_variant(sa.Integer(), "sqlite")
        self.setup = sa.Table(
            "davylamp_setup", tables, sa.Column("id", sa.Integer, primary_key=True), sa.Column("value", sa.Text)
        )
        self.judged = sa.Table(
            "davylamp_judged",
            tables,
            sa.Column("seq", number, primary_key=True, autoincrement=True),
            sa.Column("id", sa.Text, nullable=False, index=True),
            sa.Column("context", sa.Text, nullable=False),
            sa.Column("p", sa.Text, nullable=False),
            sa.Column("given", sa.Double),
            sa.Column("at", sa.Double, nullable=False),
        )
        self.events = sa.Table(
            "davylamp_events",
            tables,
            sa.Column("seq", number, primary_key=True, autoincrement=False),
            sa.Column("kind", sa.Text, nullable=False),
            sa.Column("context", sa.Text, nullable=False),
            sa.Column("judged", number, sa.ForeignKey("davylamp_judged.seq"), unique=True),
            sa.Column("label", sa.Integer, nullable=False),
            sa.Column("propensity", sa.Double, nullable=False),
            sa.Column("by", sa.Text, nullable=False),
            sa.Column("factor", sa.Double, nullable=False),
            sa.Column("at", sa.Double, nullable=False),
        )
        self.states = sa.Table(
            "davylamp_states",
            tables,
            sa.Column("seq", number, primary_key=True, autoincrement=False),
            sa.Column("value", sa.Text, nullable=False),
        )
        try:
            self._prepare(tables, setup)
        except BaseException:
            self.engine.dispose()
            raise

    def _prepare(self, tables: Any, setup: Mapping[str, Any]) -> None:
        """Make the tables where they are missing, and see that the state is of this setup."""
        wanted = canonical(setup)
        with self._begin() as connection:
            if not self.sqlite:  # two replicas that start at once: one makes the tables, the other waits
                connection.execute(self.sa.text("SELECT pg_advisory_xact_lock(720263)"))
            tables.create_all(connection)
            found = connection.execute(self.sa.select(self.setup.c.value)).scalar()
            if found is None:
                connection.execute(self.setup.insert().values(id=1, value=wanted))
        if found is not None and found != wanted:
            before, now = json.loads(found), json.loads(wanted)
            name = next(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))
            raise InputError(
                f"the state {self.name} was begun with other {name}: {before.get(name)}, not {now.get(name)}. "
                "Use the same experts and learner, or a new place for the state"
            )

    @contextmanager
    def _begin(self, how: str = "durable") -> Iterator[Any]:
        """One transaction: durable (on the disk when it returns) | quick (safe against kill -9, not against a power cut) | read."""
        try:
            with self.engine.execution_options(davylamp=how).begin() as connection:
                yield connection
        except self.sa.exc.DBAPIError as problem:
            lines = str(problem.orig).strip().splitlines() or [type(problem.orig).__name__]
            raise RunError(f"the state {self.name} cannot be used: {lines[0][:200]}") from None

    def record(self, item: Judged) -> None:
        row = {"id": item.id, "context": item.context, "p": json.dumps(item.p), "given": item.given, "at": time.time()}
        with self._begin("quick") as connection:
            connection.execute(self.judged.insert().values(**row))

    def feedback(self, id: str, label: int, *, propensity: float, by: str) -> None:
        with self._begin() as connection:
            self._lock(connection)
            newest = (
                self.sa.select(self.judged.c.seq, self.judged.c.context)
                .where(self.judged.c.id == id)
                .order_by(self.judged.c.seq.desc())
                .limit(1)
            )
            found = connection.execute(newest).first()
            if found is None:
                raise _unknown(id)
            had = self.sa.select(self.events.c.seq).where(self.events.c.judged == found.seq)
            if connection.execute(had).first() is not None:
                raise InputError(f"item {id!r} has had its feedback: a second one is not counted")
            self._append(
                connection,
                kind="feedback",
                context=found.context,
                judged=found.seq,
                label=label,
                propensity=propensity,
                by=by,
            )

    def discount(self, context: str, factor: float) -> None:
        with self._begin() as connection:
            self._lock(connection)
            self._append(connection, kind="discount", context=context, factor=factor)

    def _lock(self, connection: Any) -> None:
        """One writer of events at a time, so that numbers appear in order, without a gap. SQLite's BEGIN IMMEDIATE does it already."""
        if not self.sqlite:
            connection.execute(self.sa.text("LOCK TABLE davylamp_events IN SHARE ROW EXCLUSIVE MODE"))

    def _append(self, connection: Any, **row: Any) -> None:
        last = connection.execute(self.sa.select(self.sa.func.max(self.events.c.seq))).scalar() or 0
        empty = {"judged": None, "label": 0, "propensity": 1.0, "by": "", "factor": 1.0}
        connection.execute(self.events.insert().values(**{**empty, **row, "seq": last + 1, "at": time.time()}))

    def since(self, seq: int) -> list[Event]:
        joined = self.events.outerjoin(self.judged, self.events.c.judged == self.judged.c.seq)
        query = (
            self.sa.select(self.events, self.judged.c.id.label("item"), self.judged.c.p, self.judged.c.given)
            .select_from(joined)
            .where(self.events.c.seq > seq)
            .order_by(self.events.c.seq)
        )
        out = []
        with self._begin("read") as connection:
            for row in connection.execute(query):
                item = (
                    None if row.judged is None else Judged(row.item, row.context, tuple(json.loads(row.p)), row.given)
                )
                out.append(Event(row.kind, row.context, item, row.label, row.propensity, row.by, row.factor, row.seq))
        return out

    def snapshot(self) -> tuple[int, dict[str, Any]] | None:
        with self._begin("read") as connection:
            row = connection.execute(self.sa.select(self.states).order_by(self.states.c.seq.desc()).limit(1)).first()
        return None if row is None else (row.seq, json.loads(row.value))

    def keep(self, seq: int, state: Mapping[str, Any]) -> None:
        with self._begin("quick") as connection:
            self._lock(connection)
            if connection.execute(self.sa.select(self.states.c.seq).where(self.states.c.seq == seq)).first() is None:
                connection.execute(self.states.insert().values(seq=seq, value=canonical(state)))

    def close(self) -> None:
        self.engine.dispose()


def _open_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # no BEGIN of the driver's own
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    """Writers wait for each other at their start, not in the middle; an item is not worth a wait for the disk, a feedback is."""
    how = connection.get_execution_options().get("davylamp", "durable")
    connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if how == 'durable' else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN" if how == "read" else "BEGIN IMMEDIATE")


def _unknown(id: str) -> UnknownNameError:
    """A name that nothing answers to, so that a gateway can say 404. The ids that are known are nobody's business."""
    return UnknownNameError("judged item", id, (), see="davylamp show aegis")


def open_ledger(place: str, setup: Mapping[str, Any]) -> Ledger:
    """In memory if `place` is empty, else a database."""
    return SQLLedger(place, setup) if place else MemoryLedger()
