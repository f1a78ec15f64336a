"""A conversation with its last reply as tokens, by the model's own chat template: what is asked, and what is learnt or checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import Dropped
from davylamp.models.hf import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a reply, by the model's generation settings and the tokenizer. Raises InputError if there is none."""
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {given} if isinstance(given, int) else set(given or ())
    ends |= {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    if not ends:
        raise InputError(
            "neither the tokenizer nor the generation settings name an end-of-text token. Set tokenizer.eos_token"
        )
    return frozenset(int(end) for end in ends)


def need_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template, so rows cannot be written as a chat. Set tokenizer.chat_template"
        )


def encode_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reply: str, ends: frozenset[int]
) -> tuple[list[int], list[int]]:
    """(prompt, answer) as token ids. The prompt is what is asked at inference, to the token; the answer ends in one end token.

    The answer is what the template writes behind the prompt for an assistant turn, up to its first end token. Where a template writes the
    prompt differently once a reply follows (it drops an empty thought, say), the reply's own text and the end token are taken.
    Raises InputError where the tokenizer has no chat template.
    """
    need_template(tokenizer)
    return prompt_ids(tokenizer, messages), answer_ids(tokenizer, messages, reply, ends)


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reply: str, ends: frozenset[int]
) -> list[int]:
    """The second part of `encode_turn`."""
    rest = _rest(tokenizer, messages, reply)
    answer = _until_end(list(tokenizer(reply if rest is None else rest, add_special_tokens=False)["input_ids"]), ends)
    if answer[-1:] and answer[-1] in ends:
        return answer
    return [*answer, tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends)]


def _rest(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reply: str) -> str | None:
    """What the template writes behind the prompt, or None if the prompt is not how the whole text begins."""
    turns: list[dict[str, Any]] = [{"role": message.role, "content": message.text} for message in messages]
    if turns[0]["role"] == "system" and len(turns) > 1 and turns[1]["role"] == "user":
        merged = [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]
    else:
        merged = turns
    for form in (turns, merged):  # as `prompt_ids` does for templates that take no system turn
        try:
            prompt = str(tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True))
            whole = str(tokenizer.apply_chat_template([*form, {"role": "assistant", "content": reply}], tokenize=False))
        except jinja2.exceptions.TemplateError:
            continue
        return whole[len(prompt) :] if whole.startswith(prompt) and reply.strip() in whole[len(prompt) :] else None
    return None


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    at = next((i for i, token in enumerate(ids) if token in ends), None)
    return ids if at is None else ids[: at + 1]


def bad_row(case: Case) -> str:
    """Why a row cannot be trained on, in a few words; empty if it can.

    >>> bad_row(Case("1", (Message("user", "hi"),)))
    'it does not end in a reply of the assistant'
    """
    roles = [message.role for message in case.messages]
    if roles.count("system") > 1:
        return "it has more than one system turn"
    if "system" in roles[1:]:
        return "its system turn is not the first"
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns[-1] != "assistant":
        return "it does not end in a reply of the assistant"
    if not case.messages[-1].text.strip():
        return "the assistant's reply is empty"
    if "tool" in roles or any(message.media or message.calls for message in case.messages):
        return "it has tool calls or media, and only text is trained on"
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        return "user and assistant do not take turns"
    return ""


def usable(rows: Sequence[Case], *, most: float = 0.05) -> tuple[list[Case], list[Dropped]]:
    """(rows to train on, the others with why). Raises InputError if more than the share `most` of them, or all, are unusable."""
    reasons = [bad_row(case) for case in rows]
    bad = [(i, case, why) for i, (case, why) in enumerate(zip(rows, reasons, strict=True), 1) if why]
    if len(bad) > most * len(rows) or len(bad) == len(rows):
        if not rows:
            raise InputError("there are no rows to train on")
        first = "; ".join(f"row {i} ({case.id}): {why}" for i, case, why in bad[:3])
        raise InputError(
            f"{len(bad)} of {len(rows)} rows cannot be trained on, and at most {most:.0%} may be. {first}. "
            "Mend them, or skip the bad rows (skip_bad)"
        )
    return [case for case, why in zip(rows, reasons, strict=True) if not why], [
        Dropped(case, why) for _, case, why in bad
    ]
