"""Rows as prompts for the things that look inside a model: which are the harmful ones, which the benign, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.core.rows import CaseFile
from davylamp.models.hf import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BENIGN = {
    "label": ("safe", "benign"),
    "set": ("benign", "lookalikes", "capability"),
}  # values of meta that mark a row as benign


def split(rows: Sequence[Case], contrast: str | Sequence[Case] = "") -> tuple[list[Case], list[Case]]:
    """(harmful rows, benign rows). A row whose meta.label is safe or benign, or whose meta.set is benign, lookalikes or capability, is
    benign; so are all rows of `contrast` (a .jsonl file, or rows). Raises InputError without a harmful row.

    >>> from davylamp.core.nouns import Message
    >>> asked = (Message("user", "hi"),)
    >>> [case.id for case in split([Case("1", asked), Case("2", asked, meta={"label": "safe"})])[1]]
    ['2']
    """
    kinds = [any(case.meta.get(key) in values for key, values in BENIGN.items()) for case in rows]
    harmful = [case for case, is_benign in zip(rows, kinds, strict=True) if not is_benign]
    benign = [case for case, is_benign in zip(rows, kinds, strict=True) if is_benign]
    if not harmful:
        what = "are all benign" if rows else "are missing: give them with --rows"
        raise InputError(f"the prompts {what}. Harmful requests are needed to see where they are refused")
    benign += (
        CaseFile(contrast) if isinstance(contrast, str) and contrast else [c for c in contrast if isinstance(c, Case)]
    )
    return harmful, benign


def asked(case: Case) -> Case:
    """The row without a last reply of the assistant: what is put to the model. Raises InputError if nothing is left."""
    messages = case.messages[:-1] if case.messages[-1].role == "assistant" else case.messages
    if not messages:
        raise InputError(f"row {case.id} holds no request")
    return replace(case, messages=messages)


def encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Case], wrapper: str = ""
) -> list[list[int]]:
    """The rows' prompts as tokens, up to where the reply begins.

    wrapper: a text with {prompt} in it, which the last user turn fills, in place of the tokenizer's chat template; \\n is a line break.
    Raises InputError for a prompt without tokens or longer than the model takes, and where there is neither template nor wrapper.
    """
    if wrapper and "{prompt}" not in wrapper:
        raise InputError(f"the wrapper must hold {{prompt}}, got {wrapper!r}")
    if not wrapper and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template. Give a wrapper, such as 'Question: {prompt}\\nAnswer:'")
    config: Any = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or 2**31
    out = []
    for row in rows:
        messages = asked(row).messages
        if wrapper:
            text = wrapper.replace("\\n", "\n").replace("{prompt}", messages[-1].text)
            ids = list(tokenizer(text)["input_ids"])
        else:
            ids = prompt_ids(tokenizer, messages)
        if not ids:
            raise InputError(f"row {row.id} is empty once it is tokens")
        if len(ids) > room:
            raise InputError(f"row {row.id} has {len(ids)} tokens; the model takes {room}")
        out.append([int(token) for token in ids])
    return out


def same_vocabulary(model: Any, other: Any) -> None:
    """Raises InputError if two models cannot read the same tokens."""
    ours, theirs = (m.get_input_embeddings().weight.shape[0] for m in (model, other))
    if ours != theirs:
        raise InputError(f"the two models must share a vocabulary, got {ours} and {theirs} tokens")
