"""The page in a real browser: nothing runs, nothing is fetched, nothing sticks out, on a screen, on a phone, in the dark and on paper."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest

from davylamp.core.compare import compare
from davylamp.core.nouns import Case, Estimate, Message, Metric, Verdict
from davylamp.core.policy import decide, parse_rule
from davylamp.core.record import load
from davylamp.core.stats import rate
from davylamp.report.html import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium on this machine: install chromium to run the browser tests"
    ),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
#: Loads the pages in frames, measures them closed and with everything opened, and writes what it finds into itself.
MEASURE = """<!doctype html><meta charset="utf-8"><body style="margin:0">%s<pre id="found"></pre><script>
function out(d) {  // what sticks out of the page, and what does not fit into its own box
  const wide = d.documentElement.clientWidth, found = [];
  if (d.documentElement.scrollWidth > wide) found.push('page ' + d.documentElement.scrollWidth);
  for (const e of d.body.querySelectorAll('*')) {
    if (e.namespaceURI !== 'http://www.w3.org/1999/xhtml' || !e.checkVisibility({checkVisibilityCSS: true})) continue;
    if (getComputedStyle(e).position === 'absolute' && e.getBoundingClientRect().width <= 1) continue;
    const name = e.tagName + '.' + e.className + ' ' + e.textContent.trim().slice(0, 40);
    if (e.getBoundingClientRect().right > wide + 1 && !e.closest('.wide')) found.push('beyond ' + name);
    const full = e.clientWidth > 1 && e.scrollWidth > e.clientWidth + 2 && !e.closest('.map');
    if (full && /^(TD|TH|DT|DD|P|LI|H1|H2|H3|H4|PRE|SUMMARY)$/.test(e.tagName)) found.push('overfull ' + name);
  }
  return found.slice(0, 8);
}
onload = () => {
  const all = {};
  for (const frame of document.querySelectorAll('iframe')) {
    const d = frame.contentDocument, style = (e, name) => e ? getComputedStyle(e)[name] : '';
    const excerpt = d.querySelector('.sensitive .excerpt');
    const one = {ran: typeof frame.contentWindow.pwned, title: d.title, closed: out(d), blur: style(excerpt, 'filter'),
      paper: style(d.documentElement, 'backgroundColor'), ink: style(d.documentElement, 'color'),
      nav: style(d.querySelector('nav'), 'display')};
    for (const e of d.querySelectorAll('details')) e.open = true;
    Object.assign(one, {opened: out(d), shown: style(excerpt, 'visibility'), height: d.documentElement.scrollHeight,
      grid: style(d.querySelector('.numbers tbody tr'), 'display')});
    all[frame.id] = one;
  }
  document.getElementById('found').textContent = JSON.stringify(all);
};
</script>"""
BOOM = "window.pwned=1;document.title='pwned';document.body.innerHTML='<p id=pwned>pwned</p>'"
HOSTILE = f"""<script>{BOOM}</script><img src=x onerror="{BOOM}"><svg onload="{BOOM}"></svg>
</pre></bdi></td></table></details></section></main></style><script>{BOOM}</script>
<iframe srcdoc="<script>parent.pwned=1</script>"></iframe><a href="javascript:{BOOM}">x</a><style>*{{display:none!important}}</style>
<meta http-equiv="refresh" content="0;url=data:text/html,pwned">
<base href="http://127.0.0.1:9/"><link rel=stylesheet href=http://127.0.0.1:9/x.css><form action=http://127.0.0.1:9/>
<button autofocus onfocus="{BOOM}">x</button></form>{{{{7*7}}}} \u202etfel\u2066 \x00 \ud800 """


def chromium(tmp_path, *arguments):
    """One run of the browser with a fresh profile; what it prints."""
    profile = tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    profile.mkdir()
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments], capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.decode("utf-8", "replace")


@pytest.fixture
def site(tmp_path):
    """A folder behind a loopback address, and the paths that were asked of it."""
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(args[0].split()[1] if args and isinstance(args[0], str) else str(args))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def everything(make_run, make_record):
    """Folders and options of a page with every part, long names and hostile rows."""

    def make():
        def rows(bad):
            reply = Message(
                "assistant", HOSTILE + "longword" * 300, reasoning=HOSTILE, calls=({"function": {"name": HOSTILE}},)
            )
            out = []
            for i in range(60):
                asked = (Message("user", f"question {i} {HOSTILE}"),)
                case = Case(f"r{i}", asked, category=f"area_with_a_long_name/part_{i % 9}", meta={"arm": "none"})
                value = None if i % 20 == 7 else float(i < bad)
                out.append((case, (reply,), Verdict(value, label="complied", why=HOSTILE)))
            return [*out[:-1], (out[-1][0], None, None)]  # the last one failed

        judge = {"name": "plain", "version": 2, "measures": "unsafe", "options": {}}
        counts = {"true_hits": 90, "positives": 100, "true_passes": 80, "negatives": 100}
        make_record("judge", "plain", {"judge": judge, "rows": {"name": "gold"}}, about={"confusion": counts})
        metrics = (
            Metric("unsafe_rate", by=("category", "meta.arm")),
            Metric("effect_with_a_long_name", by=(), higher_is_better=True),
        )
        names = ("openai/a-model-with-a-rather-long-name-2026-01-01", "organism/aligned", "x" * 60)
        folders = [
            make_run(rows(bad), target=name, metrics=metrics, notes=["A note. " * 20])
            for name, bad in zip(names, (30, 3, 0), strict=True)
        ]
        x, eight, rest = [1, 10, 100, 1000], list(range(8)), {"x_log": True, "y_unit": "rate"}
        series = [
            {"name": f"method {i}", "x": x, "y": [0.1 * i, 0.2, 0.4, 0.5]}
            | {"low": [0.05 * i, 0.1, 0.3, 0.4], "high": [0.15 * i, 0.3, 0.5, 0.6]}
            for i in range(7)
        ]
        points = [{"x": i, "y": i % 3, "label": f"a method with a long name {i}", "marked": i > 7} for i in range(9)]
        names, columns = [f"a rather long row name {i}" for i in range(12)], [f"h{i}" for i in range(48)]
        large, cells = [[i - j for i in range(48)] for j in range(12)], ["m", rate(5, 90, 2).json(), "word " * 30]
        figures = [
            {"kind": "heatmap", "title": "Small", "rows": ["layer", "b"], "columns": list(map(str, eight)), "values": [eight, [None] * 8]},
            {"kind": "heatmap", "title": "Large", "rows": names, "columns": columns, "values": large},
            {"kind": "curves", "title": "Curves", "x_label": "steps", "y_label": "rate", "series": series, **rest},
            {"kind": "scatter", "title": "Scatter", "x_label": "x", "y_label": "y", "points": points},
            {"kind": "table", "title": "T", "columns": ["method", "rate", "words"], "rows": [cells] * 3},
        ]  # fmt: skip
        arms = "a rather long name of an arm - another long name of an arm"
        claims = (
            {"text": f"unsafe_rate: {arms} >= 0.3", "held": True, "value": 0.5, "low": 0.41, "high": 0.6, "n": 200},
            {
                "text": "unsafe_rate: random <= 0.05",
                "held": False,
                "control": True,
                "value": 0.06,
                "low": -0.01,
                "high": 0.1,
                "n": 9,
            },
        )
        estimates = (Estimate(12.5, 11.25, 13.75, 20, name="time", unit="seconds"),)
        study = make_record(
            "study",
            "s",
            {"hash": "ab" * 32},
            claims=claims,
            estimates=estimates,
            about={"figures": figures},
            command=["study", "x" * 300],
        )
        decisions = [
            d for folder in folders for d in decide(parse_rule("unsafe_rate.high > 0.3"), load(folder).estimates)
        ]
        comparisons = [compare(folders[0], other) for other in folders[1:]]
        return [*folders, study], {
            "decisions": decisions,
            "comparisons": comparisons,
            "skipped": [("capability", "no rows " * 30)],
        }

    return make


def measure(tmp_path, url, folder, frames, *flags):
    """{id: what was measured} of frames (id, page, width)."""
    boxes = "".join(
        f'<iframe id="{name}" src="{page}" style="border:0;width:{width}px;height:900px"></iframe>'
        for name, page, width in frames
    )
    (folder / "measure.html").write_text(MEASURE % boxes)
    dom = chromium(tmp_path, *flags, "--window-size=1400,900", "--dump-dom", f"{url}/measure.html")
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found and found[1], dom[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.slow
def test_nothing_sticks_out_runs_or_is_fetched(everything, site, tmp_path):
    folder, url, asked = site
    folders, options = everything()
    write_report(
        folder / "page.html",
        folders,
        title="A title that is rather long and names openai/a-model-with-a-rather-long-name",
        **options,
    )
    text = (folder / "page.html").read_text(encoding="utf-8")
    paper = text.replace("@media print", "@media all").replace("@media screen", "@media not all")
    (folder / "paper.html").write_text(paper, encoding="utf-8")
    frames = [
        ("wide", "page.html", 1280),
        ("tablet", "page.html", 820),
        ("phone", "page.html", 390),
        ("paper", "paper.html", 695),
    ]
    found = measure(tmp_path, url, folder, frames)
    for name, one in found.items():
        assert one["closed"] == [] and one["opened"] == [], name
        assert one["ran"] == "undefined" and one["title"].startswith("A title that is"), name
        assert one["height"] > 3000
    assert (
        found["wide"]["blur"] == found["phone"]["blur"] == "blur(5px)" and found["wide"]["shown"] == "hidden"
    )  # once opened the whole text stands below
    assert [found[name]["grid"] for name in ("wide", "tablet", "phone", "paper")] == [
        "table-row",
        "flex",
        "flex",
        "table-row",
    ]
    assert found["paper"]["nav"] == "none" and found["wide"]["nav"] == "block"
    pages = {
        path.partition("?")[0] for path in asked if path.startswith("/")
    }  # the server notes its 404 for the icon here too
    assert pages <= {"/measure.html", "/page.html", "/paper.html", "/favicon.ico"}


@pytest.mark.slow
def test_dark_where_the_reader_s_system_is_dark(make_run, site, tmp_path):
    folder, url, _ = site
    write_report(folder / "page.html", [make_run([("a", 1.0, "x")] * 5)], title="t")
    frames = [("page", "page.html", 1280)]
    dark = measure(tmp_path, url, folder, frames, "--blink-settings=preferredColorScheme=0")["page"]
    assert (dark["paper"], dark["ink"]) == ("rgb(17, 21, 26)", "rgb(229, 233, 238)")
    light = measure(tmp_path, url, folder, frames, "--blink-settings=preferredColorScheme=1")["page"]
    assert (light["paper"], light["ink"]) == ("rgb(255, 255, 255)", "rgb(27, 32, 39)")


def test_hostile_rows_opened_from_disk(everything, tmp_path):
    """From file://, as a reader opens it: the tree holds what the template wrote, and the marker scripts did not run."""
    folders, options = everything()
    path = tmp_path / "page.html"
    write_report(path, folders, title="Calm", **options)
    dom = chromium(tmp_path, "--dump-dom", path.as_uri())
    assert "<title>Calm</title>" in dom and 'id="pwned"' not in dom
    tags = set(re.findall(r"<([a-z][\w-]*)", dom))
    assert not tags & {"script", "iframe", "img", "form", "button", "base", "link", "object", "embed", "foreignobject"}
    assert not re.findall(r"<[a-z][^>]*\son\w+=", re.sub(r'="[^"]*"', '=""', dom))
    assert dom.count("<style>") == 1 and "{{7*7}}" in dom and "⟨U+202E⟩tfel⟨U+2066⟩ ⟨U+0000⟩ ⟨U+D800⟩" in dom


@pytest.mark.slow
def test_it_prints(everything, tmp_path):
    folders, options = everything()
    path, pdf = tmp_path / "page.html", tmp_path / "page.pdf"
    write_report(path, folders, title="On paper", **options)
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", path.as_uri())
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF") and data.rstrip().endswith(b"%%EOF")
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 40
