"""How a guard model is asked and read: a prompt format in a file, the prompt it makes, and the way back from the answer.

The files of `assets/hf_guard/` say of each format where it is known from; all sentences in them are ours. Source of the rules:
arXiv:2404.05993 and arXiv:2501.09004 (codes are read against the list that was shown; anything but a clear word is no verdict).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Message
from davylamp.core.rows import canonical
from davylamp.data.guard_policy import ASSETS, FIELD, Policy, known_keys, read_toml

FIELDS = ("role", "categories", "conversation", "request", "reply", "message")
HOWS = ("chat", "user", "raw", "classes")
READS = ("lines", "json", "fields", "word")


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of guards is asked and read. how: `chat` (the conversation, by the model's own template), `user` (our text as the user's
    one turn), `raw` (our text as it is), `classes` (a sequence classifier).

    before: role that is judged -> pattern after which the decision stands; none: at the start.  asks: for families that judge one policy a
    call: name -> (node, template arguments).  keys: of a JSON or field answer, by role and `categories`.
    newline: what stands between decision and codes.
    """

    name: str
    version: int
    title: str
    known_from: str
    how: str
    read: str = "lines"
    taxonomy: str = ""
    prompt: str = ""
    entry: str = "{code}: {label}. {about}"
    joiner: str = "\n"
    turns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    content: str = "text"
    newline: str = "\n"
    unsafe: tuple[str, ...] = ()
    safe: tuple[str, ...] = ()
    before: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)
    activation: str = ""
    max_tokens: int = 20
    strict: bool = False
    sha256: str = ""


def load_format(name: str) -> Format:
    """A format that ships with davylamp, or one in a .toml file. Raises UnknownNameError, or InputError that says what is wrong with it.

    >>> load_format("llama_guard3").how, load_format("aegis2").keys["user"]
    ('chat', 'User Safety')
    """
    path = Path(name) if name.endswith(".toml") else ASSETS / "hf_guard" / f"{name}.toml"
    if not path.is_file() and not name.endswith(".toml"):
        raise UnknownNameError("guard family", name, [file.stem for file in (ASSETS / "hf_guard").glob("*.toml")])
    row = read_toml(path, "a prompt format")
    known = [name for name in Format.__dataclass_fields__ if name not in ("name", "sha256")]
    known_keys(row, known, path.name)
    for key in ("version", "title", "known_from", "how"):
        if key not in row:
            raise InputError(f"{path.name} needs {key}")
    row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    row["prompt"] = str(row.get("prompt", "")).strip("\n")
    found = Format(path.stem, **row, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    if found.how not in HOWS or found.read not in READS:
        raise InputError(f"{path.name}: how must be one of {', '.join(HOWS)} and read one of {', '.join(READS)}")
    if found.how in ("user", "raw") and not found.prompt:
        raise InputError(f"{path.name}: how = {found.how!r} needs a prompt")
    for name_ in FIELD.findall(found.prompt):
        if name_ not in FIELDS:
            raise UnknownNameError(f"field of the prompt in {path.name}", name_, FIELDS)
    if found.how != "classes" and not (found.unsafe and found.safe):
        raise InputError(f"{path.name} needs the words that say unsafe and safe")
    return found


def render(form: Format, policy: Policy | None, messages: Sequence[Message]) -> str:
    """The prompt's text for the last message under judgement. What people and models wrote cannot end the block it stands in: the format's
    own marks in it are broken by a space.

    Raises InputError for an empty conversation, or a last message that is neither the user's nor the assistant's.
    """
    role = judged_role(messages)
    texts = [(message.role, defuse(_said(message), form.marks)) for message in messages]
    spoken = [form.turns[r].replace("{text}", text) for r, text in texts if r in form.turns]
    asked = [text for r, text in texts if r == "user"]
    fields = {
        "role": form.roles.get(role, role),
        "categories": "" if policy is None else policy.text(form.entry, form.joiner),
        "conversation": form.joiner.join(spoken),
        "request": asked[-1] if asked else "",
        "reply": texts[-1][1] if role == "assistant" else "",
        "message": texts[-1][1],
    }
    return FIELD.sub(lambda match: fields[match[1]], form.prompt)  # one pass: braces in a message are never filled


def judged_role(messages: Sequence[Message]) -> str:
    """Whose message is judged: the last one's, user or assistant."""
    if not messages:
        raise InputError("a guard needs one message or more, got none")
    if messages[-1].role not in ("user", "assistant"):
        raise InputError(f"a guard judges a user's or an assistant's message, got one of role {messages[-1].role}")
    return messages[-1].role


def defuse(text: str, marks: Sequence[str]) -> str:
    """The text with every mark broken by a space behind its first character.

    >>> defuse("end it: <END CONVERSATION>", ["<END CONVERSATION>"])
    'end it: < END CONVERSATION>'
    """
    for mark in marks:
        if len(mark) > 1:
            text = re.sub(re.escape(mark), lambda m: m[0][0] + " " + m[0][1:], text, flags=re.IGNORECASE)
    return text


def prompt_marks(form: Format) -> tuple[str, ...]:
    """The format's marks that stand in its prompt exactly once: what a message must not be able to write."""
    return tuple(mark for mark in form.marks if form.prompt.casefold().count(mark.casefold()) == 1)


def _said(message: Message) -> str:
    calls = [f"(tool call) {canonical(dict(call))}" for call in message.calls]
    return "\n".join([message.text, *calls]).strip("\n")


# --- answers ------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer says. unsafe: True, False, or None (it does not say).  nodes: of the policy shown.  at: where in the text the decision
    word stands, -1 if nowhere.  why: what is wrong with it, or which codes nobody knows.
    """

    unsafe: bool | None
    nodes: tuple[str, ...] = ()
    at: int = -1
    why: str = ""


def read_answer(text: str, form: Format, policy: Policy | None, role: str) -> Reading:
    """Read a guard's answer about the message of `role`. Anything but a clear word is None: never safe.

    >>> from davylamp.data.guard_policy import load_policy
    >>> form, policy = load_format("aegis1"), load_policy("aegis")
    >>> read_answer("unsafe\\nO3,O9", form, policy, "user").nodes
    ('aegis/criminal_planning_confessions', 'aegis/pii_privacy')
    >>> read_answer("not unsafe", form, policy, "user").unsafe is None
    True
    """
    if form.read == "json":
        return _read_json(text, form, policy, role)
    at = 0
    if pattern := form.before.get(role):
        found = list(re.finditer(pattern, text, re.IGNORECASE))
        if not found:
            return Reading(None, why="the answer has no decision")
        if len({_word(text, match.end())[0] for match in found}) > 1:
            return Reading(None, why="the answer decides twice, and not alike")
        at = found[0].end()
    word, start, end = _word(text, at)
    unsafe = _decide(word, form)
    if unsafe is None:
        return Reading(None, at=start, why=f"the answer says neither {form.unsafe[0]} nor {form.safe[0]}")
    if form.read in ("word", "fields"):
        return Reading(unsafe, at=start)
    first, _, rest = text[end:].partition(form.newline)
    if first.strip(" .\t\r"):
        return Reading(None, at=start, why="the first line holds more than the decision")
    return _with_nodes(unsafe, rest.strip().partition("\n")[0] if unsafe else "", start, form, policy)


def _word(text: str, at: int) -> tuple[str, int, int]:
    match = re.compile(r"[\s\"'*:]*([^\W\d_]+)").match(text, at)
    return (match[1].casefold(), match.start(1), match.end(1)) if match else ("", at, at)


def _decide(word: str, form: Format) -> bool | None:
    if word in {item.casefold() for item in form.unsafe}:
        return True
    return False if word in {item.casefold() for item in form.safe} else None


def _with_nodes(unsafe: bool, codes: str, at: int, form: Format, policy: Policy | None) -> Reading:
    nodes, unknown = ((), ()) if policy is None or not unsafe else policy.codes(codes)
    if unknown and form.strict:
        return Reading(None, at=at, why=f"categories that were not shown: {', '.join(unknown)}")
    return Reading(unsafe, nodes, at, f"codes nobody knows: {', '.join(unknown)}" if unknown else "")


def _read_json(text: str, form: Format, policy: Policy | None, role: str) -> Reading:
    """The first JSON object in the text: one pass, no repair but a cut-off end of categories."""
    start = text.find("{")
    key = form.keys[role]
    if start < 0:
        return Reading(None, why="the answer holds no JSON object")
    try:
        row, end = json.JSONDecoder(object_pairs_hook=_pairs).raw_decode(text, start)
    except (ValueError, RecursionError):
        return Reading(None, why="the answer is broken JSON")
    if text[end:].strip(" \n\t`."):
        return Reading(None, why="something follows the JSON object")
    if not isinstance(row, dict) or form.keys["user"] not in row:
        return Reading(None, why=f"the JSON lacks {form.keys['user']!r}")
    if key not in row:
        return Reading(None, why=f"the JSON lacks {key!r}")
    place = re.search(re.escape(key) + r'"\s*:\s*"?\s*', text[start:end])
    at = -1 if place is None else start + place.end()
    said = {name: _decide(str(row.get(form.keys[name], "")).strip().casefold(), form) for name in ("user", "assistant")}
    if said[role] is None:
        return Reading(None, at=at, why=f"{key} is {str(row[key])[:40]!r}, neither {form.unsafe[0]} nor {form.safe[0]}")
    listed = row.get(form.keys["categories"], "")
    listed = ", ".join(map(str, listed)) if isinstance(listed, list) else str(listed or "")
    if listed and not any(said.values()):
        return Reading(None, at=at, why="categories are given, but nothing is unsafe")
    return _with_nodes(bool(said[role]), listed, at, form, policy)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    return {name: value for name, value in pairs if names.count(name) == 1}  # a key that stands twice says nothing


def answer_text(form: Format, policy: Policy, verdicts: Mapping[str, bool | None], nodes: Sequence[str] = ()) -> str:
    """What a guard of this format should say: the target of training. verdicts: role -> unsafe, None or absent = not there.

    >>> from davylamp.data.guard_policy import load_policy
    >>> answer_text(load_format("aegis2"), load_policy("aegis2"), {"user": True, "assistant": False}, ["aegis2/threat"])
    '{"User Safety": "unsafe", "Response Safety": "safe", "Safety Categories": "Threat"}'
    """
    words = {role: (form.unsafe if unsafe else form.safe)[0] for role, unsafe in verdicts.items() if unsafe is not None}
    shown = [item for item in policy.categories if set(item.nodes) & set(nodes)]
    shown.sort(key=lambda item: min(nodes.index(node) for node in item.nodes if node in nodes))
    if form.read == "json":
        row = {form.keys[role]: words[role] for role in ("user", "assistant") if role in words}
        if any(verdicts.values()) and shown:
            row[form.keys["categories"]] = ", ".join(item.label for item in shown)
        return json.dumps(row)
    if form.read == "fields":
        return "\n".join(f"{form.keys[role]}: {words[role]}" for role in ("user", "assistant") if role in words)
    role = "assistant" if "assistant" in words else "user"
    if form.read == "word" or not verdicts[role] or not shown:
        return words[role]
    return f"{words[role]}{form.newline}{','.join(item.code for item in shown)}"
