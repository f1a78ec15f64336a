"""SOMF: keep the safe model, and let a learnt mask say which coordinates of its fine-tunes' updates may stay.
Source: arXiv:2405.09055, section 3, and its code. Differs: the mask that is evaluated is the one deployed, by default its probabilities."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.core.registry import edit
from davylamp.edits._concrete import MODES, Mask, load_mask, logit_noise, save_mask
from davylamp.edits._fusion import Merge, Ties, drops_of, fuse, prepare
from davylamp.edits._mask_learning import Learner, Learning, encode_pairs, learn, usable_pairs
from davylamp.edits._masks import generator
from davylamp.edits._names import Slot, check_same, file_map
from davylamp.models import vectors

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASK_FILE, REPORT_FILE = "mask.safetensors", "somf.json"


@edit(
    version=1,
    source="arXiv:2405.09055",
    licence="Apache-2.0",
    stage="post-training",
    threats=("fine-tuning", "harmful-compliance", "capability-loss"),
    needs="hf",
    systems=("13",),
)
def somf(
    model: PreTrainedModel | Path,
    *others: PreTrainedModel | Path,
    rows: Sequence[Case] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: Path | None = None,
    rng: Generator,
    mode: Literal["probability", "threshold", "soft", "binary", "none"] = "probability",
    merge: Literal["none", "average", "task_arithmetic", "ties", "dare"] = "none",
    weight: float | None = None,
    density: float | None = None,
    mask: str = "",
    steps: int | None = None,
    epochs: int = 3,
    batch: int = 16,
    lr: float = 1e-3,
    beta: float = 0.1,
    sft: float = 1.0,
    init: float = 0.0,
    reference: Literal["fixed", "resample", "task"] = "fixed",
    schedule: Literal["cosine", "constant"] = "cosine",
    coarse: Literal["entry", "row", "rank", "block", "tensor"] = "entry",
    temperature: float = 0.5,
    cap: float = 10.0,
) -> Any:
    """Realign fine-tunes of a safe model: learn which coordinates of what they changed may stay, from pairs of a safer and a worse answer.

    The result is the safe model plus the masked task vectors, each rescaled by the mean of its mask; the weights themselves are not
    trained. Expect a trade between safety and task, measure both for the mode that is deployed, and look at over-refusal.

    model: the safe model (or safe adapter).  others: one or more fine-tunes that started from it, of the same sort.
    rows: preference pairs. A row ends in a user turn; meta.chosen is the safer and meta.rejected the worse answer (or the fields of
    PKU-SafeRLHF). Not needed with `mask` or mode none.
    mode: probability (sigmoid of the logits), threshold (logit above 0), soft or binary (one draw, which is stored), none (no mask: the
    plain merge, the baseline).
    merge: none for one fine-tune; average, task_arithmetic, ties or dare.  weight, density: of the rule, None for the reference's.
    mask: a mask file that was learnt for these models; then nothing is learnt.
    steps: of the optimiser, None for `epochs`; batch: pairs a step.  lr: of the logits; 1e-3 to 1e-2 in the source over about 1,000
    steps, 5e-2 for 50 steps.  beta: of DPO.  sft: weight of the chosen answers' mean log-likelihood; 0 as in the source, where a small
    model may never learn to say what it prefers.  init: of the logits; 0 keeps half, 1 keeps 73 %.
    reference: DPO's reference model: fixed (one draw at p = 0.5), resample (a new one at every step, as the source), task (no mask).
    coarse: what one logit covers: an entry, a row, LoRA's rank, a block of 16 x 16, or a tensor.  cap: the most a survivor is amplified.
    """
    if not others:
        raise InputError("somf needs a safe model and one or more fine-tunes of it, got no fine-tune")
    rule = merge_of(model, len(others), merge, weight, density)
    if mode not in (*MODES, "none"):
        raise InputError(f"mode of somf must be {', '.join(MODES)} or none, got {mode!r}")
    how = Learning(steps, epochs, batch, lr, beta, sft, init, reference, schedule, coarse, temperature, cap)
    seed = int(rng.integers(2**31))
    if mask:
        chosen = load_mask(Path(mask))
    elif mode == "none":
        chosen = no_mask(model, others)
    else:
        chosen, _ = learn_mask(model, others, rows, tokenizer=tokenizer, merge=rule, how=how, rng=rng)
    if mode in ("soft", "binary") and chosen.about.get("drawn") != mode:
        chosen = chosen.draw(mode, lambda name, shape: logit_noise(shape, generator(seed, f"mask {name}")))
    return realign(
        model, others, chosen, mode="probability" if mode == "none" else mode, merge=rule, seed=seed, out=out
    )


def merge_of(model: Any, tasks: int, merge: str, weight: float | None, density: float | None) -> Merge:
    """The merge rule; adapters have another default weight than whole models."""
    adapters = (model / "adapter_config.json").is_file() if isinstance(model, Path) else hasattr(model, "peft_config")
    return Merge(merge, tasks, weight, density, adapters)


# --- task vectors ------------------------------------------------------------------------------------------------------------------------
def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that task vectors are taken of: floating-point parameters, of a peft model those of its adapter. Tied ones once."""
    adapter = hasattr(model, "peft_config")
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and (not adapter or ".lora_" in name or ".modules_to_save." in name)
    }


def tensors_of(source: Any, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a model in memory, or those of a folder under the names (and on the devices) of the loaded safe model."""
    if not isinstance(source, Path):
        return parameters_of(source)
    opened = vectors.open_source(source, adapters="keep")
    out = {}
    try:
        for name, slots in file_map(like, list(opened.tensors)).items():
            first = opened.tensors[slots[0].file]
            whole = torch.empty(like[name].shape if len(slots) > 1 else first.shape, dtype=first.dtype)
            for slot in slots:
                view, spec = slot.of(whole), opened.tensors[slot.file]
                view.copy_(opened.raw(slot.file, 0, spec.rows).view(view.shape))
            out[name] = whole
    finally:
        opened.close()
    return out


def task_vectors(safe: Any, tasks: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
    """For each task (a model or a folder) its weights minus those of the safe model, float32, by parameter name; tensors that no task
    changed are left out.

    Raises InputError for models or adapters that do not fit, for entries that are not finite, and where nothing was changed.
    """
    own, out = parameters_of(safe), []
    for number, task in enumerate(tasks, start=1):
        what, theirs = f"task model {number}", tensors_of(task, own)
        check_same({n: p.shape for n, p in own.items()}, {n: p.shape for n, p in theirs.items()}, what)
        check_adapters(lora_settings(safe), lora_settings(task), own, theirs, what)
        tau = {name: theirs[name].to(own[name].device).float() - own[name].float() for name in own}
        for name, vector in tau.items():
            if count := int((~vector.isfinite()).sum()):
                raise InputError(f"{what} minus the safe model: {name} has {count} entries that are not finite")
        if not any(bool(vector.any()) for vector in tau.values()):
            raise InputError(f"nothing to realign: {what} equals the safe model")
        out.append(tau)
    changed = [name for name in own if any(bool(tau[name].any()) for tau in out)]
    return [{name: tau[name] for name in changed} for tau in out]


def lora_settings(source: Any) -> list[dict[str, Any]] | None:
    """Rank and scaling of a model's or folder's adapters; None for a whole model."""
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
    if isinstance(source, Path):
        file = source / "adapter_config.json"
        if not file.is_file():
            return None
        known = json.loads(file.read_text(encoding="utf-8"))
        return [{key: known.get(key) for key in keys}]
    configs = getattr(source, "peft_config", None)
    return None if not configs else [{key: getattr(config, key, None) for key in keys} for config in configs.values()]


def check_adapters(
    ours: Any, theirs: Any, own: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], what: str
) -> None:
    """Raises InputError unless both are whole models, or both wear adapters of one rank and scaling of which one continues the other."""
    if ours is None and theirs is None:
        return
    if ours is None or theirs is None:
        raise InputError(
            f"{what} and the safe model must both be adapters or both be whole models. Merge the adapter first"
        )
    if ours != theirs:
        raise InputError(f"{what} has another LoRA rank or scaling than the safe adapter: {theirs}, not {ours}")
    pairs = [(own[n].float().flatten(), other[n].float().flatten()) for n in own if "lora_A" in n]
    near = [float(torch.cosine_similarity(a, b.to(a.device), dim=0)) for a, b in pairs if a.any() and b.any()]
    if near and sum(near) / len(near) < 0.5:  # A of two random beginnings is orthogonal; training on moves it little
        raise InputError(
            f"{what} did not start from the safe adapter (mean cosine of A is {sum(near) / len(near):.2f}). A and B can be scaled "
            "against each other without changing the model, so their difference means nothing. Merge both and realign whole models"
        )


def learn_mask(
    model: Any,
    others: Sequence[Any],
    rows: Sequence[Case],
    *,
    tokenizer: Any = None,
    merge: Merge,
    how: Learning,
    rng: Generator,
    at: Sequence[int] = (),
    watch: Callable[[int, Mask], object] | None = None,
) -> tuple[Mask, list[dict[str, float]]]:
    """(the mask, what each step saw). Of folders the safe model is loaded, and of the others only what changed. at, watch: see `learn`."""
    pairs, dropped = usable_pairs(rows)
    sources = [model, *others]
    if isinstance(model, Path):
        from davylamp.models.loading import load_pair

        model, found = load_pair(str(model))
        tokenizer = tokenizer or found
    taus = task_vectors(model, others)
    if tokenizer is None:
        raise InputError("somf needs the model's tokenizer to read rows, got None")
    pad = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
    learner = Learner(model, taus, encode_pairs(model, tokenizer, pairs), merge, how, rng, pad)
    mask, seen = learn(learner, at=at, watch=watch)
    last = {name: round(value, 6) for name, value in seen[-1].items()} if seen else {}
    mask.about = {"learning": asdict(how), "merge": asdict(merge), "pairs": len(pairs), "dropped": dropped, "steps": len(seen),
                  "last step": last, "inputs": [content_hash(source, mask) for source in sources]}  # fmt: skip
    return mask, seen


def no_mask(model: Any, others: Sequence[Any]) -> Mask:
    """A mask that lets everything through, for the plain merge: probability 1 everywhere."""
    with_parts = vectors.open_source(model, adapters="keep")
    try:
        shapes = {name: tuple(spec.shape) for name, spec in with_parts.tensors.items() if spec.dtype.is_floating_point}
    finally:
        with_parts.close()
    logits = {name: torch.full((1,) * max(1, len(shape)), 60000.0) for name, shape in shapes.items()}
    return Mask(logits, shapes, "tensor", about={"no mask": True})


def content_hash(source: Any, mask: Mask) -> str:
    """SHA-256 over the masked tensors' names, shapes and float32 values; equal for a model in memory and its folder."""
    state = hashlib.sha256()
    opened = vectors.open_source(source, adapters="keep")
    try:
        for name, slots in sorted(file_map(mask.logits, list(opened.tensors)).items()):
            state.update(f"{name} {list(mask.shapes[name])}\n".encode())
            for slot in slots:
                spec = opened.tensors[slot.file]
                step = max(1, (1 << 22) // max(1, spec.width))
                for start in range(0, spec.rows, step):
                    part = (
                        opened.raw(slot.file, start, min(start + step, spec.rows)).detach().float().cpu().contiguous()
                    )
                    state.update(part.numpy().tobytes())
    finally:
        opened.close()
    return state.hexdigest()


# --- fusion ------------------------------------------------------------------------------------------------------------------------------
class Fusion:
    """theta_safe + merge of M tau / mean M for one tensor of a checkpoint after another; what a rule of `models/vectors.py` is."""

    def __init__(self, mask: Mask, mode: str, merge: Merge, seed: int, slots: Mapping[str, Sequence[Slot]]):
        self.mask, self.mode, self.merge, self.seed = mask, mode, merge, seed
        self.scales = mask.scales(mode)
        self.where = {slot.file: (name, slot) for name, own in slots.items() for slot in own}
        self.ties: Ties | None = None

    def masked(self, part: vectors.Part, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The masked, rescaled vectors of the tasks for one tensor, in float32."""
        name, slot = self.where[part.name]
        kept = slot.of(self.mask.wide(name, self.mode)).reshape(tensors[0].shape)
        return [(tensor - tensors[0]) * kept * self.scales[name] for tensor in tensors[1:]]

    def prepare(self, plan: Any) -> None:
        """The pass over all tensors that TIES needs."""

        def every() -> Iterator[list[torch.Tensor]]:
            yield from (found for _, found in vectors.scan_plan(plan, self.masked, blocks=False))

        self.ties = prepare(self.merge, every)

    def __call__(self, part: vectors.Part, tensors: list[torch.Tensor]) -> torch.Tensor:
        name, slot = self.where[part.name]
        if self.scales[name] == 0.0:
            return tensors[0]
        shape = self.mask.shapes[name]
        drops = [slot.of(each).reshape(tensors[0].shape) for each in drops_of(self.merge, name, shape, self.seed)]
        return tensors[0] + fuse(self.merge, self.masked(part, tensors), self.ties, drops)


def realign(
    model: Any, others: Sequence[Any], mask: Mask, *, mode: str, merge: Merge, seed: int = 0, out: Path | None = None
) -> Any:
    """The safe model plus the masked fine-tunes: in memory and in place, or streamed from folders to `out` (mask and report beside it).

    Raises InputError for a mask that was learnt for other models, or has another number of tasks behind it.
    """
    if len(others) != merge.tasks:
        raise InputError(f"the merge is of {merge.tasks} task models, got {len(others)}")
    opened = vectors.open_source(model, adapters="keep")
    try:
        slots = file_map(mask.logits, list(opened.tensors))
        for name, own in slots.items():
            stored = [tuple(opened.tensors[slot.file].shape) for slot in own]
            wanted = [tuple(slot.of(torch.empty(mask.shapes[name], device="meta")).shape) for slot in own]
            if stored != wanted:
                raise InputError(f"the mask is for other tensors: {name} is {stored[0]} here, {wanted[0]} in the mask")
    finally:
        opened.close()
    known = mask.about.get("inputs")
    if known is not None:
        found = [content_hash(source, mask) for source in (model, *others)]
        wrong = [number for number, (a, b) in enumerate(zip(known, found, strict=False)) if a != b]
        if wrong or len(known) != len(found):
            which = (
                "the safe model"
                if wrong[:1] == [0]
                else f"task model {wrong[0]}"
                if wrong
                else f"{len(known) - 1} task models"
            )
            raise InputError(f"the mask was learnt for other weights: {which} differs. Learn it again for these models")
    fusion = Fusion(mask, mode, merge, seed, slots)
    shut = [name for name, scale in fusion.scales.items() if scale == 0.0]
    if shut:
        warnings.warn(
            f"{len(shut)} tensors are masked whole and stay as in the safe model: {', '.join(shut[:5])}", stacklevel=2
        )
    options = {"mode": mode, "merge": asdict(merge), "seed": seed, "about": mask.about, "masked_whole": shut}
    words: dict[str, Any] = {"lineage": {"operation": "somf", "options": options}, "only": fusion.where.__contains__,
                             "before": fusion.prepare}  # fmt: skip
    if isinstance(model, Path):
        words |= {"adapters": "keep", "out": out, "after": lambda folder: _beside(folder, mask, mode, options)}
    return vectors.edit(model, others, fusion, **words)


def _beside(folder: Path, mask: Mask, mode: str, options: Mapping[str, Any]) -> None:
    if not mask.about.get("no mask"):
        save_mask(mask, folder / MASK_FILE)
    report = {**options, "kept": kept_fractions(mask, mode)}
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# --- what a mask keeps -------------------------------------------------------------------------------------------------------------------
def kept_fractions(mask: Mask, mode: str = "probability") -> dict[str, Any]:
    """The mean of the mask over all entries, by layer and by kind of module: {"all", "layers": {number: …}, "modules": {name: …}}."""
    sums: dict[tuple[str, str], list[float]] = {}
    for name, shape in mask.shapes.items():
        layer, size = vectors.layer_of(name), float(torch.Size(shape).numel())
        parts = [part for part in name.split(".") if part not in ("weight", "bias", "default", "lora_A", "lora_B")]
        for key in (("all", ""), ("layers", "none" if layer is None else str(layer)), ("modules", parts[-1])):
            total = sums.setdefault(key, [0.0, 0.0])
            total[0] += float(mask.wide(name, mode).double().mean()) * size
            total[1] += size
    out: dict[str, Any] = {"layers": {}, "modules": {}}
    for (kind, part), (weighted, entries) in sums.items():
        if kind == "all":
            out["all"] = weighted / entries
        else:
            out[kind][part] = weighted / entries
    return out


def overlap(left: Mask, right: Mask) -> dict[str, float]:
    """How far two masks keep the same coordinates (logit above 0): Jaccard index, and what independent masks of these sizes would give."""
    both = either = ours = theirs = total = 0.0
    for name in left.logits:
        if name not in right.logits or left.shapes[name] != right.shapes[name]:
            raise InputError(f"two masks of one model are needed, {name} is not the same in both")
        a, b = left.wide(name, "threshold").bool(), right.wide(name, "threshold").bool()
        both, either = both + float((a & b).sum()), either + float((a | b).sum())
        ours, theirs, total = ours + float(a.sum()), theirs + float(b.sum()), total + a.numel()
    chance = ours * theirs / total
    return {"jaccard": both / either if either else 1.0, "by_chance": chance / max(1.0, ours + theirs - chance)}
