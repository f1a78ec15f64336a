"""How `lamp` is trained: the hashed head, and the low-rank adapter and head of an encoder. Torch is needed for training alone.

Loss: binary cross-entropy of unsafe (labels smoothed by 0.02) + 0.3 x cross-entropy of the coarse hazard on unsafe rows that have one.
AdamW, linear warm-up and decay. After training both scores are put on one scale by Platt's method (1999) on rows held out by group, the
two classes weighing the same. Sources: arXiv:2106.09685 (adapters); Platt, "Probabilistic outputs for support vector machines".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from davylamp.guards._lamp_encoder import Encoder
from davylamp.guards._lamp_hash import HAZARDS, HashHead
from davylamp.guards._lamp_rows import Sentence
from davylamp.guards._lamp_text import BUCKETS, WINDOW, Reading, features

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

Say = Callable[[str], None]
SMOOTH = 0.02
HAZARD_WEIGHT = 0.3
OUTPUTS = 1 + len(HAZARDS)
Arrays = dict[str, "NDArray[Any]"]


def _loss(logits: torch.Tensor, rows: Sequence[Sentence]) -> torch.Tensor:
    label = torch.tensor([row.label for row in rows], dtype=torch.float32)
    weight = torch.tensor([row.weight for row in rows])
    unsafe = F.binary_cross_entropy_with_logits(
        logits[:, 0], label * (1 - 2 * SMOOTH) + SMOOTH, weight=weight, reduction="sum"
    )
    known = [i for i, row in enumerate(rows) if row.hazard >= 0]
    total = unsafe / weight.sum()
    if known:
        wanted = torch.tensor([rows[i].hazard for i in known])
        total = total + HAZARD_WEIGHT * F.cross_entropy(logits[known, 1:], wanted) * len(known) / len(rows)
    return total


def fit_hash(
    rows: Sequence[Sentence],
    *,
    rng: Generator,
    size: int = 16,
    hidden: int = 32,
    epochs: int = 4,
    batch: int = 256,
    lr: float = 3e-3,
    drop: float = 0.5,
    decay: float = 0.05,
    say: Say = lambda text: None,
) -> Arrays:
    """The arrays of a HashHead. drop: the share of a row's features that an epoch leaves out, so that no single one is leaned on.

    decay: of the table, decoupled as in AdamW. The table begins at zero: a feature that was never seen says nothing.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    table = torch.nn.Parameter(torch.zeros(BUCKETS, size))
    w1 = torch.nn.Parameter(torch.randn(hidden, 3 * size, generator=generator) * (1 / size) ** 0.5)
    w2 = torch.nn.Parameter(torch.randn(OUTPUTS, hidden, generator=generator) * 0.05)
    b1, b2 = torch.nn.Parameter(torch.full((hidden,), 0.1)), torch.nn.Parameter(torch.zeros(OUTPUTS))
    groups = [{"params": [table], "weight_decay": decay}, {"params": [w1, w2, b1, b2], "weight_decay": 1e-4}]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    parts: list[list[NDArray[Any]]] = [[], [], []]
    for row in rows:
        words, grams = features(row.text)
        for part, keys in zip(parts, (words, grams, features(row.context[-WINDOW:], context=True)[0]), strict=True):
            part.append(keys.astype(np.uint16))
    steps, step = epochs * math.ceil(len(rows) / batch), 0
    for epoch in range(epochs):
        order, running = rng.permutation(len(rows)), 0.0
        for at in range(0, len(rows), batch):
            picked = order[at : at + batch].tolist()
            sums = []
            for part in parts:
                kept = [part[i][rng.random(part[i].size) >= drop] if part[i].size else part[i] for i in picked]
                lengths = [keys.size for keys in kept]
                offsets = torch.tensor(np.concatenate(([0], np.cumsum(lengths)[:-1])))
                flat = torch.from_numpy(np.concatenate(kept).astype(np.int64))
                scale = torch.tensor(lengths).clamp_min(1).rsqrt()[:, None]
                sums.append(F.embedding_bag(flat, table, offsets, mode="sum") * scale)
            logits = F.relu(torch.cat(sums, 1) @ w1.T + b1) @ w2.T + b2
            loss = _loss(logits, [rows[i] for i in picked])
            optimiser.zero_grad()
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = lr * _schedule(step, steps)
            optimiser.step()
            step, running = step + 1, running + loss.item() * len(picked)
        say(f"hashed head: epoch {epoch + 1} of {epochs}, loss {running / len(rows):.4f}")
    weights = table.detach().numpy()
    unit = float(np.quantile(np.abs(weights), 0.9999)) / 127 or 1.0
    whole = np.clip(np.rint(weights / unit), -127, 127).astype(np.int8)
    rest = {
        name: value.detach().numpy().astype(np.float32)
        for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2))
    }
    rest["w1"] *= np.float32(
        (1 - drop) ** 0.5
    )  # without dropping, a sum over the root of its number is that much larger
    return {"table": whole, "step": np.array(unit, dtype=np.float32), **rest}


def _schedule(step: int, steps: int, *, warm: float = 0.05) -> float:
    """Share of the full rate at a step: up over the first 5 %, then down to 2 %."""
    done = step / max(1, steps)
    return min(1.0, (done + 1e-3) / warm) * max(0.02, 1 - done)


def fit_encoder(
    encoder: Encoder,
    rows: Sequence[Sentence],
    *,
    rng: Generator,
    epochs: float = 2.0,
    rank: int = 16,
    frozen: int = 3,
    lr: float = 2e-3,
    tokens: int = 1400,
    longest: int = 62,
    start: Arrays | None = None,
    say: Say = lambda text: None,
) -> Arrays:
    """The adapter and head for an encoder, which is left with the adapter on. tokens: word pieces of a batch, padding included.

    start: an adapter and head to go on from, instead of none; its rank counts then.

    longest: word pieces of a training row.  frozen: the first so many blocks carry no adapter; each row goes through them once, and what
    comes out is kept (half precision, about 20 kB a row), so that an epoch costs little more than half.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    first, last = encoder.marks
    ids = []
    for row in rows:
        before = [first]
        if row.context:
            before += [*encoder.tokenizer.encode(row.context, add_special_tokens=False).ids[-24:], last]
        ids.append([*before, *encoder.tokenizer.encode(row.text, add_special_tokens=False).ids[:longest], last])
    plan: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        share = min(1.0, epochs - epoch)
        order = rng.permutation(len(rows))[: round(share * len(rows))].tolist()
        batches = _batches(order, ids, tokens)
        plan += [batches[i] for i in rng.permutation(len(batches)).tolist()]
    drawn = sorted({i for batch in plan for i in batch})  # with less than an epoch not all rows
    lower: list[torch.Tensor] = [torch.empty(0)] * len(ids)
    with torch.no_grad():
        for picked in _batches(drawn, ids, 2 * tokens):
            x = encoder.blocks(
                encoder.embed(pad([ids[i] for i in picked])[0]), [len(ids[i]) for i in picked], upto=frozen
            )
            for row, i in zip(x.half(), picked, strict=True):
                lower[i] = row[: len(ids[i])].clone()
    say(f"encoder: {len(drawn)} rows through the first {frozen} blocks")
    parameters = []
    for name, (weight, _) in encoder.linear.items():
        if int(name.split(".")[0]) >= frozen:
            a = (torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5).requires_grad_()
            b = torch.zeros(weight.shape[0], rank, requires_grad=True)
            if start is not None:
                a, b = (torch.from_numpy(start[f"{name}.{part}"]).float().requires_grad_() for part in "ab")
            encoder.adapter[name] = (a, b)
            parameters += [a, b]
    head, bias = torch.zeros(OUTPUTS, encoder.width), torch.zeros(OUTPUTS)
    if start is not None:
        head, bias = torch.from_numpy(start["head"]).clone(), torch.from_numpy(start["bias"]).clone()
    head.requires_grad_()
    bias.requires_grad_()
    rates = (lr, 2 * lr)
    optimiser = torch.optim.AdamW(
        [{"params": parameters, "lr": lr}, {"params": [head, bias], "lr": 2 * lr}], weight_decay=0.01
    )
    running = math.log(2)
    for step, picked in enumerate(plan):
        lengths = [len(ids[i]) for i in picked]
        x = torch.nn.utils.rnn.pad_sequence([lower[i] for i in picked], batch_first=True).float()
        logits = F.linear(encoder.pool(encoder.blocks(x, lengths, first=frozen), lengths), head, bias)
        loss = _loss(logits, [rows[i] for i in picked])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, len(plan))
        optimiser.step()
        running = 0.98 * running + 0.02 * loss.item()
        if step % 50 == 49 or step + 1 == len(plan):
            say(f"encoder: step {step + 1} of {len(plan)}, loss {running:.4f}")
    out: Arrays = {"head": head.detach().numpy().astype(np.float32), "bias": bias.detach().numpy().astype(np.float32)}
    for name, (a, b) in encoder.adapter.items():
        encoder.adapter[name] = (a.detach().half().float(), b.detach().half().float())  # what is kept is what is used
        out[f"{name}.a"], out[f"{name}.b"] = (part.detach().numpy().astype(np.float16) for part in (a, b))
    return out


def _batches(order: Sequence[int], ids: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Rows of near length together, at most `tokens` pieces a batch with padding."""
    out: list[list[int]] = []
    for at in range(0, len(order), 1024):
        chunk = sorted(order[at : at + 1024], key=lambda i: len(ids[i]))
        batch: list[int] = []
        for i in chunk:
            if batch and len(ids[i]) * (len(batch) + 1) > tokens:
                out.append(batch)
                batch = []
            batch.append(i)
        out.append(batch)
    return out


def pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[int]]:
    """Rows of ids as one tensor, and their lengths."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]), [len(row) for row in rows]


def hash_scores(head: HashHead, rows: Sequence[Sentence]) -> list[float]:
    """The unsafe logit of each row."""
    return [float(head.score(Reading(row.text, row.context))[0]) for row in rows]


def encoder_scores(encoder: Encoder, arrays: Arrays, rows: Sequence[Sentence], *, tokens: int = 2000) -> list[float]:
    """The unsafe logit of each row, the largest over its windows."""
    head = torch.from_numpy(arrays["head"][:1])
    cut = [(i, window) for i, row in enumerate(rows) for window in encoder.windows(row.text, row.context)]
    out = [-math.inf] * len(rows)
    with torch.inference_mode():
        for batch in _batches(range(len(cut)), [window for _, window in cut], tokens):
            hidden = encoder.hidden(*pad([cut[i][1] for i in batch]))
            logits = F.linear(hidden, head)[:, 0] + float(arrays["bias"][0])
            for i, logit in zip(batch, logits.tolist(), strict=True):
                out[cut[i][0]] = max(out[cut[i][0]], logit)
    return out


def platt(logits: Sequence[float], labels: Sequence[int]) -> tuple[float, float]:
    """(slope, shift) with 1 / (1 + exp(-(slope * logit + shift))) as the chance of unsafe where both classes are equally common.

    >>> slope, shift = platt([-2, -1, 1, 2], [0, 1, 0, 1])
    >>> 0 < slope < 1 and abs(shift) < 1e-6
    True
    """
    x, y = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float)
    positives, negatives = max(1.0, y.sum()), max(1.0, (1 - y).sum())
    weight = np.where(y == 1, 0.5 / positives, 0.5 / negatives)
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))  # Platt's smoothed targets
    theta = np.array([1.0, 0.0])
    design = np.stack((x, np.ones_like(x)), 1)
    prior = np.array([1.0, 0.0])  # pulls very weakly, so that separable rows have a solution

    def loss(at: NDArray[Any]) -> float:
        z = design @ at
        return float((weight * (np.logaddexp(0, z) - target * z)).sum() + 5e-5 * ((at - prior) ** 2).sum())

    for _ in range(100):  # Newton's method on a convex function, each step halved until it goes down
        p = 1 / (1 + np.exp(-np.clip(design @ theta, -30, 30)))
        gradient = design.T @ (weight * (p - target)) + 1e-4 * (theta - prior)
        hessian = (design * (weight * p * (1 - p))[:, None]).T @ design + 1e-4 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        while loss(theta - step) > loss(theta) and np.abs(step).max() > 1e-12:
            step = step / 2
        theta = theta - step
        if np.abs(step).max() < 1e-9:
            break
    return max(0.05, float(theta[0])), float(theta[1])
