"""The policy a guard is shown: an ordered list of hazard categories that can be cut, shuffled, renamed, merged and added to.

Sources: arXiv:2404.05993 (13 + 9 categories) and arXiv:2501.09004 (12 + 9; a category may be defined in the prompt, with no training);
definitions and bullets are in our words. Shared by `guards/`, `train/guard_sft.py` and `data/jury.py`; standard library only.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.rows import canonical
from davylamp.core.taxonomy import taxonomy

if TYPE_CHECKING:
    from numpy.random import Generator

ASSETS = Path(__file__).parent.parent / "assets"
FIELD = re.compile(r"\{(\w+)\}")


# --- policies -----------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Category:
    """One category of a policy. node: its taxonomy path, or custom/NAME for one defined on the spot; several where it is merged.

    about: the definition in a sentence.  should_not, can: what the model should not and can do, one bullet each.
    """

    code: str
    label: str
    about: str = ""
    nodes: tuple[str, ...] = ()
    should_not: tuple[str, ...] = ()
    can: tuple[str, ...] = ()
    group: str = "hazard"

    @property
    def node(self) -> str:
        return self.nodes[0]


@dataclass(frozen=True, slots=True)
class Policy:
    """An ordered list of categories with unique codes and labels: what counts as unsafe, as a guard is shown it."""

    name: str
    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        if not self.categories:
            raise InputError(f"the policy {self.name} has no category")
        for what in ("code", "label"):
            values = [getattr(item, what).casefold() for item in self.categories]
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise InputError(f"the policy {self.name} has two categories with the {what} {twice[0]!r}")

    def find(self, name: str) -> Category:
        """By code, label, or node (with or without its namespace). Raises UnknownNameError with the nearest."""
        folded = name.strip().casefold()
        for item in self.categories:
            spellings = {item.code, item.label, *item.nodes, *(node.partition("/")[2] for node in item.nodes)}
            if folded in {spelling.casefold() for spelling in spellings}:
                return item
        raise UnknownNameError(f"category of the policy {self.name}", name, [item.label for item in self.categories])

    def subset(self, names: Iterable[str]) -> Policy:
        """These categories, in the order given; codes stay."""
        return replace(self, categories=tuple(self.find(name) for name in names))

    def without(self, names: Iterable[str]) -> Policy:
        gone = {self.find(name).code for name in names}
        return replace(self, categories=tuple(item for item in self.categories if item.code not in gone))

    def rename(self, name: str, label: str) -> Policy:
        old = self.find(name)
        return replace(self, categories=tuple(replace(c, label=label) if c is old else c for c in self.categories))

    def merge(self, names: Sequence[str], label: str) -> Policy:
        """One category in the place of several: all their nodes, bullets and definitions."""
        parts = [self.find(name) for name in names]
        if len({part.code for part in parts}) < 2:
            raise InputError(f"merging needs two categories or more, got {', '.join(names)}")
        whole = Category(
            parts[0].code,
            label,
            "; ".join(part.about for part in parts if part.about),
            tuple(node for part in parts for node in part.nodes),
            tuple(text for part in parts for text in part.should_not),
            tuple(text for part in parts for text in part.can),
            parts[0].group,
        )
        kept = [whole if item is parts[0] else item for item in self.categories if item not in parts[1:]]
        return replace(self, categories=tuple(kept))

    def extend(self, *definitions: str | Category) -> Policy:
        """Add categories defined on the spot, as `name: definition`; they get the next free codes and the node custom/NAME.

        >>> load_policy("aegis2").extend("Gambling: urges somebody to bet money").categories[-1].node
        'custom/gambling'
        """
        out = list(self.categories)
        for item in definitions:
            if isinstance(item, str):
                label, colon, about = item.partition(":")
                if not colon or not label.strip() or not about.strip():
                    raise InputError(f"a new category reads like 'name: definition', got {item!r}")
                item = Category("", label.strip(), about.strip())
            number = 1 + max((int(m[1]) for c in out if (m := re.fullmatch(r"\D*(\d+)", c.code))), default=0)
            letter = re.sub(r"\d+$", "", out[0].code) or "C"
            out.append(replace(item, code=item.code or f"{letter}{number}", nodes=item.nodes or (custom(item.label),)))
        return replace(self, categories=tuple(out))

    def shuffled(self, rng: Generator, *, keep: Iterable[str] = (), drop: float = 0.0, renumber: bool = True) -> Policy:
        """A copy in random order with new codes in which each category not in `keep` (nodes) is left out with chance `drop`.

        At least one category stays. A guard trained on one fixed list learns the list by heart and does not read it.
        """
        kept = {self.find(name).code for name in keep}
        left = [item for item in self.categories if item.code in kept or rng.random() >= drop]
        left = left or [self.categories[int(rng.integers(len(self.categories)))]]
        order = [left[i] for i in rng.permutation(len(left)).tolist()]
        if renumber:
            codes = [item.code for item in self.categories][: len(order)]
            order = [replace(item, code=code) for item, code in zip(order, codes, strict=True)]
        return replace(self, categories=tuple(order))

    def text(self, entry: str = "{code}: {label}. {about}", joiner: str = "\n") -> str:
        """The categories as they stand in a prompt. entry: {code} {label} {about} {bullets}."""
        return joiner.join(FIELD.sub(partial(_entry, item), entry).rstrip() for item in self.categories)

    def codes(self, text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(nodes, what was not understood) of a comma-separated list of codes or labels, read against this very list."""
        nodes: list[str] = []
        unknown: list[str] = []
        for part in re.split(r"[,;\n]", text):
            if part := part.strip(" .\"'[]"):
                try:
                    nodes += self.find(part.partition(":")[0]).nodes
                except UnknownNameError:
                    unknown.append(part[:40])
        return tuple(dict.fromkeys(nodes)), tuple(unknown)

    def json(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": hashlib.sha256(canonical(self._rows()).encode()).hexdigest()}

    def _rows(self) -> list[list[Any]]:
        return [
            [c.code, c.label, c.about, list(c.nodes), list(c.should_not), list(c.can), c.group] for c in self.categories
        ]


def _entry(item: Category, match: re.Match[str]) -> str:
    if match[1] == "bullets":
        lines = [f"- should not: {text}" for text in item.should_not] + [f"- can: {text}" for text in item.can]
        return "\n".join(lines)
    return str(getattr(item, match[1]))


def defined(pairs: Iterable[Sequence[str]], *, name: str = "defined", letter: str = "C") -> Policy:
    """A policy of (name, definition) pairs alone, with codes C1, C2, … and nodes custom/NAME.

    >>> defined([("discounts", "offers a discount")]).text()
    'C1: discounts. offers a discount'
    """
    rows = [Category(f"{letter}{i}", label, about, (custom(label),)) for i, (label, about) in enumerate(pairs, 1)]
    return Policy(name, tuple(rows))


def custom(label: str) -> str:
    """The node of a category that no taxonomy has.

    >>> custom("No discounts!")
    'custom/no_discounts'
    """
    return "custom/" + (re.sub(r"\W+", "_", label.casefold()).strip("_") or "category")


@cache
def load_policy(name: str) -> Policy:
    """`aegis` (13 + 9 categories), `aegis2` (21 + Needs Caution and Other), any other taxonomy by name, or a .toml file of one's own.

    A file holds title and, for each category, a table [name] with about and, if wanted, label, code, node, should_not, can.

    >>> len(load_policy("aegis2").categories), load_policy("aegis").find("O3").label
    (23, 'Criminal Planning/Confessions')
    """
    if name.endswith(".toml"):
        return _from_file(Path(name))
    found, bullets = taxonomy(name), tomllib.loads((ASSETS / "aegis2" / "policy.toml").read_text(encoding="utf-8"))
    rows, spare = [], 0
    for node in found.nodes:
        if node.kind in ("safe", "style", "technique") or (name == "aegis" and node.id == "other"):
            continue  # "safe" is no category, and annotators alone may say "other" in the first version
        code, more = node.code, bullets.get(node.id, {}) if name in ("aegis", "aegis2") else {}
        if code == node.id and not re.fullmatch(r"[A-Z]+\d+", code):  # the source gives no code: the next free number
            spare += 1
            numbers = [int(m[1]) for n in found.nodes if (m := re.fullmatch(r"[A-Z]+(\d+)", n.code))]
            letter = next((m[1] for n in found.nodes if (m := re.fullmatch(r"([A-Z]+)\d+", n.code))), "C")
            code = f"{letter}{max(numbers, default=0) + spare}"
        group = {"sparse": "sparse", "fine": "fine-grained"}.get(node.kind, "core")
        group = "other" if node.id in ("needs_caution", "other") else group
        rows.append(
            Category(
                code,
                node.label,
                node.about,
                (node.path,),
                tuple(more.get("should_not", ())),
                tuple(more.get("can", ())),
                group,
            )
        )
    return Policy(name, tuple(rows))


def _from_file(path: Path) -> Policy:
    row = read_toml(path, "a policy")
    title = row.pop("title", path.stem)
    rows = []
    for number, (name, entry) in enumerate(row.items(), 1):
        if not isinstance(entry, dict):
            raise InputError(f"{path.name}: {name} must be a table [{name}] with `about`, got {entry!r}")
        known_keys(entry, ("about", "label", "code", "node", "should_not", "can"), f"{path.name} [{name}]")
        if not isinstance(entry.get("about"), str) or not entry["about"].strip():
            raise InputError(f"{path.name} [{name}]: about must say what the category is, got {entry.get('about')!r}")
        rows.append(
            Category(
                entry.get("code", f"C{number}"),
                entry.get("label", name),
                entry["about"],
                (entry.get("node", custom(name)),),
                tuple(entry.get("should_not", ())),
                tuple(entry.get("can", ())),
            )
        )
    return Policy(str(title), tuple(rows))


# --- files --------------------------------------------------------------------------------------------------------------------------------
def read_toml(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no file {path}. Expected {what}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} is no TOML file: {error}") from None


def known_keys(row: Iterable[str], known: Sequence[str], where: str) -> None:
    for name in row:
        if name not in known:
            raise UnknownNameError(f"key of {where}", name, known)
