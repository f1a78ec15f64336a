"""Models by name for the commands that change or look into them: a folder, a hub id, `hf/<path or id>`, or `organism/<name>`.

A folder with an `adapter_config.json` is a LoRA adapter: its base is loaded and the adapter put on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davylamp.core.errors import InputError
from davylamp.core.needs import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def locate(spec: str) -> str:
    """The folder (as text) or hub id behind a model's name. Raises InputError where a folder is meant and holds no model.

    >>> locate("hf/org/model"), locate("org/model")
    ('org/model', 'org/model')
    """
    if spec.startswith("organism/"):
        from davylamp.models import organism

        return str(organism.path(spec.removeprefix("organism/")))
    path = spec.removeprefix("hf/")
    folder = Path(path).expanduser()
    if folder.exists():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(
                f"{path} holds no config.json. Expected a folder written by save_pretrained, or a hub id such as org/model"
            )
        return str(folder)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise InputError(
            f"there is no folder {path}. Expected a folder written by save_pretrained, or a hub id such as org/model"
        )
    return path


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, which speak of shards where a command has its own words."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def load_pair(spec: str, *, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer). On a GPU if there is one; half precision is widened to float32 on a CPU, where it would crawl.

    dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.  Raises InputError for what cannot be loaded, with the first line of why.
    """
    need("hf", spec)
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoTokenizer

    source = locate(spec)
    adapter = Path(source) / "adapter_config.json"
    base = source
    try:
        if adapter.is_file():
            need("train", f"the adapter {spec}")
            base = locate(str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]))
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source if (Path(source) / "tokenizer_config.json").is_file() or not adapter.is_file() else base
        )
        problems: list[str] = []
        for kind in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
            try:
                with quiet_transformers():
                    model = kind.from_pretrained(base, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
                break
            except ValueError as problem:
                if "Unrecognized configuration class" not in str(problem):
                    raise
                problems.append(type(problem).__name__)
        else:
            raise InputError(f"{spec} is no causal, image-text or encoder-decoder language model")
        if adapter.is_file():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, source)
    except (OSError, ValueError, KeyError, ImportError) as problem:
        if isinstance(problem, InputError):
            raise
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise InputError(
            f"{spec} could not be loaded: {first}. Is the folder whole, the id right, the hub reachable?"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        model = model.float()
    model = model.to(torch.device(device)).eval()  # type: ignore[arg-type]
    return model, tokenizer


def identity(spec: str, model: Any = None) -> dict[str, str]:
    """What names a model for good: its name, and the hash of its folder (weights, configuration, tokenizer) or the hub's commit."""
    source = locate(spec)
    folder = Path(source)
    if not folder.is_dir():
        return {"name": spec, "commit": str(getattr(getattr(model, "config", None), "_commit_hash", None) or "unknown")}
    return {"name": spec, "sha256": folder_hash(folder)}


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and bytes of a model folder's files."""
    state = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in WEIGHTS and file.name != "lineage.json":
            state.update(f"{file.relative_to(folder)}\n".encode())
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    state.update(block)
    return state.hexdigest()


def lineage(spec: str) -> Mapping[str, Any]:
    """The `lineage.json` that davylamp wrote into a model's folder, empty where there is none."""
    path = Path(locate(spec)) / "lineage.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
