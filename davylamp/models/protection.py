"""Safety mechanisms that change a text-to-image model's guidance: a negative prompt, and safe latent guidance in four strengths.
Source: arXiv:2211.05105 (SLD), equations 3 to 8 and its four presets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from davylamp.core.errors import InputError, UnknownNameError

#: SLD strengths: (warm-up steps, guidance s_S, threshold lambda, momentum scale s_m, momentum decay beta_m).
SLD = {
    "WEAK": (15, 20.0, 0.0, 0.0, 0.0),
    "MEDIUM": (10, 1000.0, 0.01, 0.3, 0.4),
    "STRONG": (7, 2000.0, 0.025, 0.5, 0.7),
    "MAX": (0, 5000.0, 1.0, 0.5, 0.7),
}
SLD_NAMES = ("sld_warmup_steps", "sld_guidance_scale", "sld_threshold", "sld_momentum_scale", "sld_mom_beta")


@dataclass(frozen=True, slots=True)
class Protection:
    """What is put around the pipeline when it paints. negative: a negative prompt.  sld: a strength of `SLD`, against `concept`.

    >>> Protection(sld="MIGHTY", concept="circle")
    Traceback (most recent call last):
    davylamp.core.errors.UnknownNameError: no SLD strength named 'MIGHTY'. Known: MAX, MEDIUM, STRONG, WEAK.
    """

    negative: str = ""
    sld: str = ""
    concept: str = ""

    def __post_init__(self) -> None:
        if self.sld and self.sld not in SLD:
            raise UnknownNameError("SLD strength", self.sld, SLD)
        if bool(self.sld) != bool(self.concept):
            raise InputError("SLD needs a strength and the concept it steers away from: sld=MAX,concept=TEXT")
        if self.sld and self.negative:
            raise InputError("take a negative prompt or SLD, not both")

    @property
    def guides(self) -> bool:
        """Whether it changes the guidance, which is what the text-filter option of P4D is about."""
        return bool(self.sld or self.negative)


def sld_guidance(
    text: torch.Tensor, free: torch.Tensor, concept: torch.Tensor, momentum: torch.Tensor, level: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is taken off the guidance, the next momentum): equations 4 and 6 to 8 of arXiv:2211.05105.

    text, free, concept, momentum: predictions of one shape, for the prompt, for no prompt, for the unwanted concept, and the last momentum.
    """
    _, strength, threshold, scale, decay = SLD[level]
    apart = text - concept
    mu = torch.where(apart >= threshold, torch.zeros_like(apart), (apart.abs() * strength).clamp(max=1.0))  # eq. 6
    guidance = (concept - free) * mu + scale * momentum  # eq. 4 and 7
    return guidance, decay * momentum + (1 - decay) * guidance  # eq. 8
