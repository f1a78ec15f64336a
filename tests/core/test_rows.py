import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from davylamp.core.errors import InputError, RunError
from davylamp.core.nouns import Case, Message, Verdict
from davylamp.core.rows import CaseFile, RowLog, canonical, case_from, message_from, read_run, write_cases

ROW = {"id": "1", "messages": [{"role": "user", "content": "hi"}]}


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a row must be an object"),
        ({**ROW, "id": ""}, "line 2: id must be"),
        ({**ROW, "id": True}, "line 2: id must be"),
        ({**ROW, "messages": []}, "line 2: messages must be a non-empty list"),
        ({**ROW, "messages": [{"role": "boss", "content": "x"}]}, "role must be one of"),
        ({**ROW, "messages": [{"role": "user", "content": 3}]}, "content must be text"),
        ({**ROW, "messages": [{"role": "user", "content": "x", "colour": 1}]}, "no key of a message"),
        ({**ROW, "id": "2", "categroy": "x"}, "Did you mean 'category'"),
        ({**ROW, "id": "2", "category": 5}, "category must be text"),
        ({**ROW, "id": "2", "meta": []}, None),
        ({**ROW, "id": "2", "meta": [1]}, "meta must be an object"),
        (ROW, "id '1' stands already on line 1"),
    ],
)
def test_bad_rows_name_their_line(tmp_path, row, said):
    path = write(tmp_path / "rows.jsonl", ROW, row)
    if said is None:
        assert len(list(CaseFile(path))) == 2
        return
    with pytest.raises(InputError, match=r"rows\.jsonl line 2") as error:
        list(CaseFile(path))
    assert said in str(error.value)


def test_not_utf8_and_empty_and_absent(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        list(CaseFile(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        list(CaseFile(tmp_path / "b.jsonl"))
    with pytest.raises(InputError, match="no file"):
        CaseFile(tmp_path / "c.jsonl")


TEXT = st.text(max_size=30)
MESSAGES = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant"]),
    TEXT,
    reasoning=st.none() | TEXT,
    media=st.lists(TEXT, max_size=2).map(tuple),
)
CASES = st.builds(
    Case,
    TEXT.filter(bool),
    st.lists(MESSAGES, min_size=1, max_size=3).map(tuple),
    category=st.none() | TEXT,
    answer=st.none() | TEXT | st.integers(),
    group=st.none() | TEXT,
    meta=st.dictionaries(TEXT, TEXT | st.integers() | st.booleans(), max_size=3),
)


@given(CASES)
def test_cases_survive_json(case):
    assert case_from(json.loads(canonical(case.json())), "here") == case


@given(st.floats(0, 1) | st.none(), TEXT)
def test_verdicts_survive_json(value, why):
    from davylamp.core.rows import verdict_from

    assert verdict_from(json.loads(canonical(Verdict(value, why=why).json()))) == Verdict(value, why=why)


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.01, float("inf")])
def test_a_verdict_outside_its_range_is_refused(value):
    with pytest.raises(InputError):
        Verdict(value)


def test_openai_parts_and_names():
    message = message_from(
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]},
        "x",
    )
    assert (message.text, message.media) == ("a", ("u",))
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert message_from({"role": "assistant", "content": None, "tool_calls": calls}, "x").calls == tuple(calls)


def test_write_cases_whole_or_not(tmp_path):
    def broken():
        yield Case("1", (Message("user", "x"),))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_cases(tmp_path / "out.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


def line(key, value, reply=True):
    verdict = None if value is None else {"value": value}
    return json.dumps(
        {
            "key": key,
            "case": ROW,
            "reply": [{"role": "assistant", "content": "ok"}] if reply else None,
            "verdict": verdict,
        },
        separators=(",", ":"),
    )


KEYS = ["0" * 31 + str(i) for i in range(4)]


def test_last_line_of_a_key_counts(tmp_path):
    log = RowLog(tmp_path / "rows.jsonl")
    for key, value, reply in (
        (KEYS[0], None, False),
        (KEYS[1], 1.0, True),
        (KEYS[0], 0.0, True),
        (KEYS[2], None, True),
    ):
        log.append(line(key, value, reply))
    log.close()
    log = RowLog(tmp_path / "rows.jsonl")
    assert log.state == {KEYS[0]: "done", KEYS[1]: "done", KEYS[2]: "unjudged"}
    assert log.reply(KEYS[2])[0].text == "ok" and log.reply(KEYS[1]) is None
    log.close()
    assert [row["verdict"] for row in read_run(tmp_path / "rows.jsonl")] == [{"value": 1.0}, {"value": 0.0}, None]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    whole = line(KEYS[0], 1.0) + "\n"
    path.write_text(whole + line(KEYS[1], 1.0)[:cut])
    log = RowLog(path)
    assert log.state == {KEYS[0]: "done"} and path.read_text() == whole
    log.append(line(KEYS[2], 0.0))
    log.close()
    assert len(list(read_run(path))) == 2


def test_two_writers_are_refused(tmp_path):
    log = RowLog(tmp_path / "rows.jsonl")
    with pytest.raises(RunError, match="another run is writing"):
        RowLog(tmp_path / "rows.jsonl")
    log.close()
    RowLog(tmp_path / "rows.jsonl").close()


def test_a_foreign_file_is_not_touched(tmp_path):
    (tmp_path / "rows.jsonl").write_text("hello\n")
    with pytest.raises(InputError, match="line 1"):
        RowLog(tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "hello\n"


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    log = RowLog(tmp_path / "rows.jsonl")
    log.append(line(KEYS[0], 1.0))
    write_ = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write_(fd, data[:7]))  # room for seven more bytes
    with pytest.raises(RunError, match="No space left"):
        log.append(line(KEYS[1], 1.0))
    monkeypatch.undo()
    assert (tmp_path / "rows.jsonl").read_text() == line(KEYS[0], 1.0) + "\n"
    log.append(line(KEYS[1], 1.0))
    log.close()
    assert len(list(read_run(tmp_path / "rows.jsonl"))) == 2
