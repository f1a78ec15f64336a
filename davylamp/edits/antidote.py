"""Antidote: after fine-tuning, zero the weights that matter most for harmful answers.
Source: arXiv:2408.09600, section 4 and its code. Differs: one pass with hooks instead of two over stored activations, with equal masks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.core.registry import edit
from davylamp.core.rows import CaseFile, digest
from davylamp.edits._masks import top_mask
from davylamp.edits._wanda import How, Key, Mode, Picker, Report, active_adapters, parts, targets_of
from davylamp.models.activations import InputNorms, Weight, input_norms, linear_weights
from davylamp.models.turns import encode_turn, ends_of

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@edit(
    version=1,
    source="arXiv:2408.09600",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning", "harmful-compliance"),
    needs="hf",
    systems=("31",),
)
def antidote(
    model: PreTrainedModel | Path,
    *others: PreTrainedModel | Path,
    rows: Sequence[Case] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: Path | None = None,
    rng: Generator,
    ratio: float = 0.1,
    mode: Literal["auto", "adapter", "delta", "merged", "full"] = "auto",
    score: Literal["activations", "magnitude", "random"] = "activations",
    scope: str = "row",
    norm: Literal["rms", "mean"] = "rms",
    target: tuple[str, ...] = (),
    benign: str = "",
    benign_ratio: float = 0.1,
    held_out: str = "",
    early: bool = False,
) -> Any:
    """Repair a fine-tuned model: score every weight by |weight| times how strongly harmful answers use it, and zero the top share.

    It takes no gradient step and need not know how the model was fine-tuned. It can cost the skill that was taught, and it does not
    protect: the model can be fine-tuned again. Run score=random of the same ratio beside it, and measure the skill.

    others: for mode delta on whole models, the aligned model that was fine-tuned; for an adapter's folder, its base if it moved.
    rows: the re-alignment set, harmful requests that end in a harmful answer (a few hundred; the reference takes 2,000).
    ratio: the share of each row's weights that is zeroed, in (0, 1); the reference takes 0.01 to 0.2, 0.1 for most.
    mode: adapter (LoRA's A and B themselves, as the reference), delta (what the fine-tune added: B A, or the model minus others[0]),
    merged (adapter merged, then its layers' weights), full (weights of q, k and v, or of `target`); auto takes adapter or full.
    score: activations, or the controls magnitude (|weight| alone) and random (a mask of equal size).
    scope: row (top share of each output row, as the reference), tensor, global, or n:m (n of every m columns).
    norm: rms (the reference's code: root of the mean over texts of the squared norm) or mean (its paper: mean of the norms).
    target: layers to mask, by last name or glob.  benign: a rows file; weights in its own top `benign_ratio` are left alone (a variant).
    held_out: a rows file that is used for evaluation and must share no request with `rows`.
    early: stop reading when the mask of a few rows has not changed over two batches; approximate.
    """
    how = How(ratio=ratio, score=score, scope=scope, norm=norm, benign_ratio=benign_ratio, early=early,
              seed=int(rng.integers(2**31)))  # fmt: skip
    if held_out:
        check_disjoint(rows, list(CaseFile(held_out)))
    harmless = list(CaseFile(benign)) if benign else []
    if isinstance(model, Path):
        from davylamp.edits._antidote_folder import repair_folder

        if out is None:
            raise InputError("antidote on a folder needs `out`, the folder to write")
        folders = [Path(other) for other in others]  # type: ignore[arg-type]
        return repair_folder(
            model, folders, rows, out, how, mode=mode, target=target, tokenizer=tokenizer, benign=harmless
        )
    aligned = others[0] if others else None
    return repair(
        model, rows, tokenizer=tokenizer, how=how, mode=mode, target=target, benign=harmless, aligned=aligned
    )[0]


# --- the re-alignment set ----------------------------------------------------------------------------------------------------------------
def with_answers(rows: Sequence[Case]) -> list[Case]:
    """The rows that end in a non-empty answer; the others are left out. Raises InputError with their ids if none is left.

    >>> from davylamp.core.nouns import Message
    >>> with_answers([Case("a", (Message("user", "x"),))])
    Traceback (most recent call last):
    davylamp.core.errors.InputError: the re-alignment set needs harmful requests with harmful answers; no row ends in one. First ids: a
    """
    if not rows:
        raise InputError("the re-alignment set is empty. Give rows: harmful requests that end in a harmful answer")
    good = [row for row in rows if row.messages[-1].role == "assistant" and row.messages[-1].text.strip()]
    if not good:
        raise InputError(
            "the re-alignment set needs harmful requests with harmful answers; no row ends in one. First ids: "
            + ", ".join(row.id for row in rows[:5])
        )
    return good


def check_disjoint(rows: Sequence[Case], held_out: Sequence[Case]) -> None:
    """Raises InputError, with the first five ids, if a request of `rows` is asked in the evaluation too (by a hash of its words)."""

    def key(case: Case) -> str:
        return digest([" ".join(message.text.lower().split()) for message in case.messages if message.role == "user"])

    taken = {key(case) for case in held_out}
    if both := [case.id for case in rows if key(case) in taken]:
        raise InputError(
            f"{len(both)} rows of the re-alignment set are also evaluation rows: {', '.join(both[:5])}. Take other rows"
        )


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Sequence[Case],
    weights: Mapping[str, Weight],
    how: How,
) -> InputNorms:
    """Read the rows (request, answer and end token, as the chat template writes them) once; see `models/activations.py`."""
    if tokenizer is None:
        raise InputError("antidote needs the model's tokenizer to read rows, got None")
    ends = ends_of(model, tokenizer)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    encoded = []
    for row in with_answers(rows):
        prompt, answer = encode_turn(tokenizer, row.messages[:-1], row.messages[-1].text, ends)
        encoded.append((row.id, (prompt + answer)[:room]))
    enough = _Stable(weights, how) if how.early else None
    pad = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
    return input_norms(model, encoded, weights, norm=how.norm, pad=pad, enough=enough)


class _Stable:
    """True once the masks of the first rows of every eighth weight have stayed the same over two batches."""

    def __init__(self, weights: Mapping[str, Weight], how: How):
        self.probes = {name: matrix for name, weight in list(weights.items())[::8]
                       for (_, expert, half), matrix in parts(name, weight, weight.parameter.data) if not expert + half}  # fmt: skip
        self.how, self.old, self.same = how, {}, 0  # type: ignore[var-annotated]

    def __call__(self, found: InputNorms) -> bool:
        new = {}
        for name, matrix in self.probes.items():
            if name in found.means:
                values = found.importance(name).reshape(-1, matrix.shape[1])[0]
                new[name] = top_mask(matrix[:32].float().abs() * values, self.how.ratio)
        equal = bool(new) and new.keys() == self.old.keys() and all(torch.equal(new[n], self.old[n]) for n in new)
        self.same, self.old = self.same + 1 if equal else 0, new
        return self.same >= 2


def repair(
    model: Any,
    rows: Sequence[Case],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    how: How | None = None,
    mode: Mode = "auto",
    target: Sequence[str] = (),
    benign: Sequence[Case] = (),
    aligned: Any = None,
    norms: InputNorms | None = None,
) -> tuple[Any, Report]:
    """(the repaired model, the report), in memory and in place; options as in `antidote`. Modes merged and delta take the adapter off.

    aligned: the model before the fine-tune, for mode delta without an adapter.
    norms: from an earlier `calibrate` of the same model and targets, so that several ratios need one pass.
    """
    how = how or How()
    used, weights = targets_of(model, mode, target)
    start = time.perf_counter()
    origins: dict[str, torch.Tensor] = {}
    if used in ("merged", "delta") and active_adapters(model):
        inside = {
            name: name.removesuffix("base_layer.weight").removeprefix("base_model.model.") + "weight"
            for name in weights
        }
        if used == "delta":
            origins = {inside[name]: weight.parameter.data.clone() for name, weight in weights.items()}
        model = model.merge_and_unload()
        every = linear_weights(model)
        weights = {name: every[name] for name in inside.values()}
    elif used == "delta":
        origins = _origins(weights, aligned)
    report = Report(used, how)
    found: list[InputNorms | None] = [norms, None]
    if how.score == "activations":
        for i, some in enumerate((rows, benign)):
            if found[i] is None and (some or i == 0):
                found[i] = calibrate(model, tokenizer, some, weights, how)
                report.dropped += len(some) - len(with_answers(some))
    report.scored(found[0], time.perf_counter() - start)
    middle = time.perf_counter()

    def matrices() -> Iterator[tuple[Key, torch.Tensor]]:
        for name, weight in weights.items():
            stored = weight.parameter.data
            yield from parts(name, weight, stored.float() - origins[name].float() if origins else stored)

    picker = Picker(how, matrices, *found)
    before = {
        key: view for name, weight in weights.items() if origins for key, view in parts(name, weight, origins[name])
    }
    after = {key: view for name, weight in weights.items() for key, view in parts(name, weight, weight.parameter.data)}
    for key, scored in matrices():
        mask = picker.mask_or_skip(key, scored, report)
        if mask is not None:
            after[key].copy_(torch.where(mask, before[key] if origins else torch.zeros_like(after[key]), after[key]))
    report.done(time.perf_counter() - middle)
    return model, report


def _origins(weights: Mapping[str, Weight], aligned: Any) -> dict[str, torch.Tensor]:
    """The same weights of the model before the fine-tune."""
    if aligned is None:
        raise InputError("mode delta needs the aligned model that was fine-tuned, or a model with its LoRA adapter")
    theirs = linear_weights(aligned)
    for name, weight in weights.items():
        if name not in theirs or theirs[name].parameter.shape != weight.parameter.shape:
            found = list(theirs[name].parameter.shape) if name in theirs else "nothing"
            raise InputError(
                f"the aligned model has {found} for {name}, expected {list(weight.parameter.shape)}. Is it the right one?"
            )
    return {name: theirs[name].parameter.data for name in weights}
