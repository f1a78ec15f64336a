"""Text-to-image models as targets: `diffusion/PATH:OPTIONS`, pictures out, beside the unprotected model that an audit compares with.

diffusion/PATH                                   a folder or hub id of a diffusers pipeline
diffusion/PATH:negative=TEXT                     under a negative prompt
diffusion/PATH:sld=MAX,concept=TEXT              under safe latent guidance (WEAK, MEDIUM, STRONG, MAX)
diffusion/PATH:erased=FILE                       with the weights of a U-Net (or transformer) from which a concept was erased
diffusion/PROTECTED:ordinary=PATH                any protected pipeline, beside the ordinary one it came from
More options: guidance=7.5, steps=25, size=512, pictures=3, clip=PATH (a CLIPModel for similarity), device=cuda.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.needs import need
from davylamp.core.nouns import Message
from davylamp.models.loading import folder_hash
from davylamp.models.painter import Painter, quiet
from davylamp.models.pictures import data_url
from davylamp.models.protection import Protection

OPTIONS = (
    "negative",
    "sld",
    "concept",
    "erased",
    "ordinary",
    "guidance",
    "steps",
    "pictures",
    "size",
    "clip",
    "device",
)
SETTINGS = ("guidance", "pictures")


class DiffusionTarget:
    """A protected text-to-image model. Its reply holds pictures and no text; the prompt is the last user turn.

    protected: what is asked.  ordinary: the model without the protection, which white-box attacks compare with.
    pictures: how many a question paints, from the question's seed on.

    """

    def __init__(self, protected: Painter, ordinary: Painter, *, name: str = "diffusion", pictures: int = 3,
                 identity: Mapping[str, Any] | None = None):  # fmt: skip
        check_pair(ordinary, protected)
        if pictures < 1:
            raise InputError(f"a question paints 1 picture or more, got {pictures}")
        self.protected, self.ordinary, self.name, self.pictures = protected, ordinary, name, pictures
        self.identity = {"name": name, **(identity or {})}

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        for setting in settings:
            if setting not in SETTINGS:
                raise UnknownNameError("setting of a text-to-image target", setting, SETTINGS)
        many = int(settings.get("pictures", self.pictures))
        text = messages[-1].text
        found = self.protected.paint([text] * many, range(seed, seed + many), guidance=settings.get("guidance"))
        return Message("assistant", media=tuple(data_url(one) for one in found))


def load(spec: str) -> DiffusionTarget:
    """The target that `PATH:OPTIONS` names. A value may hold commas. Raises InputError, with what does not fit.

    >>> load("path:shield=MAX")
    Traceback (most recent call last):
    davylamp.core.errors.UnknownNameError: no option of a diffusion target named 'shield'. Did you mean 'sld'?
    """
    need("diffusion", f"diffusion/{spec}")
    path, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    last = ""
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if equals:
            if key not in OPTIONS:
                raise UnknownNameError("option of a diffusion target", key, OPTIONS)
            options[key], last = value, key
        elif last:
            options[last] += f",{part}"
        else:
            raise InputError(f"options of a diffusion target read like negative=TEXT,steps=25, got {part!r}")
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe, files = _pipeline(path, device)
    protection = Protection(options.get("negative", ""), options.get("sld", ""), options.get("concept", ""))
    try:
        sampler = {
            key: kind(options[key])
            for key, kind in (("guidance", float), ("steps", int), ("size", int))
            if key in options
        }
        pictures = int(options.get("pictures", 3))
    except ValueError:
        raise InputError(f"guidance, steps, size and pictures of diffusion/{spec} must be numbers") from None
    more: dict[str, Any] = {}
    if "clip" in options:
        more["clip"] = _clip(options["clip"], device)
    protected_pipe = pipe
    if "erased" in options:
        protected_pipe = with_core(pipe, read_weights(Path(options["erased"])))
        files["erased"] = hashlib.sha256(Path(options["erased"]).read_bytes()).hexdigest()
    ordinary_pipe = pipe
    if "ordinary" in options:
        ordinary_pipe, theirs = _pipeline(options["ordinary"], device)
        files |= {f"ordinary {key}": value for key, value in theirs.items()}
    settings = {**more, **sampler}
    return DiffusionTarget(
        Painter(protected_pipe, protection, **settings), Painter(ordinary_pipe, **settings), name=f"diffusion/{spec}",
        pictures=pictures, identity=files,
    )  # fmt: skip


def _pipeline(path: str, device: str) -> tuple[Any, dict[str, str]]:
    """(pipeline, what names it for good)."""
    with quiet():
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(path)
        except (OSError, ValueError) as problem:
            first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            raise InputError(
                f"diffusion/{path} could not be loaded: {first}. Is the folder whole, the id right?"
            ) from None
    pipe.set_progress_bar_config(disable=True)
    if device == "cpu":
        pipe = pipe.to(torch.float32)  # half precision crawls on a CPU
    folder = Path(path)
    files = (
        {"sha256": folder_hash(folder)}
        if folder.is_dir()
        else {"commit": str(getattr(pipe.config, "_commit_hash", None))}
    )
    return pipe.to(device), files


def _clip(path: str, device: str) -> Any:
    with quiet():
        from transformers import CLIPModel

        try:
            return CLIPModel.from_pretrained(path).to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
        except (OSError, ValueError) as problem:
            raise InputError(f"clip={path} is no CLIPModel: {str(problem).splitlines()[0]}") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from .safetensors, or from a torch file opened with `weights_only` (nothing in it is run)."""
    if not path.is_file():
        raise InputError(f"there is no file {path}. Expected the erased network's weights, .safetensors or .pt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # what a broken file raises differs by version
        raise InputError(f"{path} cannot be read as weights: {str(problem).splitlines()[0][:200]}") from None


def with_core(pipe: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """The pipeline with a copy of its network that has other weights; all else is shared. Raises InputError with the first five misfits.

    weights: all of the network's, or a part of them, as ESD-x saves (others stay).
    """
    name = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    core = copy.deepcopy(getattr(pipe, name))
    own = core.state_dict()
    wrong = [f"{key} (unknown)" for key in weights if key not in own]
    wrong += [
        f"{key} ({tuple(value.shape)}, expected {tuple(own[key].shape)})"
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    if wrong or not weights:
        raise InputError(f"{len(wrong)} keys do not fit the network: {', '.join(wrong[:5]) or 'the file is empty'}")
    core.load_state_dict(dict(weights), strict=False)
    out = copy.copy(pipe)
    out._internal_dict = copy.deepcopy(pipe._internal_dict)
    object.__setattr__(out, name, core)
    return out


def check_pair(ordinary: Painter, protected: Painter) -> None:
    """Raises InputError, with both values, where two models cannot be compared: families, vocabularies, schedules, latent scales."""
    a, b = ordinary, protected
    facts = [
        ("families", a.family, b.family),
        ("sizes of the vocabulary", len(a.tokenizer().get_vocab()), len(b.tokenizer().get_vocab())),
        ("shapes of the token embeddings", tuple(a.table.shape), tuple(b.table.shape)),
        ("latent scales", a.pipe.vae.config.scaling_factor, b.pipe.vae.config.scaling_factor),
    ]
    for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type"):
        facts.append((f"schedules ({key})", a.pipe.scheduler.config.get(key), b.pipe.scheduler.config.get(key)))
    for what, one, other in facts:
        if one != other:
            raise InputError(f"the ordinary and the protected model have different {what}: {one} and {other}")
    if a.tokenizer().get_vocab() != b.tokenizer().get_vocab() or not torch.equal(a.table, b.table.to(a.table.device)):
        raise InputError("the ordinary and the protected model have different vocabularies or token embeddings")
