"""A provider that will not even ask its model: its policy error becomes a reply that was held back, an outcome of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from davylamp.core.errors import TargetError
from davylamp.core.nouns import Message, Target

POLICY = re.compile(
    r"answered (?:400|403|451):.*?(content[_ -]?(?:filter|policy|management)|usage polic|policy[_ -]?violation|responsible ?ai|"
    r"safety (?:system|filter)|moderation|flagged|blocked|invalid_prompt)",
    re.IGNORECASE | re.DOTALL,
)


class PolicyBlocks:
    """The target as it is, but for a policy violation (400, 403, 451): an empty reply that ended in `content_filter` instead of an error.

    Other errors stay errors. What the provider held back is never a reply of the model, and no judge calls it safe.
    """

    def __init__(self, target: Target):
        self.target, self.name = target, target.name

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.target.identity

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        try:
            return await self.target(messages, seed=seed, **settings)
        except TargetError as problem:
            if problem.retry or problem.down or not POLICY.search(str(problem)):
                raise
            return Message("assistant", "", finish="content_filter")

    async def close(self) -> None:
        if (closing := getattr(self.target, "close", None)) is not None:
            await closing()
