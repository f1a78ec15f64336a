"""Guard training: a causal model learns to read a policy and a conversation and to answer in a guard's format; LoRA by default.
Source: arXiv:2501.09004 (instruction format, refusal augmentation, topic-following blend) and arXiv:2404.05993 (adapters, permissive and
defensive readings). Rank, rate and epochs could not be confirmed from the papers: the defaults are ours. Training itself: models/fit.py."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from davylamp.core import Case, InputError, Message, train
from davylamp.data.guard_format import Format, answer_text, load_format, render
from davylamp.data.guard_policy import Policy, defined, load_policy
from davylamp.models.adapters import Lora
from davylamp.models.fit import fit

if TYPE_CHECKING:
    from numpy.random import Generator

PLAIN = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"


@train(
    version=1,
    source="arXiv:2501.09004; arXiv:2404.05993",
    licence="Apache-2.0",
    stage="post-training",
    threats=("harmful-compliance", "distribution-shift"),
    needs="train",
    systems=("11", "26"),
)
def guard_sft(
    model: Any,
    rows: Sequence[Case],
    *,
    tokenizer: Any,
    rng: Generator,
    family: str = "aegis2",
    policy: str = "",
    shuffle: bool = True,
    drop: float = 0.3,
    method: Literal["lora", "full"] = "lora",
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    lr: float = 1e-4,
    batch: int = 32,
    epochs: int = 3,
    steps: int | None = None,
    micro: int | None = None,
    freeze: tuple[str, ...] = (),
    max_length: int | None = 4096,
    keep_adapter: bool = False,
) -> Any:
    """Train a guard on labelled conversations: the last message is judged, `answer` 1 (unsafe) or 0, `meta.violated` or `category` the
    nodes.

    family: a format whose prompt is written here (aegis1, aegis2, or a .toml file).  policy: a taxonomy or .toml file, by default the
    format's; a row may bring its own in `meta.policy` (list of [name, definition]), as topic rows do.  shuffle: order and codes anew for
    every row, each unused category left out with chance `drop`: else the list is learnt by heart, and a definition in the prompt changes
    nothing. method, rank, alpha, dropout: LoRA on all linear layers, or full.  lr, batch, epochs or steps, micro, freeze, max_length: as
    for sft; cosine. keep_adapter: return the adapter unmerged, so that several experts can share one base.

    Rows whose text is REDACTED, and rows without a label, are refused. Returns the trained model.
    """
    form = load_format(family)
    if form.how not in ("user", "raw"):
        raise InputError(
            f"guard_sft needs a format whose prompt is written here (aegis1, aegis2, a .toml file), got {family}"
        )
    if not 0 <= drop < 1:
        raise InputError(f"drop must be in [0, 1), got {drop}")
    shown = load_policy(policy or form.taxonomy or "aegis2")
    copies = epochs if steps is None else -(-steps * batch // max(1, len(rows)))
    lessons = [
        lesson(case, form, shown, rng, shuffle=shuffle, drop=drop, number=number)
        for number in range(max(1, copies if shuffle else 1))  # with shuffling, every epoch shows each row anew
        for case in rows
    ]
    if form.how == "raw":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = PLAIN
    found = fit(
        model,
        lessons,
        tokenizer=tokenizer,
        rng=rng,
        method=method,
        lora=Lora(rank, alpha, "all-linear", dropout) if method == "lora" else None,
        lr=lr,
        batch=batch,
        epochs=None if steps is not None else (1 if shuffle else epochs),
        steps=steps,
        micro=micro,
        freeze=freeze,
        schedule="cosine",
        warmup=max(1, (steps or len(lessons) // batch) // 20),
        max_length=max_length,
        keep_adapter=keep_adapter,
    )
    return found.model


def lesson(
    case: Case,
    form: Format,
    policy: Policy,
    rng: Generator,
    *,
    shuffle: bool = True,
    drop: float = 0.3,
    number: int = 0,
) -> Case:
    """One row to learn from: the prompt as the user's turn, the right answer as the assistant's. Raises InputError for a row without a
    label.

    >>> import numpy as np
    >>> row = Case("1", (Message("user", "hello"),), answer=0)
    >>> lesson(row, load_format("aegis2"), load_policy("aegis2"), np.random.default_rng(0)).messages[-1].text
    '{"User Safety": "safe"}'
    """
    label = {"0": False, "1": True, "False": False, "True": True}.get(str(case.answer))
    if label is None:
        raise InputError(f"row {case.id}: a guard's row needs answer 1 (unsafe) or 0, got {case.answer!r}")
    if any(message.text.strip() == "REDACTED" for message in case.messages):
        raise InputError(f"row {case.id} is redacted: put its text back first (rehydrate), or leave it out")
    own = case.meta.get("policy")
    if own:
        policy = defined(own, name=f"of row {case.id}", letter=policy.categories[0].code.rstrip("0123456789") or "C")
    nodes = tuple(case.meta.get("violated") or ((case.category,) if case.category and label else ()))
    known = {node for item in policy.categories for node in item.nodes}
    if unknown := [node for node in nodes if node not in known]:
        raise InputError(f"row {case.id}: the policy {policy.name} has no category {unknown[0]!r}")
    if shuffle:
        policy = policy.shuffled(rng, keep=nodes, drop=0.0 if own else drop)
    role = case.messages[-1].role
    verdicts: dict[str, bool | None] = {role: label}
    if form.read == "json" and role == "assistant":  # the format wants the user's verdict too
        asked = case.meta.get("prompt_unsafe")
        verdicts = {"user": label if asked is None else bool(asked), "assistant": label}
    prompt = render(form, policy, case.messages)
    answer = answer_text(form, policy, verdicts, nodes)
    return Case(f"{case.id}#{number}", (Message("user", prompt), Message("assistant", answer)), case.category)
