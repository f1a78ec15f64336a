"""Everyday English prose for guards: the quotations and jokes of the Debian package `fortunes`, each taken as a safe row.

Source: fortune-mod 1.99.1 (BSD licence; see /usr/share/doc/fortunes/copyright). Nobody labelled them; they are what a guard must let pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message

#: Files that are not English prose, or too often at somebody's expense to be called safe.
LEFT_OUT = frozenset({"ascii-art", "drugs", "ethnic", "kids", "men-women", "perl", "translate-me"})
SHORTEST, LONGEST = 20, 500  # characters of an entry that is kept


def fortunes(where: str) -> Iterator[Case]:
    """The entries of a folder of `fortunes` files, each once, in an order that only their texts decide; the first N for `FOLDER#N`.

    Raises InputError for a folder without such files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "wisdom").write_text("A tool has no temper of its own.\\n%\\nToo short.\\n%\\n")
    ...     print([case.messages[-1].text for case in fortunes(folder)])
    ['A tool has no temper of its own.']
    """
    place, _, most = where.partition("#")
    if most and not most.isdigit():
        raise InputError(f"fortunes:FOLDER#N takes a whole number N, got {most!r}")
    folder, texts = Path(place), set()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name not in LEFT_OUT and not path.suffix and path.is_file():
            entries = path.read_text(encoding="utf-8", errors="replace").split("\n%\n")
            texts |= {" ".join(entry.split()) for entry in entries} if len(entries) > 1 else set()
    known = sorted((_key(text), text) for text in texts if SHORTEST <= len(text) <= LONGEST)
    if not known:
        raise InputError(f"{place} holds no fortunes: expected text files with entries parted by lines of one %")
    for key, text in known[: int(most)] if most else known:
        meta = {"source": "fortunes", "language": "en"}
        yield Case(f"fortunes-{key}", (Message("user", text),), None, 0, f"fortunes-{key}", meta)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
