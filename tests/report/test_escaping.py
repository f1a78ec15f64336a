"""Whatever a model, a judge, a name or a file says reaches the page as text: no element, attribute or style comes of it."""

import re

import pytest

from davylamp.core.compare import compare
from davylamp.core.nouns import Case, Estimate, Message, Metric, Verdict
from davylamp.core.policy import decide, parse_rule
from davylamp.core.record import load

#: All that the template writes. Anything else on the page came from the outside.
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "a",
    "header",
    "p",
    "svg",
    "path",
    "span",
    "h1",
    "h2",
    "h3",
    "h4",
    "dl",
    "div",
    "dt",
    "dd",
    "bdi",
    "nav",
    "ul",
    "li",
    "main",
    "section",
    "article",
    "b",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "code",
    "pre",
    "details",
    "summary",
    "figure",
    "figcaption",
    "ol",
    "footer",
    "line",
    "rect",
    "circle",
    "text",
    "i",
}
ATTRS = {
    "class",
    "id",
    "href",
    "lang",
    "charset",
    "content",
    "http-equiv",
    "name",
    "role",
    "scope",
    "colspan",
    "tabindex",
    "dir",
    "start",
    "style",
    "title",
    "viewbox",
    "width",
    "height",
    "x",
    "y",
    "x1",
    "x2",
    "y1",
    "y2",
    "d",
    "cx",
    "cy",
    "r",
    "text-anchor",
    "overflow",
    "preserveaspectratio",
    "focusable",
    "data-is",
    "open",
}
ATTACKS = {
    "script": "<script>document.title='pwned'</script>",
    "handler": "<img src=x onerror=\"document.title='pwned'\">",
    "quotes": "\" onmouseover=\"alert(1)\" x='' autofocus onfocus='alert(2)",
    "close": "</pre></details></section></main></style></title></svg><h1 id=pwned>pwned</h1>",
    "svg": "<svg onload=alert(1)><foreignObject><iframe src=javascript:alert(1)></iframe></foreignObject></svg>",
    "comment": "<!-- --><!--><![CDATA[<b>]]>",
    "template": "{{7*7}}{% for x in ().__class__.__base__.__subclasses__() %}{{x}}{% endfor %}{# hidden #}",
    "entity": "&lt;b&gt; &#60;script&#62; &amp;",
    "base": '<base href="http://evil.example/"><meta http-equiv=refresh content="0;url=http://evil.example/">',
    "css": "}</style><style>body{display:none}</style>expression(alert(1)) url(http://evil.example/x)",
}


def checked(page):
    """No element, attribute, link or style that the template does not write."""
    for element in page.all():
        if element.tag == "#root":
            continue
        assert element.tag in TAGS, element.tag
        for name, value in element.attrs.items():
            assert name in ATTRS or name.startswith("aria-"), (element.tag, name, value)
            assert not name.startswith("on")
            if name == "href":
                assert re.fullmatch(r"#[a-z]+", value)
            if name == "style":
                assert re.fullmatch(r"(--(l|li|d|di):#[0-9a-f]{6};?){4}|width:[\d.]+rem", value), value
            if name in ("class", "id"):
                assert re.fullmatch(r"[\w -]*", value), value
    assert not page.comments and page.declarations == ["doctype html"]
    assert page.source.count("<style") == page.source.count("</style") == 1
    return page


def hostile(place, kind="script"):
    return f"«{place}» {ATTACKS[kind]}"


@pytest.fixture
def everywhere(make_run, make_record):
    """A run with an attack in every text that a target, judge, suite or user can choose."""

    def make(kind):
        def bad(place):
            return hostile(place, kind)

        meta = {"arm": bad("arm"), "other": 1}
        asked = Case(bad("id"), (Message("system", bad("system")), Message("user", bad("prompt"))), category=bad("category"),
                     answer=bad("answer"), group=bad("group"), meta=meta)  # fmt: skip
        call = {"id": bad("call id"), "function": {"name": bad("call name"), "arguments": bad("arguments")}}
        reply = Message("assistant", bad("reply"), reasoning=bad("reasoning"), media=(bad("media"), "data:image/png;base64," + "A" * 99),
                        calls=(call,), finish=bad("finish"))  # fmt: skip
        verdict = Verdict(1.0, label=bad("label"), categories=(bad("hazard"),), why=bad("why"))
        other = Case("2", (Message("user", "x"),), category="plain", meta={"arm": "b"})
        rows = [
            (asked, (Message("tool", bad("tool")), reply), verdict),
            (other, (reply,), Verdict(None, why=bad("no why"))),
            (other, None, None),
        ]
        metrics = (Metric("unsafe_rate", by=("category", "meta.arm", "meta.other")),)
        options = {"metrics": metrics, "judge": "judge", "notes": [bad("note")]}
        figures = [
            {"kind": "heatmap", "title": bad("map"), "rows": [bad("map row")], "columns": [bad("map column"), "b"], "values": [[1, None]],
             "note": bad("map note")},
            {"kind": "curves", "title": bad("curves"), "x_label": bad("x"), "y_label": bad("y"), "x_unit": bad("unit"),
             "series": [{"name": bad("series"), "x": [1, 2], "y": [1, 2]}, {"name": "b", "x": [1], "y": [1]}]},
            {"kind": "scatter", "title": "s", "x_label": bad("across"), "y_label": "y",
             "points": [{"x": 1, "y": 1, "label": bad("point")[:38], "marked": True}]},
            {"kind": "table", "title": bad("table"), "columns": [bad("head")], "rows": [[bad("cell")]]},
        ]  # fmt: skip
        about = {
            "version": bad("version"),
            "more": {bad("key"): bad("value")},
            "command": ["eval", bad("command")],
            "figures": figures,
        }
        first = make_run(rows, target=bad("target"), suite=bad("suite"), about=about, **options)
        second = make_run(rows, target=bad("second"), suite=bad("suite"), **options)
        claim = {
            "text": f"{bad('quantity')}: {bad('claim arm')} >= 0.5",
            "held": True,
            "value": 1.0,
            "low": 1.0,
            "high": 1.0,
            "n": 3,
        }
        estimate = Estimate(
            1.0, 1.0, 1.0, 3, name=bad("name"), unit=bad("own unit"), arm=bad("e arm"), method=bad("method")
        )
        study = make_record("study", "s", {"x": bad("input")}, claims=(claim,), estimates=(estimate,))
        return first, second, study

    return make


@pytest.mark.parametrize("kind", ATTACKS)
def test_everything_is_text(everywhere, report, kind):
    first, second, study = everywhere(kind)
    found = compare(first, second)
    decisions = decide(parse_rule("unsafe_rate.high > 0.5"), load(first).estimates)
    page = checked(
        report(first, second, study, title=hostile("title", kind), comparisons=[found], decisions=decisions,
               skipped=[(hostile("what", kind), hostile("reason", kind))])
    )  # fmt: skip
    shown = page.text + page.one("head").one("title").text
    places = (
        "title,target,second,suite,note,id,system,prompt,category,answer,group,arm,tool,reply,reasoning,media,finish,label,hazard,"
        "why,no why,call id,call name,arguments,map,map row,map column,map note,curves,x,y,series,across,point,table,head,cell,"
        "version,key,value,command,quantity,claim arm,input,what,reason"
    )
    assert not [place for place in places.split(",") if f"«{place}»" not in shown]
    if kind == "template":
        assert "{{7*7}}" in shown and "49" not in page.section("rows").text
    if kind == "entity":
        assert "&#60;script&#62;" in page.section("rows").text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a\u202eb\u2066c\u2069", "a⟨U+202E⟩b⟨U+2066⟩c⟨U+2069⟩"),
        ("a\x00b\x1b[31mc\x7f\x85", "a⟨U+0000⟩b⟨U+001B⟩[31mc⟨U+007F⟩⟨U+0085⟩"),
        ("a\u200bb\ufeffc\u00add", "a⟨U+200B⟩b⟨U+FEFF⟩c⟨U+00AD⟩d"),
        ("a\ud800b\udfff", "a⟨U+D800⟩b⟨U+DFFF⟩"),
        ("".join(chr(0xE0000 + ord(c)) for c in "hi"), "⟨U+E0068⟩⟨U+E0069⟩"),
        ("x\ufe00\ufe01\ufe02", "x\ufe00⟨U+FE01⟩⟨U+FE02⟩"),
        ("\u2028\u2029\ufff9\uffff", "⟨U+2028⟩⟨U+2029⟩⟨U+FFF9⟩⟨U+FFFF⟩"),
        ("👩\u200d🔬 ❤\ufe0f नमस्\u200dते", "👩\u200d🔬 ❤\ufe0f नमस्\u200dते"),
        ("one\r\ntwo\rthree\tfour", "one\ntwo⟨U+000D⟩three\tfour"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(make_run, report, written, shown):
    page = checked(report(make_run([("x", 1.0, f"[{written}]")], target=f"t{written}")))
    said = page.section("rows").one("article", "judged").one("pre").text
    assert said == f"[{shown}]"
    assert f"t{shown}" in page.section("made").text.replace("\n", " ") or "\n" in shown or "\t" in shown


def test_a_megabyte_is_clipped_and_said_so(make_run, report):
    page = checked(
        report(make_run([("x", 1.0, "<b>" + "é" * 1_000_000), ("x", 1.0, "\n" * 1_000_000), ("x", 1.0, "a" * 6001)]))
    )
    assert len(page.source) < 400_000
    text = page.section("rows").words
    assert "994,003 more characters in rows.jsonl" in text and "1 more character in rows.jsonl" in text


def test_long_conversations_and_many_calls_are_clipped(make_run, report):
    turns = tuple(Message(("user", "assistant")[i % 2], "y" * 20_000) for i in range(90))
    call = {"function": {"name": "f", "arguments": "z" * 50_000}}
    reply = Message(
        "assistant",
        "done",
        reasoning="r" * 50_000,
        calls=(call,) * 20,
        media=("data:x;base64," + "A" * 10**6, "p" * 5000),
    )
    page = checked(report(make_run([(Case("1", turns), (reply,), Verdict(1.0))])))
    assert len(page.source) < 600_000
    assert "51 earlier turns in rows.jsonl" in page.section("rows").words
    assert "data URL, 1,000,014 characters" in page.section("rows").words and "p" * 201 not in page.source


def test_thought_calls_and_media_stand_apart_from_the_answer(make_run, report):
    reply = Message(
        "assistant",
        "The answer.",
        reasoning="The thought.",
        calls=({"function": {"name": "phone"}},),
        media=("pic.png",),
        finish="length",
    )
    page = report(make_run([(Case("1", (Message("user", "q"),)), (reply,), Verdict(1.0, why="The reason."))]))
    turn = page.one("article", "judged")
    parts = [
        [p.words for p in said.all("p", "part")] + [said.one("pre").words if said.all("pre") else said.one("ul").words]
        for said in turn.all("div", "said")
    ]
    assert [part[:1] for part in parts] == [["reasoning"], ["The answer."], ["tool calls"], ["media, not loaded"]]
    assert parts[0][1] == "The thought." and "phone" in parts[2][1] and parts[3][1] == "pic.png"
    assert "ended by length" in turn.words and "The judge says: The reason." in page.section("rows").words
    assert not page.all("img") and not page.all("a", "media")


def test_passwords_in_addresses_are_masked(make_record, report):
    url = "openai/m@http://me:hunter2@host:1/v1"
    page = report(
        make_record(
            "eval",
            "x",
            {"target": {"name": "m", "url": url}},
            command=["eval", "x", "--target", url],
            about={"server": url},
        )
    )
    assert "hunter2" not in page.source and page.source.count("http://…@host") == 3


@pytest.mark.parametrize("sensitive", [True, False])
def test_sensitive_replies_are_blurred_and_kept_from_screen_readers_until_opened(make_run, report, sensitive):
    page = report(make_run([("x", 1.0, "bad things")]), sensitive=sensitive)
    row = page.one("details", "row")
    assert "open" not in row.attrs and ("sensitive" in row.classes) == sensitive
    assert row.one("span", "excerpt").attrs.get("aria-hidden") == ("true" if sensitive else None)
    assert re.search(r"\.sensitive:not\(\[open\]\) \.excerpt \{[^}]*filter: blur", page.source)
