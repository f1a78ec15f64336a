"""The live page: right numbers, whole without scripts, moving with them, and nobody's text on it unless the policy says so."""

import asyncio
import re

import pytest

from davylamp.serve.config import read_policy
from davylamp.serve.metrics import Board, Metrics, prometheus
from davylamp.serve.page import page
from tests.serve import upstream as up
from tests.serve.browser import CHROMIUM, browse
from tests.serve.running import Running

POLICY = """[[guard]]
use = "JUDGES:word"
[[guard]]
use = "JUDGES:mix"
on = "input"
[[guard]]
use = "JUDGES:broken"
on = "input"
on_failure = "allow"
"""
EVIL = '<script>document.title = "evil"</script><img src=x onerror="document.title=1">'

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture
def pair(tmp_path):
    with up.Upstream() as behind, Running(behind.url, POLICY, tmp_path) as gateway:
        yield behind, gateway


def numbers(html):
    """The tiles by name."""
    return {name: int(number.replace(",", "")) for name, number in re.findall(r'id="n-([\w-]+)">([\d,]+)<', html)}


def test_the_numbers_stand_on_the_page_and_add_up(pair):
    behind, gateway = pair
    for text in ("a", "b", "forbidden"):
        gateway.chat(text)
    gateway.ask("POST", "/v1/chat/completions", b"{")
    behind.answer = up.say("forbidden")
    gateway.chat("c")
    gateway.counts("requests")
    status, headers, body = gateway.ask("GET", "/")
    html = body.decode()
    tiles = numbers(html)
    assert status == 200 and tiles["requests"] == 5
    assert tiles["allowed"] == 2 and tiles["blocked"] == 2 and tiles["rejected"] == 1 and tiles["in-flight"] == 0
    assert "raised 4" in html and "<td>word</td><td>output</td>" in html
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and headers["X-Frame-Options"] == "DENY"
    assert 'http-equiv="refresh"' in html and not re.search(r"\b(src|href)=", html), "nothing from elsewhere"


def test_texts_stand_there_only_if_asked_and_stay_text(pair, tmp_path):
    behind, gateway = pair
    gateway.chat("my secret " + EVIL)
    assert b"secret" not in gateway.ask("GET", "/")[2]
    folder = tmp_path / "texts"
    folder.mkdir()
    with Running(behind.url, POLICY + "[page]\ntexts = true\n", folder) as shows:
        shows.chat("my secret " + EVIL)
        html = shows.ask("GET", "/")[2].decode()
        assert "my secret &lt;script&gt;" in html and "<img" not in html
    with Running(behind.url, POLICY + "[page]\nenabled = false\n", folder) as hides:
        assert hides.ask("GET", "/")[0] == 404


def test_weights_over_time_are_drawn_from_what_guards_expose():
    policy = read_policy(upstream="http://h/v1", guards=["mix"])
    metrics = Metrics()
    for weight in (0.5, 0.7, 0.9):
        metrics.weigh("mix", {"strict": weight, "lax": 1 - weight, EVIL: float("nan")})
    html = page(Board(None, 0).all(metrics), policy)[0].decode()
    lines = re.findall(r'<polyline class="c\d" points="([^"]+)"', html)
    assert len(lines) == 2 and "strict 0.900" in html and "lax 0.100" in html and "<script>document" not in html
    heights = [float(point.split(",")[1]) for point in lines[0].split()]
    assert heights == [100.0, 60.0, 20.0, 20.0]


def test_counts_survive_the_way_through_another_workers_file(tmp_path):
    metrics, board = Metrics(), Board(tmp_path, 1)
    metrics.count("requests", "chat", "allowed")
    metrics.count("rejected", 'odd"\n\\code')
    metrics.took("", 0.2)
    metrics.weigh("mix", {"a": 1.0})
    board.write(metrics)
    (tmp_path / "7.json").write_text("{torn")
    again = Metrics()
    again.load(board.read(1))
    assert {**again.plain(), "started": 0} == {**metrics.plain(), "started": 0}
    text = prometheus(Board(tmp_path, 0).all(Metrics()))
    assert 'davylamp_requests_total{endpoint="chat",outcome="allowed",worker="1"} 1' in text
    assert 'code="odd\\"\\n\\\\code"' in text


def test_what_was_not_simply_allowed_stands_by_itself_however_long_ago(pair):
    _, gateway = pair
    gateway.chat("forbidden once")
    for _ in range(12):
        gateway.chat("a")
    html = gateway.ask("GET", "/")[2].decode()
    notable, latest = (re.search(rf'<table id="{id}">(.*?)</table>', html, re.S)[1] for id in ("notable", "latest"))
    assert notable.count(">blocked<") == 1 and ">blocked<" not in latest
    assert "raised RuntimeError" in notable, "let pass, but without a verdict"


def test_bars_hold_what_ended_in_their_time_and_every_request_once(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("davylamp.serve.metrics.time.time", lambda: clock[0])
    policy = read_policy(upstream="http://h/v1", guards=["mix"])
    one, board = Metrics(), Board(tmp_path, 0)
    two = Metrics()
    for at, outcomes in ((1000, ["allowed"] * 3), (1004, ["blocked"]), (1017, ["rejected", "allowed"])):
        clock[0] = at
        for outcome in outcomes:
            one.count("requests", "chat", outcome)
        one.beat()
        one.beat()
    two.count("requests", "chat", "allowed")
    two.beat()
    Board(tmp_path, 1).write(two)
    assert [list(beat) for beat in one.beats] == [[100, 3, 1, 0], [101, 1, 0, 1]]
    again = Metrics()
    again.load(one.plain())
    again.count("requests", "chat", "allowed")
    again.beat()
    assert [list(beat) for beat in again.beats] == [[100, 3, 1, 0], [101, 2, 0, 1]], (
        "what was counted before is not new"
    )
    html = page(board.all(one), policy, now=1017.0)[0].decode()
    bars = re.findall(r'<rect class="(\w+)" x="(\d+)" y="([\d.]+)" width="8" height="([\d.]+)"', html)
    assert bars == [
        ("blocked", "581", "75.00", "25.00"),
        ("allowed", "581", "0.00", "75.00"),
        ("other", "591", "75.00", "25.00"),
        ("allowed", "591", "25.00", "50.00"),
    ]


@pytest.mark.browser
@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scripts", [False, True])
def test_in_a_browser_the_numbers_stand_and_move_with_scripts_off_and_on(pair, scripts):
    _, gateway = pair
    gateway.chat("a")
    gateway.chat("forbidden")
    gateway.counts("requests")

    async def look():
        async with browse(f"http://127.0.0.1:{gateway.port}/", scripts=scripts) as view:
            html = await view.until(lambda html: numbers(html).get("requests") == 2)
            assert numbers(html)["blocked"] == 1
            await asyncio.to_thread(gateway.chat, "b")  # by a reload where scripts are off, in place where they are on
            html = await view.until(lambda html: numbers(html).get("requests") == 3)
            assert numbers(html)["allowed"] == 2 and "stale" not in html.split("<header")[0].rpartition("<body")[2]

    asyncio.run(look())


@pytest.mark.browser
@pytest.mark.slow
@needs_chromium
def test_in_a_browser_hostile_names_stay_text(pair, tmp_path):
    _, gateway = pair
    gateway.gateway.guards.by_name["mix"].judge.function.weights = {EVIL: 0.4, "lax": 0.6}  # noted every second

    async def look():
        async with browse(f"http://127.0.0.1:{gateway.port}/") as view:
            html = await view.until(lambda html: "lax 0.600" in html)
            await asyncio.sleep(3)  # the script has swapped the numbers in by then
            html = await view.html()
            assert "<title>davylamp gateway</title>" in html and "&lt;img src=x" in html and "<img" not in html

    asyncio.run(look())
