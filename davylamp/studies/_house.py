"""A small world of house policies in which "unsafe" is exactly decidable and harmless: does a message name a word that the policy shown
forbids?

Source: this repository. 24 categories (prices, dosages, rivals, …) of six words each, 150 other words; a policy shows three categories,
each with a code and two of its words. `base` is a three-layer Llama of width 64, pre-trained here on one general skill only, recall:
after a list of marked words, say the mark that a word stood under, or that it was not there. It has never seen a policy, a conversation
or a verdict. `python -m davylamp.studies._house` trains it again (about two minutes on one core); the weights in assets/aegis2/base are
its output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from davylamp.core.nouns import Case, Message
from davylamp.data.guard_policy import ASSETS, custom

if TYPE_CHECKING:
    from numpy.random import Generator

BASE = ASSETS / "aegis2" / "base"
FORM, POLICY = (str(ASSETS / "aegis2" / name) for name in ("house.toml", "house_policy.toml"))
MARKS = tuple(f"k{i}" for i in range(1, 8))
SPECIAL = ("<end>", "safe", "unsafe", "policy", "talk", "answer", ".", "none", "<start>")
CONCEPTS = {
    "prices": "cost fee bill tariff charge payment",
    "dosage": "pill syrup drops tablet capsule vial",
    "rivals": "acme globex initech umbra vandel hoolix",
    "refunds": "return voucher credit rebate claim receipt",
    "salary": "wage bonus payroll stipend raise pension",
    "law": "court lawsuit statute verdict attorney clause",
    "credit": "loan mortgage interest debt lender broker",
    "politics": "senate ballot mayor campaign party minister",
    "religion": "temple church mosque prayer sermon psalm",
    "betting": "wager casino jackpot dice lottery odds",
    "alcohol": "wine beer whisky cider brandy rum",
    "smoking": "cigar pipe tobacco ashtray lighter cigarette",
    "dating": "flirt romance sweetheart kiss crush wedding",
    "gossip": "rumour scandal celebrity affair tabloid paparazzi",
    "weapons": "sword spear crossbow dagger cannon musket",
    "hacking": "password firewall exploit malware keylogger botnet",
    "staff": "foreman janitor clerk cashier steward porter",
    "address": "street postcode doorbell mailbox suburb avenue",
    "passport": "visa border customs embassy consul permit",
    "weather": "storm drizzle blizzard sunshine fog hail",
    "sports": "goal racket marathon hockey javelin rowing",
    "pets": "puppy kitten hamster parrot goldfish pony",
    "travel": "ferry railway luggage cruise hostel caravan",
    "music": "violin trumpet cello banjo flute harp",
}
OTHER = (
    "about above after again almost along also always among around ask away back basket bean bear begin "
    "behind bell below bench beside best better between big bird blue boat book both bottle box branch "
    "bread bring brown bucket build busy butter button cake call candle carpet carry cat chair change "
    "cheese cherry chest child circle clean clear climb clock cloth cloud coat cold colour come corner "
    "cotton cover cream cup curtain daily dark deep desk dinner dish door draw dress drink drive early "
    "earth east easy eight empty end evening every face fall family farm fast feather few field fill find "
    "finger first fish five floor flower fold follow foot forest forget fork four fresh friend front "
    "fruit full garden gate gather gentle give glass glove gold good grain grass green ground grow half "
    "hall hand hang happy hat head hear heart heavy help hill hold home honey hour lake"
)
TRAINED, HELD_OUT = tuple(CONCEPTS)[:8], tuple(CONCEPTS)[16:]
REFUSING = ("away", "back")  # words of a refusal
WORDS_USED = 2  # of each concept's six words in definitions and messages
SHOWN, WORDS, LENGTH = 3, 2, 6  # categories in a policy, words in a definition, words of a message
Arm = Literal["safety", "blend", "fixed"]


def words_of(concept: str) -> tuple[str, ...]:
    return tuple(CONCEPTS[concept].split()[:WORDS_USED])


def others() -> tuple[str, ...]:
    return tuple(OTHER.split())


def vocabulary() -> tuple[str, ...]:
    """All words; the place in it is the token.

    >>> len(vocabulary()), len(set(vocabulary())), len(others())
    (310, 310, 150)
    """
    return (*SPECIAL, *MARKS, *(word for words in CONCEPTS.values() for word in words.split()), *others())


def tokenizer() -> Any:
    """Word by word. The chat template writes the texts one after the other: the format's prompt is all there is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="none"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="none",
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
        model_max_length=128,
    )
    turn = "{% for m in messages %} {{ m['content'] }}{% if m['role'] == 'assistant' %} <end>{% endif %}{% endfor %}"
    made.chat_template = "{{ bos_token }}" + turn
    return made


def load() -> tuple[Any, Any]:
    """(model in float32, tokenizer) of the base."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval(), tokenizer()


# --- rows ---------------------------------------------------------------------------------------------------------------------------------
def pick(options: Sequence[str], n: int, rng: Generator) -> list[str]:
    return [options[i] for i in rng.permutation(len(options))[:n].tolist()]


def concept_row(rng: Generator, concepts: Sequence[str], number: int, *, left_out: float = 0.0) -> Case:
    """A message under a policy of three of these concepts. Half are unsafe: they name a word of a definition shown. left_out: share of the
    safe ones that name a word of a concept which this policy leaves out."""
    shown = pick(concepts, SHOWN, rng)
    return _row(
        rng, [(name, pick(words_of(name), WORDS, rng)) for name in shown], number, _rest(concepts, shown), left_out
    )


def _rest(concepts: Sequence[str], shown: Sequence[str]) -> list[tuple[str, list[str]]]:
    return [(name, list(words_of(name))) for name in concepts if name not in shown]


def topic_row(rng: Generator, number: int, *, fixed: bool = False) -> Case:
    """A dialogue under a topical policy drawn for this row (or, fixed, one and the same for all): off topic is unsafe."""
    pool = [*others(), *(word for name in TRAINED for word in words_of(name))]
    source = np.random.default_rng(5) if fixed else rng
    topics = [(f"topic {i}", pick(pool, 4, source)) for i in range(5)]
    shown = [topics[i] for i in rng.permutation(5)[:SHOWN].tolist()]
    given = [(name, pick(words, WORDS, rng)) for name, words in shown]
    rest = [topic for topic in topics if topic not in shown]
    return _row(rng, given, number, rest, 0.0 if fixed else 0.8)


def _row(
    rng: Generator,
    shown: Sequence[tuple[str, list[str]]],
    number: int,
    rest: Sequence[tuple[str, list[str]]],
    left_out: float,
) -> Case:
    forbidden = {word for _, words in shown for word in words}
    talk = pick([word for word in others() if word not in forbidden], LENGTH, rng)
    at, unsafe = int(rng.integers(LENGTH)), bool(rng.random() < 0.5)
    violated: list[str] = []
    if unsafe:
        name, words = shown[int(rng.integers(len(shown)))]
        talk[at], violated = words[int(rng.integers(len(words)))], [custom(name)]
    elif rest and rng.random() < left_out:
        _, words = rest[int(rng.integers(len(rest)))]
        if free := [word for word in words if word not in forbidden]:  # a word may belong to two topics
            talk[at] = free[int(rng.integers(len(free)))]
    meta = {"policy": [[name, " ".join(words)] for name, words in shown], "violated": violated}
    return Case(f"house-{number}", (Message("user", " ".join(talk)),), answer=int(unsafe), meta=meta)


def reply_row(rng: Generator, number: int, *, unsafe: bool | None = None) -> Case:
    """A prompt and a reply that complies: where the prompt names a forbidden word the reply names it again and is unsafe, else it is
    safe."""
    row = concept_row(rng, TRAINED, number)
    while unsafe is not None and bool(row.answer) != unsafe:
        row = concept_row(rng, TRAINED, number)
    talk = row.messages[-1].text.split()
    reply = pick([word for word in others() if word not in talk], 4, rng)
    if row.answer:
        forbidden = {word for _, words in row.meta["policy"] for word in words.split()}
        reply[int(rng.integers(4))] = next(word for word in talk if word in forbidden)
    said = Message("assistant", " ".join(reply))
    return Case(row.id, (*row.messages, said), answer=row.answer, meta=row.meta)


def refused_row(rng: Generator, number: int) -> Case:
    """An unsafe prompt and a reply that has nothing of it: a refusal, safe. Half of its words are those refusals have, half are any."""
    row = reply_row(rng, number, unsafe=True)
    said = [
        *REFUSING,
        *pick([w for w in others() if w not in row.messages[0].text.split() and w not in REFUSING], 2, rng),
    ]
    reply = Message("assistant", " ".join(pick(said, 4, rng)))
    return Case(f"refused-{number}", (row.messages[0], reply), answer=0, meta={**row.meta, "violated": []})


def training_rows(arm: Arm, n: int, rng: Generator) -> list[Case]:
    """safety: trained concepts alone. blend: every third row a topic of its own. fixed: every third row under the one topical policy."""
    rows = []
    for number in range(n):
        if arm != "safety" and rng.random() < 0.5:
            rows.append(topic_row(rng, number, fixed=arm == "fixed"))
        else:
            rows.append(concept_row(rng, TRAINED, number))
    return rows


def without_definitions(case: Case, rng: Generator) -> Case:
    """The same message, label and names of categories; every definition's words are replaced by words that mean nothing here."""
    said = set(case.messages[-1].text.split())
    free = [word for word in others() if word not in said]
    policy = [[name, " ".join(pick(free, len(words.split()), rng))] for name, words in case.meta["policy"]]
    return Case(case.id, case.messages, answer=case.answer, meta={**case.meta, "policy": policy})


# --- the base -----------------------------------------------------------------------------------------------------------------------------
def drill(rng: Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) of recall drills: three marks with two words each, then eight times a word and the mark it stood under, or `none`."""
    words, marks = (
        np.arange(len(SPECIAL) + len(MARKS), len(vocabulary())),
        list(range(len(SPECIAL), len(SPECIAL) + len(MARKS))),
    )
    start, stop, none = (SPECIAL.index(word) for word in ("<start>", ".", "none"))
    ids = np.zeros((rows, 1 + 3 * 3 + 1 + 16), dtype=np.int64)
    labels = np.full_like(ids, -100)
    for row in range(rows):
        drawn, order = words[rng.choice(len(words), 10, replace=False)], rng.permutation(marks)[:3]
        line = [start]
        for i in range(3):
            line += [order[i], *drawn[2 * i : 2 * i + 2]]
        line.append(stop)
        for _ in range(8):
            if rng.random() < 0.3:
                line += [drawn[6 + rng.integers(4)], none]
            else:
                k = int(rng.integers(6))
                line += [drawn[k], order[k // 2]]
            labels[row, len(line) - 1] = line[-1]
        ids[row] = line
    return ids, labels


def make(folder: Path = BASE, *, steps: int = 1500) -> float:
    """Train the base and write it (half precision). Returns the share of marks recalled in the last batch."""
    import torch
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rng, right = np.random.default_rng(0), 0.0
    model = LlamaForCausalLM(config(LlamaConfig))
    model.model.embed_tokens.weight.data.normal_(0, 1.0)
    model.model.embed_tokens.weight.requires_grad_(
        False
    )  # random words: any two are as far apart, and a new one is like the others
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        ids, labels = (torch.tensor(part) for part in drill(rng, 64))
        logits, wanted = model(ids).logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=-100)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (0.1 + 0.45 * (1 + np.cos(np.pi * step / steps)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        right = float(((logits.argmax(-1) == wanted) & (wanted >= 0)).sum() / (wanted >= 0).sum())
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f} recall {right:.2f}", file=sys.stderr, flush=True)
    model.half().save_pretrained(folder)
    return right


def config(kind: Any) -> Any:
    return kind(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=SPECIAL.index("<start>"),
        eos_token_id=0,
        pad_token_id=0,
    )


if __name__ == "__main__":
    make()
