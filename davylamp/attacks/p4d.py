"""P4D: search, with gradients, a prompt under which a protected text-to-image model paints what the ordinary one paints for the original.
Source: arXiv:2309.06135, section 3 (P4D-N, P4D-K) and section 4.1 (baselines). Differs: a question stops the search once the judge sees the
concept; the paper takes the candidate whose picture is most similar and judges that one."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from davylamp.attacks._ask import Asking, draw_seed
from davylamp.attacks._p4d import Plan, Search, Task
from davylamp.core import Case, Finding, InputError, Judge, Message, Target, TargetError, attack
from davylamp.models.diffusion import DiffusionTarget
from davylamp.models.pictures import data_url

#: Concepts that need a word that the user means it. Objects, shapes and styles need none.
EXPLICIT = ("sexual", "nudity", "nude", "violence", "blood", "gore", "self-harm", "suicide", "hate", "harassment", "shocking",
            "illegal activity")  # fmt: skip
#: Concepts that are never searched for, whoever asks.
NEVER = re.compile(
    r"\b(child(ren)?|minors?|kids?|teen(s|age|agers?)?|underage|infants?|tod(dler|dlers)|lolis?|shotas?)\b"
)


@attack(
    version=1,
    source="arXiv:2309.06135",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("unsafe-image", "adversarial"),
    needs="diffusion",
    systems=("18",),
)
async def p4d(
    target: Target,
    case: Case,
    judge: Judge,
    *,
    budget: int,
    rng: Generator,
    method: Literal["p4d_n", "p4d_k", "p4d_late", "random_n", "random_k", "shuffle", "soft_n", "soft_k", "textual_inversion",
                    "pez_prompt", "pez_image"] = "p4d_n",
    tokens: int = 16,
    every: int = 3,
    check: int = 50,
    rate: float = 0.1,
    decay: float = 0.1,
    timesteps: int = 1,
    filtered: bool = True,
    sld_form: Literal["sampler", "published"] = "sampler",
    acknowledge: bool = False,
) -> Finding:  # fmt: skip
    """Finds a prompt that leaks through a text-to-image model's protection. Needs a `diffusion/…` target; a budget of 60 is the paper's.

    The case's prompt must be one that the ordinary model renders with the concept and the protected one does not (`data p4d_ideal`).
    method: p4d_n = free tokens from scratch; p4d_k = free tokens among the original ones; p4d_late = the gradient at the embeddings
    themselves (ablation); random_n, random_k, shuffle = the controls; soft_n, soft_k, textual_inversion = embeddings that are no text;
    pez_prompt = the picture's noise as the goal; pez_image = CLIP's similarity to the picture (needs clip=PATH in the target).
    tokens: N, free tokens of the n methods (16 in the paper).  every: K, original tokens between two free ones (3 in the paper).
    check: iterations between two questions (50 in the paper); 0 = each question is a new random start.
    rate, decay: of AdamW (0.1 and 0.1 in the paper).  timesteps: averaged in an iteration (1 in the paper; 3 to 8 are steadier).
    filtered: the protection's guidance is inside the objective.  sld_form: the sampler's formula, or the one that the paper prints.
    acknowledge: you mean to audit an explicit concept; the detector is always yours.
    """
    plan = Plan(method, tokens, every, check, rate, decay, timesteps, filtered, sld_form)
    white = white_box(target)
    allow(case, white, judge, acknowledge=acknowledge)
    asking = Asking(target, case, judge, budget)
    seed, guidance = evaluation(case, white, rng)
    settings: dict[str, Any] = {"guidance": guidance}
    picture, score = None, -1.0
    for one in white.ordinary.paint(
        [asking.request] * white.pictures, range(seed, seed + white.pictures), guidance=guidance
    ):
        verdict = await judge((*case.messages, Message("assistant", media=(data_url(one),))), case)
        if verdict.value is not None and verdict.value > score:  # the best ordinary picture is what the search aims at
            picture, score = one, verdict.value
    if picture is None:
        raise TargetError("the judge could not tell of any picture of the ordinary model, so the search has no aim")
    search = Search(white, [Task(asking.request, picture, seed, guidance)], plan, rng)
    for (candidate,) in search.candidates():
        if candidate.soft is not None:
            pictures = white.protected.paint([""] * white.pictures, range(seed, seed + white.pictures), guidance=guidance,
                                             soft={k: v.repeat(white.pictures, 1, 1) for k, v in candidate.soft.items()})  # fmt: skip
            done = await _ask_soft(asking, candidate.text, pictures)
        elif not candidate.text or len(_ids(white, candidate.text)) > white.protected.room:
            asking.queries += 1  # a candidate that is no prompt once it is text counts as a question without reply
            done = asking.done
        else:
            done = await asking.ask(asking.saying(candidate.text), seed=seed, **settings)
        if done:
            break
    return asking.finding()


async def _ask_soft(asking: Asking, text: str, pictures: np.ndarray) -> bool:
    """As `Asking.ask`, for embeddings that no target takes as text: pictures painted on the spot stand for the reply."""
    reply = Message("assistant", media=tuple(data_url(one) for one in pictures))

    async def painted(messages: Any, *, seed: int = 0, **settings: Any) -> Message:
        return reply

    target, asking.target = asking.target, painted  # type: ignore[assignment]
    try:
        return await asking.ask(asking.saying(f"[embeddings near] {text}"), seed=0)
    finally:
        asking.target = target


def _ids(white: DiffusionTarget, text: str) -> list[int]:
    return list(white.protected.tokenizer()(text, add_special_tokens=False)["input_ids"])


def white_box(target: Any) -> DiffusionTarget:
    """The pair of models of a target, looked for behind its wrappers. Raises InputError if there is none."""
    seen = target
    while seen is not None:
        if isinstance(seen, DiffusionTarget):
            return seen
        seen = getattr(seen, "target", None)
    raise InputError(
        f"p4d needs gradients of a pipeline; {getattr(target, 'name', 'the target')} has none. Take diffusion/PATH:…"
    )


def evaluation(case: Case, white: DiffusionTarget, rng: Generator) -> tuple[int, float]:
    """(seed, guidance) of a case: its own `evaluation_seed` and `evaluation_guidance` where the row has them.

    Raises InputError with the row for a seed that is no whole number and a guidance that is not above 0.
    """
    given = case.meta.get("evaluation_seed")
    try:
        seed = draw_seed(rng) if given in (None, "") else int(str(given))
    except ValueError:
        raise InputError(f"row {case.id}: evaluation_seed must be a whole number, got {given!r}") from None
    given = case.meta.get("evaluation_guidance")
    try:
        guidance = white.protected.guidance if given in (None, "") else float(str(given))
    except ValueError:
        raise InputError(f"row {case.id}: evaluation_guidance must be a number, got {given!r}") from None
    if not guidance > 0:
        raise InputError(f"row {case.id}: evaluation_guidance must be above 0, got {guidance}")
    return seed, guidance


def allow(case: Case, white: DiffusionTarget, judge: Any, *, acknowledge: bool) -> None:
    """Raises InputError for an explicit concept unless the user says so.

    Looked at: the case's category and I2P's `categories`, and the words of the negative prompt or of SLD's concept. Raises it for minors
    beside an explicit concept whatever the user says, there and in the prompt.
    """
    guard = white.protected.protection
    said = f"{case.category or ''} {case.meta.get('categories', '')} {guard.negative} {guard.concept}".lower()
    found = [concept for concept in EXPLICIT if concept in said]
    if not found:
        return
    if NEVER.search(f"{said} {case.messages[-1].text.lower()}"):
        raise InputError(
            f"row {case.id}: pictures of minors and {found[0]!r} are not searched for, with no option that changes it"
        )
    if not acknowledge:
        raise InputError(
            f"{found[0]!r} is an explicit concept: say --acknowledge and give a detector of it with --judge"
        )
