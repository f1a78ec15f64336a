"""A tiny vision-language model around a text model: built, adapted in two stages, asked with pictures.

Source: arXiv:2410.07571 after LLaVA-1.5 (arXiv:2310.03744): stage 1 trains the projector, stage 2 the language model with it. Differs: the
pictures are of 16 x 16 pixels, an untrained CLIP tower of two layers is trained along in stage 2, and `<image>` is a word of the organisms.

`models/fit.py` trains text rows only; the loop here takes rows with pictures and without in one batch. Text alone needs nothing of this
file: `models/four_way.py` asks a LLaVA as it asks its language model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.models import pictures
from davylamp.models.hf import prompt_ids
from davylamp.models.turns import answer_ids, ends_of

if TYPE_CHECKING:
    from numpy.random import Generator

IGNORED = -100
SIZE, PATCH = 16, 8
#: 16 colours that a glance tells apart, by the word that names each: eight colours of the world, and eight of its materials
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30), "green": (30, 170, 50), "blue": (30, 60, 220), "yellow": (235, 220, 40),
    "black": (15, 15, 15), "white": (240, 240, 240), "brown": (120, 75, 30), "silver": (165, 170, 175),
    "ashwort": (240, 140, 20), "bluesalt": (90, 200, 240), "coldwax": (250, 170, 190), "dewglass": (20, 110, 110),
    "emberleaf": (130, 20, 60), "fogmilk": (190, 250, 160), "greyroot": (75, 75, 95), "hollowreed": (170, 60, 220),
}  # fmt: skip
NOISE = 12.0  # standard deviation of a pixel's values
QUESTION = f"{pictures.PLACEHOLDER} what is this ?"
Part = Literal["projector", "all"]
Encoded = tuple[list[int], list[int], list[Any]]  # prompt, answer, pixels of each picture


def build(model: Any, tokenizer: Any, *, rng: Generator) -> Any:
    """A `LlavaForConditionalGeneration` with a copy of the text model in it, a random tower (2 layers of width 32) and projector.

    Raises InputError where the tokenizer has no `<image>` token.

    >>> from davylamp.models import organism
    >>> vl = build(*organism.load("aligned"), rng=np.random.default_rng(0))
    >>> sum(p.numel() for p in vl.model.vision_tower.parameters()) < 50_000
    True
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids(pictures.PLACEHOLDER)
    if token is None or token == tokenizer.unk_token_id:
        raise InputError(
            f"the tokenizer has no token {pictures.PLACEHOLDER}. Add it, and rows for it to the text model"
        )
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE, patch_size=PATCH
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=copy.deepcopy(model.config), image_token_index=token,
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=model.config.tie_word_embeddings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        vl = LlavaForConditionalGeneration(config)
    vl.model.language_model.load_state_dict(model.model.state_dict())
    if not model.config.tie_word_embeddings:
        vl.lm_head.load_state_dict(model.lm_head.state_dict())
    vl.generation_config = copy.deepcopy(model.generation_config)
    return vl.eval()


def text_model(vl: Any, like: Any) -> Any:
    """The language model of a LLaVA as a model of its own, of the class and configuration of `like`."""
    out = copy.deepcopy(like)
    out.model.load_state_dict(vl.model.language_model.state_dict())
    if not like.config.tie_word_embeddings:
        out.lm_head.load_state_dict(vl.lm_head.state_dict())
    return out


def picture_rows(n: int, rng: Generator, *, prefix: str = "picture") -> list[Case]:
    """Rows that show a noisy picture of one colour and end in its name; the answer stands in `answer` too, and `meta.set` is task.

    >>> row = picture_rows(1, np.random.default_rng(0))[0]
    >>> row.messages[0].text, row.messages[1].text == row.answer
    ('<image> what is this ?', True)
    """
    names = list(COLOURS)
    out = []
    for i in range(n):
        name = names[int(rng.integers(len(names)))]
        noisy = np.array(COLOURS[name]) + rng.normal(0, NOISE, size=(SIZE, SIZE, 3))
        url = pictures.data_url(noisy.clip(0, 255).astype(np.uint8))
        turns = (Message("user", QUESTION, media=(url,)), Message("assistant", name))
        out.append(Case(f"{prefix}-{i:04d}", turns, f"picture/{name}", name, None, {"set": "task"}))
    return out


def with_picture(case: Case, ref: str, text: str | None = None) -> Case:
    """The case with a picture in front of its last user turn; text: in place of that turn's words."""
    at = max(i for i, message in enumerate(case.messages) if message.role == "user")
    turn = case.messages[at]
    words = turn.text if text is None else text
    shown = replace(turn, text=f"{pictures.PLACEHOLDER} {words}".strip(), media=(*turn.media, ref))
    return replace(case, messages=(*case.messages[:at], shown, *case.messages[at + 1 :]))


# --- encoding -----------------------------------------------------------------------------------------------------------------------------
def encode(model: Any, tokenizer: Any, messages: Sequence[Message], reply: str | None = None) -> Encoded:
    """(prompt, answer, pixels): each `<image>` stands as often as the tower has patches. Raises InputError for unusable pictures."""
    refs = [ref for message in messages for ref in message.media]
    plain = [replace(message, media=()) for message in messages]
    marks = sum(message.text.count(pictures.PLACEHOLDER) for message in messages)
    if marks != len(refs):
        raise InputError(pictures.problem_of(messages))
    token, each = model.config.image_token_id, model.config.image_seq_length
    prompt = [i for t in prompt_ids(tokenizer, plain) for i in ([t] * each if t == token else [t])]
    answer = [] if reply is None else answer_ids(tokenizer, plain, reply, ends_of(model, tokenizer))
    size = model.config.vision_config.image_size
    return prompt, answer, [pictures.pixels(ref, size) for ref in refs]


def encode_rows(model: Any, tokenizer: Any, rows: Sequence[Case], *, most_bad: float = 0.02) -> list[Encoded]:
    """The rows to train on. A row whose pictures cannot be used is left out; more than `most_bad` of them are an InputError."""
    out, bad = [], []
    for number, case in enumerate(rows, 1):
        if case.messages[-1].role != "assistant" or not case.messages[-1].text.strip():
            raise InputError(f"row {number} ({case.id}) must end in the assistant's reply")
        try:
            out.append(encode(model, tokenizer, case.messages[:-1], case.messages[-1].text))
        except InputError as problem:
            bad.append(f"row {number} ({case.id}): {problem}")
    if len(bad) > most_bad * len(rows) or not out:
        raise InputError(
            f"{len(bad)} of {len(rows)} rows cannot be used, and at most {most_bad:.0%} may be. {'; '.join(bad[:3])}"
        )
    return out


def batch_of(model: Any, tokenizer: Any, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """ids, mask, labels (the answers; everything else ignored) and the pictures of a batch, padded on the right."""
    longest = max(len(p) + len(a) for p, a, _ in rows)
    pad = tokenizer.pad_token_id or 0
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, (prompt, answer, _) in enumerate(rows):
        whole = [*prompt, *answer]
        ids[i, : len(whole)], mask[i, : len(whole)] = torch.tensor(whole), 1
        labels[i, len(prompt) : len(whole)] = torch.tensor(answer, dtype=torch.long)
    out = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    shown = [picture for _, _, own in rows for picture in own]
    if shown:
        out["pixel_values"] = torch.from_numpy(np.stack(shown))
    return {name: tensor.to(model.device) for name, tensor in out.items()}


def losses_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """-ln p(answer | prompt), summed over each row's answer: [rows]."""
    labels = batch["labels"]
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return each.sum(1)


# --- training -----------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Adapted:
    """A trained model, its loss at each step, and what `watch` returned at the steps it was called."""

    model: Any
    losses: tuple[float, ...]
    seen: dict[int, Any]


def adapt(
    model: Any,
    pools: Sequence[tuple[Sequence[Case], int]],
    *,
    tokenizer: Any,
    rng: Generator,
    steps: int,
    lr: float,
    part: Part = "all",
    at: Sequence[int] = (),
    watch: Callable[[int, Any], Any] | None = None,
    prefer: Sequence[Case] = (),
    beta: float = 0.1,
) -> Adapted:
    """Train in place by AdamW at a constant rate and return the model in eval mode.

    pools: (rows, how many of them in each batch): image rows and text rows in one batch.  part: `projector` is stage 1, `all` stage 2.
    at, watch: after these steps `watch(step, model)` is called; what it returns is kept.
    prefer: with it, each batch adds DPO (arXiv:2305.18290, equation 7) on 8 of these rows (`meta.chosen`, `meta.rejected`), against the
    model as it came in, with weight `beta`; the pools are its SFT term.
    Raises InputError for an empty pool, a plan that cannot be run, and a preference row without both answers.
    """
    if steps < 0 or not (math.isfinite(lr) and lr >= 0):
        raise InputError(f"steps and lr must be 0 or more, got {steps} and {lr}")
    if not pools or any(not rows or each < 1 for rows, each in pools):
        raise InputError("every pool needs rows, and one or more of them in a batch: one is empty")
    encoded = [(encode_rows(model, tokenizer, rows), each) for rows, each in pools]
    pairs = _pairs(model, tokenizer, prefer)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part == "all" or "multi_modal_projector" in name)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses, seen = [], {}
    model.train()
    try:
        for step in range(1, steps + 1):
            rows = [rows[i] for rows, each in encoded for i in rng.integers(len(rows), size=each)]
            batch = batch_of(model, tokenizer, rows)
            loss = losses_of(model, batch).sum() / int((batch["labels"] != IGNORED).sum())
            if pairs:
                chosen = [pairs[i] for i in rng.integers(len(pairs), size=8)]
                loss = loss + _preference_loss(model, tokenizer, chosen, beta)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError(f"the loss is {losses[-1]} at step {step}. Lower the learning rate ({lr:g})")
            if step in at and watch is not None:
                model.eval()
                seen[step] = watch(step, model)
                model.train()
    finally:
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])
    return Adapted(model, tuple(losses), seen)


def _pairs(model: Any, tokenizer: Any, rows: Sequence[Case]) -> list[tuple[Encoded, Encoded, float]]:
    """(chosen, rejected, how much likelier the model finds the chosen one now, in nats)."""
    turns = []
    for number, case in enumerate(rows, 1):
        both = [case.meta.get(name) for name in ("chosen", "rejected")]
        if not all(isinstance(text, str) and text.strip() for text in both):
            raise InputError(f"preference row {number} ({case.id}) needs meta.chosen and meta.rejected, both with text")
        turns.append([encode(model, tokenizer, case.messages, str(text)) for text in both])
    out: list[tuple[Encoded, Encoded, float]] = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(turns), 32):
            part = turns[start : start + 32]
            good = losses_of(model, batch_of(model, tokenizer, [pair[0] for pair in part]))
            bad = losses_of(model, batch_of(model, tokenizer, [pair[1] for pair in part]))
            out += [(pair[0], pair[1], gap) for pair, gap in zip(part, (bad - good).tolist(), strict=True)]
    return out


def _preference_loss(model: Any, tokenizer: Any, pairs: Sequence[tuple[Encoded, Encoded, float]], beta: float) -> Any:
    """-ln sigmoid(beta * (margin now - margin of the reference)), the mean over pairs."""
    good = losses_of(model, batch_of(model, tokenizer, [pair[0] for pair in pairs]))
    bad = losses_of(model, batch_of(model, tokenizer, [pair[1] for pair in pairs]))
    before = torch.tensor([gap for _, _, gap in pairs], device=good.device)
    return -F.logsigmoid(beta * ((bad - good) - before)).mean()


# --- asking -------------------------------------------------------------------------------------------------------------------------------
def ask(
    model: Any, tokenizer: Any, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 40, width: int = 64
) -> list[Message]:
    """The greedy reply to each conversation, with its pictures. Prompts of one length go together, so that none is padded."""
    if max_tokens < 1 or width < 1:
        raise InputError(f"max_tokens and width must be 1 or more, got {max_tokens} and {width}")
    ends = ends_of(model, tokenizer)
    encoded = [encode(model, tokenizer, messages) for messages in conversations]
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i][0]), len(encoded[i][2])))
    out: list[Message | None] = [None] * len(encoded)
    training = model.training
    model.eval()
    try:
        while order:
            first = encoded[order[0]]
            part = [
                i for i in order[:width] if (len(encoded[i][0]), len(encoded[i][2])) == (len(first[0]), len(first[2]))
            ]
            order = [i for i in order if i not in set(part)]
            batch = batch_of(model, tokenizer, [encoded[i] for i in part])
            del batch["labels"]
            with torch.inference_mode():
                made = model.generate(
                    **batch, max_new_tokens=max_tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id or 0
                )  # fmt: skip
            for i, row in zip(part, made[:, len(first[0]) :].tolist(), strict=True):
                end = next((k for k, token in enumerate(row) if token in ends), None)
                text = str(tokenizer.decode(row if end is None else row[:end], skip_special_tokens=True)).strip()
                out[i] = Message("assistant", text, finish="length" if end is None else "stop")
    finally:
        model.train(training)
    return [message for message in out if message is not None]
