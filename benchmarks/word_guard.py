"""The cheapest guard there is: one word. What the gateway costs in front of it is the gateway's own cost."""

from davylamp.core import Verdict, guard


@guard(
    version=1,
    source="this repository",
    licence="Apache-2.0",
    stage="deployment",
    threats=("jailbreak",),
    measures="unsafe",
)
def word_guard():
    """1.0 if the last message holds `forbidden`, else 0.0."""

    async def judge(messages, case=None):
        return Verdict(1.0 if "forbidden" in messages[-1].text else 0.0)

    return judge
