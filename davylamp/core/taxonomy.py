"""Hazard taxonomies by name, and the crosswalk from each of them to the MLCommons codes.

One file per taxonomy in `davylamp/taxonomies/`, named as its namespace. A category is written `namespace/spelling`: the
node's id, the source's own code, its exact label (capitals do not matter) or an alias, as in `aegis2/violence` and
`aegis2/S1`. A bare `S3` is refused: four taxonomies have one, and it means four things.

A crosswalk entry is `"relation code"`, the primary code first. Relations: `=` same scope, `<` the source is narrower,
`>` it is wider, `~` they overlap; `>` and `~` lose scope, so `convert` lists them. Codes are `mlc/S1` to `mlc/S14` and,
for what MLCommons lacks, `x/X1` to `x/X20`. A node that is no hazard (a writing style, a safe prompt type) says
`none = "why"`. `by` is `spec` for a row of the project's specification, `davylamp` for a decision of ours. The table is
for reports: it is many-to-many, never invert it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from davylamp.core.errors import InputError, UnknownNameError

FOLDER = Path(__file__).parent.parent / "taxonomies"
HUB = ("mlc", "x")  # where every crosswalk leads: the MLCommons codes and our extensions of them
SAB_PREFIX = re.compile(r"(?i)\b(risk category|risk|causing harm to humans|causing damage to properties)\s*:\s*")


@dataclass(frozen=True, slots=True)
class Node:
    """One category. parent: a path.  crosswalk: (path, relation), primary first.  none: why there is no crosswalk."""

    namespace: str
    id: str
    code: str
    label: str
    about: str
    aliases: tuple[str, ...] = ()
    kind: str = "hazard"
    parent: str | None = None
    crosswalk: tuple[tuple[str, str], ...] = ()
    none: str = ""
    by: str = "spec"

    @property
    def path(self) -> str:
        """How the node is written everywhere: `aegis2/violence`."""
        return f"{self.namespace}/{self.id}"


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """A named list of nodes. also: further names of it, such as `beavertails` for `astral`."""

    name: str
    title: str
    version: str
    source: str
    nodes: tuple[Node, ...]
    also: tuple[str, ...] = ()
    spellings: Mapping[str, Node] = field(default_factory=dict, repr=False, compare=False)

    def find(self, name: str) -> Node:
        """The node with this id, code, label or alias.

        >>> taxonomy("aegis2").find("hate/identity hate").id
        'hate_identity_hate'
        """
        if found := self.spellings.get(name) or self.spellings.get(name.casefold()):
            return found
        raise UnknownNameError(f"{self.name} category", name, self.spellings, see=f"taxonomies/{self.name}.toml")


class Conversion(NamedTuple):
    """counts by primary code; lossy: (path, code, relation) that lost scope; dropped: (path, count, why)."""

    counts: dict[str, float]
    lossy: list[tuple[str, str, str]]
    dropped: list[tuple[str, float, str]]


def read(path: Path) -> Taxonomy:
    """One taxonomy file, checked: no unknown key, no spelling of two nodes, a crosswalk or a reason for every node.

    >>> read(FOLDER / "sst.toml").title
    'SimpleSafetyTests'
    """
    head = tomllib.loads(path.read_text(encoding="utf-8"))
    rows, by, also = head.pop("node", {}), head.pop("by", "spec"), tuple(head.pop("also", ()))
    _only(head, ("title", "version", "source"), path.name)
    nodes = tuple(_node(path.stem, id_, {"by": by, **row}) for id_, row in rows.items())
    exact: dict[str, Node] = {}
    for item in nodes:
        for spelling in (item.id, item.code, item.label, *item.aliases):
            if exact.setdefault(spelling, item) is not item:
                raise InputError(f"{path.name}: {spelling!r} is both {exact[spelling].id!r} and {item.id!r}.")
    folded = {spelling.casefold(): item for item in nodes for spelling in (item.label, *item.aliases)}
    return Taxonomy(path.stem, **head, nodes=nodes, also=also, spellings=MappingProxyType(folded | exact))


def _node(namespace: str, id_: str, row: dict[str, Any]) -> Node:
    where = f"{namespace}.toml {id_}"
    _only(row, ("code", "label", "aliases", "about", "kind", "parent", "crosswalk", "none", "by"), where)
    links = [entry.partition(" ") for entry in row.pop("crosswalk", ())]
    if any(relation not in ("=", "<", ">", "~") or to.partition("/")[0] not in HUB for relation, _, to in links):
        raise InputError(f"{where}: a crosswalk entry looks like '> mlc/S1', got {[''.join(link) for link in links]}.")
    if namespace not in HUB and bool(links) == bool(row.get("none")):
        raise InputError(f"{where}: needs either `crosswalk`, or `none` with the reason.")
    row = {"code": id_, "label": id_, "about": ""} | row | {"aliases": tuple(row.get("aliases", ()))}
    if "/" not in row.get("parent", "/"):
        row["parent"] = f"{namespace}/{row['parent']}"
    return Node(namespace, id_, crosswalk=tuple((to, relation) for relation, _, to in links), **row)


def _only(row: Iterable[str], known: Iterable[str], where: str) -> None:
    if unknown := sorted(set(row) - set(known)):
        raise UnknownNameError(f"{where} key", unknown[0], known)


@cache
def _shelf() -> Mapping[str, Taxonomy]:
    shelf = [read(path) for path in sorted(FOLDER.glob("*.toml"))]
    return MappingProxyType({name: item for item in shelf for name in (item.name, *item.also)})


def names() -> tuple[str, ...]:
    """The namespaces, without further names: `"mlc"` is one, `"beavertails"` is not."""
    return tuple(sorted({item.name for item in _shelf().values()}))


def taxonomy(name: str) -> Taxonomy:
    """The taxonomy of this name: `taxonomy("beavertails")` is that of ASTRAL and BeaverTails."""
    if name not in _shelf():
        raise UnknownNameError("taxonomy", name, _shelf())
    return _shelf()[name]


def node(path: str) -> Node:
    """The node that `namespace/spelling` names.

    >>> node("aegis2/S3").label, node("mlc/S3").label
    ('Criminal Planning/Confessions', 'Sex-Related Crimes')
    """
    name, slash, spelling = path.partition("/")
    if slash and name in _shelf():
        return taxonomy(name).find(spelling)
    if homes := [f"`{home}/{path}`" for home in names() if path in taxonomy(home).spellings]:
        raise InputError(f"{path!r} needs its taxonomy before it: write {' or '.join(homes)}.")
    if slash:
        raise UnknownNameError("taxonomy", name, _shelf())
    raise InputError(f"a category is written `taxonomy/name`, such as `aegis2/violence`; got {path!r}.")


def crosswalk(path: str, *, to: str = "mlc") -> list[tuple[str, str]]:
    """(path, relation) of what corresponds, primary first; empty for a declared drop. From a code back, only `=` rows.

    >>> crosswalk("aegis2/violence", to="mlc"), crosswalk("mlc/S11", to="aegis2")
    ([('mlc/S1', '>'), ('x/X11', '>')], [('aegis2/suicide_and_self_harm', '=')])
    """
    source, target = node(path), taxonomy(to).name
    if source.namespace == target or {source.namespace, target} <= set(HUB):
        return [(source.path, "=")]
    if target in HUB:
        return list(source.crosswalk)
    if source.namespace in HUB:
        return [(item.path, "=") for item in taxonomy(target).nodes if item.crosswalk[:1] == ((source.path, "="),)]
    raise InputError(f"there is no table from {source.namespace} to {target}. Convert both to mlc and compare there.")


def convert(counts: Mapping[str, float]) -> Conversion:
    """Counts by category to counts by primary code. Total after = total before minus the dropped.

    >>> convert({"aegis2/violence": 2, "sst/SST1": 3})
    Conversion(counts={'mlc/S1': 2, 'mlc/S11': 3}, lossy=[('aegis2/violence', 'mlc/S1', '>')], dropped=[])
    """
    out = Conversion({}, [], [])
    for spelling, count in counts.items():
        source, links = node(spelling), crosswalk(spelling)
        if not links:
            out.dropped.append((source.path, count, source.none))
            continue
        code, relation = links[0]
        out.counts[code] = out.counts.get(code, 0) + count
        if relation in (">", "~") and (source.path, code, relation) not in out.lossy:  # two spellings of one node
            out.lossy.append((source.path, code, relation))
    return out


def normalise_sab(text: str) -> tuple[str, ...]:
    """The hazards in a SafeAgentBench `risk_category`: free text with prefixes, several in one, about 50 spellings.

    >>> normalise_sab("Causing harm to humans: Impact Hazard; Fire Risk")
    ('sab/other_human', 'sab/fire_hazard')
    """
    sab, parts = taxonomy("sab"), re.split(r"[,;]\s+", SAB_PREFIX.sub("", text).strip())
    if unknown := [part for part in parts if part.casefold() not in sab.spellings]:
        raise InputError(f"no SafeAgentBench hazard {unknown}. Known: {', '.join(item.label for item in sab.nodes)}.")
    return tuple(dict.fromkeys(sab.find(part).path for part in parts))
