"""Streams: server-sent events cut out byte for byte, and held back until guards have seen their characters in overlapping windows.

What is promised, and tested with random chunks. A reply's characters come in some order, 0, 1, 2, …; `judged` of them have been allowed.
Each is new to a guard exactly once. A window holds at most `window` characters: up to `holdback` that were judged before, and the new
ones. At no time has a character at or after `judged - holdback` been sent, until the reply has ended and all of it is allowed. So a
passage of `holdback + 1` characters or fewer that a guard flags whenever it sees it whole is never sent, not even its first character.

Pure: no clock, no network, no guard. Order within a reply is the order of arrival; what a guard sees is cut by channel (`content`,
`reasoning`, the arguments of a tool call), because that is how a client puts it together again.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NamedTuple

BOUNDARY = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")  # two ends of line; atomic, since \r\n is one
LINE = re.compile(rb"\r\n|\n|\r")
DONE = b"[DONE]"


class Malformed(ValueError):
    """The upstream's stream cannot be read, so nobody can judge it."""


def data_of(event: bytes) -> bytes:
    """The data of an event: its `data` lines, joined; empty for comments and bare fields.

    >>> data_of(b"event: x\\r\\ndata: {}\\r\\n\\r\\n"), data_of(b": ping\\n\\n")
    (b'{}', b'')
    """
    if event.startswith(b"data: ") and event.endswith(b"\n\n") and b"\r" not in event and event.count(b"\n") == 2:
        return event[6:-2]
    lines = (line for line in LINE.split(event) if line.startswith(b"data"))
    parts = [b"" if line == b"data" else line[5:].removeprefix(b" ") for line in lines if line[4:5] in (b":", b"")]
    return b"\n".join(parts)


class Piece(NamedTuple):
    """Characters of one channel of one choice."""

    choice: int
    channel: str
    text: str


class Chunk(NamedTuple):
    """What an event carries: pieces of text, the choices that end in it, its parsed data (None without), whether it is [DONE]."""

    pieces: list[Piece]
    ends: list[int]
    data: dict[str, Any] | None
    done: bool


RUN = 16  # events of a run that travel as one: more would be held back for longer than they need
LESSONS = 4  # how often the common form of a stream's events is learnt: one that keeps changing is not worth it
MOLD = 4096  # bytes; a longer event is no form for others
STRETCH = 16384  # bytes that are looked through at a time
NOTHING: Any = Chunk([], [], None, False)
KNOWN_DELTA = frozenset({"role", "content"})
NO_TEXT = frozenset(
    {"role", "type", "id", "index", "finish_reason", "tool_call_id"}
)  # keys whose strings a model did not write


def read_chunk(event: bytes) -> Chunk:
    """The text of one event of a chat or text completion: every string that the model may have written, known field or not.

    Log-probabilities are left out: they repeat the tokens. Raises Malformed on data that is no JSON object.

    >>> read_chunk(b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\\n\\n').pieces
    [Piece(choice=0, channel='delta.content', text='Hi')]
    """
    data = data_of(event)
    if not data:
        return NOTHING
    if data.strip() == DONE:
        return Chunk([], [], None, True)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Malformed("an event of the stream is no JSON") from None
    if not isinstance(value, dict):
        raise Malformed("an event of the stream is no JSON object")
    pieces: list[Piece] = []
    ends: list[int] = []
    choices = value.get("choices")
    if choices is None:
        return Chunk(pieces, ends, value, False)
    if not isinstance(choices, list):
        raise Malformed("`choices` of an event is no list")
    for choice in choices:
        if not isinstance(choice, dict):
            raise Malformed("a choice of an event is no object")
        index, delta = choice.get("index", 0), choice.get("delta")
        if type(index) is not int:
            raise Malformed("the index of a choice is no integer")
        if type(delta) is dict and delta.keys() <= KNOWN_DELTA and type(delta.get("content")) is str:
            if delta["content"]:
                pieces.append(Piece(index, "delta.content", delta["content"]))
        else:
            rest = {key: item for key, item in choice.items() if key != "logprobs"}
            pieces += [Piece(index, channel, text) for channel, text in strings(rest)]
        if choice.get("finish_reason") is not None:
            ends.append(index)
    return Chunk(pieces, ends, value, False)


class Events:
    """Cuts bytes into events, each with the blank line that ends it, and reads them: joined together they are the bytes again.

    limit: bytes that one event may hold.  read: False leaves the text unread, for streams nobody judges.

    Most events of a stream differ in one string only, and those are not parsed one by one. Once an event with a single piece was parsed,
    its bytes before and after that piece are kept, after a check that another word between them is read as that piece. An event of the
    same bytes around the inside of a JSON string can only mean the same with that string as its text; up to sixteen of them are one chunk.

    >>> events = Events()
    >>> [raw for raw, _ in events.feed(b"data: {}\\n\\nda")], [raw for raw, _ in events.feed(b"ta: [DONE]\\n\\n")]
    ([b'data: {}\\n\\n'], [b'data: [DONE]\\n\\n'])
    """

    def __init__(self, limit: int = 4 * 2**20, *, read: bool = True):
        self.limit, self.rest = limit, b""
        self._read = read_chunk if read else lambda event: NOTHING
        self._looked = 0  # up to where `rest` holds no boundary
        self._mold: tuple[bytes, bytes, int, str] | None = None  # what stands before and after the text of most events
        self._lessons = LESSONS if read else 0

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Chunk]]:
        """The events that are whole now, as they came and as they read. Raises Malformed."""
        rest, at = self.rest + data if self.rest else data, 0
        while True:
            if self._mold is not None and rest.startswith(self._mold[0], at):
                for end, text in self._run(rest, at):
                    pieces = [Piece(self._mold[2], self._mold[3], text)] if text else []
                    yield rest[at:end], Chunk(pieces, [], None, False)
                    at = self._looked = end
            found = BOUNDARY.search(rest, max(at, self._looked))
            if found is None:
                break
            event = rest[at : found.end()]
            if len(event) > self.limit:
                break
            at = self._looked = found.end()
            chunk = self._read(event)
            if self._lessons and len(chunk.pieces) == 1 and not chunk.ends:
                self._learn(event, chunk.pieces[0])
            yield event, chunk
        self.rest = rest[at:]
        self._looked = max(0, len(self.rest) - 3)
        if len(self.rest) > self.limit:
            raise Malformed(f"an event of the stream is longer than {self.limit} bytes")

    def end(self) -> Iterator[tuple[bytes, Chunk]]:
        """What came after the last boundary, once the stream has ended."""
        rest, self.rest, self._looked = self.rest, b"", 0
        if rest:
            yield rest, self._read(rest)

    def _run(self, data: bytes, at: int) -> list[tuple[int, str]]:
        """(end, text) of the events from `at` on that fit the mold, sixteen at a time.

        They are cut at blank lines: one inside a JSON string would be raw, and neither `_plain` nor `_unquoted` takes it. (To look for
        what stands between two texts takes twice as long: bytes.split starts anew on a long separator after each find.)
        """
        assert self._mold is not None
        head, tail, _, _ = self._mold
        close, frame, begin, cut = tail[:-2], len(head) + len(tail), len(head), 2 - len(tail)

        def fits(event: bytes) -> bool:
            return event.startswith(head) and event.endswith(close) and len(event) >= frame - 2

        events = data[at : at + min(STRETCH, self.limit)].split(b"\n\n")[:-1]
        while events and not fits(events[-1]):
            events.pop()
        insides = [event[begin:cut] for event in events]
        between = (tail + head).join(insides)
        if not data.startswith(between, at + begin):  # one of another form stands between them
            insides = [event[begin:cut] for event in takewhile(fits, events)]
        out: list[tuple[int, str]] = []
        for start in range(0, len(insides), RUN):
            parts = insides[start : start + RUN]
            joined = b"".join(parts)
            text = _plain(joined)
            if text is None:
                texts = [_unquoted(part) for part in parts]
                if None in texts:  # an event of another form that begins and ends like the others
                    good = texts.index(None)
                    if good:
                        at += sum(map(len, parts[:good])) + good * frame
                        out.append((at, "".join(filter(None, texts[:good]))))
                    return out
                text = "".join(filter(None, texts))
            at += len(joined) + len(parts) * frame
            out.append((at, text))
        return out

    def _learn(self, event: bytes, piece: Piece) -> None:
        index, channel, text = piece
        needle = text.encode("utf-8", "surrogatepass")
        at = event.rfind(b'"' + needle + b'"') + 1
        if not at or not event.endswith(b"\n\n") or len(event) > MOLD:
            return
        if self._lessons == LESSONS and b'"role"' in event:  # a stream's first event is mostly the only one of its form
            self._lessons -= 1
            return
        self._lessons -= 1
        head, tail = event[:at], event[at + len(needle) :]
        probe = read_chunk(head + b"a probe" + tail)
        if probe.pieces == [Piece(index, channel, "a probe")] and not probe.ends:
            self._mold = head, tail, index, channel


def _plain(inside: bytes) -> str | None:
    """The text of what stands between a JSON string's quotes if it reads as it stands; None if that needs a closer look."""
    try:
        text = inside.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() and '"' not in text and "\\" not in text else None


def _unquoted(inside: bytes) -> str | None:
    """The text of what stands between a JSON string's quotes; None if it is no such thing."""
    try:
        text = inside.decode("utf-8") + '"'
        value, end = scanstring(text, 0, True)
    except ValueError:
        return None
    return value if end == len(text) else None  # it ends where it should, not at a quote before


def strings(value: Any) -> Iterator[tuple[str, str]]:
    """(path, text) of every non-empty string inside a JSON value, but for short ones under keys such as `id`. Not recursive.

    >>> list(strings({"delta": {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]}}))
    [('delta.tool_calls.1.function.arguments', '{}')]
    """
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, item = stack.pop()
        if type(item) is str:
            if item:
                yield path, item
        elif type(item) is dict:
            stack += [
                (f"{path}.{key}" if path else key, inner)
                for key, inner in reversed(item.items())
                if inner and not (key in NO_TEXT and type(inner) is str and len(inner) <= 80)
            ]
        elif type(item) is list:
            for i in range(len(item) - 1, -1, -1):
                inner = item[i]
                number = inner["index"] if type(inner) is dict and type(inner.get("index")) is int else i
                stack.append((f"{path}.{number}", inner))


class Window(NamedTuple):
    """What a guard is shown next. new: how many characters at its end have not been judged before."""

    choice: int
    channel: str
    text: str
    new: int


@dataclass(slots=True)
class _Choice:
    received: int = 0
    judged: int = 0
    ended: bool = False
    closed: bool = False  # its end was released
    context: dict[str, str] = field(default_factory=dict)  # by channel: its last `holdback` judged characters
    new: dict[str, list[str]] = field(default_factory=dict)  # by channel: what has not been judged


class Hold:
    """Events held back until their characters are judged: `push`, judge what `due` gives, `allow`, send what `release` gives.

    window, holdback: in characters.  whole: nothing is due before the end.

    >>> hold = Hold(window=4, holdback=2)
    >>> hold.push(b"event", [Piece(0, "content", "abcdef")])
    >>> [view.text for view in hold.due()]
    ['ab', 'abcd', 'cdef']
    >>> hold.allow(); hold.release()
    b''
    >>> hold.end(); hold.release()
    b'event'
    """

    def __init__(self, window: int, holdback: int, *, whole: bool = False):
        self.holdback, self.whole = holdback, whole
        self.step = window - holdback
        self.sent = 0  # characters of all choices that were released
        self.held_bytes = 0
        self._choices: dict[int, _Choice] = {}
        # An event, where it leaves each choice it adds to, how many characters it adds, which choices end with it.
        self._events: deque[tuple[bytes, tuple[tuple[int, int], ...], int, Sequence[int]]] = deque()
        self._is_due = False

    def push(self, event: bytes, pieces: Sequence[Piece], ends: Sequence[int] = ()) -> None:
        """Take one event in."""
        needs: tuple[tuple[int, int], ...] = ()
        count = 0
        for index, channel, text in pieces:
            choice = self._choices.get(index)
            if choice is None:
                choice = self._choices[index] = _Choice()
            choice.received += len(text)
            choice.ended = False
            texts = choice.new.get(channel)
            if texts is None:
                choice.new[channel] = [text]
            else:
                texts.append(text)
            count += len(text)
            needs = (*needs, (index, choice.received)) if needs else ((index, choice.received),)
            if choice.received - choice.judged >= self.step and not self.whole:
                self._is_due = True
        self._events.append((event, needs, count, ends))
        self.held_bytes += len(event)
        for index in ends:
            if index in self._choices and not self.whole:
                self._choices[index].ended = self._is_due = True

    def end(self) -> None:
        """The stream is over: what has come is all there is."""
        for choice in self._choices.values():
            choice.ended = self._is_due = True

    def due(self) -> list[Window]:
        """The windows that must be judged now, in order; empty while fewer than window - holdback characters are new."""
        out: list[Window] = []
        if self._is_due:
            for index, choice in self._ripe():
                for channel, texts in choice.new.items():
                    out += self._cut(index, channel, choice.context.get(channel, ""), "".join(texts))
        return out

    def _ripe(self) -> Iterator[tuple[int, _Choice]]:
        for index, choice in self._choices.items():
            fresh = choice.received - choice.judged
            if fresh and (choice.ended or (fresh >= self.step and not self.whole)):
                yield index, choice

    def _cut(self, index: int, channel: str, context: str, new: str) -> Iterator[Window]:
        if self.whole:
            yield Window(index, channel, new, len(new))
            return
        text, at = context + new, len(context)
        while at < len(text):
            end = min(at + self.step, len(text))
            yield Window(index, channel, text[max(0, at - self.holdback) : end], end - at)
            at = end

    def allow(self) -> None:
        """All that was due has been judged and may be sent as soon as the hold-back lets it."""
        if not self._is_due:
            return
        for _, choice in self._ripe():
            if self.holdback:
                for channel, texts in choice.new.items():
                    choice.context[channel] = (choice.context.get(channel, "") + "".join(texts))[-self.holdback :]
            choice.new.clear()
            choice.judged = choice.received
        self._is_due = False

    def release(self) -> bytes:
        """The bytes that may be sent now, taken off the front; order is kept, so an event waits for those before it."""
        out: list[bytes] = []
        while self._events:
            event, needs, count, ends = self._events[0]
            for index, position in needs:
                choice = self._choices[index]
                if position > choice.judged - self.holdback and not (choice.ended and position <= choice.judged):
                    return b"".join(out)
            out.append(event)
            self.sent += count
            self.held_bytes -= len(event)
            for index in ends:
                if index in self._choices:
                    self._choices[index].closed = True
            self._events.popleft()
        return b"".join(out)

    @property
    def open_choices(self) -> list[int]:
        """The choices whose end was not released, or [0] if none has begun."""
        return [index for index, choice in self._choices.items() if not choice.closed] or ([] if self._choices else [0])
