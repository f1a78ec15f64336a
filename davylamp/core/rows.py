"""Rows: the one format of cases, read with line numbers, and the append-only log a run writes.

A row of cases:  {"id", "messages": [{"role", "content"}], "category"?, "answer"?, "group"?, "meta"?}
A row of a run:  {"key", "case", "seed", "reply": [messages], "verdict", "seconds", "error"?}   (`rows.jsonl`)
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError, RunError, UnknownNameError
from davylamp.core.nouns import ROLES, Case, Message, Verdict

CASE_KEYS = ("id", "messages", "category", "answer", "group", "meta")
MESSAGE_KEYS = ("role", "content", "reasoning", "media", "calls", "call_id", "finish", "tokens")
WIRE_NAMES = {"tool_calls": "calls", "tool_call_id": "call_id", "reasoning_content": "reasoning"}  # OpenAI-style names


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, UTF-8 as is, no NaN. Equal values give equal text.

    >>> canonical({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return _ENCODE(value)


_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value. A lone surrogate from a broken reply counts as its escape."""
    return hashlib.sha256(canonical(value).encode("utf-8", "backslashreplace")).hexdigest()


def message_from(row: Any, where: str) -> Message:
    """A Message from its plain form. `where` names the place in errors. Raises InputError."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a message must be an object with role and content, got {type(row).__name__}")
    given = {WIRE_NAMES.get(name, name): value for name, value in row.items()}
    for name in map(str, given):
        if name not in MESSAGE_KEYS:
            raise UnknownNameError(f"key of a message ({where})", name, MESSAGE_KEYS)
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise InputError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
    media = list(given.get("media") or ())
    if isinstance(content, list):  # OpenAI content parts
        texts = []
        for part in content:
            if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif (
                isinstance(part, Mapping)
                and part.get("type") == "image_url"
                and isinstance(part.get("image_url"), Mapping)
            ):
                media.append(str(part["image_url"].get("url")))
            else:
                raise InputError(f"{where}: a content part must be text or image_url, got {str(part)[:60]!r}")
        content = "\n".join(texts)
    if content is None and given.get("calls"):
        content = ""
    if not isinstance(content, str):
        raise InputError(f"{where}: content must be text, got {type(content).__name__}")
    return Message(
        role,
        content,
        reasoning=given.get("reasoning"),
        media=tuple(media),
        calls=tuple(given.get("calls") or ()),
        call_id=given.get("call_id"),
        finish=given.get("finish", ""),
        tokens=tuple(given.get("tokens", (0, 0))),
    )


def case_from(row: Any, where: str) -> Case:
    """A Case from its plain form. Raises InputError or UnknownNameError that name `where`.

    >>> case_from({"id": "1", "messages": [{"role": "user", "content": "hi"}]}, "line 1").id
    '1'
    >>> case_from({"id": "1", "messages": []}, "rows.jsonl line 3")
    Traceback (most recent call last):
    davylamp.core.errors.InputError: rows.jsonl line 3: messages must be a non-empty list, got []. See: davylamp show case
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a row must be an object, got {type(row).__name__}. See: davylamp show case")
    for name in row:
        if name not in CASE_KEYS:
            raise UnknownNameError(f"key of a row ({where})", name, CASE_KEYS, see="davylamp show case")
    name, messages, meta = row.get("id"), row.get("messages"), row.get("meta") or {}
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: id must be a non-empty text, got {name!r}. See: davylamp show case")
    if not isinstance(messages, list) or not messages:
        what = "[]" if messages == [] else type(messages).__name__
        raise InputError(f"{where}: messages must be a non-empty list, got {what}. See: davylamp show case")
    for key in ("category", "group"):
        if not isinstance(row.get(key), str | None):
            raise InputError(f"{where}: {key} must be text, got {type(row[key]).__name__}. See: davylamp show case")
    if not isinstance(meta, Mapping):
        raise InputError(f"{where}: meta must be an object, got {type(meta).__name__}. See: davylamp show case")
    return Case(
        id=name,
        messages=tuple(message_from(message, where) for message in messages),
        category=row.get("category"),
        answer=row.get("answer"),
        group=row.get("group"),
        meta=dict(meta),
    )


def verdict_from(row: Mapping[str, Any] | None) -> Verdict | None:
    """A Verdict from its plain form; None stays None (not judged yet)."""
    if row is None:
        return None
    return Verdict(
        row["value"], label=row.get("label"), categories=tuple(row.get("categories", ())), why=row.get("why", "")
    )


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl or .csv file (UTF-8), one at a time. Raises InputError with the line number."""
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    if None in row or None in row.values():
                        raise InputError(
                            f"{path.name} line {reader.line_num}: expected {len(reader.fieldnames or ())} columns"
                        )
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        value = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise InputError(
                            f"{path.name} line {number}: not JSON ({error.msg} at column {error.colno})"
                        ) from None
                    if not isinstance(value, dict):
                        raise InputError(
                            f"{path.name} line {number}: a row must be an object, got {type(value).__name__}"
                        )
                    yield number, value
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path.name} is not valid CSV: {error}") from None


class CaseFile:
    """The cases of a .jsonl file, read anew at each walk, never held in memory. Ids must be unique."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no file {self.path}")

    def __iter__(self) -> Iterator[Case]:
        seen: dict[str, int] = {}
        for number, row in read_objects(self.path):
            case = case_from(row, f"{self.path.name} line {number}")
            if case.id in seen:
                raise InputError(
                    f"{self.path.name} line {number}: id {case.id!r} stands already on line {seen[case.id]}"
                )
            seen[case.id] = number
            yield case
        if not seen:
            raise InputError(f"{self.path.name} holds no rows")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A case that a `@data` function leaves out, and why, in a few words that can be counted."""

    case: Case
    reason: str


def write_cases(path: Path, cases: Iterable[Case]) -> int:
    """Write cases as .jsonl, whole or not at all (a temporary file takes the name at the end). Returns their number."""
    part, count = path.with_name(path.name + ".part"), 0
    try:
        with part.open("w", encoding="utf-8") as file:
            for case in cases:
                file.write(canonical(case.json()) + "\n")
                count += 1
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


class RowLog:
    """`rows.jsonl` of one run: append-only, one whole line a write, one writer at a time, safe against kill -9 and a full disk.

    A torn last line (the machine died in the middle) is cut off when the log is opened. `state` maps each key to `done`,
    `unjudged` (a reply without a verdict) or `failed`, by the last line that bears it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.fd)
            raise RunError(f"another run is writing to {path.parent}: wait for it, or stop it first") from None
        self.size = self._trim()
        self.state: dict[str, str] = {}
        self._at: dict[str, int] = {}  # where the replies without a verdict stand
        for offset, row in self._lines():
            self._note(row["key"], _state(row), offset)

    def _note(self, key: str, state: str, offset: int) -> None:
        self.state[key] = state
        if state == "unjudged":
            self._at[key] = offset
        else:
            self._at.pop(key, None)

    def reply(self, key: str) -> tuple[Message, ...] | None:
        """The stored reply that still lacks its verdict, or None."""
        if key not in self._at:
            return None
        with self.path.open("rb") as file:
            file.seek(self._at[key])
            return tuple(message_from(message, f"row {key}") for message in json.loads(file.readline())["reply"])

    def _trim(self) -> int:
        size = os.fstat(self.fd).st_size
        keep, step = size, 65536
        while keep and os.pread(self.fd, 1, keep - 1) != b"\n":
            start = max(0, keep - step)
            keep = start + os.pread(self.fd, keep - start, start).rfind(b"\n") + 1
        if keep != size:
            os.ftruncate(self.fd, keep)
        return keep

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield offset, json.loads(line)
                except ValueError:
                    raise InputError(
                        f"{self.path} line {number} is not a row this program wrote: move the file away"
                    ) from None
                offset += len(line)

    def append(self, line: str) -> None:
        """Add one line (without its end). Raises RunError, with the file as it was, if it cannot be written whole."""
        data = (line + "\n").encode("utf-8", "backslashreplace")
        try:
            written = os.write(self.fd, data)
            if written != len(data):  # the disk filled up within the line
                raise OSError(28, "No space left on device")
        except OSError as error:
            os.ftruncate(self.fd, self.size)
            raise RunError(
                f"cannot write {self.path}: {error.strerror}. All rows so far are kept: make room and run it again"
            ) from None
        self.size += len(data)

    def close(self) -> None:
        os.close(self.fd)


def _state(row: Mapping[str, Any]) -> str:
    if row.get("verdict") is not None:
        return "done"
    return "unjudged" if row.get("reply") is not None else "failed"


def read_run(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's `rows.jsonl`, one per key: the last line of each counts. Two passes, rows are not held in memory."""
    last: dict[bytes, int] = {}
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                last[_key_of(line)] = offset
            offset += len(line)
    keep = set(last.values())
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if offset in keep:
                yield json.loads(line)
            offset += len(line)


def _key_of(line: bytes) -> bytes:
    # Rows of ours begin with {"key":"<32 hex>", so that the index needs no parsing; anything else is parsed.
    return line[8:40] if line.startswith(b'{"key":"') and line[40:41] == b'"' else json.loads(line)["key"].encode()


def conversation(row: Mapping[str, Any]) -> tuple[Case, Sequence[Message]]:
    """The case of a run's row and the whole conversation: the case's messages and what followed."""
    case = case_from(row["case"], f"row {row['key']}")
    return case, case.messages + tuple(message_from(message, f"row {row['key']}") for message in row["reply"] or ())
