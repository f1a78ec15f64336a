"""Run folders made with core's own functions, and a page taken apart into its elements, text and tables."""

from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import pytest

from davylamp.core.evaluate import finish
from davylamp.core.nouns import Case, Message, Metric, Verdict
from davylamp.core.record import folder_for, new_record, save
from davylamp.core.rows import RowLog, canonical, digest
from davylamp.core.tally import metric_json
from davylamp.report.html import write_report

VOID = {"meta", "link", "br", "hr", "img", "input", "base", "embed", "source", "wbr"}
UNSAFE = Metric("unsafe_rate", by=("category", "meta.arm"))


@dataclass
class Element:
    tag: str
    attrs: dict
    children: list = field(default_factory=list)
    parent: object = None

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def words(self):
        return " ".join(self.text.split())

    @property
    def classes(self):
        return (self.attrs.get("class") or "").split()

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag=None, cls=None):
        return [e for e in self.walk() if (tag is None or e.tag == tag) and (cls is None or cls in e.classes)]

    def one(self, tag=None, cls=None):
        found = self.all(tag, cls)
        assert len(found) == 1, f"{len(found)} {tag} .{cls}"
        return found[0]


class Page(HTMLParser):
    """A tree of elements; a tag that is closed but not open, or left open, is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.source, self.root = text, Element("#root", {})
        self.open, self.declarations, self.comments = [self.root], [], []
        self.feed(text)
        self.close()
        assert len(self.open) == 1, [e.tag for e in self.open]

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        element = Element(tag, dict(attrs), parent=self.open[-1])
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs), parent=self.open[-1]))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> while {self.open[-1].tag} is open"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)

    def handle_decl(self, decl):
        self.declarations.append(decl)

    def handle_comment(self, data):
        self.comments.append(data)

    def all(self, tag=None, cls=None):
        return self.root.all(tag, cls)

    def one(self, tag=None, cls=None):
        return self.root.one(tag, cls)

    @property
    def text(self):
        return self.one("body").text

    def section(self, name):
        return next((e for e in self.all("section") if e.attrs.get("id") == name), None)


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def make_run(runs):
    """A finished eval run. rows: (category, value or None or "failed", reply) each, or whole (Case, replies, Verdict or None)."""

    def make(rows, *, target="model", suite="demo", judge="plain", metrics=(UNSAFE,), notes=(), about=None, parents=()):
        inputs = {
            "suite": {
                "name": suite,
                "version": 1,
                "options": {},
                "cases": digest([suite, len(rows)]),
                "limit": None,
                "metrics": [metric_json(metric) for metric in metrics],
            },
            "target": {"name": target},
            "judge": {"name": judge, "version": 2, "measures": "unsafe", "options": {}},
            "settings": {},
            "seed": 0,
            "epochs": 1,
        }
        record = new_record(
            "eval", suite, inputs, parents=parents, created="2026-01-02T03:04:05+00:00", notes=list(notes)
        )
        record = replace(
            record, about={"davylamp": "0.0", "created": record.about["created"], "notes": list(notes), **(about or {})}
        )
        folder = folder_for(runs, record)
        log = RowLog(folder / "rows.jsonl")
        for index, row in enumerate(rows):
            if not isinstance(row[0], Case):
                category, value, reply = row
                case = Case(f"r{index}", (Message("user", f"question {index}"),), category=category)
                failed = value == "failed"
                row = (case, None if failed else (Message("assistant", reply),), None if failed else Verdict(value))
            case, reply, verdict = row
            line = {
                "key": f"{index:032x}",
                "case": case.json(),
                "seed": 0,
                "seconds": 0.1,
                "reply": None if reply is None else [message.json() for message in reply],
                "verdict": None if verdict is None else verdict.json(),
            }
            if verdict is None:
                line["error"] = "no answer"
            rest = canonical({name: value for name, value in line.items() if name != "key"})
            log.append(f'{{"key":"{line["key"]}",{rest[1:]}')
        log.close()
        finish(folder, record, metrics, epochs=1, runs=runs)
        return folder

    return make


@pytest.fixture
def make_record(runs):
    """A record of any verb with what it is given."""

    def make(verb, name, inputs=None, *, about=None, command=(), parents=(), **fields):
        record = new_record(verb, name, inputs or {"seed": 0}, parents=parents)
        record = replace(
            record, status="finished", about={"davylamp": "0.0", "command": list(command), **(about or {})}, **fields
        )
        folder = folder_for(runs, record)
        save(folder, record)
        return folder

    return make


@pytest.fixture
def report(tmp_path):
    """Write a report and take it apart."""

    def make(*folders, title="A report", **options):
        path = tmp_path / "report.html"
        write_report(path, folders, title=title, **options)
        return Page(path.read_text(encoding="utf-8"))

    return make


def numbers(table):
    """The rows of a table of estimates: {class of the cell: its words}, with the words of the row's head."""
    return [
        {
            cell.classes[0] if cell.classes else cell.tag: cell.words
            for cell in row.children
            if isinstance(cell, Element)
        }
        | {"counts": [cell.words for cell in row.all("td", "count")]}
        for row in table.one("table").all("tr")
        if row.all("td", "value")
    ]


@pytest.fixture
def rows_of():
    return numbers
