"""Labelled rows for guards, read from the formats they are published in: `answer` 1 = unsafe, 0 = safe.

A spec is `FORM:WHERE`, or `WHERE` alone where the columns tell the form. WHERE is a .jsonl, .csv or .parquet file, or the id of a data
set on the hub (`nvidia/Aegis-AI-Content-Safety-Dataset-2.0`, with a split as in `id#test`), read through `datasets`. Forms:

  rows               davylamp's own rows, `answer` 1 or 0
  aegis1             arXiv:2404.05993; text, text_type, labels_0 … labels_4 (comma-joined, one annotator each)
  aegis2             arXiv:2501.09004; prompt, response, prompt_label, response_label, violated_categories
  beavertails        arXiv:2307.04657; prompt, response, is_safe, category (name -> true/false)
  wildguardmix       arXiv:2406.18495; prompt, response, prompt_harm_label, response_harm_label
  toxicchat          arXiv:2310.17389; user_input, toxicity
  openai_moderation  arXiv:2208.03274; prompt and the flags S H V HR SH S3 H2 V2; a missing flag is unknown, not false
  xstest             arXiv:2308.01263; prompt, type, label (or types that start with contrast_)
  fortunes           a folder of the Debian package `fortunes`: quotations and jokes, taken as safe rows; `fortunes:FOLDER#N` draws N
  public             a folder of public benchmark rows, by the recipe in assets/lamp/public.toml

A row that cannot be used is dropped with a named reason; a label nobody knows is an error, unless `lenient`. Columns of aegis1, aegis2,
beavertails, wildguardmix and toxicchat are written down from their documentation.
Longer than 400 lines because the forms stand side by side, each a few lines, so that one can be written by looking at the next.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davylamp.core.errors import DavylampError, InputError, UnknownNameError
from davylamp.core.needs import need
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import CaseFile, Dropped, read_objects
from davylamp.core.taxonomy import taxonomy

if TYPE_CHECKING:
    from numpy.random import Generator

RECIPE = Path(__file__).parent.parent / "assets" / "lamp" / "public.toml"
Row = Mapping[str, Any]
Read = Callable[[Row, str, bool], list[Case | Dropped]]
TURN = re.compile(r"^\s*(system|user|human|agent|assistant|bot|model|chatbot)\s*:\s*", re.IGNORECASE | re.MULTILINE)
ROLE = {"system": "system", "user": "user", "human": "user"}  # every other speaker is the assistant
AEGIS1_ELSE = {"safe", "needs caution", "other"}


def load_rows(spec: str | Path, *, lenient: bool = False, permissive: bool = False) -> list[Case | Dropped]:
    """The rows of a spec (see the module), each with `answer` 1 or 0, a `group` of rows that belong together, and `meta.source`.

    lenient: a row with an unknown label or a missing column becomes `Dropped` instead of an error.  permissive: Aegis' "Needs Caution"
    counts as safe (default: unsafe, the defensive reading of arXiv:2404.05993).

    Raises InputError or UnknownNameError for a spec that is no file, a form nobody knows, columns that fit none, a file without rows.
    """
    form, where = _split(str(spec))
    if form in ("rows", "") and where.endswith(".jsonl") and Path(where).is_file() and _looks_ours(Path(where)):
        return _plain_rows(Path(where))
    if form == "rows":
        return _plain_rows(Path(where))
    if form == "fortunes":
        from davylamp.data._fortunes import fortunes

        return list(fortunes(where))
    if form == "public":
        raise InputError("public rows are drawn: use public_rows(folder, rng=…)")
    out: list[Case | Dropped] = []
    for number, row in _objects(where):
        form = form or detect(row, where)
        name = f"{Path(where).name} row {number}"
        try:
            found = FORMS[form](row, name, permissive)
        except DavylampError as problem:
            if not lenient:
                raise
            found = [_drop(f"{form}-{number}", str(problem), form)]
        out += [_numbered(item, form, number) for item in found]
    if not out:
        raise InputError(f"{where} holds no rows")
    return out


def kept(rows: Sequence[Case | Dropped]) -> tuple[list[Case], dict[str, int]]:
    """The cases, and how many were dropped for each reason."""
    cases = [row for row in rows if isinstance(row, Case)]
    return cases, dict(Counter(row.reason for row in rows if isinstance(row, Dropped)))


def detect(row: Row, where: str = "the file") -> str:
    """The form whose columns a row has. Raises InputError if none fits.

    >>> detect({"user_input": "hello", "toxicity": 0})
    'toxicchat'
    """
    for form, columns in COLUMNS.items():
        if all(any(name in row for name in names.split("|")) for names in columns):
            return form
    raise InputError(
        f"{where}: no known form has the columns {', '.join(map(str, row))}. Write FORM:PATH with one of {', '.join(FORMS)}"
    )


def _split(spec: str) -> tuple[str, str]:
    form, colon, where = spec.partition(":")
    if not colon:
        return "", spec
    if form in FORMS or form in ("rows", "fortunes", "public"):
        return form, where
    if Path(spec).exists():
        return "", spec
    raise UnknownNameError("form of guard rows", form, [*FORMS, "rows", "fortunes", "public"], see="docs/guards.md")


def _looks_ours(path: Path) -> bool:
    return all("messages" in row for _, row in zip(range(1), (row for _, row in read_objects(path)), strict=False))


def _plain_rows(path: Path) -> list[Case | Dropped]:
    out: list[Case | Dropped] = []
    for case in CaseFile(path):
        label = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}.get(str(case.answer).lower())
        if label is None:
            raise InputError(f"{path.name} row {case.id}: a labelled row needs answer 1 or 0, got {case.answer!r}")
        meta = {"source": path.stem, **case.meta}
        out.append(Case(case.id, case.messages, case.category, label, case.group, meta))
    return out


def _objects(where: str) -> Iterator[tuple[int, Row]]:
    """(number, row) of a file or a hub data set."""
    path = Path(where)
    if path.suffix in (".jsonl", ".csv"):
        yield from read_objects(path)
    elif path.suffix == ".json" and path.is_file():
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise InputError(f"{path.name} is not JSON: {problem}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path.name} must hold a list of objects")
        yield from enumerate(rows, 1)
    elif path.suffix == ".parquet":
        need("data", "reading .parquet files")
        from pyarrow import parquet

        if not path.is_file():
            raise InputError(f"no file {path}")
        yield from enumerate(parquet.read_table(path).to_pylist(), 1)
    elif path.is_dir() or where.count("/") == 1:
        need("data", f"the data set {where}")
        from datasets import load_dataset

        name, _, split = where.partition("#")
        try:
            rows = load_dataset(name, split=split or "test")
        except Exception as problem:  # the hub client raises a dozen kinds; the user needs one sentence
            first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            raise InputError(
                f"the data set {name} could not be read: {first}. Write another split as {name}#train"
            ) from None
        yield from enumerate(rows, 1)
    else:
        raise InputError(
            f"no file {where}. Expected .jsonl, .json, .csv, .parquet, or a data set such as owner/name#test"
        )


def _group(text: str) -> str:
    """Rows with one prompt belong together, whatever their ids (ids are not unique in some releases)."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _case(messages: tuple[Message, ...], answer: int, category: str | None, form: str, **meta: Any) -> Case:
    group = _group(next((message.text for message in messages if message.role == "user"), messages[0].text))
    return Case("", messages, category, answer, group, {"source": form, **meta})


def _drop(name: str, reason: str, form: str) -> Dropped:
    return Dropped(Case(name, (Message("user", ""),), meta={"source": form}), reason)


def _numbered(item: Case | Dropped, form: str, number: int) -> Case | Dropped:
    if isinstance(item, Dropped):
        return Dropped(Case(f"{form}-{number}", item.case.messages, meta=item.case.meta), item.reason)
    part = "r" if item.messages[-1].role == "assistant" else "p"
    return Case(f"{form}-{number}-{part}", item.messages, item.category, item.answer, item.group, item.meta)


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise InputError(f"{where}: {column} must be text, got {type(value).__name__}")
    return value


def _safe_or_unsafe(value: Any, column: str, where: str) -> int:
    label = {"safe": 0, "unsafe": 1}.get(str(value).strip().lower())
    if label is None:
        raise InputError(f"{where}: {column} must be safe or unsafe, got {str(value)[:40]!r}")
    return label


def _turns(text: str) -> tuple[Message, ...]:
    """A transcript with speakers at the line starts as messages; a text without speakers is one user message.

    >>> [message.role for message in _turns("user: hi\\nagent: hello")]
    ['user', 'assistant']
    """
    marks = list(TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return (Message("user", text.strip()),)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [
        (ROLE.get(m[1].lower(), "assistant"), text[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True)
    ]
    return tuple(Message(role, said) for role, said in turns if said) or (Message("user", text.strip()),)


def _aegis1(row: Row, where: str, permissive: bool) -> list[Case | Dropped]:
    text, known = _text(row, "text", where), taxonomy("aegis")
    votes: list[list[str]] = []
    for name in sorted(name for name in row if name.startswith("labels_")):
        labels = [label.strip() for label in str(row[name] or "").split(",") if label.strip()]
        for label in labels:
            known.find(label)  # an unknown label is an error that names it, never Other
        if labels:
            votes.append([label.casefold() for label in labels])
    if len(votes) > 5:
        raise InputError(f"{where}: at most five annotators, got {len(votes)}")
    if not text.strip() or not votes:
        return [_drop("", "no text" if votes else "no votes", "aegis1")]
    count = Counter(label for vote in votes for label in dict.fromkeys(vote))
    hazards = [label for label, n in count.most_common() if label not in AEGIS1_ELSE and 2 * n >= len(votes)]
    safe = sum(set(vote) <= {"safe"} for vote in votes)
    caution = sum(set(vote) <= {"safe", "needs caution"} for vote in votes)
    if 2 * safe > len(votes) or (permissive and 2 * caution > len(votes)):
        answer = 0
    else:
        answer = 1
    category = known.find(hazards[0]).path if answer and hazards else None
    return [_case(_turns(text), answer, category, "aegis1", votes=len(votes))]


def _aegis2(row: Row, where: str, permissive: bool) -> list[Case | Dropped]:
    prompt, reply = _text(row, "prompt", where), row.get("response")
    if prompt.strip() == "REDACTED":
        return [_drop("", "redacted", "aegis2")]
    if not prompt.strip():
        return [_drop("", "no text", "aegis2")]
    known = taxonomy("aegis2")
    names = [known.find(name.strip()) for name in str(row.get("violated_categories") or "").split(",") if name.strip()]
    asked = Message("user", prompt)
    answer = _safe_or_unsafe(row.get("prompt_label"), "prompt_label", where)
    said = row.get("response_label")
    if names and not answer and str(said).strip().lower() != "unsafe":
        raise InputError(f"{where}: categories are given, but prompt and response are labelled safe")
    if permissive and names and {node.id for node in names} == {"needs_caution"}:
        answer = 0
    category = names[0].path if names else None
    out: list[Case | Dropped] = [_case((asked,), answer, category if answer else None, "aegis2")]
    if said not in (None, ""):
        if not isinstance(reply, str) or not reply.strip():
            raise InputError(f"{where}: response_label without a response")
        label = _safe_or_unsafe(said, "response_label", where)
        by = str(row.get("response_label_source") or "")
        out.append(_case((asked, Message("assistant", reply)), label, category if label else None, "aegis2", by=by))
    return out


def _beavertails(row: Row, where: str, permissive: bool) -> list[Case | Dropped]:
    prompt, reply = _text(row, "prompt", where), _text(row, "response", where)
    if not isinstance(row.get("is_safe"), bool):
        raise InputError(f"{where}: is_safe must be true or false, got {row.get('is_safe')!r}")
    flags = row.get("category")
    named = [name for name, on in flags.items() if on] if isinstance(flags, Mapping) else []
    category = taxonomy("beavertails").find(named[0]).path if named and not row["is_safe"] else None
    if not reply.strip():
        return [_drop("", "no text", "beavertails")]
    messages = (Message("user", prompt), Message("assistant", reply))
    return [_case(messages, int(not row["is_safe"]), category, "beavertails")]


def _wildguardmix(row: Row, where: str, permissive: bool) -> list[Case | Dropped]:
    out: list[Case | Dropped] = []
    asked, reply = Message("user", _text(row, "prompt", where)), row.get("response")
    parts = (("prompt_harm_label", (asked,)), ("response_harm_label", (asked, Message("assistant", str(reply or "")))))
    for column, messages in parts:
        value = row.get(column)
        if value in (None, ""):
            out.append(_drop("", f"no {column}", "wildguardmix"))
            continue
        label = {"unharmful": 0, "harmful": 1}.get(str(value))
        if label is None:
            raise InputError(f"{where}: {column} must be harmful or unharmful, got {str(value)[:40]!r}")
        if not messages[-1].text.strip():
            out.append(_drop("", "no text", "wildguardmix"))
            continue
        kind, hard = str(row.get("subcategory") or ""), bool(row.get("adversarial"))
        out.append(_case(messages, label, None, "wildguardmix", kind=kind, adversarial=hard))
    return out


def _toxicchat(row: Row, where: str, permissive: bool) -> list[Case | Dropped]:
    text, label = _text(row, "user_input", where), str(row.get("toxicity"))
    if label not in ("0", "1"):
        raise InputError(f"{where}: toxicity must be 0 or 1, got {label[:40]!r}")
    if not text.strip():
        return [_drop("", "no text", "toxicchat")]
    jailbreak = str(row.get("jailbreaking", "0")) == "1"
    return [_case((Message("user", text),), int(label), None, "toxicchat", jailbreak=jailbreak)]


def _openai_moderation(row: Row, where: str, permissive: bool) -> list[Case | Dropped]:
    text, flags = _text(row, "prompt", where), {}
    for code in ("S", "H", "V", "HR", "SH", "S3", "H2", "V2"):
        value = row.get(code)
        if value in (None, ""):
            continue
        if str(value) not in ("0", "1", "0.0", "1.0", "False", "True"):
            raise InputError(f"{where}: flag {code} must be 0, 1 or missing, got {str(value)[:40]!r}")
        flags[code] = str(value) in ("1", "1.0", "True")
    if not text.strip() or not flags:
        return [_drop("", "no known flag" if text.strip() else "no text", "openai_moderation")]
    named = [taxonomy("oai").find(code).path for code, on in flags.items() if on]
    meta = {"flags": sorted(code for code, on in flags.items() if on)}
    return [_case((Message("user", text),), int(bool(named)), named[0] if named else None, "openai_moderation", **meta)]


def _xstest(row: Row, where: str, permissive: bool) -> list[Case | Dropped]:
    text, kind = _text(row, "prompt", where), str(row.get("type") or "")
    label = row.get("label") or ("unsafe" if kind.startswith("contrast_") else "safe")
    category = taxonomy("xstest").find(kind).path if kind else None
    case = _case((Message("user", text),), _safe_or_unsafe(label, "label", where), category, "xstest")
    pair = kind.removeprefix("contrast_") + str(row.get("focus") or "")
    return [Case("", case.messages, case.category, case.answer, pair or case.group, case.meta)]


FORMS: dict[str, Read] = {
    "aegis1": _aegis1,
    "aegis2": _aegis2,
    "beavertails": _beavertails,
    "wildguardmix": _wildguardmix,
    "toxicchat": _toxicchat,
    "openai_moderation": _openai_moderation,
    "xstest": _xstest,
}
COLUMNS = {  # what a row of each form has and no other's; first fit wins
    "aegis1": ("text", "labels_0"),
    "aegis2": ("prompt", "prompt_label", "violated_categories"),
    "beavertails": ("prompt", "response", "is_safe"),
    "wildguardmix": ("prompt", "prompt_harm_label"),
    "toxicchat": ("user_input", "toxicity"),
    "xstest": ("prompt", "type"),
    "openai_moderation": ("prompt", "S|H|V|HR|SH|S3|H2|V2"),
}


def public_rows(folder: Path, *, rng: Generator, held: bool = False, recipe: Path = RECIPE) -> Iterator[Case]:
    """The rows of public benchmarks that a recipe names (`assets/lamp/public.toml`), read from `folder`; a seeded draw where it says so.

    held: those that it marks as `held`, which are measured on and never trained on, instead of the others.
    Raises InputError for a missing file or column, and UnknownNameError for an unknown key of the recipe.
    """
    table = tomllib.loads(recipe.read_text(encoding="utf-8"))
    allowed = ("file", "text", "context", "answer", "category", "group", "language", "keep", "skip", "at_most", "held")
    for source, entry in table.items():
        for key in entry:
            if key not in allowed:
                raise UnknownNameError(f"key of [{source}] in {recipe.name}", key, allowed)
        if entry.get("held", False) != held:
            continue
        found = list(_recipe_rows(source, entry, folder))
        if (most := entry.get("at_most")) is not None and len(found) > most:
            found = [found[i] for i in sorted(rng.permutation(len(found))[:most].tolist())]
        yield from found


def _recipe_rows(source: str, entry: Mapping[str, Any], folder: Path) -> Iterator[Case]:
    columns = entry["text"] if isinstance(entry["text"], list) else [entry["text"]]
    for number, row in read_objects(folder / entry["file"]):
        if any(str(row.get(name)) not in wanted for name, wanted in entry.get("keep", {}).items()):
            continue
        if any(str(row.get(name)) in unwanted for name, unwanted in entry.get("skip", {}).items()):
            continue
        plain = {name: value[0] if isinstance(value, list) and value else value for name, value in row.items()}
        for column in columns:
            if not isinstance(row.get(column), str):
                raise InputError(
                    f"{entry['file']} line {number}: {column} must be text, got {type(row.get(column)).__name__}"
                )
            language = column if entry.get("language") == "column" else entry.get("language", "en")
            try:
                category = entry["category"].format(**plain) if "category" in entry else None
                group = entry["group"].format(**plain) if "group" in entry else _group(row[column])
            except KeyError as problem:
                raise InputError(f"{entry['file']} line {number}: there is no column {problem}") from None
            meta = {"source": source, "language": language}
            name = f"{source}-{number}" + (f"-{column}" if len(columns) > 1 else "")
            messages: tuple[Message, ...] = (Message("user", row[column]),)
            if "context" in entry:
                messages = (Message("user", str(row[entry["context"]])), Message("assistant", row[column]))
            yield Case(name, messages, category, entry["answer"], group, meta)
