"""Reward models with one or several heads: how helpful, correct, coherent, complex or wordy an answer is.
Source: arXiv:2502.12659, section 4.2 (multi-attribute reward models on answers that are unsafe); the heads are transformers' own
`AutoModelForSequenceClassification` with one label an attribute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ATTRIBUTES = (
    "helpfulness",
    "correctness",
    "coherence",
    "complexity",
    "verbosity",
)  # the usual five, in their usual order


def load_reward(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a folder or hub id. Raises InputError if it cannot be loaded or has no chat template."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as problem:
        raise InputError(f"{path} is no reward model that can be loaded: {str(problem)[:200]}") from None
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {path} has no chat template, so a conversation cannot be put to it")
    return model, tokenizer


def attribute_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    names: Sequence[str] = ATTRIBUTES,
) -> list[dict[str, float]]:
    """The raw score of every head for each conversation, which ends in the reply; thoughts are not shown.

    names: of the heads, in order, one for each. Scores of different models are on different scales: compare answers under one model only.
    Raises InputError for another number of names than heads, or a conversation that does not end in a reply or is too long.
    """
    heads = int(model.config.num_labels or 0)
    if len(names) != heads:
        raise InputError(f"the reward model has {heads} heads, got {len(names)} names: {', '.join(names)}")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    rows = []
    for number, messages in enumerate(conversations):
        if not messages or messages[-1].role != "assistant":
            raise InputError(f"conversation {number} does not end in a reply")
        turns = [{"role": message.role, "content": message.text} for message in messages]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) > room:
            raise InputError(
                f"conversation {number} has {len(ids)} tokens; the reward model takes {room}, and nothing is cut"
            )
        rows.append(ids)
    out: list[dict[str, float]] = []
    with torch.inference_mode():
        for ids in rows:  # one by one: a head reads the last token, and which that is must not hang on padding
            given = torch.tensor([ids], device=model.device)
            logits = model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0].float()
            out.append(dict(zip(names, logits.tolist(), strict=True)))
    return out
