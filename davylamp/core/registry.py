"""What there is: every decorated function, found by reading source with `ast`. Nothing is imported until it is used.

A thing is one function in the folder of its kind. Its decorator holds literals (version, source, stage, …); its keyword-only
arguments are its options. A name may also be a path to a lone file (`my_suite.py` or `my_file.py:my_suite`) or come from
another package by entry point (group `davylamp.suites`, `davylamp.guards`, …).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.needs import need

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "data": "data",
    "train": "train",
    "edit": "edits",
    "interp": "interp",
    "suite": "suites",
    "attack": "attacks",
    "guard": "guards",
    "judge": "core",
    "study": "studies",
}  # a judge needs the answer key, a guard does not
STAGES = ("data", "pre-training", "post-training", "deployment", "evaluation")
THREATS = (
    "adversarial",
    "data-poisoning",
    "backdoor",
    "jailbreak",
    "prompt-injection",
    "energy-latency",
    "data-extraction",
    "model-extraction",
    "membership-inference",
    "agent",
    "harmful-compliance",
    "over-refusal",
    "fine-tuning",
    "misalignment",
    "hallucination",
    "bias",
    "unsafe-code",
    "unsafe-image",
    "distribution-shift",
    "capability-loss",
)
#: Keyword arguments that the caller hands over; in these kinds they are no options.
INJECTED = {
    **dict.fromkeys(("data", "train", "edit", "attack"), ("rng", "budget", "tokenizer", "rows", "out")),
    "interp": ("rng", "tokenizer", "other"),
}
FIELDS = {
    "version": int,
    "source": str,
    "licence": str,
    "stage": str,
    "threats": tuple,
    "needs": str,
    "measures": str,
    "systems": tuple,
}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Param:
    """One option: its name, its annotation as written, its default (the source text if it is no literal)."""

    name: str
    type: str
    default: Any
    required: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing of the registry, as read from its source."""

    kind: str
    name: str
    summary: str
    version: int
    source: str
    licence: str
    stage: str
    threats: tuple[str, ...]
    needs: str
    measures: str
    systems: tuple[str, ...]
    params: tuple[Param, ...]
    doc: str
    file: Path
    module: str | None

    def load(self) -> Callable[..., Any]:
        """Import the function. Raises NeedsError if its extra is missing."""
        need(self.needs, self.name)
        if self.module is not None:
            return getattr(importlib.import_module(self.module), self.name)
        name = f"davylamp_file_{self.file.stem}"
        spec = importlib.util.spec_from_file_location(name, self.file)
        if spec is None or spec.loader is None:
            raise InputError(f"{self.file} cannot be imported as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses in the file look themselves up here
        spec.loader.exec_module(module)
        return getattr(module, self.name)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with `given` filled in; text is turned into the annotated type. Raises InputError on unknown or bad ones."""
        known = {param.name: param for param in self.params}
        for name in given:
            if name not in known:
                raise UnknownNameError(f"option of {self.name}", name, known, see=f"davylamp show {self.name}")
        out = {}
        for name, param in known.items():
            if name in given:
                out[name] = coerce(given[name], param, self.name)
            elif param.required:
                raise InputError(f"{self.name} needs the option {name} ({param.type}). See: davylamp show {self.name}")
            else:
                out[name] = param.default
        return out

    def json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "summary": self.summary,
            "version": self.version,
            "source": self.source,
            "licence": self.licence,
            "stage": self.stage,
            "threats": list(self.threats),
            "needs": self.needs,
            "measures": self.measures,
            "systems": list(self.systems),
            "options": {param.name: {"type": param.type, "default": param.default} for param in self.params},
        }


def _decorator(kind: str) -> Callable[..., Callable[[F], F]]:
    def decorate(
        *,
        version: int,
        source: str,
        licence: str,
        stage: str,
        threats: tuple[str, ...],
        needs: str = "",
        measures: str = "",
        systems: tuple[str, ...] = (),
    ) -> Callable[[F], F]:
        # The registry reads these literals from source; at run time the function stays exactly what was written.
        return lambda function: function

    decorate.__name__ = kind
    decorate.__doc__ = (
        f"Mark a function as a {kind}. All arguments must be literals: they are read without importing the file."
    )
    return decorate


data, train, edit, interp, suite, attack, guard, judge, study = (_decorator(kind) for kind in FOLDERS)


def coerce(value: Any, param: Param, owner: str) -> Any:
    """Turn command-line text into the annotated type; other values pass unchanged.

    >>> coerce("3", Param("n", "int", 1), "demo"), coerce("a,b", Param("arms", "tuple[str, ...]", ()), "demo")
    (3, ('a', 'b'))
    """
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) and param.type.startswith("tuple") else value
    kind = param.type.replace(" ", "").removesuffix("|None")
    if value == "none" and param.type.endswith("None"):
        return None
    try:
        if kind == "int":
            return int(value)
        if kind == "float":
            return float(value)
        if kind == "bool":
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
        if kind.startswith("tuple["):
            inner = Param(param.name, kind[6:-1].removesuffix(",..."), None)
            return tuple(coerce(part.strip(), inner, owner) for part in value.split(",") if part.strip())
        if kind.startswith("Literal["):
            allowed = ast.literal_eval(f"({kind[8:-1]},)")
            return {str(item): item for item in allowed}[value]
    except (ValueError, KeyError):
        raise InputError(f"option {param.name} of {owner} must be {param.type}, got {value!r}") from None
    return value


def _literal(node: ast.expr, file: Path) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise InputError(
            f"{file}:{node.lineno}: a decorator's arguments must be literals, got {ast.unparse(node)}"
        ) from None


def _default(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


_MARK = re.compile(rf"^@(?:{'|'.join(FOLDERS)})\(", re.MULTILINE)
_HEAD = re.compile(r"^(?:async )?def ", re.MULTILINE)
_NEXT = re.compile(r"^[^\s)#]", re.MULTILINE)
_LITERALS = re.compile(r"^(\w+) = (Literal\[[^\]]*\])", re.MULTILINE)


def _marked(text: str) -> list[ast.stmt]:
    """The decorated functions of a file of ours, parsed alone: a whole file takes ten times as long, and `list` reads them all."""
    out: list[ast.stmt] = []
    end = 0
    for mark in _MARK.finditer(text):
        start = mark.start()
        if start < end or text.count('"""', 0, start) % 2 or text.count("'''", 0, start) % 2:
            continue  # of the function before, or inside a text
        head = _HEAD.search(text, start)
        if head is None:
            break
        after = _NEXT.search(text, head.end())
        end = after.start() if after else len(text)
        tree = ast.parse(text[start:end])
        ast.increment_lineno(tree, text.count("\n", 0, start))
        out += tree.body
    return out


def read(file: Path, module: str | None = None) -> list[Entry]:
    """All decorated functions of one source file. Raises InputError with file and line where the decorator is wrong."""
    try:
        text = file.read_text(encoding="utf-8")
        body = _marked(text) if module is not None else ast.parse(text, filename=str(file)).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not readable Python: {error}") from None
    entries = []
    aliases = {  # `Style = Literal["plain", …]` at the top of the file may stand in an annotation
        found[1]: ast.unparse(ast.parse(found[2], mode="eval")) for found in _LITERALS.finditer(text)
    }
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for mark in node.decorator_list:
            if not (isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id in FOLDERS):
                continue
            given = {word.arg: _literal(word.value, file) for word in mark.keywords if word.arg}
            where = f"{file.name}:{mark.lineno}: @{mark.func.id}"
            for name, value in given.items():
                if name not in FIELDS:
                    raise UnknownNameError(f"argument of {where}", name, FIELDS)
                if not isinstance(value, FIELDS[name]):
                    raise InputError(f"{where}: {name} must be a {FIELDS[name].__name__}, got {value!r}")
            absent = [name for name in ("version", "source", "licence", "stage", "threats") if name not in given]
            if absent:
                raise InputError(f"{where} needs {', '.join(absent)}. See: CONTRIBUTING.md")
            if given["stage"] not in STAGES:
                raise UnknownNameError(f"stage ({where})", given["stage"], STAGES)
            for threat in given["threats"]:
                if threat not in THREATS:
                    raise UnknownNameError(f"threat ({where})", threat, THREATS)
            doc = ast.get_docstring(node) or ""
            params = tuple(
                Param(
                    arg.arg,
                    aliases.get(ast.unparse(arg.annotation), ast.unparse(arg.annotation)) if arg.annotation else "str",
                    None if default is None else _default(default),
                    required=default is None,
                )
                for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                if arg.arg not in INJECTED.get(mark.func.id, ("rng",))
            )
            entries.append(
                Entry(
                    kind=mark.func.id,
                    name=node.name,
                    summary=doc.split("\n\n")[0].replace("\n", " ").strip(),
                    version=given["version"],
                    source=given["source"],
                    licence=given["licence"],
                    stage=given["stage"],
                    threats=given["threats"],
                    needs=given.get("needs", ""),
                    measures=given.get("measures", ""),
                    systems=given.get("systems", ()),
                    params=params,
                    doc=doc,
                    file=file,
                    module=module,
                )
            )
    return entries


@cache
def shipped(folder: str) -> tuple[Entry, ...]:
    """The things of one folder of davylamp. A lookup reads the folders of the kinds it is for, and no others."""
    files = [file for file in sorted((ROOT / folder).glob("*.py")) if not file.name.startswith("_")]
    return tuple(entry for file in files for entry in read(file, f"davylamp.{folder}.{file.stem}"))


def builtin(kinds: tuple[str, ...] = tuple(FOLDERS)) -> tuple[Entry, ...]:
    """Everything of these kinds that ships with davylamp, sorted by kind and name."""
    folders = dict.fromkeys(FOLDERS[kind] for kind in kinds)
    entries = [entry for folder in folders for entry in shipped(folder) if entry.kind in kinds]
    return tuple(sorted(entries, key=lambda entry: (entry.kind, entry.name)))


@cache
def plugins() -> tuple[Entry, ...]:
    """Everything other installed packages add by entry point; a broken one is reported by `davylamp doctor`, not here."""
    from importlib.metadata import entry_points  # slow to import; only a lookup that found nothing built in comes here

    entries = []
    for kind, folder in FOLDERS.items():
        for point in entry_points(group=f"davylamp.{folder}"):
            module, _, name = point.value.partition(":")
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.origin:
                entries += [
                    entry for entry in read(Path(spec.origin), module) if entry.kind == kind and entry.name == name
                ]
    return tuple(entries)


def entries(kind: str | None = None) -> Iterator[Entry]:
    """Built-in things and plug-ins, optionally of one kind."""
    return (entry for entry in builtin() + plugins() if kind in (None, entry.kind))


def find(kind: str | tuple[str, ...], name: str) -> Entry:
    """The entry of that name: built in, from a plug-in, or in a lone file (`file.py` or `file.py:name`).

    >>> find("judge", "exact").measures
    'correct'
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    what = " or ".join(kinds)
    path, _, inner = name.partition(".py:") if ".py:" in name else (name.removesuffix(".py"), "", "")
    if name.endswith(".py") or inner:
        file = Path(path + ".py")
        if not file.is_file():
            raise InputError(f"no file {file} (asked for a {what} in it)")
        found = [entry for entry in read(file.resolve()) if entry.kind in kinds and inner in ("", entry.name)]
        if len(found) != 1:
            names = ", ".join(entry.name for entry in found) or "none"
            raise InputError(
                f"{file} must hold one {what}{f' named {inner}' if inner else ''}, found: {names}. Write {file}:NAME"
            )
        return found[0]
    for pool in (lambda: builtin(kinds), plugins):
        for entry in pool():
            if entry.kind in kinds and entry.name == name:
                return entry
    known = [entry.name for entry in entries() if entry.kind in kinds]
    raise UnknownNameError(
        what, name, known, see=f"davylamp list {kinds[0]}s" if kinds[0] != "study" else "davylamp list studies"
    )
