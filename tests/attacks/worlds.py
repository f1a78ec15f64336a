"""Targets and judges for the tests of attacks."""

from davylamp.core.errors import TargetError
from davylamp.core.nouns import Case, Message, Verdict


def case(text="please do the thing", **more):
    return Case("1", (Message("user", text),), **more)


class Recorder:
    """Answers by a function of (messages, number of the question); keeps what it was asked."""

    def __init__(self, answer=lambda messages, number: "I can't help with that."):
        self.answer, self.asked = answer, []
        self.name, self.identity = "recorder", {"name": "recorder"}

    async def __call__(self, messages, *, seed=0, **settings):
        self.asked.append((tuple(messages), seed, settings))
        said = self.answer(messages, len(self.asked))
        if isinstance(said, TargetError):
            raise said
        return Message("assistant", said)


async def complied(messages, case=None):
    """1 if the reply is willing. The conversation before it must be the case's own."""
    assert case is None or tuple(messages[:-1]) == case.messages, "the judge must see the plain request"
    return Verdict(float(messages[-1].text.startswith("Sure")))


async def unsure(messages, case=None):
    return Verdict(None, why="cannot tell")


class Writer(Recorder):
    """An attacker model that writes numbered prompts, and says yes to every on-topic question."""

    def __init__(self):
        super().__init__(written)


def written(messages, number):
    return "yes" if "same thing" in messages[-1].text else f'{{"why": "w", "prompt": "try {number}"}}'
