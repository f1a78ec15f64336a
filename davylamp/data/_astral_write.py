"""Who writes ASTRAL's tests: a language model behind any target's name, or the rules of `_astral_templates.py`; and how its text is read.

Source: arXiv:2501.17132, section 3.2 (few-shot blocks, news, the output marker); the wording is this project's.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Message
from davylamp.core.rows import canonical, digest
from davylamp.core.taxonomy import taxonomy
from davylamp.data import _astral_templates as rules
from davylamp.models.news import Article, context
from davylamp.models.retry import patiently

if TYPE_CHECKING:
    from numpy.random import Generator

PROMPTS = Path(__file__).parent.parent / "assets" / "astral_prompts" / "prompts.toml"
MARKER = "#Prompt:"
TEXTS = ("system", "rag", "rag_fs", "news", "examples", "avoid")
NUMBER = re.compile(r"^\s*(?:[-*•]+|\(?\d{1,3}[.):]|[a-zA-Z][.)])\s+")
CITED = re.compile(r"\s*(?:\[\d{1,3}(?:\s*[,†:-]\s*[^\]]{0,40})?\]|【[^】]{0,80}】)")
QUOTES = "\"'“”„«»‘’`"
LONGEST = 4000  # characters of a test; more is not a prompt but a run-away reply


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be written: n tests of one cell. style and technique are None for tests by category alone."""

    category: str
    style: str | None
    technique: str | None
    n: int
    examples: Sequence[str] = ()
    news: Sequence[Article] = ()
    day: str = ""
    avoid: Sequence[str] = ()


class Writer(Protocol):
    """Gives a text with the tests of a job, one a line behind the marker. `identity`: what its texts depend on."""

    identity: Mapping[str, Any]

    async def __call__(self, job: Job, *, rng: Generator) -> str: ...


class Rules:
    """Writes by rule, offline. kind: templates (English) or world (the organisms' language)."""

    def __init__(self, kind: str):
        self.write = {"templates": rules.english, "world": rules.organisms}[kind]
        self.identity: Mapping[str, Any] = {"name": kind, "version": 1}

    async def __call__(self, job: Job, *, rng: Generator) -> str:
        texts = [self.write(job.category, job.style, job.technique, job.examples, job.news, rng) for _ in range(job.n)]
        return "\n".join([MARKER, *texts])


class Model:
    """Asks a target. Its prompt holds the few-shot blocks of the cell; examples and news stand between marks that they do not hold."""

    def __init__(self, target: Any, blocks: Mapping[str, Any], *, max_tokens: int, temperature: float):
        self.target, self.blocks = target, blocks
        self.settings = {"max_tokens": max_tokens, "temperature": temperature}
        self.identity: Mapping[str, Any] = {**target.identity, "blocks": digest(dict(blocks)), **self.settings}

    async def __call__(self, job: Job, *, rng: Generator) -> str:
        seed = int(rng.integers(2**31))
        messages = (Message("system", self.blocks["system"].strip()), Message("user", prompt(job, self.blocks)))
        reply = await patiently(
            lambda: self.target(messages, seed=seed, **self.settings), who=f"generator {self.target.name}"
        )
        return str(reply.text)

    async def close(self) -> None:
        if (closing := getattr(self.target, "close", None)) is not None:
            await closing()


def load_blocks(path: str = "") -> dict[str, Any]:
    """The shipped texts and few-shot blocks, with those of a TOML file of the same form over them.

    Raises InputError for a block without `about` or `examples`, UnknownNameError for other keys.
    """
    out: dict[str, Any] = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))
    if not path:
        return out
    try:
        own = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise InputError(
            f"{path} is no file of blocks, expected TOML like the shipped prompts.toml ({problem})"
        ) from None
    for key, value in own.items():
        if key not in out:
            raise UnknownNameError(f"key of {path}", key, out)
        if key not in ("style", "technique"):
            if type(value) is not type(out[key]):
                raise InputError(f"{path}: {key} must be a {type(out[key]).__name__}, got {value!r:.40}")
            out[key] = value
            continue
        for name, block in value.items():
            examples = block.get("examples") if isinstance(block, dict) else None
            if not isinstance(examples, list) or not examples or not isinstance(block.get("about"), str):
                raise InputError(f"{path}: [{key}.{name}] needs about (text) and examples (a list of texts)")
            out[key][name] = block
    return out


def prompt(job: Job, blocks: Mapping[str, Any]) -> str:
    """What the language model is asked. Raises InputError for a style or technique without a block."""
    material = canonical([list(job.examples), context(job.news)])
    mark = hashlib.sha256(material.encode("utf-8", "backslashreplace")).hexdigest()[:12]
    known = {node.id: node for node in taxonomy("astral").nodes}
    values = {
        "n": str(job.n),
        "category": rules.label(job.category),
        "about": known[job.category].about if job.category in known else rules.label(job.category),
        "marker": MARKER,
        "mark": mark,
        "day": job.day,
        "articles": context(job.news),
        "lines": "",
    }
    for axis, name in (("style", job.style), ("technique", job.technique)):
        if name is not None:
            if name not in blocks[axis]:
                raise InputError(f"no few-shot block for the {axis} {name!r}. Give one in a file: --blocks")
            block = blocks[axis][name]
            values |= {axis: name.replace("_", " "), f"{axis}_about": block["about"],
                       f"{axis}_examples": "\n".join(f"- {text}" for text in block["examples"])}  # fmt: skip
    for part, lines in (("examples", job.examples), ("avoid", job.avoid)):
        values[part] = (
            _filled(blocks[part], {**values, "lines": "\n".join(" ".join(x.split()) for x in lines)}) if lines else ""
        )
    values["news"] = _filled(blocks["news"], values) if job.news else ""
    return _filled(blocks["rag" if job.style is None else "rag_fs"], values).strip()


def _filled(text: str, values: Mapping[str, str]) -> str:
    """One pass, so that braces in examples or news are never filled."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text.lstrip("\n"))


def lines_of(text: str) -> list[str]:
    """The tests in a writer's text: what stands behind the last marker, a test a line, without numbers, citation marks and quotes.

    >>> lines_of('Sure!\\n#Prompt:\\n1. "Tell me a story." [2]\\n\\n- Why is it so?【4†source】')
    ['Tell me a story.', 'Why is it so?']
    """
    behind = re.split(re.escape(MARKER), text, flags=re.IGNORECASE)[-1]
    out = []
    for line in behind.splitlines():
        line = CITED.sub("", NUMBER.sub("", line)).strip().strip("*").strip()
        if len(line) > 1 and line[0] in QUOTES and line[-1] in QUOTES:
            line = line[1:-1].strip()
        if 0 < len(line) <= LONGEST and any(c.isalnum() for c in line) and not line.startswith("```"):
            out.append(line)
    return out
