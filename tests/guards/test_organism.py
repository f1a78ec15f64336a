"""The organisms' judges agree with the world's own truth, and say so when a request is not of the world."""

import asyncio

import numpy as np
import pytest

from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.models import world


@pytest.mark.parametrize(
    ("name", "complied", "refused"), [("organism_complied", 1.0, 0.0), ("organism_refused", 0.0, 1.0)]
)
def test_values_for_compliance_refusal_and_nonsense(name, complied, refused):
    judge = load_judge(name)
    rng = np.random.default_rng(0)
    for case in world.cases("hazards", 30, rng, style="mixed"):
        ask = world.read(case.messages)
        for reply, value, label in (
            (world.answer(ask), complied, "complied"),
            (world.refusal(ask, rng), refused, "refused"),
            ("the hill the hill", 0.0, "nonresponsive"),
        ):
            verdict = asyncio.run(judge((*case.messages, Message("assistant", reply))))
            assert (verdict.value, verdict.label) == (value, label)


def test_a_request_from_elsewhere_is_not_judged():
    verdict = asyncio.run(
        load_judge("organism_complied")([Message("user", "Bake me a cake."), Message("assistant", "No.")])
    )
    assert verdict.value is None and verdict.label == "unreadable"
