"""The audit log: one JSON object a line, appended with one write before the client gets its answer, so that nothing acknowledged is lost.

A killed process loses nothing that was written (the kernel has it); against power cuts there is `fsync`. Several processes may append to
one file. A line torn by a full disk or a crash is ended when the log is opened, so that it spoils no other.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError
from davylamp.serve import config

_ENCODE = json.JSONEncoder(
    separators=(",", ":"), ensure_ascii=True, check_circular=False
).encode  # ASCII: no torn character


class AuditError(Exception):
    """A line could not be written, so the request must not be answered."""


class AuditLog:
    """The open log. Without a path it takes everything and writes nothing."""

    def __init__(self, settings: config.Audit):
        self.settings, self.texts = settings, settings.texts
        self.key = b""
        if settings.key_env:
            self.key = os.environ.get(settings.key_env, "").encode()
            if not self.key:
                raise InputError(f"no key for the audit log's hashes: set the environment variable {settings.key_env}")
        self.fd = -1
        if settings.path:
            self.reopen()

    @property
    def on(self) -> bool:
        return self.fd >= 0

    def reopen(self) -> None:
        """Open the file anew, as after a rotation. Raises InputError if it cannot be opened; then the old one stays."""
        path = Path(self.settings.path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise InputError(f"the audit log {path} cannot be opened: {error.strerror}") from None
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")
        self.close()
        self.fd = fd

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line. Raises AuditError."""
        if self.fd < 0:
            return
        data = (_ENCODE(row) + "\n").encode()
        try:
            if os.write(self.fd, data) != len(data):
                raise OSError(28, "No space left on device")
            if self.settings.fsync:
                os.fsync(self.fd)
        except OSError as error:
            raise AuditError(f"the audit log cannot be written ({error.strerror})") from None

    def hasher(self) -> Any:
        """A SHA-256 to feed, keyed if the log has a key."""
        return hmac.new(self.key, digestmod=hashlib.sha256) if self.key else hashlib.sha256()

    def digest(self, data: bytes) -> str:
        return (hmac.new(self.key, data, hashlib.sha256) if self.key else hashlib.sha256(data)).hexdigest()

    def said(self, name: str, text: str) -> dict[str, Any]:
        """How a text stands in the log: its length and hash."""
        return {f"{name}_chars": len(text), f"{name}_sha256": self.digest(text.encode("utf-8", "surrogatepass"))}

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
