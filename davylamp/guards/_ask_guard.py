"""How a guard model is asked: a model here, or a server in OpenAI's form. Both give the answer's tokens with what else was likely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from davylamp.core.errors import InputError, TargetError
from davylamp.core.needs import need
from davylamp.core.nouns import Message
from davylamp.data.guard_format import Format, Reading, defuse, judged_role, render
from davylamp.data.guard_policy import Policy
from davylamp.models.retry import patiently

if TYPE_CHECKING:
    import torch

WIDTH = 32
OVERLAP = 0.25  # of a window, where a text is longer than the model takes
LISTED = 20  # alternatives a server is asked for; the API's limit


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer, and the log probabilities of tokens (as text) at its place; empty where a server gave none."""

    text: str
    likely: Mapping[str, float]


Steps = tuple[Step, ...]


def spoken(steps: Sequence[Step]) -> str:
    return "".join(step.text for step in steps)


def score(steps: Sequence[Step], reading: Reading, form: Format) -> float | None:
    """P(unsafe) / (P(unsafe) + P(safe)) at the token where the decision word begins; None where that cannot be told from one token.

    A token counts for the words it may begin: it is unsafe if only words that say unsafe start with it. Words that share their first token
    leave nothing to count. Alternatives that a server did not list count as 0.

    >>> form = Format("x", 1, "", "", "raw", unsafe=("unsafe",), safe=("safe",))
    >>> steps = (Step("safe", {"safe": math.log(0.75), "unsafe": math.log(0.2), "hm": math.log(0.05)}),)
    >>> round(score(steps, Reading(False, at=0), form), 3)
    0.211
    """
    if reading.unsafe is None or reading.at < 0:
        return None
    end = 0
    for step in steps:
        end += len(step.text)
        if reading.at < end:
            break
    else:
        return None
    sums = {True: 0.0, False: 0.0}
    for token, logprob in step.likely.items():
        begins = token.strip(" \t\r\n\"'*:{").casefold()
        if not begins or math.isnan(logprob):
            continue
        fits = {
            unsafe
            for unsafe, words in ((True, form.unsafe), (False, form.safe))
            if any(word.casefold().startswith(begins) for word in words)
        }
        if len(fits) == 1:
            sums[fits.pop()] += math.exp(min(logprob, 0.0))
        elif fits and step.text.strip() == token.strip():
            return None  # the very token that was said could begin either word
    whole = sums[True] + sums[False]
    if not whole > 0 or sums[reading.unsafe] == 0:
        return None
    return min(1.0, max(0.0, sums[True] / whole))


class LocalModel:
    """A causal model of a folder or hub id, asked in micro-batches, greedy. `likely` holds every token that may begin a decision word."""

    def __init__(self, model: Any, tokenizer: Any, identity: Mapping[str, Any], form: Format):
        from davylamp.models.batching import MicroBatcher

        self.model, self.tokenizer, self.identity, self.form = model, tokenizer, dict(identity), form
        self.name = str(identity.get("name", "guard"))
        self._begin = _beginnings(tokenizer, (*form.unsafe, *form.safe))
        first = [set(_beginnings(tokenizer, words).values()) for words in (form.unsafe, form.safe)]
        self._shared = bool(first[0] & first[1])
        given = model.generation_config.eos_token_id if model.generation_config is not None else None
        self._ends = {given} if isinstance(given, int) else set(given or ())
        self._ends |= {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        specials = {str(token) for token in [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]}
        self._specials = sorted((token for token in specials if len(token) > 1), key=len, reverse=True)
        self._batcher = MicroBatcher(self._batch, width=WIDTH, size=lambda item: len(item[0]), key=lambda item: item[1])

    @classmethod
    def load(cls, spec: str, form: Format) -> LocalModel:
        need("hf", f"the guard {spec}")
        from davylamp.models.loading import identity, load_pair

        model, tokenizer = load_pair(spec)
        return cls(model, tokenizer, identity(spec, model), form)

    async def ask(
        self, messages: Sequence[Message], policy: Policy | None, arguments: Mapping[str, Any], *, too_long: str
    ) -> list[Steps]:
        """The answer, or several where the last message is longer than the model takes and is judged in overlapping windows."""
        ids = self._ids(messages, policy, arguments)
        room = self._room()
        if len(ids) <= room:
            return [await self._submit(ids)]
        if too_long == "error":
            raise InputError(
                f"{self.name} takes {room} tokens and the conversation has {len(ids)}: shorten it, or too_long=windows"
            )
        return [await self._submit(ids) for ids in self._windows(messages, policy, arguments, room)]

    async def _submit(self, ids: list[int]) -> Steps:
        return await self._batcher.submit((ids, self.form.max_tokens))

    def _room(self) -> int:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        return int(positions) - self.form.max_tokens

    def _windows(
        self, messages: Sequence[Message], policy: Policy | None, arguments: Mapping[str, Any], room: int
    ) -> list[list[int]]:
        """Prompts that hold the last message in parts; earlier turns are left out, from the first on, until there is room for a part."""
        earlier, last = list(messages[:-1]), messages[-1]
        while True:
            spent = len(self._ids([*earlier, Message(last.role, "x")], policy, arguments))
            size = room - spent - 8  # a text in pieces may take a few tokens more than whole
            if size >= min(64, room // 4) or not earlier:
                break
            earlier.pop(0)
        if size < 8:
            raise InputError(
                f"{self.name} takes {room} tokens, and the policy alone has about {spent}: shorten the policy"
            )
        words = self.tokenizer(last.text, add_special_tokens=False)["input_ids"]
        step = max(1, int(size * (1 - OVERLAP)))
        out = []
        for start in range(0, max(1, len(words) - int(size * OVERLAP)), step):
            part = Message(last.role, str(self.tokenizer.decode(words[start : start + size])))
            ids = self._ids([*earlier, part], policy, arguments)
            if len(ids) > room:
                raise TargetError(f"{self.name}: a window of the text does not fit into {room} tokens")
            out.append(ids)
        return out

    def _ids(self, messages: Sequence[Message], policy: Policy | None, arguments: Mapping[str, Any]) -> list[int]:
        """Token ids of the prompt. A special token that stands in somebody's text is broken: it must stay text."""
        clean = [Message(m.role, defuse(m.text, self._specials), calls=m.calls) for m in messages]
        text = prompt_text(self.form, policy, clean, arguments, self.tokenizer)
        return list(
            self.tokenizer(text, add_special_tokens=self.form.how == "raw" and not self._begins_special(text))[
                "input_ids"
            ]
        )

    def _begins_special(self, text: str) -> bool:
        return any(text.startswith(token) for token in self._specials)

    def _batch(self, items: list[tuple[list[int], int]]) -> list[Steps | Exception]:
        import torch

        prompts = [ids for ids, _ in items]
        longest, pad = max(len(ids) for ids in prompts), self.tokenizer.pad_token_id or 0
        rows = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=self.model.device)
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=rows,
                attention_mask=mask,
                max_new_tokens=items[0][1],
                max_length=None,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                output_logits=True,
                return_dict_in_generate=True,
            )
        said = made.sequences[:, longest:].tolist()
        return [
            self._steps(prompt, row, [logits[i] for logits in made.logits])
            for i, (prompt, row) in enumerate(zip(prompts, said, strict=True))
        ]

    def _steps(self, prompt: list[int], row: list[int], logits: Sequence[torch.Tensor]) -> Steps:
        """Text is decoded as a whole and cut where each token ends, since a tokenizer may write a token differently alone."""
        row = row[: next((i for i, token in enumerate(row) if token in self._ends), len(row))]
        out, before = [], ""
        for i in range(len(row)):
            text = str(self.tokenizer.decode(row[: i + 1], skip_special_tokens=True))
            at = logits[i].float().log_softmax(-1)
            said = text[len(before) :] if text.startswith(before) else text
            likely = {word: float(at[token]) for word, token in self._begin.items()}
            out.append(Step(said, likely if self._shared else {said.strip(): float(at[row[i]]), **likely}))
            before = text
        return self._whole_words(prompt, row, out) if self._shared else tuple(out)

    def _whole_words(self, prompt: list[int], row: list[int], steps: list[Step]) -> Steps:
        """Where the decision words share their first token: the log probability of each whole word at its place, summed over its tokens."""
        import torch

        said = spoken(steps)
        words = (*self.form.unsafe, *self.form.safe)
        place = min((at for word in words if (at := said.casefold().find(word.casefold())) >= 0), default=-1)
        if place < 0:
            return tuple(steps)
        end, index = 0, 0
        for index, step in enumerate(steps):  # noqa: B007  the step that the word begins in
            end += len(step.text)
            if place < end:
                break
        lead = steps[index].text[: len(steps[index].text) - len(steps[index].text.lstrip())]
        sums = {}
        with torch.inference_mode():
            for word in words:
                ids = list(self.tokenizer(lead + word, add_special_tokens=False)["input_ids"])
                whole = torch.tensor([[*prompt, *row[:index], *ids]], device=self.model.device)
                at = self.model(input_ids=whole).logits[0].float().log_softmax(-1)
                first = whole.shape[1] - len(ids)
                sums[word] = sum(float(at[first + i - 1, token]) for i, token in enumerate(ids))
        steps[index] = Step(steps[index].text, sums)
        return tuple(steps)

    async def close(self) -> None:
        await self._batcher.close()


def _beginnings(tokenizer: Any, words: Sequence[str]) -> dict[str, int]:
    """Text -> id of the first token of each decision word, in the spellings it may come in: after a space, line or quote; capitalised."""
    out: dict[str, int] = {}
    for word in words:
        for form in dict.fromkeys((word, word.lower(), word.capitalize(), word.upper())):
            for before in ("", " ", "\n", '"'):
                lead = list(tokenizer(before, add_special_tokens=False)["input_ids"]) if before else []
                ids = list(tokenizer(before + form, add_special_tokens=False)["input_ids"])
                ids = ids[len(lead) :] if ids[: len(lead)] == lead else ids
                if not ids or ids[0] == tokenizer.unk_token_id:
                    continue
                text = str(tokenizer.decode([ids[0]]))
                if text.strip(" \t\r\n\"'*:{"):
                    out.setdefault(text, int(ids[0]))
    return out


class RemoteModel:
    """A server in OpenAI's form: chat completions for formats by the model's template, completions for raw ones; with log probabilities."""

    def __init__(self, spec: str, form: Format, *, logprobs: bool = True):
        from davylamp.models.targets import load_target

        self.target: Any = load_target(spec)
        self.form, self.logprobs, self.name = form, logprobs, self.target.name
        self.identity = {**self.target.identity, "logprobs": logprobs}

    async def ask(
        self, messages: Sequence[Message], policy: Policy | None, arguments: Mapping[str, Any], *, too_long: str
    ) -> list[Steps]:
        from davylamp.models.openai import post_json, session, wire

        form, target = self.form, self.target
        judged_role(messages)
        body: dict[str, Any] = {"model": target.model, "temperature": 0, "max_tokens": form.max_tokens, "seed": 0}
        if form.how == "raw":
            url = f"{target.base_url}/completions"
            body |= {"prompt": render(form, policy, messages)} | ({"logprobs": LISTED} if self.logprobs else {})
        else:
            url = target.url
            if form.how == "user":
                sent = [{"role": "user", "content": render(form, policy, messages)}]
            else:
                sent = [_parts(wire(message), form) for message in messages]
            body |= {"messages": sent} | ({"logprobs": True, "top_logprobs": LISTED} if self.logprobs else {})
            if arguments:
                body["chat_template_kwargs"] = dict(arguments)  # as vLLM and SGLang take them
        if target._session is None:
            target._session = session()
        http = target._session
        answer = await patiently(lambda: post_json(http, url, body, target.headers, who=self.name), who=self.name)
        return [steps_from(answer, self.name)]

    async def close(self) -> None:
        await self.target.close()


def prompt_text(
    form: Format, policy: Policy | None, messages: Sequence[Message], arguments: Mapping[str, Any], tokenizer: Any
) -> str:
    """The prompt as text. Raises InputError where a format needs a chat template and the tokenizer has none."""
    judged_role(messages)
    if form.how == "raw":
        return render(form, policy, messages)
    if not tokenizer.chat_template:
        raise InputError(f"the format {form.name} needs the model's own chat template, and its tokenizer has none")
    import jinja2

    if form.how == "user":
        turns = [{"role": "user", "content": render(form, policy, messages)}]
    else:
        turns = [_parts({"role": m.role, "content": m.text}, form) for m in messages]
    for attempt in (turns, [turn for turn in turns if turn["role"] != "system"]):  # many guards take no system turn
        try:
            return str(tokenizer.apply_chat_template(attempt, tokenize=False, add_generation_prompt=True, **arguments))
        except jinja2.exceptions.TemplateError as problem:
            said = str(problem)
    raise TargetError(f"the chat template refused the conversation: {said}")


def _parts(turn: dict[str, Any], form: Format) -> dict[str, Any]:
    if form.content != "parts" or not isinstance(turn["content"], str):
        return turn
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def steps_from(answer: Mapping[str, Any], who: str) -> Steps:
    """The steps of a completion in OpenAI's form, chat or plain; a text without log probabilities is one step. Raises TargetError.

    >>> steps_from({"choices": [{"message": {"content": "safe"}}]}, "demo")
    (Step(text='safe', likely={}),)
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError):
        raise TargetError(f"{who} answered without a message") from None
    if not isinstance(text, str):
        raise TargetError(f"{who} answered with content that is no text: {type(text).__name__}")
    found = choice.get("logprobs")
    steps: list[Step] = []
    try:
        if isinstance(found, dict) and isinstance(found.get("content"), list):
            for item in found["content"]:
                listed = {str(other["token"]): float(other["logprob"]) for other in item.get("top_logprobs") or ()}
                listed.setdefault(str(item["token"]), float(item["logprob"]))
                steps.append(Step(str(item["token"]), listed))
        elif isinstance(found, dict) and isinstance(found.get("tokens"), list):
            tops = found.get("top_logprobs") or [{}] * len(found["tokens"])
            for token, own, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True):
                listed = {str(name): float(value) for name, value in (top or {}).items()}
                steps.append(Step(str(token), {**({} if own is None else {str(token): float(own)}), **listed}))
    except (KeyError, TypeError, ValueError, AttributeError):
        steps = []  # log probabilities in a form nobody knows: the text still stands
    # Some servers leave out special tokens or trim the text; the text is what is read, so steps that do not spell it are of no use.
    return tuple(steps) if spoken(steps).strip() == text.strip() and steps else (Step(text, {}),)
