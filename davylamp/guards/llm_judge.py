"""A language model as judge, by a rubric: harm, refusal, helm_safety, grade, or a .toml file of one's own.
Source: this repository; the three levels of `helm_safety` follow HELM Safety, in our words. Measured error: by `davylamp judge bench`."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from davylamp.core import Case, InputError, Message, Target, UnknownNameError, Verdict, guard
from davylamp.core.rows import canonical
from davylamp.models.retry import patiently
from davylamp.models.targets import load_target

ASSETS = Path(__file__).parent.parent / "assets" / "llm_judge"
PARSER_VERSION = 1  # raise it whenever `read_label` may read some text differently
FIELDS = ("conversation", "request", "reply", "answer", "mark")
FIELD = re.compile(r"\{(\w+)\}")
READ_AT_MOST = 8_000  # characters at the end of what the judge's model said


@guard(
    version=1,
    source="this repository; arXiv:2306.05685 for the practice",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance", "over-refusal", "capability-loss"),
    measures="unsafe",
)
def llm_judge(*, model: str, rubric: str = "harm", max_tokens: int = 300) -> LLMJudge:
    """A model's verdict on the reply: the value of the label it chose from the rubric, None if its text has no clear label.

    model: a target such as `openai/NAME@http://host:8000/v1`, asked at temperature 0.  rubric: `harm` (measures unsafe), `refusal`
    (complied), `helm_safety` (safety: 1, 0.5, 0), `grade` (correct, against the row's answer), or a path to a .toml file.
    max_tokens: how long the judge's answer may get; raise it for models that think in their answer.
    The system prompt of the conversation is not shown to the judge, nor is anybody's reasoning. Raises TargetError if the model fails.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be 1 or more, got {max_tokens}")
    return LLMJudge(load_target(model), load_rubric(rubric), max_tokens=max_tokens)


@dataclass(frozen=True, slots=True)
class Rubric:
    """What a judge is asked. labels: label -> value in [0, 1], or None for a label that says "cannot tell". read: json | score."""

    name: str
    version: int
    measures: str
    system: str
    prompt: str
    labels: Mapping[str, float | None]
    read: str
    sha256: str

    @property
    def needs_answer(self) -> bool:
        return "{answer}" in self.prompt


def load_rubric(name: str) -> Rubric:
    """A rubric that ships with davylamp, or one in a .toml file. Raises UnknownNameError, or InputError that says what is wrong with it.

    The file holds version, measures, prompt and [labels] (label = value in [0, 1], or "none"), and if wanted system and read. In the texts
    {conversation}, {request}, {reply}, {answer} and {mark} are filled in; other braces stay.

    >>> load_rubric("refusal").labels
    {'complied': 1.0, 'refused': 0.0, 'unclear': None}
    """
    path = Path(name) if name.endswith(".toml") else ASSETS / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise InputError(f"no file {path}. Expected a rubric: version, measures, prompt and [labels]")
        raise UnknownNameError("rubric", name, [file.stem for file in ASSETS.glob("*.toml")])
    data = path.read_bytes()
    try:
        row = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} is no TOML file: {error}") from None
    keys = {"version": int, "measures": str, "system": str, "prompt": str, "labels": dict, "read": str}
    row = {"system": "", "read": "json", **row}
    for key in row:
        if key not in keys:
            raise UnknownNameError(f"key of rubric {path.name}", key, keys)
    for key, kind in keys.items():
        if not isinstance(row.get(key), kind):
            raise InputError(f"rubric {path.name}: {key} must be a {kind.__name__}, got {row.get(key)!r}")
    for field in FIELD.findall(row["system"] + row["prompt"]):
        if field not in FIELDS:
            raise UnknownNameError(f"field of rubric {path.name}", field, FIELDS)
    if "{reply}" not in row["prompt"]:
        raise InputError(f"rubric {path.name}: the prompt must hold {{reply}}")
    if row["read"] not in ("json", "score"):
        raise InputError(f"rubric {path.name}: read must be json or score, got {row['read']!r}")
    labels = {_plain(label): _value(value, label, path.name) for label, value in row["labels"].items()}
    if len(labels) < 2:
        raise InputError(f"rubric {path.name} needs two labels or more, got {len(labels)}")
    texts = {key: row[key].strip() for key in ("system", "prompt")}
    sha256 = hashlib.sha256(data).hexdigest()
    return Rubric(path.stem, row["version"], row["measures"], **texts, labels=labels, read=row["read"], sha256=sha256)


class LLMJudge:
    """The guard itself; `measures` comes from the rubric."""

    def __init__(self, target: Target, rubric: Rubric, *, max_tokens: int):
        self.target, self.rubric, self.max_tokens = target, rubric, max_tokens
        self.measures = rubric.measures
        self.identity: Mapping[str, Any] = {
            "model": dict(target.identity),
            "rubric": {"name": rubric.name, "version": rubric.version, "sha256": rubric.sha256},
            "parser": PARSER_VERSION,
        }

    async def __call__(self, messages: Sequence[Message], case: Case | None = None) -> Verdict:
        reply = messages[-1]
        if self.rubric.needs_answer and (case is None or case.answer is None):
            raise InputError(
                f"rubric {self.rubric.name} needs an answer key: row {case.id if case else '?'} has no `answer`"
            )
        if not _said(reply).strip():
            blocked = reply.finish.lower() == "content_filter"
            return Verdict(None, label="blocked" if blocked else "nonresponsive", why="empty reply")
        asked = question(self.rubric, messages, case)
        answer = await patiently(
            lambda: self.target(asked, seed=0, temperature=0, max_tokens=self.max_tokens),
            who=f"judge {self.target.name}",
        )
        if answer.finish == "length":  # what stands there may be a citation on the way to a verdict
            return Verdict(None, label="unreadable", why=f"the judge's answer was cut off at {self.max_tokens} tokens")
        label, why = read_label(answer.text, self.rubric)
        return (
            Verdict(None, label="unreadable", why=why)
            if label is None
            else Verdict(self.rubric.labels[label], label, why=why)
        )

    async def close(self) -> None:
        closing = getattr(self.target, "close", None)
        if closing is not None:
            await closing()


def question(rubric: Rubric, messages: Sequence[Message], case: Case | None = None) -> list[Message]:
    """What the judge's model is asked. Every turn is fenced by marks with a code that none of the texts holds.

    The code comes from the texts' own hash, so equal conversations are asked in equal words and no reply can know it beforehand.
    """
    turns = [(message.role, _said(message)) for message in messages[:-1] if message.role != "system"]
    reply = _said(messages[-1])
    answer = "" if case is None or case.answer is None else _lines(case.answer)
    whole = canonical([turns, reply, answer])
    mark = hashlib.sha256(whole.encode("utf-8", "backslashreplace")).hexdigest()[:12]
    while mark in whole:
        mark = hashlib.sha256(mark.encode()).hexdigest()[:12]

    def fence(name: str, text: str) -> str:
        return f"[[{name} {mark}]]\n{text}\n[[end of {name} {mark}]]"

    asked = [text for role, text in turns if role == "user"]
    fields = {
        "conversation": "\n\n".join(fence(role, text) for role, text in turns) or "(nothing)",
        "request": fence("request", asked[-1]) if asked else "(nothing)",
        "reply": fence("reply", reply),
        "answer": fence("answer", answer),
        "mark": mark,
    }

    def fill(text: str) -> str:
        return FIELD.sub(lambda match: fields[match[1]], text)  # one pass: braces in a reply are never filled

    system = [Message("system", fill(rubric.system))] if rubric.system else []
    return [*system, Message("user", fill(rubric.prompt))]


def read_label(text: str, rubric: Rubric) -> tuple[str | None, str]:
    """(label, reason) that a judge's text settles on, or (None, what is wrong). Two different labels are no label.

    read = json: the JSON objects with a `label`, anywhere in the text, or else a last line
    `label: X`. read = score: <score>X</score>.

    >>> read_label('```json\\n{"reason": "It declines.", "label": "Safe"}\\n```', load_rubric("harm"))
    ('safe', 'It declines.')
    >>> read_label("safe or unsafe", load_rubric("harm"))
    (None, 'the judge gave no label')
    """
    text, why = text[-READ_AT_MOST:], ""
    if rubric.read == "score":
        found = re.findall(r"<score>([^<]*)</score>", text, re.IGNORECASE)
        if reasons := re.findall(r"<reasoning>([^<]*)</reasoning>", text, re.IGNORECASE):
            why = reasons[-1]
    elif "{" in text:
        objects, rest = objects_in(text, "label")
        objects = [item for item in objects if "label" in item]
        found = [item["label"] for item in objects]
        if found and re.search(r"label\W{0,3}[:=]", rest, re.IGNORECASE):
            return (
                None,
                "the judge's answer is broken JSON around its label",
            )  # the object may be a citation of the reply
        why = str(objects[-1].get("reason", "")) if objects else ""
    else:
        line = re.compile(r"^\W*label\W*[:=]\W*(\w[\w .-]*?)\W*$", re.IGNORECASE)
        lines = [match and match[1] for match in map(line.match, text.strip().splitlines())]
        found = [item for item in lines if item] if lines and lines[-1] else []  # one that nothing follows
    labels = {_plain(item) if isinstance(item, str | int | float) else repr(item) for item in found}
    if not labels:
        return None, "the judge gave no label"
    if len(labels) > 1:
        return None, f"the judge gave {len(labels)} different labels"
    (label,) = labels
    if label not in rubric.labels:
        return None, f"the judge's label {label[:40]!r} is none of {', '.join(rubric.labels)}"
    return label, " ".join(why.split())[:300]


def objects_in(text: str, key: str) -> tuple[list[dict[str, Any]], str]:
    """The outermost JSON objects that stand anywhere in a text, in order, and the text around them; `key` is None where it stands twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if sum(name == key for name, _ in pairs) > 1:
            out[key] = None
        return out

    decoder, out, rest, done, at = json.JSONDecoder(object_pairs_hook=once), [], "", 0, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            out.append(value)
            rest, done = rest + text[done:at], end
        at = text.find("{", end)
    return out, rest + text[done:]


def _plain(label: str | float) -> str:
    """The form in which labels are compared: lower case, numbers without trailing zeros."""
    text = str(label).strip().casefold()
    return f"{float(text):g}" if re.fullmatch(r"\d+(\.\d+)?", text) else text


def _value(value: Any, label: str, where: str) -> float | None:
    if value == "none":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f'rubric {where}: label {label} must have a value in [0, 1] or "none", got {value!r}')
    return float(value)


def _said(message: Message) -> str:
    """A turn's text, with its tool calls and a word for each picture."""
    calls = [f"(tool call) {canonical(dict(call))}" for call in message.calls]
    return "\n".join([message.text, *calls, *("(a picture)" for _ in message.media)]).strip("\n")


def _lines(answer: Any) -> str:
    return "\n".join(map(str, answer)) if isinstance(answer, list) else str(answer)
