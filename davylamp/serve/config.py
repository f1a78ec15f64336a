"""The policy file of the gateway: TOML in, frozen dataclasses out. Unknown keys are errors, with the nearest name.

Every dataclass below is one table of the file, its fields are the table's keys, and its defaults the defaults: there is no second list.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.policy import MEANS_UNSAFE, GuardRule, Level
from davylamp.core.taxonomy import names, node

SIDES = ("input", "output", "both")
SHORT = re.compile(r"(input|output|both)=(.+)", re.DOTALL)  # how --guard names a side
JUDGED_ROLES = ("system", "user", "assistant", "tool")


def _positive(table: Any, *fields: str) -> None:
    for field in fields:
        if not getattr(table, field) > 0:
            raise InputError(f"{field} must be above 0, got {getattr(table, field)}")


@dataclass(frozen=True, slots=True)
class Upstream:
    """`[upstream]`: the server behind.

    url: its base, such as http://127.0.0.1:8000/v1.  key_env: environment variable with the key sent there; empty: the client's own key
    goes through (unless the gateway checks keys itself).  connect_seconds, reply_seconds (to the first byte), idle_seconds (between two
    pieces): after them the answer is 504.  connections: most at a time.
    """

    url: str = ""
    key_env: str = ""
    connect_seconds: float = 10.0
    reply_seconds: float = 600.0
    idle_seconds: float = 120.0
    connections: int = 1024

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"the upstream must be a URL such as http://127.0.0.1:8000/v1, got {self.url!r}")
        if parts.username or parts.password or parts.query or parts.fragment or not self.url.isascii():
            raise InputError("the upstream's URL must hold no user, key, query or fragment. Keys belong into key_env")
        _positive(self, "connect_seconds", "reply_seconds", "idle_seconds", "connections")


@dataclass(frozen=True, slots=True)
class Server:
    """`[server]`: where it listens, and who may ask.

    workers: processes that share the port.  keys_env: environment variable with the API keys that are accepted, parted by commas; empty:
    no check.  open_pages: /, /metrics without a key although keys are checked.  grace_seconds: how long a stop waits for requests.
    stuck_seconds: with several workers, one whose loop stood still so long is killed and started again.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    keys_env: str = ""
    open_pages: bool = False
    grace_seconds: float = 30.0
    stuck_seconds: float = 60.0

    def __post_init__(self) -> None:
        _positive(self, "workers", "grace_seconds", "stuck_seconds")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be from 0 to 65535, got {self.port}")


@dataclass(frozen=True, slots=True)
class Limits:
    """`[limits]`: what is refused before anybody judges it.

    body_bytes: 413 above.  reply_bytes, event_bytes: an upstream's reply or event above it is 502.  messages: 400 above.
    body_seconds: 408 if the body takes longer to come.  concurrent: requests at a time in one worker, 503 above.
    per_minute: requests of one key (or address) a minute in one worker, 429 above; 0: no limit.
    deny_fields: top-level request fields that are refused with 400, such as chat_template.
    """

    body_bytes: int = 16 * 2**20
    reply_bytes: int = 64 * 2**20
    event_bytes: int = 4 * 2**20
    messages: int = 4096
    body_seconds: float = 60.0
    concurrent: int = 1024
    per_minute: int = 0
    deny_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _positive(self, "body_bytes", "reply_bytes", "event_bytes", "messages", "body_seconds", "concurrent")
        if self.per_minute < 0:
            raise InputError(f"per_minute must be 0 (no limit) or more, got {self.per_minute}")


@dataclass(frozen=True, slots=True)
class Stream:
    """`[stream]`: how a streamed reply is judged. See `serve/stream.py`.

    window: characters that guards see at a time.  holdback: characters at the window's start that were judged before; as many judged
    characters are always held back.  whole: hold everything until the reply is complete, and judge it in one piece.
    """

    window: int = 400
    holdback: int = 200
    whole: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.holdback < self.window:
            raise InputError(
                f"holdback must be at least 0 and less than window, got {self.holdback} and window {self.window}"
            )


@dataclass(frozen=True, slots=True)
class Regenerate:
    """`[regenerate]`: what the action of that name does.

    rounds: replies that are asked for and judged, in all.  after: when all were flagged, `refuse`, or `last`: send one more unjudged.
    hint: a system message put before the others from the second round on; empty: none. `seed` grows by one each round in any case.
    """

    rounds: int = 5
    after: str = "refuse"
    hint: str = ""

    def __post_init__(self) -> None:
        _positive(self, "rounds")
        if self.after not in ("refuse", "last"):
            raise UnknownNameError("way to end (after)", self.after, ("refuse", "last"))


@dataclass(frozen=True, slots=True)
class Audit:
    """`[audit]`: the append-only log, one JSON object a line.

    path: its file; empty: no log.  texts: write prompts and replies as they are; otherwise only their SHA-256.
    key_env: environment variable with a secret that keys the hashes (HMAC), so that short prompts cannot be guessed from them.
    fsync: wait for the disk at every line, against power cuts (a killed process loses nothing without it).
    """

    path: str = ""
    texts: bool = False
    key_env: str = ""
    fsync: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """`[page]`: the live page.  enabled: serve it.  texts: show the last message of each request, and reasons that may cite it."""

    enabled: bool = True
    texts: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """`[reply]`: blocked: what a client reads instead of a blocked reply."""

    blocked: str = "This content was withheld by a safety guard."


@dataclass(frozen=True, slots=True)
class Guard:
    """`[[guard]]`: one guard.

    use: a guard's spec, as everywhere (`lamp`, `llm_judge:model=…`, `my_guard.py`).  name: how it is called in counts, logs and ids.
    on: input | output | both.  flag, levels, ignore, on_failure: see `core.policy.GuardRule`; flag "" takes what the measure says.
    timeout: seconds for one verdict.  thread: run it in a thread of its own, for guards that compute for long without waiting.
    roles: whose messages are judged on the input side.  turns: `last`, those after the last assistant turn, or `all`, every one.
    """

    use: str = ""
    name: str = ""
    on: str = "both"
    flag: str = ""
    levels: tuple[Level, ...] = (Level("unsafe", 0.5, "block"),)
    ignore: tuple[str, ...] = ()
    on_failure: str = "block"
    timeout: float = 10.0
    thread: bool = False
    roles: tuple[str, ...] = ("user", "tool", "assistant")
    turns: str = "last"

    def __post_init__(self) -> None:
        if not self.use:
            raise InputError('a guard needs `use`, such as use = "lamp". See: davylamp list guards')
        for what, value, known in (("side (on)", self.on, SIDES), ("way to judge turns", self.turns, ("last", "all"))):
            if value not in known:
                raise UnknownNameError(what, value, known)
        for role in self.roles:
            if role not in JUDGED_ROLES:
                raise UnknownNameError("role", role, JUDGED_ROLES)
        _positive(self, "timeout")
        for path in self.ignore:
            if path.partition("/")[0] in names():
                node(path)  # raises on a category that its taxonomy lacks
        self.rule("unsafe")

    def rule(self, measures: str) -> GuardRule:
        """The rule of this guard, given what it measures. Raises InputError if that does not say which end is unsafe."""
        flag = self.flag or MEANS_UNSAFE.get(measures, "")
        if not flag:
            raise InputError(
                f'guard {self.use} measures {measures!r}: say which end of it is unsafe, flag = "high" or "low"'
            )
        return GuardRule(self.levels, flag, self.on_failure, self.ignore)


@dataclass(frozen=True, slots=True)
class Policy:
    """The whole file."""

    upstream: Upstream
    guard: tuple[Guard, ...]
    server: Server = Server()
    limits: Limits = Limits()
    stream: Stream = Stream()
    regenerate: Regenerate = Regenerate()
    audit: Audit = Audit()
    page: Page = Page()
    reply: Reply = Reply()

    def __post_init__(self) -> None:
        if not self.guard:
            raise InputError("no guard: name one with --guard NAME, or as [[guard]] in the policy file")
        called = [guard.name for guard in self.guard]
        for name in called:
            if called.count(name) > 1:
                raise InputError(f"two guards are called {name!r}: give one of them another `name`")


def read_policy(
    path: Path | None = None,
    *,
    upstream: str | None = None,
    guards: Sequence[str] = (),
    audit: str | None = None,
    **server: Any,
) -> Policy:
    """The policy of a file (if any), with what the command line says put over it. Raises InputError or UnknownNameError.

    guards: specs that are added to the file's, each with or without a side: `lamp`, `input=lamp`, `output=llm_judge:model=…`.
    server: host, port, workers; None leaves what the file says.

    >>> read_policy(upstream="http://127.0.0.1:8000/v1", guards=["input=my_guard"]).guard[0].on
    'input'
    >>> read_policy(upstream="http://127.0.0.1:8000/v1", guards=["my_guard"], port=99999)
    Traceback (most recent call last):
    davylamp.core.errors.InputError: port must be from 0 to 65535, got 99999
    """
    table = _load(path) if path is not None else {}
    where = path.name if path is not None else "the policy"
    _known(Policy, table, where)
    for key, more in (("upstream", {"url": upstream}), ("server", server), ("audit", {"path": audit})):
        more = {name: value for name, value in more.items() if value is not None}
        if more and isinstance(table.get(key, {}), dict):
            table[key] = {**table.get(key, {}), **more}
    more_guards = []
    for spec in guards:
        match = SHORT.fullmatch(spec)
        more_guards.append({"on": match[1], "use": match[2]} if match else {"use": spec})
    if more_guards and isinstance(table.get("guard", []), list):
        table["guard"] = [*table.get("guard", []), *more_guards]
    if "upstream" not in table:
        raise InputError("no upstream: say --upstream URL, or [upstream] url in the policy file")
    table.setdefault("guard", [])
    if isinstance(table["guard"], list):
        table["guard"] = _named(table["guard"])
    return _build(Policy, table, where)


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no file {path}. Expected a policy in TOML") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path.name} is no TOML file: {error}") from None


def _named(rows: list[Any]) -> list[Any]:
    """Guards get the name of what they use, numbered where it is taken; names are kept to letters that ids and logs can hold."""
    out: list[Any] = []
    taken = {row.get("name") for row in rows if isinstance(row, dict)}
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("use"), str) and not row.get("name"):
            _, inner, after = row["use"].partition(".py:")
            spelt = after.partition(":")[0] if inner else Path(row["use"].partition(":")[0]).stem
            base = re.sub(r"[^\w-]+", "_", spelt).strip("_") or "guard"
            name, number = base, 2
            while name in taken:
                name, number = f"{base}_{number}", number + 1
            taken.add(name)
            row = {**row, "name": name}
        elif isinstance(row, dict) and isinstance(row.get("name"), str) and not re.fullmatch(r"[\w-]+", row["name"]):
            raise InputError(f"a guard's name must be letters, digits, _ or -, got {row['name']!r}")
        out.append(row)
    return out


def _build(cls: Any, table: Any, where: str) -> Any:
    """An instance of the dataclass from a TOML table; every value is checked against the field's type."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where} must be a table of keys, got {type(table).__name__}")
    hints = _known(cls, table, where)
    for field in dataclasses.fields(cls):
        if field.name not in table and field.default is dataclasses.MISSING:
            raise InputError(f"{where} needs {field.name}")
    try:
        return cls(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in table.items()})
    except UnknownNameError:
        raise
    except InputError as error:
        raise InputError(f"{where}: {error}" if where not in str(error) else str(error)) from None


def _known(cls: Any, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The types of the dataclass's fields. Raises UnknownNameError on a key that is no field."""
    hints = get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise UnknownNameError(f"key in {where}", key, hints, see="docs/gateway.md")
    return hints


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list, got {value!r}")
        return tuple(_value(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} must be {kind.__name__}, got {value!r}")
    if kind is float and not (-1e18 < value < 1e18):  # TOML has inf and nan
        raise InputError(f"{where} must be a finite number, got {value!r}")
    return value
