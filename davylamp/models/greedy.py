"""Greedy replies, the quick way where it can be: a known reply needs one teacher-forced pass, the rest is generated."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from davylamp.core.nouns import Message
from davylamp.models.hf import generate_batch, prompt_ids
from davylamp.models.thinking import split_thinking
from davylamp.models.turns import answer_ids, ends_of, need_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDTH = 64  # rows at a time


def greedy_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    known: Sequence[Sequence[str]],
    *,
    max_tokens: int = 64,
    width: int = WIDTH,
) -> tuple[list[Message], int]:
    """(greedy reply to each conversation, how many had to be generated). `known`: replies to try for each, in order.

    A known reply is the greedy one if and only if, teacher-forced, the likeliest token at each of its places, end token included, is its
    own. A failed try also says how far it was right and what came instead, so that a reply that cannot be it any more is not tried.
    """
    need_template(tokenizer)
    ends = ends_of(model, tokenizer)
    found: dict[int, Message] = {}
    waiting: dict[int, list[tuple[list[int], list[int]]]] = {}
    # A reply's tokens are taken from the first conversation that it is tried for: a hit is a proof whatever they are, a miss is generated.
    answers: dict[str, list[int]] = {}
    for i, (messages, replies) in enumerate(zip(conversations, known, strict=True)):
        prompt = prompt_ids(tokenizer, messages) if replies else []
        for reply in replies:
            if reply not in answers:
                answers[reply] = answer_ids(tokenizer, messages, reply, ends)
        waiting[i] = [(prompt, answers[reply]) for reply in replies if len(answers[reply]) <= max_tokens]
    while True:
        asked = sorted((i for i, turns in waiting.items() if turns), key=lambda i: sum(map(len, waiting[i][0])))
        if not asked:
            break
        for part in (asked[at : at + width] for at in range(0, len(asked), width)):
            said = likeliest(model, tokenizer, [waiting[i][0] for i in part])
            for i, tokens in zip(part, said, strict=True):
                prompt, answer = waiting[i].pop(0)
                same = next(
                    (k for k, (a, b) in enumerate(zip(answer, tokens, strict=True)) if not _same(a, b, ends)), None
                )
                if same is None:
                    text = str(tokenizer.decode(answer[:-1], skip_special_tokens=True)).strip()
                    thought, text = split_thinking(text)
                    found[i] = Message(
                        "assistant", text.strip(), reasoning=thought, finish="stop", tokens=(len(prompt), len(answer))
                    )
                    waiting[i] = []
                else:  # the greedy reply begins like this
                    begins = tokens[: same + 1]
                    waiting[i] = [
                        turn for turn in waiting[i]
                        if len(turn[1]) > same and all(_same(a, b, ends) for a, b in zip(begins, turn[1], strict=False))
                    ]  # fmt: skip
    rest = [i for i in range(len(conversations)) if i not in found]
    made = generate(model, tokenizer, [conversations[i] for i in rest], max_tokens=max_tokens, width=width)
    found.update(zip(rest, made, strict=True))
    return [found[i] for i in range(len(conversations))], len(rest)


def _same(a: int, b: int, ends: frozenset[int]) -> bool:
    return a == b or (a in ends and b in ends)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    width: int = WIDTH,
) -> list[Message]:
    """Greedy replies by generation: `generate_batch`, or for an encoder-decoder (T5) its counterpart."""
    if not conversations:
        return []
    if not model.config.is_encoder_decoder:
        return generate_batch(model, tokenizer, conversations, width=width, max_tokens=max_tokens)
    ends = ends_of(model, tokenizer)
    out: list[Message] = []
    for at in range(0, len(conversations), width):
        prompts = [prompt_ids(tokenizer, messages) for messages in conversations[at : at + width]]
        ids, mask = padded(prompts, _pad(tokenizer, ends), model.device)
        with torch.inference_mode():
            made: Any = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=sorted(ends),
            )
        for prompt, row in zip(prompts, made[:, 1:].tolist(), strict=True):  # the first token is the decoder's start
            end = next((k for k, token in enumerate(row) if token in ends), None)
            used = row if end is None else row[:end]
            text = str(tokenizer.decode(used, skip_special_tokens=True)).strip()
            finish = "length" if end is None else "stop"
            out.append(Message("assistant", text, finish=finish, tokens=(len(prompt), len(used) + (end is not None))))
    return out


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), each (rows, longest), padded on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def _pad(tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> int:
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else min(ends)


def likeliest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[list[int], list[int]]]
) -> list[list[int]]:
    """The likeliest token at each place of each answer, in one pass over (prompt, answer) pairs."""
    ends = ends_of(model, tokenizer)
    pad = _pad(tokenizer, ends)
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            ids, mask = padded([prompt for prompt, _ in turns], pad, model.device)
            labels, _ = padded([answer for _, answer in turns], pad, model.device)
            best = model(input_ids=ids, attention_mask=mask, labels=labels).logits.argmax(-1)
            return [row[: len(answer)] for (_, answer), row in zip(turns, best.tolist(), strict=True)]
        ids, mask = padded([prompt + answer for prompt, answer in turns], pad, model.device)
        first = min(len(prompt) for prompt, _ in turns) - 1  # logits before it are not wanted
        parameters = inspect.signature(model.forward).parameters
        kept: Mapping[str, Any] = {"logits_to_keep": ids.shape[1] - first} if "logits_to_keep" in parameters else {}
        # Right padding under a causal mask: no token of an answer sees the padding.
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
        best = logits[:, -(ids.shape[1] - first) :].argmax(-1).tolist()
    out = []
    for (prompt, answer), row in zip(turns, best, strict=True):
        start = len(prompt) - 1 - first
        out.append(row[start : start + len(answer)])
    return out
