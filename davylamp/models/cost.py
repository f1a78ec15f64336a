"""What a fine-tune costs, before it is run: operations, seconds on this machine, a price. Estimates, and said to be so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from davylamp.core.errors import InputError

if TYPE_CHECKING:
    from davylamp.models.adapters import Lora


def train_flops(model: Any, tokens: int, *, lora: Lora | None = None) -> float:
    """About how many floating-point operations it takes to train on so many tokens: 6 P a token in full, 4 P with LoRA (the frozen weights
    need no gradients of their own) plus 6 for each parameter of the adapter. P: parameters in use for a token; attention's own part,
    small for short rows, is left out. (Kaplan et al. 2020, arXiv:2001.08361, section 2.1.)
    """
    from davylamp.models.adapters import adapter_parameters

    active = active_parameters(model)
    return tokens * (6.0 * active if lora is None else 4.0 * active + 6.0 * adapter_parameters(model, lora))


def active_parameters(model: Any) -> int:
    """Parameters that multiply for a token: all but the input embedding (unless the output head shares it); of experts, those in use."""
    config = model.config.get_text_config()
    experts, used = getattr(config, "num_local_experts", None), getattr(config, "num_experts_per_tok", None)
    share = used / experts if experts and used else 1.0
    inputs = {id(p) for p in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    shared = {id(p) for p in head.parameters()} if head is not None else set()
    return round(
        sum(
            p.numel() * (share if ".experts." in name else 1.0)
            for name, p in model.named_parameters()
            if id(p) not in inputs or id(p) in shared
        )
    )


def price(seconds: float, per_hour: float) -> float:
    """What the seconds cost at a device's hourly price, in its currency.

    >>> price(1800, 2.0)
    1.0
    """
    if seconds < 0 or per_hour < 0:
        raise InputError(f"seconds and an hourly price must be 0 or more, got {seconds} and {per_hour}")
    return seconds / 3600 * per_hour
