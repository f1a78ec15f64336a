"""A classifier of (prompt, completion) pairs: scores, saliency by word, training from a weighted mixture. transformers' own models inside.

Source: arXiv:2205.01663, sections 3 and 4 (a classifier reads the completion in its prompt; tokens are shown by the size of the gradient at
their embedding). Differs: label smoothing, so that scores do not saturate and thresholds keep their meaning; any sequence classifier of
transformers with one or two outputs serves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from davylamp.core.errors import InputError

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

WORD = re.compile(r"\S+")
Pair = tuple[str, str]  # prompt, completion


class PairClassifier:
    """model: a `...ForSequenceClassification` with one output, or two (the second means unsafe).  max_tokens: longer texts lose their end,
    and `scores` says so by an InputError, since what is cut off would pass unread.

    >>> classifier, pair = PairClassifier(*tiny()), ("the box stood .", "the vase broke .")
    >>> bool(classifier.scores([pair])[0] == classifier.scores([pair])[0])
    True
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int = 512):
        outputs = int(getattr(model.config, "num_labels", 0))
        if outputs not in (1, 2) or "SequenceClassification" not in type(model).__name__:
            raise InputError(
                f"a sequence classifier with one or two outputs is needed, got {type(model).__name__}, {outputs} outputs"
            )
        size = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} words and the model's table {size}: they do not belong together"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_tokens = min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens))
        self._mark = f" {tokenizer.sep_token} " if tokenizer.sep_token else "\n"  # between prompt and completion

    @classmethod
    def load(cls, folder: Path) -> PairClassifier:
        """From a folder that `save_pretrained` wrote. Raises InputError if it holds none."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise InputError(f"no classifier in {folder}: expected a folder that `davylamp train adversarial` wrote")
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def _encode(self, pairs: Sequence[Pair]) -> Any:
        texts = [f"{prompt}{self._mark}{completion}" for prompt, completion in pairs]
        found = self.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        if found["input_ids"].shape[1] > self.max_tokens:
            raise InputError(f"a text has {found['input_ids'].shape[1]} tokens, the classifier reads {self.max_tokens}")
        return found

    def _margin(self, **inputs: Any) -> torch.Tensor:
        """(n,) log-odds of unsafe."""
        logits = self.model(**inputs).logits
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    @torch.no_grad()
    def scores(self, pairs: Sequence[Pair], *, batch: int = 512) -> NDArray[np.float64]:
        """(n,) probabilities in (0, 1) that each pair is unsafe."""
        out = [
            self._margin(**self._encode(pairs[i : i + batch])).double().sigmoid().numpy()
            for i in range(0, len(pairs), batch)
        ]
        return np.concatenate(out) if out else np.zeros(0)

    def saliency(self, pairs: Sequence[Pair], *, rng: Generator | None = None) -> tuple[list[NDArray[np.float64]], str]:
        """For each pair, how much each word of the completion matters, scaled to a maximum of 1; and how that was found: `gradient`, the
        Euclidean norm of the log-odds' gradient at the embedding, the highest of a word's tokens; or `leave-one-out` where the tokenizer
        does not say which letters a token stands for. rng: random gradients instead, the control."""
        if not getattr(self.tokenizer, "is_fast", False):
            tried = [left_out(pair) for pair in pairs]
            flat = self.scores([pair for each in tried for pair in each])
            return falls(flat, [len(each) for each in tried]), "leave-one-out"
        texts = [f"{prompt}{self._mark}{completion}" for prompt, completion in pairs]
        found = self.tokenizer(
            texts, padding=True, return_tensors="pt", return_offsets_mapping=True, return_token_type_ids=False
        )
        offsets = found.pop("offset_mapping").numpy()
        if rng is None:
            size = self._gradient(found).norm(dim=-1).double().numpy()
        else:
            size = rng.random(offsets.shape[:2])
        out = []
        for row, (prompt, completion) in enumerate(pairs):
            start = len(prompt) + len(self._mark)
            each = np.zeros(len(WORD.findall(completion)))
            for at, word in enumerate(WORD.finditer(completion)):
                inside = (offsets[row, :, 0] < start + word.end()) & (offsets[row, :, 1] > start + word.start())
                each[at] = size[row, inside].max(initial=0.0)
            out.append(each / each.max() if each.size and each.max() > 0 else each)
        return out, "gradient"

    def _gradient(self, inputs: Any) -> torch.Tensor:
        """(n, tokens, width) gradient of the log-odds at the embeddings. By a hook and not by `inputs_embeds`: models that read the last
        token must see which tokens are padding."""
        kept: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1]

        handle = self.model.get_input_embeddings().register_forward_hook(keep)
        try:
            return torch.autograd.grad(self._margin(**inputs).sum(), kept[0])[0]
        finally:
            handle.remove()

    def fit(
        self,
        pairs: Sequence[Pair],
        labels: Sequence[float],
        weights: Sequence[float],
        *,
        rng: Generator,
        epochs: int = 5,
        batch: int = 64,
        lr: float = 2e-3,
        smoothing: float = 0.02,
    ) -> None:
        """Train on loss = sum_j w_j BCE(s_j, y_j) / sum_j w_j in place, by AdamW with a linearly falling rate. labels: 0 or 1, moved
        `smoothing` towards one half each."""
        inputs = self._encode(pairs)
        gold = torch.tensor(labels, dtype=torch.float32) * (1 - 2 * smoothing) + smoothing
        weight = torch.tensor(weights, dtype=torch.float32)
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.01)
        steps = epochs * -(-len(pairs) // batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**31)))
            self.model.train()
            for _ in range(epochs):
                for rows in torch.from_numpy(rng.permutation(len(pairs))).split(batch):
                    part = {name: values[rows] for name, values in inputs.items()}
                    width = int(part["attention_mask"].sum(1).max())
                    side = slice(-width, None) if self.tokenizer.padding_side == "left" else slice(width)
                    margin = self._margin(**{name: values[:, side] for name, values in part.items()})
                    loss = F.binary_cross_entropy_with_logits(margin, gold[rows], weight[rows], reduction="sum")
                    optimiser.zero_grad(set_to_none=True)
                    (loss / weight[rows].sum()).backward()
                    optimiser.step()
                    schedule.step()
            self.model.eval()


def left_out(pair: Pair) -> list[Pair]:
    """The pair, and the pair with each word of its completion left out.

    >>> left_out(("p", "a b"))
    [('p', 'a b'), ('p', 'b'), ('p', 'a')]
    """
    words = pair[1].split()
    return [pair, *((pair[0], " ".join(words[:i] + words[i + 1 :])) for i in range(len(words)))]


def falls(scores: NDArray[np.float64], sizes: Sequence[int]) -> list[NDArray[np.float64]]:
    """Leave-one-out saliency: how far the score moves without a word, scaled to a maximum of 1. sizes: of each pair's `left_out`."""
    out, at = [], 0
    for size in sizes:
        part = scores[at : at + size]
        at += size
        fall = np.abs(part[0] - part[1:])
        out.append(fall / fall.max() if fall.size and fall.max() > 0 else fall)
    return out


def tiny(words: Sequence[str] = (), *, seed: int = 0, width: int = 48, layers: int = 1) -> tuple[Any, Any]:
    """An untrained small classifier (BERT's architecture) and a tokenizer of whole words, by default those of `fragile_stories`."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from davylamp.data.fragile_stories import WORDS

    vocabulary = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]", ".", *(words or WORDS)]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        sep_token="[SEP]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    )
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # the usual 0.02 is for wide models; here attention would hardly start to learn
        num_labels=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval(), tokenizer
