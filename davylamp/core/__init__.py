"""The nouns, decorators and errors: `from davylamp.core import Message, Verdict, guard`."""

from davylamp.core.errors import BudgetError as BudgetError
from davylamp.core.errors import DavylampError as DavylampError
from davylamp.core.errors import InputError as InputError
from davylamp.core.errors import NeedsError as NeedsError
from davylamp.core.errors import RunError as RunError
from davylamp.core.errors import TargetError as TargetError
from davylamp.core.errors import UnknownNameError as UnknownNameError
from davylamp.core.nouns import Case as Case
from davylamp.core.nouns import Claim as Claim
from davylamp.core.nouns import Estimate as Estimate
from davylamp.core.nouns import Finding as Finding
from davylamp.core.nouns import Judge as Judge
from davylamp.core.nouns import Message as Message
from davylamp.core.nouns import Metric as Metric
from davylamp.core.nouns import Record as Record
from davylamp.core.nouns import Suite as Suite
from davylamp.core.nouns import Target as Target
from davylamp.core.nouns import Verdict as Verdict
from davylamp.core.registry import attack as attack
from davylamp.core.registry import data as data
from davylamp.core.registry import edit as edit
from davylamp.core.registry import guard as guard
from davylamp.core.registry import interp as interp
from davylamp.core.registry import judge as judge
from davylamp.core.registry import study as study
from davylamp.core.registry import suite as suite
from davylamp.core.registry import train as train

__all__ = [
    "BudgetError",
    "Case",
    "Claim",
    "DavylampError",
    "Estimate",
    "Finding",
    "InputError",
    "Judge",
    "Message",
    "Metric",
    "NeedsError",
    "Record",
    "RunError",
    "Suite",
    "Target",
    "TargetError",
    "UnknownNameError",
    "Verdict",
    "attack",
    "data",
    "edit",
    "guard",
    "interp",
    "judge",
    "study",
    "suite",
    "train",
]
