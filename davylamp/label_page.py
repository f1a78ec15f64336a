"""`davylamp guard label`: a small local page where a person labels texts, and rewrites them until the guard lets them pass.
Source: arXiv:2205.01663, section 4.2 (the rewriting tool: live score, salient words, substitutions in the order of their scores).

Whole without scripts and by keyboard; nothing is loaded from elsewhere and only this machine can ask. Every label is one line, written and
flushed to the disk before the page goes on. What was saved is not asked again, so a broken session is simply started anew.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from jinja2 import Environment

from davylamp.core.errors import InputError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import CaseFile

LABELS = {"1": "unsafe", "2": "safe", "3": "unsure"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PAGE = Path(__file__).parent / "assets" / "label_page" / "page.html"


class LabelPage:
    """The page's server. rows: what is labelled (a prompt, and the text as the assistant's message).  out: where labels are appended.

    guard: a spec; with a `classifier` (as `high_stakes`) words and substitutions are shown, with any other only its score.
    propose: substitutions for a word, (words, place) -> words.
    """

    def __init__(self, rows: Path, out: Path, *, rater: str, guard: str = "", propose: Any = None):
        if not rater or not rater.isprintable():
            raise InputError(f"a rater needs a name, got {rater!r}")
        self.cases: dict[str, Case] = {}
        for case in CaseFile(rows):
            if len(case.messages) < 2 or case.messages[-1].role != "assistant" or not case.messages[-1].text.strip():
                raise InputError(f"row {case.id} needs a prompt and a text (the assistant's message)")
            self.cases[case.id] = case
        if out.is_dir() or not out.parent.is_dir():
            raise InputError(f"labels cannot be written to {out}: expected a file in a folder that is there")
        self.rater, self.out, self.propose = rater, out, propose
        self.guard = load_judge(guard) if guard else None
        self.token = secrets.token_urlsafe(16)
        self._fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")  # a line that a crash tore must not spoil the next
        self.done = {row["row"] for row in labels_of(out) if row["rater"] == rater and row.get("source") == "base"}
        self._template = Environment(autoescape=True, trim_blocks=True).from_string(PAGE.read_text(encoding="utf-8"))

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._only_here], client_max_size=2**20)
        app.router.add_get("/", self._show)
        app.router.add_post("/", self._show)
        app.router.add_post("/label", self._label)
        return app

    def close(self) -> None:
        os.close(self._fd)

    @web.middleware
    async def _only_here(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """No other site may drive the page through the reader's browser: the host must be this machine, a form must bear the token."""
        if request.host.rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            return web.Response(status=403, text="this page is for this machine alone", headers=HEADERS)
        if request.method == "POST" and (await request.post()).get("token") != self.token:
            return web.Response(status=403, text="the form is of another session: open the page again", headers=HEADERS)
        return await handler(request)

    def _next(self) -> Case | None:
        return next((case for id, case in self.cases.items() if id not in self.done), None)

    async def _show(self, request: web.Request) -> web.Response:
        form: Mapping[str, Any] = await request.post() if request.method == "POST" else {}
        case = self.cases.get(str(form.get("id"))) or self._next()
        if case is None:
            return self._page(case=None)
        text = " ".join(str(form.get("text") or case.messages[-1].text).split())
        prompt = "\n".join(message.text for message in case.messages[:-1])
        score, cut, how, shades, swaps, old = None, 0.5, "", None, [], ""
        if self.guard is not None:
            inner: Any = self.guard.function
            classifier = getattr(inner, "classifier", None)
            if classifier is None:
                score = (await self.guard((*case.messages[:-1], Message("assistant", text)))).value
            else:
                cut = inner.threshold
                score = float(classifier.scores([(prompt, text)])[0])
                (found,), how = classifier.saliency([(prompt, text)])
                shades = [min(9, int(value * 9.99)) for value in found]
                place = str(form.get("word", ""))
                if self.propose is not None and place.isdecimal() and int(place) < len(shades):
                    words = text.split()
                    old = words[int(place)]
                    options = list(self.propose(words, int(place)))
                    made = [" ".join([*words[: int(place)], new, *words[int(place) + 1 :]]) for new in options]
                    scores = classifier.scores([(prompt, one) for one in made]).tolist() if made else []
                    swaps = sorted(zip(options, made, scores, strict=True), key=lambda row: row[2])
        words_ = [(word, None if shades is None else shades[i]) for i, word in enumerate(text.split())]
        return self._page(case=case, prompt=prompt, text=text, words=words_, score=score, cut=cut, how=how, swaps=swaps, old=old,
                          changed=text != " ".join(case.messages[-1].text.split()),
                          began=form.get("began") or f"{time.time():.3f}")  # fmt: skip

    def _page(self, **values: Any) -> web.Response:
        about = {
            "token": self.token,
            "total": len(self.cases),
            "done": len(self.done),
            "rater": self.rater,
            "labels": LABELS,
        }
        return web.Response(text=self._template.render(**about, **values), content_type="text/html", headers=HEADERS)

    async def _label(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        case, label, text = (
            self.cases.get(str(form.get("id"))),
            str(form.get("label")),
            " ".join(str(form.get("text", "")).split()),
        )
        try:
            began = float(str(form.get("began")))
        except ValueError:
            began = float("nan")
        if case is None or label not in LABELS.values() or not text or not began <= time.time():
            return web.Response(status=400, text="expected a row of this file, a label and its text", headers=HEADERS)
        original = " ".join(case.messages[-1].text.split())
        row = {"row": case.id, "rater": self.rater, "label": label, "began": began, "ended": round(time.time(), 3)}
        row |= {"text": text, "source": "base" if text == original else "tool-rewrite"}
        if text != original:
            row["parent"] = case.id
        if self.guard is not None:
            verdict = await self.guard((*case.messages[:-1], Message("assistant", text)))
            row |= {"value": verdict.value, "guard": dict(self.guard.identity)}
        data = (json.dumps(row) + "\n").encode()
        if os.write(self._fd, data) != len(data):
            return web.Response(status=507, text="the label could not be saved: the disk is full", headers=HEADERS)
        os.fsync(self._fd)
        if text == original:  # a rewritten text is saved beside the row, which is still to be labelled itself
            self.done.add(case.id)
        return web.Response(status=303, headers={**HEADERS, "Location": "/"})


def labels_of(path: Path) -> list[dict[str, Any]]:
    """The saved labels of a file, torn lines left out."""
    out = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and {"row", "rater", "label"} <= row.keys():
                out.append(row)
    return out


def usable(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[tuple[Mapping[str, Any], str]]]:
    """(rows whose times make sense, the others each with a reason): no end before its beginning, no two of one rater at a time.

    >>> rows = [{"rater": "a", "began": 5, "ended": 9}, {"rater": "a", "began": 8, "ended": 12}, {"rater": "b", "began": 3, "ended": 1}]
    >>> [reason for _, reason in usable(rows)[1]]
    ['it ends before it begins', 'it overlaps the one before']
    """
    kept: list[Mapping[str, Any]] = []
    refused: list[tuple[Mapping[str, Any], str]] = []
    last: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row["began"]):
        if row["ended"] < row["began"]:
            refused.append((row, "it ends before it begins"))
        elif row["began"] < last.get(row["rater"], float("-inf")):
            refused.append((row, "it overlaps the one before"))
        else:
            kept.append(row)
            last[row["rater"]] = row["ended"]
    return kept, refused


def run_label(
    rows: Path, out: Path, *, rater: str, guard: str = "", proposals: str = "roles", port: int = 8090
) -> None:
    """Serve the page on 127.0.0.1 until interrupted. Raises InputError if rows, guard or file cannot be used."""
    propose = None
    if guard:
        from davylamp.models.swaps import proposals_of

        propose = proposals_of(proposals)
    page = LabelPage(rows, out, rater=rater, guard=guard, propose=propose)
    try:
        web.run_app(page.app(), host="127.0.0.1", port=port, print=lambda text: print(text, flush=True))
    finally:
        page.close()
