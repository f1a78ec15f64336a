"""The label page: labels are saved at once and for good, the tool shows what lowers the score, strangers are refused."""

import asyncio
import contextlib
import html
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request

import pytest
from aiohttp import web

from davylamp.core.errors import InputError
from davylamp.data.fragile_stories import same_role
from davylamp.label_page import LabelPage, labels_of
from davylamp.models.classifier import tiny
from tests.serve.browser import CHROMIUM, browse

TEXT = "the vase broke <b> ."


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "messages": [{"role": "user", "content": f"prompt {i}"}, {"role": "assistant", "content": TEXT}],
                }
            )
            + "\n"
            for i in range(3)
        )
    )
    return path


@contextlib.contextmanager
def served(page):
    """The page's address, from a server in a thread."""
    ready, loop, state = threading.Event(), asyncio.new_event_loop(), {}

    async def go():
        runner = web.AppRunner(page.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        state["port"], state["end"] = runner.addresses[0][1], asyncio.Event()
        ready.set()
        await state["end"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(go()))
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{state['port']}"
    finally:
        loop.call_soon_threadsafe(state["end"].set)
        thread.join()
        loop.close()
        page.close()


def ask(url, headers=None, **form):
    data = urllib.parse.urlencode(form).encode() if form else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def fields(page):
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))


def test_labels_are_on_disk_when_the_next_row_is_shown_and_are_not_asked_again(rows, tmp_path):
    out = tmp_path / "labels.jsonl"
    out.write_text('{"torn')
    page = LabelPage(rows, out, rater="ann")
    with served(page) as url:
        for number, label in enumerate(("unsafe", "unsure")):
            status, shown = ask(url + "/")
            assert status == 200 and f"prompt {number}" in shown and f"Row {number + 1} of 3" in shown
            assert "&lt;b&gt;" in shown and "broke <b>" not in shown
            form = {name: html.unescape(value) for name, value in fields(shown).items()}
            assert ask(url + "/label", **form, label=label)[0] == 200
            assert labels_of(out)[-1]["label"] == label and len(labels_of(out)) == number + 1
    saved = labels_of(out)
    assert out.read_text().startswith('{"torn\n') and [row["row"] for row in saved] == ["0", "1"]
    assert all(row["began"] <= row["ended"] and row["source"] == "base" and row["text"] == TEXT for row in saved)
    again = LabelPage(rows, out, rater="ann")
    with served(again) as url:
        shown = ask(url + "/")[1]
        assert "prompt 2" in shown and "Row 3 of 3" in shown
        ask(url + "/label", **{k: html.unescape(v) for k, v in fields(shown).items()}, label="safe")
        assert 'id="done"' in ask(url + "/")[1]
    other = LabelPage(rows, out, rater="ben")
    assert other.done == set()
    other.close()


def test_strangers_and_broken_forms_are_refused(rows, tmp_path):
    out = tmp_path / "labels.jsonl"
    page = LabelPage(rows, out, rater="ann")
    with served(page) as url:
        form = {k: html.unescape(v) for k, v in fields(ask(url + "/")[1]).items()}
        assert ask(url + "/", headers={"Host": "evil.example:80"})[0] == 403
        assert ask(url + "/label", **{**form, "token": "x"}, label="safe")[0] == 403
        for bad in ({"label": "fine"}, {"label": "safe", "id": "9"}, {"label": "safe", "text": " "}, {"label": "safe", "began": "1e99"},
                    {"label": "safe", "began": "nan"}):  # fmt: skip
            assert ask(url + "/label", **{**form, **bad})[0] == 400, bad
    assert labels_of(out) == []


@pytest.fixture
def guarded(rows, tmp_path):
    folder = tmp_path / "classifier"
    model, tokenizer = tiny(width=32)
    model.config.high_stakes = {"threshold": 0.5}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spec = f"high_stakes:model={folder}"
    return LabelPage(
        rows, tmp_path / "labels.jsonl", rater="ann", guard=spec, propose=lambda words, i: same_role(words[i])
    )


def test_the_tool_shows_scores_words_and_swaps_in_their_order(guarded):
    with served(guarded) as url:
        shown = ask(url + "/")[1]
        assert (
            re.search(r"Score <b>0\.\d+</b>", shown)
            and shown.count('class="word') == 5
            and "Words by gradient" in shown
        )
        form = {k: html.unescape(v) for k, v in fields(shown).items()}
        shown = ask(url + "/", **form, word="1")[1]
        scores = [float(x) for x in re.findall(r'<td class="n">(0\.\d+)</td>', shown)]
        assert len(scores) == 11 and scores == sorted(scores) and "instead of vase" in shown
        new = html.unescape(re.search(r'name="text" value="([^"]+)">', shown.split('id="swaps"')[1])[1])
        shown = ask(url + "/", **{**form, "text": new})[1]
        assert "(changed by you)" in shown and f"Score <b>{scores[0]:.3f}</b>" in shown
        ask(url + "/label", **{**form, "text": new}, label="unsafe")
        (row,) = labels_of(guarded.out)
        assert (
            row["source"] == "tool-rewrite"
            and row["parent"] == "0"
            and 0 <= row["value"] <= 1
            and row["guard"]["threshold"] == 0.5
        )
        assert "prompt 0" in ask(url + "/")[1], "the row itself is still to be labelled"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser_without_scripts(guarded):
    async def look(url):
        async with browse(url + "/", scripts=False) as view:
            return await view.until(lambda html: 'id="score"' in html)

    with served(guarded) as url:
        dom = asyncio.run(look(url))
    assert all(f'accesskey="{key}"' in dom for key in "123") and 'id="score"' in dom and "<script" not in dom
    assert not re.search(r'\b(src|href)="', dom), "nothing from elsewhere"


def test_what_cannot_be_used(rows, tmp_path):
    for bad in ({"rater": ""}, {"rater": "a", "out": tmp_path}, {"rater": "a", "out": tmp_path / "no" / "where"}):
        with pytest.raises(InputError):
            LabelPage(rows, bad.get("out", tmp_path / "l.jsonl"), rater=bad["rater"])
    rows.write_text('{"id": "1", "messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(InputError, match="row 1 needs"):
        LabelPage(rows, tmp_path / "l.jsonl", rater="a")
