"""`file/REPLIES.jsonl`: a target that says what stands in a file, so that replies made elsewhere are scored without the model.

Source: the leaderboard of arXiv:2304.10436, which takes in replies and no model. A reply belongs to the conversation that it answers, word
for word; one that is asked for and not there fails its row, and is never made up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError, TargetError
from davylamp.core.nouns import Message
from davylamp.core.rows import canonical, case_from, read_objects

REPLIES = ("reply", "response")


class FileTarget:
    """Rows of {prompt, reply or response}, or of messages that end in the assistant's reply. Several for one conversation go by seed.

    Raises InputError, with the line and without its text, for a row of neither form.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise InputError(f"no file {path}. Expected file/<replies.jsonl>, with prompt and reply in each row")
        self.name = f"file/{path.name}"
        self.identity = {"name": self.name, "sha256_of_replies": hashlib.sha256(path.read_bytes()).hexdigest()}
        self.said: dict[str, list[Message]] = {}
        for number, row in read_objects(path):
            asked, reply = _pair(row, f"{path.name} line {number}")
            self.said.setdefault(_key(asked), []).append(reply)
        if not self.said:
            raise InputError(f"{path.name} holds no replies")

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        """The reply to this conversation; of several the one at place `seed`. Raises TargetError where there is none."""
        found = self.said.get(_key(messages)) or []
        if seed >= len(found):
            what = (
                "no reply to this conversation"
                if not found
                else f"{len(found)} replies to this conversation, and seed {seed} asked"
            )
            raise TargetError(f"{self.name} holds {what}")
        return found[seed]


def _key(messages: Sequence[Message]) -> str:
    return canonical([[message.role, message.text, list(message.media)] for message in messages])


def _pair(row: Any, where: str) -> tuple[Sequence[Message], Message]:
    """(the conversation, the reply) of a row."""
    if "messages" in row:
        messages = case_from({"id": where, **row}, where).messages
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise InputError(f"{where}: the messages must end in the assistant's reply")
        return messages[:-1], messages[-1]
    reply = next((row[name] for name in REPLIES if name in row), None)
    if not isinstance(row.get("prompt"), str) or not isinstance(reply, str):
        raise InputError(f"{where}: a row needs prompt and reply (or response) as text, or messages")
    return (Message("user", row["prompt"].strip()),), Message("assistant", reply)
