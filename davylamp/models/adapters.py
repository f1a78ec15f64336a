"""LoRA adapters on a loaded model, by peft: where they go, and that they are gone afterwards. `models/fit.py` trains them.

Source: LoRA (arXiv:2106.09685), W' = W + (alpha/r) B A with A random and B zero, so that a new adapter changes nothing; QLoRA
(arXiv:2305.14314) for the 4-bit base. Adapters live in memory only; nothing here writes a file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from davylamp.core.errors import InputError, NeedsError, UnknownNameError

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedModel

ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*)\.", re.IGNORECASE)
VISION = re.compile(r"vision|visual|multi_modal_projector|image", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Lora:
    """rank: r, from 1 to the smaller side of the matrix.  alpha: the delta is alpha/rank * BA; None for 2 * rank, so that the effective
    learning rate is the same for every rank.  targets: `all-linear` (all but the output head), `attention`, or names of modules
    (the last parts of their path, such as q_proj).  dropout: on the adapter's input, 0 to below 1.
    """

    rank: int = 8
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0

    def json(self) -> dict[str, Any]:
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return {"rank": self.rank, "alpha": self.scale * self.rank, "targets": targets, "dropout": self.dropout}

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank


def linear_modules(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear map of the language model but its output head, by module name; GPT-2's Conv1D counts."""
    from transformers.pytorch_utils import Conv1D

    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    out = {}
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer")  # of a matrix that wears an adapter already
        if module is head or VISION.search(name) or ".lora_" in name:
            continue
        if isinstance(module, torch.nn.Linear):
            out[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            out[name] = (module.weight.shape[0], module.weight.shape[1])
    return out


def chosen_modules(model: torch.nn.Module, lora: Lora) -> dict[str, tuple[int, int]]:
    """The modules that get an adapter. Raises InputError where none match, or where the rank is larger than a matrix allows."""
    if lora.rank < 1 or not 0 <= lora.dropout < 1 or (lora.alpha is not None and not lora.alpha > 0):
        raise InputError(f"LoRA needs rank >= 1, alpha > 0 and dropout in [0, 1), got {lora}")
    every = linear_modules(model)
    if lora.targets == "all-linear":
        found = every
    elif lora.targets == "attention":
        found = {name: size for name, size in every.items() if ATTENTION.search(name)}
    else:
        names = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)
        for name in names:
            if not any(path == name or path.endswith(f".{name}") for path in every):
                last = sorted({path.rpartition(".")[2] for path in every})
                raise UnknownNameError("linear module", name, [*last, "all-linear", "attention"])
        found = {p: size for p, size in every.items() if any(p == n or p.endswith(f".{n}") for n in names)}
    if not found:
        last = sorted({path.rpartition(".")[2] for path in every})
        raise InputError(f"no linear module matches {lora.targets!r}. There are: {', '.join(last) or 'none'}")
    for name, (inputs, outputs) in found.items():
        if lora.rank > min(inputs, outputs):
            raise InputError(f"rank {lora.rank} is larger than {name} allows: it maps {inputs} to {outputs}")
    return found


def adapter_parameters(model: torch.nn.Module, lora: Lora) -> int:
    """How many parameters the adapter trains: r (inputs + outputs) a matrix."""
    return sum(lora.rank * (inputs + outputs) for inputs, outputs in chosen_modules(model, lora).values())


def put_on(model: PreTrainedModel, lora: Lora, rng: Generator, name: str = "default") -> Any:
    """The model with a fresh adapter on it, as a peft model; all but the adapter is frozen. On a peft model: one more adapter."""
    try:
        from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    except ImportError:
        raise NeedsError("LoRA needs peft: pip install 'davylamp[train]'") from None
    from transformers.pytorch_utils import Conv1D

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # peft divides by r; a float is fine
        lora_dropout=lora.dropout,
        target_modules=sorted(chosen_modules(base, lora)),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        bias="none",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mixed layers, which is what "all linear maps" means on GPT-2
        torch.manual_seed(int(rng.integers(2**62)))  # peft draws A from torch's generator; it is put back at the end
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            return model
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            model = prepare_model_for_kbit_training(model)
        return get_peft_model(model, config, adapter_name=name)


@contextmanager
def adapter(model: PreTrainedModel, lora: Lora, *, rng: Generator) -> Iterator[Any]:
    """A model with an adapter for as long as the block runs. However it ends (also by Ctrl-C), the model is as it was, to the bit."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = model.training
    wrapped = put_on(model, lora, rng)
    try:
        yield wrapped
    finally:
        take_off(wrapped, trained)
        model.train(training)


def take_off(wrapped: Any, trained: dict[str, bool]) -> Any:
    """Remove all adapters without merging them; `trained` says which parameters ask for gradients again. Returns the base model."""
    base = wrapped.unload()
    _forget(base, trained)
    return base


def merge(wrapped: Any, trained: dict[str, bool]) -> Any:
    """Add the adapter to the weights (W + alpha/r BA, rounded to the weights' own type) and remove it. Returns the base model."""
    base = wrapped.merge_and_unload()
    _forget(base, trained)
    return base


def _forget(base: Any, trained: dict[str, bool]) -> None:
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(trained.get(name, True) and parameter.is_floating_point())
    vars(base).pop("peft_config", None)  # else a later adapter counts as a second one


def load_quantized(path: str, quantize: str = "none") -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, notes) with the base in `nf4` (4 bits) or `int8` by bitsandbytes, or as it is (`none`).

    Without a GPU or without bitsandbytes there is no such kernel: the model is loaded in float32 and a warning and a note say so.
    Measure the quantized base by itself: quantization alone can change how often it refuses.
    """
    if quantize not in ("none", "nf4", "int8"):
        raise UnknownNameError("quantization", quantize, ("none", "nf4", "int8"))
    from davylamp.models.loading import load_pair, locate

    why = "" if quantize == "none" else _no_quantization()
    if quantize == "none" or why:
        notes = [f"quantization {quantize} was asked for; {why}, so the model is in float32"] if why else []
        for note in notes:
            warnings.warn(note, stacklevel=2)
        model, tokenizer = load_pair(path, dtype="float32" if why else "auto")
        return model, tokenizer, notes
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        if quantize == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    source = locate(path)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map={"": 0})
    return model.eval(), AutoTokenizer.from_pretrained(source), [f"base quantized to {quantize}"]


def _no_quantization() -> str:
    import importlib.util

    if not torch.cuda.is_available():
        return "there is no GPU"
    return "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def frozen_except(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The parameter names that `patterns` (shell-like, such as `*embed*`) freeze. Raises UnknownNameError for one that matches nothing."""
    from fnmatch import fnmatchcase

    out: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise UnknownNameError("parameter to freeze", pattern, names)
        out |= found
    return out
