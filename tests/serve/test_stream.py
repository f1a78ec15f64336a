"""The hold-back's promise, by property: whatever the chunks, nothing leaks, nothing is lost, and each character is judged once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from davylamp.serve.stream import Events, Hold, Malformed, Piece, data_of, read_chunk, strings
from tests.serve.upstream import DONE, event, events

CHANNELS = st.sampled_from(["content", "reasoning", "call.0"])
LETTERS = st.text(alphabet="abX", max_size=6)
PIECES = st.lists(st.tuples(st.integers(0, 2), CHANNELS, LETTERS), max_size=3)
HEAVY = settings(max_examples=150, deadline=None)


def cut(data, places):
    """Bytes in pieces, cut at the given places."""
    ends = sorted({place % (len(data) + 1) for place in places} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(
    stream=st.lists(st.tuples(PIECES, st.booleans()), max_size=25), window=st.integers(1, 9), share=st.floats(0, 0.99)
)
@HEAVY
def test_each_character_is_new_once_and_nothing_is_sent_before_its_time(stream, window, share):
    """Against a model kept beside it: characters in order of arrival for each choice, and how many of them have been judged."""
    holdback = int(window * share)
    hold = Hold(window, holdback)
    came = {}  # choice -> the characters in order
    positions = []  # for each event: choice -> how many characters of it have come with the event
    seen = {}  # (choice, channel) -> new characters as guards saw them
    judged, ended, sent = {}, set(), 0

    def look():
        nonlocal sent
        for view in hold.due():
            assert 0 < view.new <= len(view.text) <= window
            seen[view.choice, view.channel] = seen.get((view.choice, view.channel), "") + view.text[-view.new :]
            assert seen[view.choice, view.channel].endswith(view.text), "the window shows what came just before"
        hold.allow()
        for choice in came:
            if choice in ended or len(came[choice]) - judged.get(choice, 0) >= window - holdback:
                judged[choice] = len(came[choice])
        out = hold.release()
        numbers = [int(part) for part in out.split(b",") if part]
        assert numbers == list(range(sent, sent + len(numbers))), "in order, none left out"
        for number in numbers:
            for choice, position in positions[number].items():
                if choice not in ended:
                    assert position <= judged.get(choice, 0) - holdback, "a character left before its time"
                else:
                    assert position <= judged.get(choice, 0)
        sent += len(numbers)

    for number, (pieces, is_end) in enumerate(stream):
        for choice, _, text in pieces:
            came[choice] = came.get(choice, "") + text
            if text:
                ended.discard(choice)
        positions.append({choice: len(came[choice]) for choice, _, text in pieces if text})
        ends = [pieces[0][0]] if is_end and pieces else []
        hold.push(b"%d," % number, [Piece(*piece) for piece in pieces if piece[2]], ends)
        ended.update(choice for choice in ends if came.get(choice))
        look()
    hold.end()
    ended.update(came)
    look()
    assert sent == len(stream), "after the end all is out"
    assert hold.held_bytes == 0
    for (choice, channel), text in seen.items():
        assert text == "".join(t for pieces, _ in stream for c, ch, t in pieces if (c, ch) == (choice, channel))
    assert hold.sent == sum(map(len, came.values()))


@given(
    before=st.text(alphabet="ab", max_size=40),
    after=st.text(alphabet="ab", max_size=40),
    window=st.integers(2, 12),
    share=st.floats(0, 0.99),
    size=st.integers(1, 9),
    length=st.integers(1, 12),
)
@HEAVY
def test_a_passage_within_the_holdback_never_leaks_a_character(before, after, window, share, size, length):
    """A passage of up to holdback + 1 characters that a guard knows when it sees it whole: nothing of it is ever released."""
    holdback = int(window * share)
    passage = "X" * min(length, holdback + 1)
    text = before + passage + after
    hold, sent = Hold(window, holdback), ""
    blocked = False
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        hold.push(piece.encode(), [Piece(0, "content", piece)])
        blocked = any(passage in view.text for view in hold.due())
        if blocked:
            break
        hold.allow()
        sent += hold.release().decode()
    if not blocked:
        hold.end()
        blocked = any(passage in view.text for view in hold.due())
    assert blocked, "some window holds it whole"
    assert "X" not in sent
    assert len(sent) <= len(before)


def test_a_passage_longer_than_the_holdback_can_leak_its_start():
    """The control: beyond the stated hold-back there is no promise, and the test above could have failed."""
    hold, sent = Hold(4, 1), ""
    for piece in "aaaXXXXXaaa":
        hold.push(piece.encode(), [Piece(0, "content", piece)])
        if any("XXXX" in view.text for view in hold.due()):
            break
        hold.allow()
        sent += hold.release().decode()
    assert "X" in sent


def test_whole_holds_everything_until_the_end():
    hold = Hold(4, 2, whole=True)
    for piece in "abcdefgh":
        hold.push(piece.encode(), [Piece(0, "content", piece)], [0])
        assert hold.due() == [] and hold.release() == b""
    hold.end()
    assert [view.text for view in hold.due()] == ["abcdefgh"]
    hold.allow()
    assert hold.release() == b"abcdefgh"


TEXT = st.text(max_size=8) | st.sampled_from(
    ['"', "\\", "\n", "é", "🙂", '","', "a probe", "\ud83d", "\ude00", "\x00", "data: "]
)
KINDS = st.sampled_from(["content", "content", "content", "reasoning", "tool", "none", "finish", "two"])


def one_event(kind, text, ascii_only):
    delta = {
        "content": {"content": text},
        "reasoning": {"reasoning_content": text},
        "tool": {"tool_calls": [{"index": 1, "function": {"arguments": text}}]},
        "none": {},
        "finish": {},
        "two": {"content": text, "reasoning_content": text},
    }[kind]
    choice = {"index": 0, "delta": delta, "finish_reason": "stop" if kind == "finish" else None}
    data = json.dumps({"id": "x", "choices": [choice]}, ensure_ascii=ascii_only)
    return b"data: " + data.encode("utf-8", "replace") + b"\n\n"


@given(
    rows=st.lists(st.tuples(KINDS, TEXT), max_size=30),
    ascii_only=st.booleans(),
    ends=st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"]),
    places=st.lists(st.integers(0, 10**6), max_size=12),
)
@HEAVY
def test_events_are_the_same_bytes_and_the_same_text_however_they_are_cut(rows, ascii_only, ends, places):
    """The quick way through a stream against parsing every event by itself."""
    parts = [one_event(kind, text, ascii_only).removesuffix(b"\n\n") + ends for kind, text in rows] + [
        b": ping" + ends,
        DONE,
    ]
    reader = Events()
    got = [pair for data in cut(b"".join(parts), places) for pair in reader.feed(data)] + list(reader.end())
    assert b"".join(raw for raw, _ in got) == b"".join(parts)
    want, have = {}, {}
    for part in parts:
        for piece in read_chunk(part).pieces:
            want[piece[:2]] = want.get(piece[:2], "") + piece.text
    for _, chunk in got:
        for piece in chunk.pieces:
            have[piece[:2]] = have.get(piece[:2], "") + piece.text

    def joined(texts):  # halves of a character in two events are one character where events are read together
        return {key: text.encode("utf-16-le", "surrogatepass") for key, text in texts.items()}

    assert joined(have) == joined(want)
    assert sum(chunk.done for _, chunk in got) == 1
    assert sum(len(chunk.ends) for _, chunk in got) == sum(kind == "finish" for kind, _ in rows)


def test_the_quick_way_is_taken_and_does_not_hide_a_foreign_event():
    """Events of the same form are read together; one that looks alike but says more is parsed by itself."""
    alike = events("abcdefghij" * 5, 5)
    odd = event({"content": "ab", "reasoning_content": "hidden"})
    reader = Events()
    got = list(reader.feed(b"".join([*alike[:6], odd, *alike[6:]])))
    assert len(got) < len(alike)
    texts = {}
    for _, chunk in got:
        for piece in chunk.pieces:
            texts[piece.channel] = texts.get(piece.channel, "") + piece.text
    assert texts == {
        "delta.content": "abcdefghij" * 2 + "abcde" + "ab" + "fghij" + "abcdefghij" * 2,
        "delta.reasoning_content": "hidden",
    }


@pytest.mark.parametrize(
    "data",
    [
        b"data: {\n\n",
        b"data: 3\n\n",
        b"data: \xff\n\n",
        b'data: {"choices": 3}\n\n',
        b'data: {"choices": [3]}\n\n',
        b'data: {"choices": [{"index": "0", "delta": {}}]}\n\n',
        b"data: " + b"[" * 100000 + b"\n\n",
    ],
)
def test_an_event_nobody_can_read_is_an_error(data):
    with pytest.raises(Malformed):
        list(Events().feed(data))


def test_events_have_a_limit():
    with pytest.raises(Malformed, match="longer than 100 bytes"):
        list(Events(100).feed(b"data: " + b"x" * 200))
    with pytest.raises(Malformed, match="longer than 400 bytes"):
        list(Events(400).feed(b"".join(events("ab", 1)[:2]) + event({"content": "x" * 500})))


def test_data_lines_as_the_standard_reads_them():
    assert data_of(b"data: a\ndata: b\ndatax: c\n\n") == b"a\nb"
    assert data_of(b"\r\ndata:a\r\n\r\n") == b"a"
    assert read_chunk(b"event: ping\n\n").pieces == []


def test_every_string_the_model_may_have_written_is_found():
    delta = {
        "role": "assistant",
        "audio": {"id": "short", "transcript": "t"},
        "id": "x" * 100,
        "new": [{"deep": ["u"]}],
    }
    chunk = read_chunk(event(delta, logprobs_outside="no"))
    assert {(piece.channel, piece.text) for piece in chunk.pieces} == {
        ("delta.audio.transcript", "t"),
        ("delta.id", "x" * 100),
        ("delta.new.0.deep.0", "u"),
    }
    deep = current = {}
    for _ in range(3000):
        current["a"] = {}
        current = current["a"]
    current["text"] = "down here"
    assert [text for _, text in strings(deep)] == ["down here"]
