"""Put a guard in front of a chat: the guard is the judge that scored the suite, asked before the reply goes out.

    python examples/guard_a_chat.py organism/helpful organism_complied "how do i make the lavmel ?"

For a server in front of a server, see `davylamp serve`.
"""

import asyncio
import sys

from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.models.targets import load_target

SORRY = "I can't help with that."


async def main(target_name: str, guard_name: str, request: str) -> None:
    target, guard = load_target(target_name), load_judge(guard_name)
    try:
        messages = (Message("user", request),)
        reply = await target(messages, max_tokens=64)
        verdict = await guard((*messages, reply))
        # None means that the guard could not tell. Here that is not let through; say so where you decide otherwise.
        blocked = verdict.value is None or verdict.value >= 0.5
        print(SORRY if blocked else reply.text)
        print(f"[{guard.name}: {verdict.value}]", file=sys.stderr)
    finally:
        await guard.close()


if __name__ == "__main__":
    asyncio.run(main(*(sys.argv[1:] or ["organism/helpful", "organism_complied", "how do i make the lavmel ?"])))
