"""What a model owes, and what was let off: the two files that `davylamp case` reads, checked before anything else."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.registry import STAGES

REQUIREMENTS = Path(__file__).parent / "assets" / "case" / "requirements.toml"
KINDS = {"rate": ("metrics", "at_most", "at_least", "keep", "rows"), "record": ("needs",)}
COMMON = ("stage", "title", "kind", "when")
#: What a model may be put to. A requirement that names none is owed by all; one with `products` only by these.
PRODUCTS = ("chat", "retrieval", "agent")
NEEDS = ("data", "lineage", "judge", "guard")


def requirements(path: Path | None = None, product: str = "chat") -> dict[str, dict[str, Any]]:
    """The requirements of a file that this product owes, by id, all of them checked. Raises InputError that names the place."""
    if product not in PRODUCTS:
        raise UnknownNameError("product", product, PRODUCTS)
    path = path or REQUIREMENTS
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: requirements are a TOML file with one table each ({error})") from None
    if not rows:
        raise InputError(f"{path} holds no requirement: a case against nothing would always pass")
    for name, row in rows.items():
        where = f"[{name}] ({path.name})"
        if not isinstance(row, Mapping):
            raise InputError(f"{where} must be a table, got {row!r}")
        if row.get("kind") not in KINDS:
            raise InputError(f"{where} kind must be rate or record, got {row.get('kind')!r}")
        for key in row:
            if key not in (*COMMON, "products", *KINDS[row["kind"]]):
                raise UnknownNameError(f"key of {where}", key, (*COMMON, "products", *KINDS[row["kind"]]))
        for key in COMMON:
            if not isinstance(row.get(key), str):
                raise InputError(f"{where} needs {key} as text, got {row.get(key)!r}")
        if row["stage"] not in STAGES:
            raise UnknownNameError(f"stage of {where}", row["stage"], STAGES)
        named = row.get("products", list(PRODUCTS))
        if not isinstance(named, list) or not named:
            raise InputError(f"{where} products must be a list of {', '.join(PRODUCTS)}, got {named!r}")
        for one in named:
            if one not in PRODUCTS:
                raise UnknownNameError(f"product of {where}", str(one), PRODUCTS)
        if row["when"] not in ("always", "changed"):
            raise InputError(f"{where} when must be always or changed, got {row['when']!r}")
        if row["kind"] == "record" and row.get("needs") not in NEEDS:
            raise UnknownNameError(f"needs of {where}", str(row.get("needs")), NEEDS)
        if row["kind"] == "rate":
            names = row.get("metrics")
            if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
                raise InputError(f"{where} needs metrics as a list of names, got {names!r}")
            limits = [key for key in ("at_most", "at_least", "keep") if key in row]
            if len(limits) != 1:
                raise InputError(f"{where} needs exactly one of at_most, at_least and keep, got {limits or 'none'}")
            for key in (*limits, *(["rows"] if "rows" in row else [])):
                if isinstance(row[key], bool) or not isinstance(row[key], int | float) or row[key] < 0:
                    raise InputError(f"{where} {key} must be a number of 0 or more, got {row[key]!r}")
    return {name: row for name, row in rows.items() if product in row.get("products", PRODUCTS)}


def waivers(path: Path | None, known: Iterable[str], today: date) -> dict[str, str]:
    """Requirement -> words of its waiver, for those that have not run out. Each needs requirement, by, reason and until (a date)."""
    if path is None:
        return {}
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("waiver", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: waivers are a TOML file of [[waiver]] tables ({error})") from None
    out, known = {}, list(known)
    for index, row in enumerate(rows, 1):
        where = f"waiver {index} ({path.name})"
        if set(row) != {"requirement", "by", "reason", "until"} or not isinstance(row["until"], date):
            raise InputError(f"{where} needs requirement, by, reason and until (a date such as 2027-01-31), got {row}")
        if row["requirement"] not in known:
            raise UnknownNameError(f"requirement of {where}", str(row["requirement"]), known)
        if not str(row["by"]).strip() or not str(row["reason"]).strip():
            raise InputError(f"{where} needs a name in `by` and a reason")
        if row["until"] >= today:
            out[row["requirement"]] = f"waived by {row['by']} until {row['until']}: {row['reason']}"
    return out
