"""A text-to-image pipeline of diffusers, opened as a white box, with a safety mechanism that changes its guidance.

Mechanisms here: a negative prompt, and safe latent guidance (SLD, arXiv:2211.05105, four strengths); an erased U-Net is other weights.
White box: encode a prompt, put embeddings of one's own in the place of its tokens, and read the model's noise (or velocity) prediction.
Families: Stable Diffusion 1 and 2, XL, PixArt-alpha, Stable Diffusion 3, Flux. Pictures always come from the pipeline's own call, and those
of SLD from `StableDiffusionPipelineSafe`. Not for models behind an API: there are no gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from davylamp.core.errors import InputError
from davylamp.core.needs import need
from davylamp.models.protection import SLD, SLD_NAMES, Protection

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes that diffusers and transformers print while they import and load: about torchvision, about shards."""
    need("diffusion", "a diffusion pipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.utils import logging as theirs
        from transformers.utils import logging

        levels, bars = (logging.get_verbosity(), theirs.get_verbosity()), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        theirs.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(levels[0])
            theirs.set_verbosity(levels[1])
            if bars:
                logging.enable_progress_bar()


class Painter:
    """A pipeline with a protection around it: paints, encodes, takes embeddings in the place of tokens, predicts.

    pipe: any of the families above, set to eval mode without gradients.  guidance: classifier-free scale, above 0.  steps: of the sampler.
    size: pixels a side [default: the pipeline's].  clip, features: see `features`.
    Raises InputError for another family, and for a protection that its pipeline does not know.
    """

    def __init__(self, pipe: DiffusionPipeline, protection: Protection | None = None, *, guidance: float = 7.5, steps: int = 25,
                 size: int | None = None, clip: Any = None, features: Any = None):  # fmt: skip
        if not guidance > 0:
            raise InputError(f"the guidance scale must be above 0, got {guidance}")
        if steps < 1:
            raise InputError(f"a sampler needs 1 step or more, got {steps}")
        self.pipe = cast(Any, pipe)
        self.family = family_of(pipe)
        self.protection = protection or Protection()
        if self.protection.sld and self.family != "sd":
            raise InputError(f"SLD is defined for Stable Diffusion 1 and 2, not for {type(pipe).__name__}")
        if self.protection.negative and self.family == "flux":
            raise InputError("Flux is guided by distillation; it has no negative prompt here")
        self.guidance, self.steps, self.size, self.clip, self._features = guidance, steps, size, clip, features
        for part in (*self.encoders.values(), self.core, self.pipe.vae):
            part.eval().requires_grad_(False)
        self._safe: Any = None

    # --- parts ---
    @property
    def core(self) -> Any:
        """The network that predicts: the U-Net or the transformer."""
        return self.pipe.unet if self.family in ("sd", "sdxl") else self.pipe.transformer

    @property
    def encoders(self) -> dict[str, Any]:
        """Text encoders by the ending of their name: "", "_2", "_3"."""
        found = {end: getattr(self.pipe, f"text_encoder{end}", None) for end in ("", "_2", "_3")}
        return {end: encoder for end, encoder in found.items() if encoder is not None}

    @property
    def spoken(self) -> tuple[str, ...]:
        """The encoders whose embeddings are searched: Flux's T5, else the first and those that share its vocabulary."""
        first = "_2" if self.family == "flux" else next(iter(self.encoders))
        vocab = self.tokenizer(first).get_vocab()
        return tuple(end for end in self.encoders if end == first or self.tokenizer(end).get_vocab() == vocab)

    def tokenizer(self, end: str | None = None) -> Any:
        return getattr(self.pipe, f"tokenizer{self.spoken[0] if end is None else end}")

    @property
    def device(self) -> torch.device:
        return self.core.device

    @property
    def table(self) -> torch.Tensor:
        """(V, D) token embeddings; those of several encoders side by side."""
        return torch.cat([self.encoders[end].get_input_embeddings().weight.detach() for end in self.spoken], dim=1)

    @property
    def room(self) -> int:
        """Tokens that a prompt may have beside the special ones."""
        return int(self.tokenizer().model_max_length) - len(special_ids(self.tokenizer()))

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without special ones. Raises InputError where it is longer than the encoder takes: nothing is cut off."""
        found = list(self.tokenizer()(text, add_special_tokens=False)["input_ids"])
        if len(found) > self.room:
            raise InputError(f"the prompt has {len(found)} tokens and the text encoder takes {self.room}: shorten it")
        return found

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer().decode(list(ids), skip_special_tokens=True)).strip()

    # --- encoding ---
    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the network is conditioned on, for prompts as they are."""
        for text in texts:
            self.ids(text)
        return self._encode_prompt(list(texts))

    def inject(self, ids: Sequence[Sequence[int]], soft: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same for embeddings of one's own. ids: n rows of tokens, which fix lengths, ends and masks.  soft: (n, k, D), k the
        longest row; gradients flow.

        Encoders with another vocabulary read the tokens' text.  The hooks are taken away again.
        """
        hooks, kept, at = [], {}, 0
        try:
            for end in self.spoken:
                encoder, tok = self.encoders[end], self.tokenizer(end)
                width = encoder.get_input_embeddings().weight.shape[1]
                hook = _replacing(soft[..., at : at + width], len(special_ids(tok)) - 1, [len(row) for row in ids])
                hooks += [layer.register_forward_hook(hook) for layer in embedding_layers(encoder)]
                at += width
                kept[f"tokenizer{end}"] = tok
                # past DiffusionPipeline.__setattr__, which would write the stand-in into the pipeline's configuration
                object.__setattr__(self.pipe, f"tokenizer{end}", _Spoken(tok, ids))
            return self._encode_prompt([str(tok.decode(list(row), skip_special_tokens=True)) for row in ids])
        finally:
            for hook in hooks:
                hook.remove()
            for name, tok in kept.items():
                object.__setattr__(self.pipe, name, tok)

    def _encode_prompt(self, texts: list[str]) -> dict[str, torch.Tensor]:
        pipe, device = self.pipe, self.device
        if self.family == "sd":
            return {"embeds": pipe.encode_prompt(texts, device, 1, False)[0]}
        if self.family == "sdxl":
            embeds, _, pooled, _ = pipe.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
            return {"embeds": embeds, "pooled": pooled}
        if self.family == "pixart":
            length = min(120, int(pipe.tokenizer.model_max_length))
            embeds, mask, _, _ = pipe.encode_prompt(
                texts, do_classifier_free_guidance=False, device=device, clean_caption=False, max_sequence_length=length
            )
            return {"embeds": embeds, "mask": mask}
        if self.family == "sd3":
            embeds, _, pooled, _ = pipe.encode_prompt(
                texts, None, None, device=device, do_classifier_free_guidance=False
            )
            return {"embeds": embeds, "pooled": pooled}
        length = min(512, int(pipe.tokenizer_2.model_max_length))
        embeds, pooled, _ = pipe.encode_prompt(texts, device=device, max_sequence_length=length)
        return {"embeds": embeds, "pooled": pooled}

    # --- predicting ---
    def predict(self, latents: torch.Tensor, at: torch.Tensor, condition: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The network's output without guidance: noise, or velocity in flow matching. latents: as `latents` gives; at: (n,) in 0…999."""
        embeds = condition["embeds"]
        if self.family == "sd":
            return self.core(latents, at, encoder_hidden_states=embeds).sample
        if self.family == "sdxl":
            side = latents.shape[-1] * self.pipe.vae_scale_factor
            sizes = torch.tensor([[side, side, 0, 0, side, side]], device=latents.device, dtype=embeds.dtype)
            more: dict[str, Any] = {"text_embeds": condition["pooled"], "time_ids": sizes.expand(len(latents), -1)}
            return self.core(latents, at, encoder_hidden_states=embeds, added_cond_kwargs=more).sample
        if self.family == "pixart":
            side = float(latents.shape[-1] * self.pipe.vae_scale_factor)
            more = {"resolution": None, "aspect_ratio": None}
            if self.core.config.sample_size == 128:
                more = {"resolution": latents.new_tensor([[side, side]]).expand(len(latents), -1),
                        "aspect_ratio": latents.new_ones(len(latents), 1)}  # fmt: skip
            out = self.core(latents, encoder_hidden_states=embeds, encoder_attention_mask=condition["mask"], timestep=at,
                            added_cond_kwargs=more, return_dict=False)[0]  # fmt: skip
            return out[:, : latents.shape[1]]  # the other half is the learned variance
        if self.family == "sd3":
            return self.core(hidden_states=latents, timestep=at, encoder_hidden_states=embeds,
                             pooled_projections=condition["pooled"], return_dict=False)[0]  # fmt: skip
        side = round(latents.shape[1] ** 0.5)
        guidance = latents.new_full((len(latents),), self.guidance) if self.core.config.guidance_embeds else None
        places = self.pipe._prepare_latent_image_ids(len(latents), side, side, latents.device, latents.dtype)
        return self.core(hidden_states=latents, timestep=at / 1000, guidance=guidance, pooled_projections=condition["pooled"],
                         encoder_hidden_states=embeds, txt_ids=latents.new_zeros(embeds.shape[1], 3), img_ids=places,
                         return_dict=False)[0]  # fmt: skip

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """The scaled latents of pictures (n, 3, height, width) in [-1, 1]; packed where the network wants them so (Flux)."""
        vae = self.pipe.vae
        with torch.inference_mode():
            found = vae.encode(pictures.to(self.device, vae.dtype))
            z = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        z = (z - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        return self.pipe._pack_latents(z, *z.shape) if self.family == "flux" else z

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Latents at time `at`: by the scheduler's variances, or on the straight line to noise in flow matching."""
        if self.family in ("sd3", "flux"):
            share = (at.to(latents.dtype) / 1000).reshape(-1, *[1] * (latents.dim() - 1))
            return (1 - share) * latents + share * noise
        return add_noise(self.pipe.scheduler, latents, noise, at)

    # --- painting ---
    def paint(self, texts: Sequence[str], seeds: Sequence[int], *, guidance: float | None = None,
              soft: Mapping[str, torch.Tensor] | None = None) -> np.ndarray:  # fmt: skip
        """One picture a prompt under the protection: (n, height, width, 3) uint8. seeds: (n,), of the first latents.

        soft: conditions from `inject` instead of texts (Stable Diffusion 1 and 2 without SLD only).
        """
        if len(texts) != len(seeds):
            raise InputError(f"prompts and seeds must have one length, got {len(texts)} and {len(seeds)}")
        scale = self.guidance if guidance is None else guidance
        drawn = [torch.Generator(self.device).manual_seed(int(seed)) for seed in seeds]
        options: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": scale, "generator": drawn}
        if self.size is not None:
            options |= {"height": self.size, "width": self.size}
        pipe: Any = self.pipe
        prompt: dict[str, Any] = {"prompt": list(texts)}
        if self.protection.negative:
            options["negative_prompt"] = [self.protection.negative] * len(texts)
        if self.protection.sld:
            pipe = self.safe
            options |= dict(zip(SLD_NAMES, SLD[self.protection.sld], strict=True))
        if self.family == "pixart":
            options |= {"clean_caption": False, "use_resolution_binning": False,
                        "max_sequence_length": min(120, int(pipe.tokenizer.model_max_length))}  # fmt: skip
        if self.family == "flux":
            options["max_sequence_length"] = min(512, int(pipe.tokenizer_2.model_max_length))
        if soft is not None:
            if self.family != "sd" or self.protection.sld:
                raise InputError("a soft prompt is painted by Stable Diffusion 1 and 2 without SLD only")
            prompt = {"prompt_embeds": soft["embeds"].detach()}
        else:
            for text in texts:
                self.ids(text)
        with quiet(), torch.inference_mode():
            pictures = pipe(**prompt, **options, output_type="np").images
        return np.asarray(np.round(np.clip(pictures, 0, 1) * 255), dtype=np.uint8)

    @property
    def safe(self) -> Any:
        """The pipeline of SLD around the same parts."""
        if self._safe is None:
            with quiet():
                from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

                self._safe = StableDiffusionPipelineSafe(
                    vae=self.pipe.vae, text_encoder=self.pipe.text_encoder, tokenizer=self.pipe.tokenizer, unet=self.pipe.unet,
                    scheduler=self.pipe.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
                )  # fmt: skip
            self._safe.set_progress_bar_config(disable=True)
            self._safe.safety_concept = self.protection.concept
        return self._safe

    def features(self, pictures: np.ndarray) -> torch.Tensor:
        """(n, F) of length 1: by what was given as `features`, by the CLIP model, else the latents (which see place and colour)."""
        tensor = torch.from_numpy(pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)
        if self._features is not None:
            return self._features(tensor.to(self.device))
        found = self.latents(tensor).flatten(1) if self.clip is None else clip_features(self.clip, tensor)
        return torch.nn.functional.normalize(found.float(), dim=-1)


def add_noise(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """sqrt(alpha_t) latents + sqrt(1 - alpha_t) noise, alpha_t being the product up to t of the scheduler's own betas.

    Not `scheduler.add_noise`: that of DPM-Solver looks t up among the few steps of the last sampling, and takes another t where it is not
    one of them.
    """
    share = scheduler.alphas_cumprod.to(latents.device, latents.dtype)[at].reshape(-1, *[1] * (latents.dim() - 1))
    return share.sqrt() * latents + (1 - share).sqrt() * noise


FAMILIES = {"PixArtTransformer2DModel": "pixart", "SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}


def family_of(pipe: Any) -> str:
    """sd, sdxl, pixart, sd3 or flux. Raises InputError for a pipeline of another sort."""
    if type(getattr(pipe, "unet", None)).__name__ == "UNet2DConditionModel" and hasattr(pipe, "text_encoder"):
        return "sdxl" if getattr(pipe, "text_encoder_2", None) is not None else "sd"
    found = FAMILIES.get(type(getattr(pipe, "transformer", None)).__name__)
    if found is None:
        raise InputError(
            f"{type(pipe).__name__} is of no known family. Known: Stable Diffusion 1, 2, XL and 3, PixArt-alpha, Flux"
        )
    return found


def special_ids(tok: Any) -> list[int]:
    """What the tokenizer puts around a text: start and end (CLIP), or the end alone (T5)."""
    return list(tok("")["input_ids"])


def embedding_layers(encoder: Any) -> list[Any]:
    """The modules that look tokens up. T5 has two that share their weights, and reads from the one that is not `get_input_embeddings()`."""
    weight = encoder.get_input_embeddings().weight
    return [
        m for m in encoder.modules() if isinstance(m, torch.nn.Embedding) and m.weight.data_ptr() == weight.data_ptr()
    ]


class _Spoken:
    """Stands in for a tokenizer while a pipeline encodes, and gives given tokens whatever text it is handed; pads as the tokenizer does."""

    def __init__(self, tok: Any, rows: Sequence[Sequence[int]]):
        self._tok, self._rows = tok, rows

    def __call__(self, text: Any, *, padding: Any = False, max_length: int | None = None, **more: Any) -> Any:
        from transformers import BatchEncoding

        *start, end = special_ids(self._tok)
        rows = [[*start, *row, end] for row in self._rows]
        length = max(map(len, rows)) if padding != "max_length" else (max_length or self._tok.model_max_length)
        pad = self._tok.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tok, name)


def _replacing(soft: torch.Tensor, start: int, lengths: Sequence[int]) -> Any:
    """A forward hook of an embedding layer: in row i, the `lengths[i]` places from `start` on hold soft[i], whatever the tokens there."""
    width = max(lengths)
    inside = torch.arange(width, device=soft.device) < torch.tensor(list(lengths), device=soft.device)[:, None]

    def hook(layer: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        middle = torch.where(inside[..., None], soft[:, :width].to(out.dtype), out[:, start : start + width])
        return torch.cat([out[:, :start], middle, out[:, start + width :]], dim=1)

    return hook


def clip_features(clip: Any, pictures: torch.Tensor) -> torch.Tensor:
    """(n, F) features of a CLIPModel. pictures: (n, 3, h, w) in [-1, 1]; scaled to its size and normalised as CLIP was trained."""
    size = clip.config.vision_config.image_size
    scaled = torch.nn.functional.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (pictures.new_tensor(x).reshape(1, 3, 1, 1) for x in ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)))
    with torch.inference_mode():
        found = clip.vision_model(pixel_values=(((scaled + 1) / 2 - mean) / std).to(clip.device, clip.dtype))
        return clip.visual_projection(found.pooler_output)


def clip_text(clip: Any, tok: Any, rows: Sequence[Sequence[int]], soft: torch.Tensor) -> torch.Tensor:
    """(n, F) text features of a CLIPModel for embeddings in the place of tokens; gradients flow. As `Painter.inject`."""
    layer = clip.text_model.get_input_embeddings()
    hook = layer.register_forward_hook(_replacing(soft, len(special_ids(tok)) - 1, [len(row) for row in rows]))
    try:
        given = _Spoken(tok, rows)("", padding="max_length").to(clip.device)
        return clip.text_projection(clip.text_model(input_ids=given["input_ids"]).pooler_output)
    finally:
        hook.remove()
