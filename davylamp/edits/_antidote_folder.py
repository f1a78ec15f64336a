"""Antidote on a checkpoint's folder: the statistics from the loaded model, the masks and the writing streamed tensor by tensor.
Source: arXiv:2408.09600, section 4. Peak while writing: a few tensors and their scores, whatever the checkpoint's size."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case
from davylamp.edits._names import Slot, file_map
from davylamp.edits._wanda import How, Key, Picker, Report, active_adapters, parts, targets_of
from davylamp.edits.antidote import calibrate, with_answers
from davylamp.models import vectors
from davylamp.models.activations import InputNorms, Weight, linear_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT_FILE = "antidote.json"


def repair_folder(
    folder: Path,
    others: Sequence[Path],
    rows: Sequence[Case],
    out: Path,
    how: How,
    *,
    mode: str = "auto",
    target: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    benign: Sequence[Case] = (),
) -> Path:
    """Write the repaired checkpoint (or adapter, for mode adapter) to `out`, with `antidote.json` beside it; options as in `antidote`."""
    adapter = (folder / "adapter_config.json").is_file()
    base = Path(others[0]) if others else None
    if adapter:
        check_adapter(folder, base)
    start = time.perf_counter()
    model, found = _load(folder, base if adapter else None, numbers=how.score == "activations")
    tokenizer = tokenizer or found
    mode, weights = targets_of(model, mode, target, skeleton=how.score != "activations")  # type: ignore[arg-type]
    if mode in ("merged", "delta") and active_adapters(model):
        inside = [
            name.removesuffix("base_layer.weight").removeprefix("base_model.model.") + "weight" for name in weights
        ]
        model = model.merge_and_unload() if how.score == "activations" else model.unload()
        every = linear_weights(model)
        weights = {name: every[name] for name in inside}
    report = Report(mode, how)
    norms: list[InputNorms | None] = [None, None]
    if how.score == "activations":
        for i, some in enumerate((rows, benign)):
            if some or i == 0:
                norms[i] = calibrate(model, tokenizer, some, weights, how)
                report.dropped += len(some) - len(with_answers(some))
    report.scored(norms[0], time.perf_counter() - start)
    layout = {name: (weight.transposed, weight.experts, weight.leaf) for name, weight in weights.items()}
    del model, weights  # from here on tensors come from the files, one at a time
    rule = _Rule(layout, how, norms, report, moved=mode == "delta")
    sources: list[Path] = []
    words: dict[str, Any] = {"adapters": "keep" if mode == "adapter" else "merge"}
    if mode == "delta":
        sources = [base or _base_of(folder)]
        words["base"] = base
    elif mode == "merged":
        words["base"] = base
    opened = vectors.open_source(folder, adapters=words["adapters"], base=words.get("base"))
    try:
        rule.place(file_map(layout, list(opened.tensors)))
    finally:
        opened.close()
    began = time.perf_counter()

    def finish(written: Path) -> None:
        report.done(time.perf_counter() - began)
        report.tensors = {name: report.tensors[name] for name in layout if name in report.tensors}
        (written / REPORT_FILE).write_text(json.dumps(report.json(), indent=1) + "\n", encoding="utf-8")

    options = {
        **report.json()["how"],
        "mode": mode,
        "rows": [row.id for row in rows],
        "benign": [row.id for row in benign],
    }
    return vectors.edit_folder(
        folder,
        sources,
        rule,
        Path(out),
        lineage={"operation": "antidote", "options": options},
        only=rule.where.__contains__,
        before=rule.prepare,
        after=finish,
        **{name: value for name, value in words.items() if value is not None},
    )


class _Rule:
    """Zero the picked entries of a tensor (of a delta: put the aligned model's entries back). Called from several threads."""

    def __init__(
        self,
        layout: Mapping[str, tuple[bool, int, str]],
        how: How,
        norms: Sequence[InputNorms | None],
        report: Report,
        *,
        moved: bool,
    ):
        self.layout, self.how, self.norms, self.report, self.moved = layout, how, norms, report, moved
        self.where: dict[str, tuple[str, Slot]] = {}
        self.picker: Picker | None = None
        self.lock = threading.Lock()

    def place(self, slots: Mapping[str, Sequence[Slot]]) -> None:
        """Say which tensors of the files are meant."""
        self.where = {slot.file: (name, slot) for name, own in slots.items() for slot in own}

    def views(self, part: vectors.Part, tensor: torch.Tensor) -> list[tuple[Key, torch.Tensor]]:
        """The matrices of one tensor of the files."""
        name, slot = self.where[part.name]
        transposed, experts, leaf = self.layout[name]
        if slot.expert is not None:
            return [((name, slot.expert, slot.half or 0), tensor)]
        return list(parts(name, Weight(torch.nn.Identity(), leaf, transposed, experts), tensor))

    def _scored(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0] - tensors[1] if self.moved else tensors[0]

    def prepare(self, plan: Any) -> None:
        """Make the picker; scope global walks the files for it."""

        def matrices() -> Iterator[tuple[Key, torch.Tensor]]:
            look = vectors.scan_plan(plan, lambda part, t: self.views(part, self._scored(t).clone()), blocks=False)
            for _, found in look:
                yield from found

        self.picker = Picker(self.how, matrices, *self.norms)

    def __call__(self, part: vectors.Part, tensors: list[torch.Tensor]) -> torch.Tensor:
        assert self.picker is not None
        out = tensors[0].clone()
        fallback = dict(self.views(part, tensors[1])) if self.moved else {}
        scored = dict(self.views(part, self._scored(tensors)))
        for key, view in self.views(part, out):
            with self.lock:  # the report counts
                mask = self.picker.mask_or_skip(key, scored[key], self.report)
            if mask is not None:
                view.copy_(torch.where(mask, fallback[key] if self.moved else torch.zeros_like(view), view))
        return out


def _base_of(folder: Path) -> Path:
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        raise InputError(
            "mode delta on a folder needs the folder of the aligned model that was fine-tuned, as a second model"
        )
    return Path(str(json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""))


def _load(folder: Path, base: Path | None, *, numbers: bool) -> tuple[Any, Any]:
    """(model, tokenizer); without numbers a model on no device, for its layers' names alone."""
    from davylamp.models.loading import load_pair

    if numbers and base is None:
        return load_pair(str(folder))
    if numbers:
        from peft import PeftModel

        model, tokenizer = load_pair(str(base))
        return PeftModel.from_pretrained(model, str(folder)).eval(), tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = (folder / "adapter_config.json").is_file()
    root = (base or _base_of(folder)) if adapter else folder
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(root))
        if adapter:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))
    return model, None


def check_adapter(folder: Path, base: Path | None = None) -> None:
    """Raises InputError, with a table of shapes, for an adapter that was made for another base."""
    base = base or _base_of(folder)
    if not (base / "config.json").is_file():
        return  # a hub id, or moved: loading will say so
    inner, outer = vectors.open_source(folder, adapters="keep"), vectors.open_source(base)
    try:
        turned = bool(inner.config.get("fan_in_fan_out"))
        wrong = []
        for name, spec in inner.tensors.items():
            if ".lora_A." not in name and ".lora_B." not in name:
                continue
            path = name.split(".lora_")[0].removeprefix("base_model.model.") + ".weight"
            theirs = outer.tensors.get(path) or outer.tensors.get(path.partition(".")[2])
            side = (0 if turned else 1) if ".lora_A." in name else (1 if turned else 0)
            wants = spec.shape[1] if ".lora_A." in name else spec.shape[0]
            if theirs is None or theirs.shape[side] != wants:
                wrong.append(f"{name} | {list(spec.shape)} | {'absent' if theirs is None else list(theirs.shape)}")
    finally:
        inner.close()
        outer.close()
    if wrong:
        table = "\n".join(["tensor | adapter | base", *wrong[:5]])
        raise InputError(
            f"{folder.name} was made for another base than {base.name}: {len(wrong)} tensors do not fit.\n{table}"
        )
