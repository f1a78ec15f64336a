"""`hf/<path or id>`: a transformers model with its own chat template, asked in micro-batches."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from davylamp.core.errors import InputError, TargetError, UnknownNameError
from davylamp.core.nouns import Message
from davylamp.core.rows import canonical
from davylamp.models.batching import MicroBatcher
from davylamp.models.loading import identity, load_pair
from davylamp.models.thinking import OPEN, split_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "stop", "prefill")
MAX_TOKENS = 256
THOUGHT = re.compile(r"</?think(ing)?>", re.IGNORECASE)
WIDTH = 64


class Prompt(NamedTuple):
    """The tokens up to where the model goes on, and the text that the reply begins with (a prefill, or a tag the template opened)."""

    ids: list[int]
    head: str = ""
    head_ids: tuple[int, ...] = ()


class HFTarget:
    """A loaded model as a target. Greedy unless `temperature` is above 0; then every row draws with its own seed, so that its reply does
    not depend on the rows it is batched with. No tool calls; pictures where the model is a LLaVA (`models/eyes.py`).

    settings: max_tokens (default 256), temperature, top_p, top_k, stop (a text or a list), prefill (a text that the reply begins with: the
    model goes on from there, and the reply holds it). A template that takes no system role (Gemma) gets the system text in front of the
    first user turn.
    """

    prefills = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        identity: Mapping[str, Any],
        *,
        width: int = WIDTH,
        source: str = "",
    ):
        self.model, self.tokenizer, self.name, self.identity = model, tokenizer, name, dict(identity)
        self.source = source or name
        self._eyes: Any = None
        self._batcher = MicroBatcher(
            self._batch, width=width, key=lambda item: item[2], size=lambda item: len(item[0].ids)
        )

    def knows(self, tag: str) -> bool:
        """Whether the tag is a token of the tokenizer, or stands in the chat template."""
        return tag in self.tokenizer.get_vocab() or tag in str(self.tokenizer.chat_template or "")

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        check_settings(settings)
        prefill = str(settings.pop("prefill", "") or "")
        shown: list[Any] = []
        if any(message.media for message in messages) and not any(message.calls for message in messages):
            if prefill:
                raise InputError("a prompt with pictures takes no prefill")
            ids, shown = self._see(messages)
            prompt = Prompt(ids)
        else:
            prompt = begun_ids(self.tokenizer, messages, prefill)
        reply: Message = await self._batcher.submit((prompt, seed, canonical(settings), settings, shown))
        return reply

    def _see(self, messages: Sequence[Message]) -> tuple[list[int], list[Any]]:
        """Tokens and pixels; the image processor is loaded with the first picture."""
        if self._eyes is None:
            from davylamp.models.eyes import Eyes

            self._eyes = Eyes(self.model, self.tokenizer, self.source)
        return self._eyes.encode(messages)

    def _batch(self, items: list[tuple[Prompt, int, str, dict[str, Any], list[Any]]]) -> list[Message | Exception]:
        prompts, seeds, _, settings, shown = map(list, zip(*items, strict=True))
        return _generate(self.model, self.tokenizer, prompts, seeds, settings[0], shown)

    async def close(self) -> None:
        await self._batcher.close()


def load(path: str) -> HFTarget:
    """The model of a folder, or of a hub id. Half precision is kept on a GPU and widened to float32 on a CPU, where it would crawl.

    Raises InputError for a folder without a model, for an id that the hub does not give, and for a tokenizer without a chat template.
    """
    model, tokenizer = load_pair(path)
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {path} has no chat template, so it cannot be asked as a chat. Add chat_template.jinja to its folder, or "
            "write the prompt yourself in a python/<file.py>:<function> target"
        )
    name = f"hf/{path}"
    kind = {"model": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch.")}
    return HFTarget(model, tokenizer, name, {**identity(path, model), **kind, "name": name}, source=path)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UnknownNameError or InputError for a setting that generation does not take."""
    for name in settings:
        if name not in SETTINGS:
            raise UnknownNameError("setting of an hf target", name, SETTINGS)
    for name, low, high, kind in (
        ("max_tokens", 1, math.inf, int),
        ("temperature", 0, math.inf, float),
        ("top_k", 1, math.inf, int),
    ):
        value = settings.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | kind) or not low <= value <= high
        ):
            raise InputError(f"{name} must be a number of {low} or more, got {value!r}")
    top_p = settings.get("top_p")
    if top_p is not None and (isinstance(top_p, bool) or not isinstance(top_p, int | float) or not 0 < top_p <= 1):
        raise InputError(f"top_p must be in (0, 1], got {top_p!r}")
    prefill = settings.get("prefill")
    if prefill is not None and not isinstance(prefill, str):
        raise InputError(f"prefill must be a text, got {prefill!r}")
    stop = settings.get("stop")
    if stop is not None and not (
        isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(text, str) for text in stop))
    ):
        raise InputError(f"stop must be a text or a list of texts, got {stop!r}")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The prompt's tokens by the tokenizer's chat template, up to where the reply begins. Raises InputError or TargetError."""
    if any(message.media or message.calls for message in messages):
        raise InputError("an hf target takes text only, got a message with media or tool calls")
    turns = [{"role": message.role, "content": message.text} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.exceptions.TemplateError as problem:
        if turns[:1] and turns[0]["role"] == "system" and len(turns) > 1 and turns[1]["role"] == "user":
            merged = [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]
            try:
                text = tokenizer.apply_chat_template(merged, tokenize=False, add_generation_prompt=True)
            except jinja2.exceptions.TemplateError as second:
                raise TargetError(f"the chat template refused the conversation: {second}") from None
        else:
            raise TargetError(f"the chat template refused the conversation: {problem}") from None
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def begun_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prefill: str = "") -> Prompt:
    """The prompt with the beginning of its reply. A thought that the template opens already is not opened twice.

    The prefill is read by itself, never together with the prompt, so that the prompt's own tokens stay what they are without it.
    """
    ids = prompt_ids(tokenizer, messages)
    if not prefill:
        end = str(tokenizer.decode(ids[-8:])).rstrip().lower()
        return Prompt(ids, "<think>" if end.endswith(("<think>", "<thinking>")) else "")
    opening = OPEN.match(prefill)
    rest = prefill
    if opening is not None and OPEN.fullmatch(str(tokenizer.decode(ids[-8:])).rstrip()[-len(opening[0].strip()) :]):
        rest = prefill[opening.end() :].lstrip("\n")
    added = list(tokenizer(rest, add_special_tokens=False)["input_ids"]) if rest else []
    return Prompt([*ids, *added], prefill, tuple(added))


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    seeds: Sequence[int] | None = None,
    width: int = WIDTH,
    prefill: str = "",
    **settings: Any,
) -> list[Message]:
    """One reply to each conversation, in their order, `width` at a time by length. Settings as in `HFTarget`; seeds: one a conversation.

    Raises TargetError for a prompt longer than the model takes.
    """
    check_settings(settings)
    seeds = list(seeds) if seeds is not None else [0] * len(conversations)
    prompts = [begun_ids(tokenizer, messages, prefill) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    found: dict[int, Message] = {}
    for part in (order[at : at + width] for at in range(0, len(order), width)):
        replies = _generate(model, tokenizer, [prompts[i] for i in part], [seeds[i] for i in part], settings)
        for i, reply in zip(part, replies, strict=True):
            if isinstance(reply, Exception):
                raise reply
            found[i] = reply
    return [found[i] for i in range(len(prompts))]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    shown: Sequence[Sequence[Any]] = (),
) -> list[Message | Exception]:
    """A reply or a TargetError to each prompt."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    out: dict[int, Message | Exception] = {
        i: TargetError(
            f"the prompt has {len(prompt.ids)} tokens; the model takes {room}, with one or more for the reply"
        )
        for i, prompt in enumerate(prompts)
        if len(prompt.ids) >= room
    }
    fitting = [i for i in range(len(prompts)) if i not in out]
    # Rows in one batch share their number of new tokens, so a row near the model's end is asked with others near it, or alone.
    wanted = int(settings.get("max_tokens") or MAX_TOKENS)
    groups: dict[int, list[int]] = {}
    for i in fitting:
        groups.setdefault(min(wanted, room - len(prompts[i].ids)), []).append(i)
    for new, rows in groups.items():
        own = [picture for i in rows for picture in shown[i]] if shown else []
        replies = _ask(model, tokenizer, [prompts[i] for i in rows], [seeds[i] for i in rows], new, settings, own)
        out.update(zip(rows, replies, strict=True))
    return [out[i] for i in range(len(prompts))]


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    new: int,
    settings: Mapping[str, Any],
    shown: Sequence[Any] = (),
) -> list[Message]:
    """shown: the pixels of all pictures of the batch, in the order of their places."""
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(sorted(ends)), 0)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts], device=model.device
    )
    processors = LogitsProcessorList()
    if settings.get("temperature"):
        processors.append(_Draw(seeds, float(settings["temperature"]), settings.get("top_k"), settings.get("top_p")))
    read = _Reader(tokenizer)
    stop = settings.get("stop") or []
    stops = [stop] if isinstance(stop, str) else [text for text in stop if text]
    seen = (
        {"pixel_values": torch.stack([torch.from_numpy(one) for one in shown]).to(model.device, model.dtype)}
        if shown
        else {}
    )
    criteria = StoppingCriteriaList([_Stops(read, stops, longest)] if stops else [])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the checkpoint's own generation settings, which greedy decoding overrides
        made: torch.Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            **seen,
            max_new_tokens=new,
            max_length=None,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            logits_processor=processors,
            stopping_criteria=criteria,
        )
    out = []
    for prompt, row in zip(prompts, made[:, longest:].tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in ends), None)
        used = row if end is None else row[:end]
        finish = "length" if end is None else "stop"
        # Read behind the prefill, so that a space between the two is the tokenizer's own.
        text = read([*prompt.head_ids, *used])[len(read(prompt.head_ids)) :] if prompt.head_ids else read(used)
        cut = min((at for at in (text.find(word) for word in stops) if at >= 0), default=None)
        if cut is not None:
            text, finish = text[:cut], "stop"
            used = row[: _tokens_until(read, row, cut)]
        reasoning, answer = split_thinking(prompt.head + text)
        done = len(used) + (end is not None and cut is None)
        tokens = (len(prompt.ids), done)
        out.append(Message("assistant", answer.strip(), reasoning=reasoning, finish=finish, tokens=tokens))
    return out


class _Reader:
    """The text of a reply without special tokens; those that mark a thought stay, as the thought must still be told from the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()  # built anew at every look, so looked at once a batch
        self.marks = {i: str(token) for i, token in added if token.special and THOUGHT.fullmatch(str(token))}

    def __call__(self, row: Sequence[int]) -> str:
        if not self.marks or not self.marks.keys() & set(row):
            return str(self.tokenizer.decode(list(row), skip_special_tokens=True))
        out = ""
        part: list[int] = []
        for token in [*row, None]:
            if token is None or token in self.marks:
                out += str(self.tokenizer.decode(part, skip_special_tokens=True))
                out += "" if token is None else self.marks[token]
                part = []
            else:
                part.append(token)
        return out


def _tokens_until(read: _Reader, row: list[int], cut: int) -> int:
    """How many tokens it takes to write more than `cut` characters."""
    return next((n for n in range(1, len(row) + 1) if len(read(row[:n])) > cut), len(row))


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a reply, by the model's generation settings and the tokenizer."""
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {given} if isinstance(given, int) else set(given or ())
    return ends | ({int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set())


class _Draw(LogitsProcessor):
    """Turns greedy decoding into sampling: adds Gumbel noise from a generator per row, so that the largest is a draw (Gumbel-max trick)."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_k: int | None, top_p: float | None):
        self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores: (rows, vocabulary) logits."""
        scores = scores.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, places = scores.sort(dim=-1, descending=True)
            share = ordered.softmax(-1)
            before = share.cumsum(-1) - share  # the probability of all that are likelier
            scores = scores.masked_fill((before >= self.top_p).gather(-1, places.argsort(-1)), -math.inf)
        noise = torch.stack([torch.rand(scores.shape[-1], generator=each) for each in self.generators])
        return scores - (-noise.clamp_min(1e-20).log()).log().to(scores.device)


class _Stops(StoppingCriteria):
    """Ends a row whose reply holds one of the texts. transformers' own raises on texts that a vocabulary of words cannot spell."""

    def __init__(self, read: _Reader, texts: Sequence[str], start: int):
        self.read, self.texts, self.start = read, texts, start
        self.window = (
            max(len(text) for text in texts) + 8
        )  # tokens; a token is at least one character of what could be left of a text

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """input_ids: (rows, tokens so far)."""
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :].tolist()
        done = [any(text in self.read(tail) for text in self.texts) for tail in tails]
        return torch.tensor(done, device=input_ids.device)
