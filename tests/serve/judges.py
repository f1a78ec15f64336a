"""Guards for tests: ones that look for a word, and ones that misbehave in every way a guard can."""

import asyncio
import time

from davylamp.core import InputError, UnknownNameError, Verdict, guard

SEEN = []  # what `sees` was shown: the messages of each call


@guard(version=1, source="tests", licence="Apache-2.0", stage="deployment", threats=("jailbreak",), measures="unsafe")
def word(*, word: str = "forbidden", value: float = 1.0, category: str = ""):
    """`value` if the last message holds `word`, else 0.0."""

    async def judge(messages, case=None):
        hit = word in messages[-1].text
        return Verdict(value if hit else 0.0, categories=(category,) if hit and category else ())

    return judge


@guard(version=1, source="tests", licence="Apache-2.0", stage="deployment", threats=("jailbreak",), measures="unsafe")
def severity():
    """0.4, 0.7 or 1.0 if the last message holds `minor`, `moderate` or `severe`, else 0.0."""

    async def judge(messages, case=None):
        text = messages[-1].text
        return Verdict(
            max((v for w, v in (("minor", 0.4), ("moderate", 0.7), ("severe", 1.0)) if w in text), default=0.0)
        )

    return judge


@guard(version=1, source="tests", licence="Apache-2.0", stage="deployment", threats=("jailbreak",), measures="unsafe")
def sees(*, wait: float = 0.0):
    """0.0, after `wait` seconds; keeps what it was shown."""

    async def judge(messages, case=None):
        SEEN.append(messages)
        if wait:
            await asyncio.sleep(wait)
        return Verdict(0.0)

    return judge


@guard(version=1, source="tests", licence="Apache-2.0", stage="deployment", threats=("jailbreak",), measures="unsafe")
def broken(*, how: str = "raises"):
    """A guard that misbehaves: how = raises, hangs, blocks, nan, forged, none, float, cancels, recursion, unsure."""

    async def judge(messages, case=None):
        if how == "raises":
            raise RuntimeError("the secret text of the prompt: " + messages[-1].text)
        if how == "hangs":
            await asyncio.sleep(3600)
        if how == "blocks":
            time.sleep(1.0)
        if how == "nan":
            return Verdict(float("nan"))
        if how == "forged":
            verdict = Verdict(0.0)
            object.__setattr__(verdict, "value", float("nan"))
            return verdict
        if how == "none":
            return None
        if how == "float":
            return 0.0
        if how == "cancels":
            raise asyncio.CancelledError
        if how == "recursion":
            return await judge(messages, case)
        return Verdict(None)

    return judge


@guard(version=1, source="tests", licence="Apache-2.0", stage="deployment", threats=("jailbreak",), measures="unsafe")
def broken_at(*, word: str):
    """Raises if the last message holds `word`, else 0.0."""

    async def judge(messages, case=None):
        if word in messages[-1].text:
            raise RuntimeError
        return Verdict(0.0)

    return judge


@guard(version=1, source="tests", licence="Apache-2.0", stage="deployment", threats=("jailbreak",), measures="unsafe")
def no_start():
    """A guard that cannot be loaded."""
    raise OSError("the weights are not there")


@guard(version=1, source="tests", licence="Apache-2.0", stage="deployment", threats=("jailbreak",), measures="complied")
def complied():
    """A guard whose measure does not say which end is unsafe."""

    async def judge(messages, case=None):
        return Verdict(1.0)

    return judge


class Mix:
    """Two experts whose weights move with feedback."""

    def __init__(self):
        self.weights, self.known, self.labels = {"strict": 0.5, "lax": 0.5}, {}, {}

    async def __call__(self, messages, case=None):
        self.known[case.id] = messages
        return Verdict(self.weights["strict"] if "odd" in messages[-1].text else 0.0)

    async def feedback(self, id, label):
        if id not in self.known:
            raise UnknownNameError("verdict", id, [])
        if id in self.labels:
            raise InputError(f"verdict {id} has its label already")
        self.labels[id] = label
        self.weights = {"strict": 0.9, "lax": 0.1} if label else {"strict": 0.1, "lax": 0.9}


@guard(version=1, source="tests", licence="Apache-2.0", stage="deployment", threats=("jailbreak",), measures="unsafe")
def mix():
    """Two experts whose weights move with feedback."""
    return Mix()
