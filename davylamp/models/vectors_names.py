"""What a tensor's name says: its layer, whether it belongs to a vision part, is a buffer, or has one row for each token.

Also the grammar by which options give a number to some tensors: "0.5", "0-3:0.2,4-:0.7", "*.mlp.*:0.5,*:0.3".
Needs the standard library only.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping

from davylamp.core.errors import InputError

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.")
VISION = re.compile(
    r"(?:^|\.)(?:vision\w*|visual|vit\w*|siglip\w*|audio\w*|image_newline|multi_modal_projector|mm_projector|connector|embed_vision)(?:\.|$)"
)
# Fixed by the configuration or counted from data: adding two of them means nothing. GPT-2's causal masks are named attn.bias.
BUFFER = re.compile(
    r"(?:^|\.)(?:inv_freq|original_inv_freq|masked_bias|position_ids|running_mean|running_var|num_batches_tracked)$|\.attn\.bias$"
)
TOKEN_ROWS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight$")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection|output)\.(?:weight|bias)$|^final_logits_bias$")


def layer_of(name: str) -> int | None:
    """Number of the layer a tensor stands in; None outside of layers, and in vision parts, whose layers are counted apart.

    >>> layer_of("model.layers.12.mlp.up_proj.weight"), layer_of("lm_head.weight"), layer_of("vision_tower.layers.3.bias")
    (12, None, None)
    """
    found = None if is_vision(name) else LAYER.search(name)
    return int(found.group(1)) if found else None


def is_vision(name: str) -> bool:
    """Whether a tensor is of a vision (or audio) tower or of its projector.

    >>> is_vision("multi_modal_projector.linear_1.weight"), is_vision("language_model.model.norm.weight")
    (True, False)
    """
    return VISION.search(name) is not None


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer by its name: copied, never added."""
    return BUFFER.search(name) is not None


def has_token_rows(name: str, shape: tuple[int, ...], vocabulary: int | None) -> bool:
    """Whether row i of the tensor belongs to token i: an embedding or a head, as its name and its size both say.

    >>> has_token_rows("model.embed_tokens.weight", (48, 32), 48), has_token_rows("model.norm.weight", (48,), 48)
    (True, False)
    """
    fits = vocabulary is not None and len(shape) > 0 and shape[0] == vocabulary
    return fits and not is_vision(name) and (TOKEN_ROWS.search(name) or HEAD.search(name)) is not None


def root_of(names: Iterable[str]) -> str | None:
    """What stands before `layers.0.` in the text part: `model.` in a Llama, `language_model.model.` in a LLaVA. None if not one thing.

    >>> root_of(["language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.encoder.layers.0.fc1.weight"])
    'language_model.model.'
    """
    roots = set()
    for name in names:
        found = None if is_vision(name) else LAYER.search(name)
        if found:
            start = found.start() + (name[found.start()] == ".")
            roots.add(name[:start])
    return roots.pop() if len(roots) == 1 else None


def same_family(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """{name: other's name} for the text tensors of two models of which one may have a vision part, such as a LLaVA and its Llama.

    >>> same_family(["language_model.lm_head.weight", "language_model.model.layers.0.a"], ["lm_head.weight", "model.layers.0.a"])
    {'language_model.lm_head.weight': 'lm_head.weight', 'language_model.model.layers.0.a': 'model.layers.0.a'}
    """
    ours, theirs = root_of(names), root_of(others)
    if ours is None or theirs is None:
        return {}
    heads = {name.rpartition("lm_head.")[2]: name for name in others if HEAD.search(name) and "lm_head." in name}
    out = {}
    for name in names:
        if is_vision(name):
            continue
        if HEAD.search(name) and "lm_head." in name:
            if name.rpartition("lm_head.")[2] in heads:
                out[name] = heads[name.rpartition("lm_head.")[2]]
        elif name.startswith(ours) and theirs + name.removeprefix(ours) in others:
            out[name] = theirs + name.removeprefix(ours)
    return out


def by_name(given: float | str, names: Iterable[str], *, otherwise: float, what: str = "weight") -> dict[str, float]:
    """A number for each name: one for all, or rules with a comma between two, of which the first that fits counts.

    A rule is `LAYERS:NUMBER` (3, 0-3 or 4-) or `PATTERN:NUMBER` (a shell pattern over the whole name). Names that no rule
    fits get `otherwise`. Raises InputError for what cannot be read, is not finite, or fits no tensor at all.

    >>> by_name("0-1:0.2,*.norm.*:1", ["layers.0.w", "layers.2.w", "final.norm.w"], otherwise=0.0)
    {'layers.0.w': 0.2, 'layers.2.w': 0.0, 'final.norm.w': 1.0}
    """
    names = list(names)
    if isinstance(given, int | float) or ":" not in given:
        return dict.fromkeys(names, _number(given, what))
    out: dict[str, float] = {}
    layers = {name: layer_of(name) for name in names}
    last = max((layer for layer in layers.values() if layer is not None), default=-1)
    for rule in given.split(","):
        key, _, number = rule.strip().rpartition(":")
        value = _number(number, what)
        span = re.fullmatch(r"(\d+)(-(\d*))?", key)
        if span:
            first = int(span[1])
            final = first if span[2] is None else int(span[3]) if span[3] else last
            fits = [name for name in names if (at := layers[name]) is not None and first <= at <= final]
            if first > last or final > last:
                raise InputError(
                    f"{what} names layers {key}, but the layers are numbered 0 to {last}"
                    if last >= 0
                    else f"{what} names layers {key}, but these tensors stand in no layers. Write a pattern such as *.mlp.*"
                )
        else:
            fits = fnmatch.filter(names, key)
        if not fits:
            raise InputError(f"{what} has a rule for {key!r}, which fits no tensor. The first is {names[0]}")
        for name in fits:
            out.setdefault(name, value)
    return {name: out.get(name, otherwise) for name in names}


def _number(text: float | str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(
            f"{what} must be a number, or rules such as 0-3:0.2,4-:0.7 or *.mlp.*:0.5, got {text!r}"
        ) from None
    if not math.isfinite(value):
        raise InputError(f"{what} must be finite, got {text}")
    return value


def key_difference(ours: Collection[str], theirs: Collection[str], left: str, right: str) -> str:
    """The first five names that only one side has, for an error.

    >>> key_difference(["a", "b"], ["b", "c"], "base", "tuned")
    'only in base (1): a; only in tuned (1): c'
    """
    parts = []
    for only, label in ((sorted(set(ours) - set(theirs)), left), (sorted(set(theirs) - set(ours)), right)):
        if only:
            parts.append(f"only in {label} ({len(only)}): {', '.join(only[:5])}{', …' if len(only) > 5 else ''}")
    return "; ".join(parts)


def vocabulary_size(config: Mapping[str, object]) -> int | None:
    """Rows of the embedding by the configuration. A nested one of the text model knows better: PaliGemma's outer one keeps an old size.

    >>> vocabulary_size({"vocab_size": 257152, "text_config": {"vocab_size": 48}})
    48
    """
    for part in (config.get("text_config"), config.get("llm_config"), config.get("language_config"), config):
        if isinstance(part, Mapping) and isinstance(size := part.get("vocab_size"), int):
            return size
    return None
