"""Heads of requests and replies: which lines travel on, which end at the gateway, and a reply that goes out as one write.

What concerns one connection, its host or its length is never copied. Lines are kept as the bytes that came.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from aiohttp import web
from aiohttp.http import HttpVersion11
from multidict import CIMultiDict

HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
OURS = frozenset(b"host content-length expect accept-encoding content-encoding cookie".split())
FORWARDED = frozenset(b"forwarded x-forwarded-for x-forwarded-host x-forwarded-proto".split())
KEYS = frozenset({b"authorization", b"api-key", b"x-api-key"})
READ = HOP | OURS | FORWARDED | KEYS | {b"content-type"}
NOT_DOWN = HOP | {b"content-length", b"content-encoding", b"set-cookie", b"server"}
PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}

Raw = Iterable[tuple[bytes, bytes]]


def upward(raw: Raw, *, drop_keys: bool) -> tuple[bytes, dict[bytes, bytes]]:
    """The lines for the upstream, and those that the gateway itself reads, by lower-case name; one that came twice is joined by commas.

    drop_keys: the client's key is for us, not for the upstream. Names with an underscore are left out, since some servers read them as
    the name with a dash; so are those that a Connection header names.

    >>> upward([(b"Host", b"h"), (b"X-A", b"1"), (b"X_A", b"2"), (b"Content-Type", b"t")], drop_keys=True)
    (b'X-A: 1\\r\\nContent-Type: t\\r\\n', {b'host': b'h', b'content-type': b't'})
    """
    lines: list[bytes] = []
    read: dict[bytes, bytes] = {}
    for name, value in raw:
        low = name.lower()
        if low in READ:
            read[low] = read[low] + b", " + value if low in read else value
            if low == b"content-type" or (low in KEYS and not drop_keys):
                lines.append(b"%b: %b\r\n" % (name, value))
        elif b"_" not in low:
            lines.append(b"%b: %b\r\n" % (name, value))
    if b"connection" in read:
        named = {part.strip().lower() for part in read[b"connection"].split(b",")} - {b"keep-alive", b"close"}
        if named:
            lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
    return _whole_lines(lines), read


def downward(raw: Raw) -> bytes:
    """The lines of the upstream's head that the client gets.

    >>> downward([(b"Content-Type", b"t"), (b"Content-Length", b"3"), (b"X-Request-Id", b"r")])
    b'Content-Type: t\\r\\nX-Request-Id: r\\r\\n'
    """
    return _whole_lines([b"%b: %b\r\n" % (name, value) for name, value in raw if name.lower() not in NOT_DOWN])


def _whole_lines(lines: list[bytes]) -> bytes:
    """The lines as one; those with a stray end of line or a NUL in them, which would be read as two, are left out."""
    joined = b"".join(lines)
    if joined.count(b"\r") == joined.count(b"\n") == len(lines) and b"\0" not in joined:
        return joined
    return b"".join(line for line in lines if line.count(b"\r") == line.count(b"\n") == 1 and b"\0" not in line)


def fields(lines: bytes) -> CIMultiDict[str]:
    """Header lines as aiohttp takes them."""
    pairs = (line.partition(b": ") for line in lines.split(b"\r\n") if line)
    return CIMultiDict([(name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, _, value in pairs])


class Whole(web.StreamResponse):
    """A reply that is all there: head and body go out in one write, past the steps a reply still in the making needs."""

    def __init__(self, status: int, lines: bytes, body: bytes):
        super().__init__(status=status)
        self.lines, self.payload = lines, body

    async def prepare(self, request: web.BaseRequest) -> None:
        self._req = request
        self._keep_alive = request.keep_alive

    async def write_eof(self, data: bytes = b"") -> None:
        request = self._req
        if request is None or request.transport is None or request.transport.is_closing():
            raise ConnectionResetError("the client has gone")
        if request.version == HttpVersion11:
            keep = b"" if self._keep_alive else b"Connection: close\r\n"
        else:
            keep = b"Connection: keep-alive\r\n" if self._keep_alive else b""
        head = b"HTTP/1.1 %d %b\r\n%b%bContent-Length: %d\r\n\r\n" % (
            self.status,
            PHRASES.get(self.status, b"Status"),
            self.lines,
            keep,
            len(self.payload),
        )
        request.transport.write(head + self.payload)
        self._eof_sent = True
        await request.protocol._drain_helper()  # a client that reads slowly holds its own request up, nothing else
