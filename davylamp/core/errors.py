"""The one error tree. A message is one to three short sentences: what was expected, what came, what to do.

DavylampError                 exit 3   could not run
├── InputError                exit 2   what was given cannot be used: an option, a row, a file, a name
│   └── UnknownNameError      exit 2   a name that nothing answers to; says the nearest one
├── NeedsError                exit 3   an optional package is missing; says what to type
├── TargetError               exit 3   the target (or a judge's model) did not give a usable reply
├── BudgetError               exit 3   the run's limit of calls or tokens is reached
└── RunError                  exit 3   the run cannot go on: folder in use, disk full, target down
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DavylampError(Exception):
    """Base of everything davylamp raises on purpose."""

    exit_code = 3


class InputError(DavylampError):
    """What the user gave cannot be used."""

    exit_code = 2


class UnknownNameError(InputError):
    """A name that nothing answers to.

    >>> str(UnknownNameError("guard", "refusl", ["refusal", "lamp"], see="davylamp list guards"))
    "no guard named 'refusl'. Did you mean 'refusal'? See: davylamp list guards"
    """

    def __init__(self, what: str, name: str, known: Iterable[str], *, see: str = ""):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if near:
            hint = f" Did you mean {near[0]!r}?"
        elif 0 < len(known) <= 12:
            hint = f" Known: {', '.join(known)}."
        else:
            hint = ""
        super().__init__(f"no {what} named {name!r}.{hint}{f' See: {see}' if see else ''}")
        self.name, self.nearest = name, near[0] if near else None


class NeedsError(DavylampError):
    """An optional package is missing."""


class TargetError(DavylampError):
    """The target gave no usable reply.

    retry: whether asking again may help.  after: seconds the server asked to wait, if it did.
    down: the server could not be reached at all.
    """

    def __init__(self, message: str, *, retry: bool = False, after: float | None = None, down: bool = False):
        super().__init__(message)
        self.retry, self.after, self.down = retry, after, down


class BudgetError(DavylampError):
    """The run's limit of calls or tokens is reached."""


class RunError(DavylampError):
    """The run cannot go on."""
