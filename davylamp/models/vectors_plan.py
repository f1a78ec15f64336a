"""Which tensor of which source meets which, found and checked before a byte is written.

Tensors meet by name; where one source is a vision-language model and another its language model, by what follows the name's root.
Token rows meet by token string and never by number, since siblings' vocabularies may hold the same tokens in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from davylamp.core.errors import InputError
from davylamp.models import vectors_names as naming
from davylamp.models.vectors_io import ADDED, Folder, Source, Spec, read_json
from davylamp.models.vectors_sources import MANIFEST, Aligned, Merged, Model, Residual

# Fields that change what the same weights compute: siblings may differ in them though every shape fits.
MEANINGFUL = (
    "model_type",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "num_experts_per_tok",
    "tie_word_embeddings",
)


class Job(NamedTuple):
    """One tensor to write. name: as the rule sees it (a tied copy has its owner's).  target: as written.  inputs: none = copy."""

    name: str
    target: str
    spec: Spec
    inputs: tuple[tuple[Source, str], ...]


class Plan(NamedTuple):
    """sources: as aligned, the model first.  jobs: every tensor of the result in the model's order.  notes: what a reader must know.
    vocabulary: rows of the result's embedding, where the configurations say so.
    """

    sources: tuple[Source, ...]
    jobs: tuple[Job, ...]
    notes: dict[str, Any]
    vocabulary: int | None

    def close(self) -> None:
        for source in self.sources:
            source.close()


def open_source(source: Any, *, adapters: Literal["merge", "keep"] = "merge", base: Path | None = None) -> Source:
    """A Source of a folder, an adapter folder or a model in memory; a Source is given back as it is.

    adapters: `merge` reads an adapter folder as its base (`base`, or the local folder that its configuration names) with the adapter
    in it; `keep` reads the adapter's own tensors.
    """
    if not isinstance(source, str | Path):
        return Model(source) if isinstance(source, torch.nn.Module) else source
    path = Path(source)
    if (path / MANIFEST).is_file():
        return Residual(path)
    if not (path / "adapter_config.json").is_file():
        return Folder(path)
    adapter = Folder(path, adapter=True)
    if adapters == "keep":
        return adapter
    named = base or Path(str(adapter.config.get("base_model_name_or_path") or ""))
    if not (named / "config.json").is_file():
        adapter.close()
        raise InputError(f"{path} is an adapter and its base {str(named)!r} is no folder here. Say where the base is")
    return Merged(Folder(named), adapter)


def vocabulary(source: Source) -> dict[str, int] | None:
    """{token: row} from the tokenizer beside the weights (of a model in memory: in the folder it was loaded from); None without one."""
    folder = getattr(source, "path", None)
    if isinstance(source, Model):
        folder = Path(str(getattr(source.model, "name_or_path", "") or "."))
    if not isinstance(folder, Path) or folder == Path():
        return None
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(read_json(folder / "tokenizer.json"), folder)
    if not any(
        (folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    ):
        return None
    from transformers import AutoTokenizer  # slow to import, and only for the old formats

    try:
        return dict(AutoTokenizer.from_pretrained(folder).get_vocab())
    except (OSError, ValueError, KeyError, ImportError) as problem:
        raise InputError(f"the tokenizer of {folder} cannot be read: {str(problem).splitlines()[0]}") from None


def _from_tokenizer_json(content: Mapping[str, Any], folder: Path) -> dict[str, int]:
    known = content.get("model", {}).get("vocab") or {}
    if isinstance(known, list):  # Unigram: [[token, score], …]
        known = {entry[0]: row for row, entry in enumerate(known)}
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    if not known and not added:
        raise InputError(f"{folder / 'tokenizer.json'} holds no vocabulary")
    return {**known, **added}


def make(
    given: Sequence[Source],
    *,
    only: Callable[[str], bool] | None = None,
    missing: Literal["error", "copy"] = "error",
    vocabulary_of: int = 0,
    new_rows: Literal["model", "zero"] = "model",
    vocabularies: Sequence[Mapping[str, int] | None] | None = None,
) -> Plan:
    """The plan for a model and others. Raises InputError where they do not fit together.

    only: which tensors the rule gets.  missing: `copy` takes a tensor that another source lacks from the model as it is.
    vocabulary_of: the source whose tokens the result has.
    new_rows: what another source has for tokens of the model that it lacks; the model itself has zero for those that it lacks.
    vocabularies: {token: row} of each source, in place of what lies beside it.
    """
    sources = list(given)
    notes: dict[str, Any] = {}
    pairs: list[dict[str, str]] = [{}, *(_pairs(sources[0], other) for other in sources[1:])]
    _align(sources, pairs, notes, vocabulary_of, new_rows, vocabularies, missing)
    model = sources[0]
    tied = _tied(model, sources[1:])
    if tied:
        notes["tied"] = tied
    for at, other in enumerate(sources[1:], start=1):
        _check_keys(model, other, pairs[at], tied, notes, missing)
        _check_shapes(model, other, pairs[at])
        if changed := differing_fields(model.config, other.config):
            notes.setdefault("configurations differ", {})[_label(other)] = changed
    jobs = []
    for target, spec in model.tensors.items():
        name = tied.get(target, target)
        wanted = spec.dtype in ADDED and not naming.is_buffer(name) and (only is None or only(name))
        inputs = [(other, pairs[at].get(name)) for at, other in enumerate(sources[1:], start=1)]
        if wanted and all(found is not None for _, found in inputs):
            jobs.append(Job(name, target, spec, ((model, name), *((other, str(found)) for other, found in inputs))))
        else:
            jobs.append(Job(name, target, spec, ()))
    if only is not None and not any(job.inputs for job in jobs):
        first = next(iter(model.tensors), "none")
        raise InputError(f"no tensor of {model.where} is to be edited. The first of {len(jobs)} is {first}")
    return Plan(tuple(sources), tuple(jobs), notes, naming.vocabulary_size(given[vocabulary_of].config))


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The configuration fields that both have, that change what equal weights compute, and that differ.

    >>> differing_fields({"rms_norm_eps": 1e-5, "vocab_size": 4}, {"rms_norm_eps": 1e-6, "vocab_size": 5})
    {'rms_norm_eps': [1e-05, 1e-06]}
    """
    ours, theirs = ({**config, **(config.get("text_config") or {})} for config in (ours, theirs))
    return {
        name: [ours[name], theirs[name]]
        for name in MEANINGFUL
        if name in ours and name in theirs and ours[name] != theirs[name] and name != "model_type"
    }


def _label(source: Source) -> str:
    path = getattr(source, "path", None)
    return path.name if isinstance(path, Path) else source.where


def _pairs(model: Source, other: Source) -> dict[str, str]:
    """{model's name: other's name}."""
    direct = {name: name for name in model.tensors if name in other.tensors}
    if len(direct) * 2 < min(len(model.tensors), len(other.tensors)):
        direct = naming.same_family(model.tensors, other.tensors) or direct
    # A tied model's file may hold the embedding alone: there the head is the embedding.
    embedding = [name for name in other.tensors if naming.TOKEN_ROWS.search(name) and not naming.is_vision(name)]
    has_head = any(naming.HEAD.search(name) and name.endswith("weight") for name in other.tensors)
    for name in model.tensors:
        head = naming.HEAD.search(name) and name.endswith("weight") and not has_head
        if name not in direct and embedding and (head or naming.TOKEN_ROWS.search(name)):
            direct[name] = embedding[0]
    return direct


def _align(
    sources: list[Source],
    pairs: Sequence[Mapping[str, str]],
    notes: dict[str, Any],
    chosen: int,
    new_rows: str,
    given: Sequence[Mapping[str, int] | None] | None,
    missing: str,
) -> None:
    sizes = [naming.vocabulary_size(source.config) for source in sources]
    if sizes[chosen] is None:
        return
    known = list(given) if given is not None else [vocabulary(source) for source in sources]
    wanted, count = known[chosen], int(sizes[chosen] or 0)
    model = sources[0]
    for at, source in enumerate(sources):
        if at == chosen or sizes[at] is None:
            continue
        own, label = known[at], f"{_label(source)} to {_label(sources[chosen])}"
        if wanted is None or own is None:
            if sizes[at] != count:
                raise InputError(
                    f"the vocabularies differ: {sources[chosen].where} has {count} rows, {source.where} has {sizes[at]}. "
                    "Rows are matched by token: put each model's tokenizer beside its weights"
                )
            notes.setdefault("vocabulary", {})[label] = "not checked: no tokenizer beside the weights"
            continue
        if own == wanted and sizes[at] == count:
            continue
        places, facts = match_rows(own, int(sizes[at] or 0), wanted, count)
        if facts["shared"] < 0.5 * min(len(own), len(wanted)):
            raise InputError(
                f"{source.where} and {sources[chosen].where} share {facts['shared']} of {len(own)} and {len(wanted)} tokens: "
                "these models are not of one family"
            )
        if at == 0 and facts["dropped"] and missing == "error":
            raise InputError(
                f"{facts['dropped']} tokens of {source.where} are unknown to {sources[chosen].where} and would be lost, such as "
                f"{facts['first dropped']}. Say allow_missing to drop them"
            )
        notes.setdefault("vocabulary", {})[label] = facts
        rows = {
            name: (places, Spec(spec.dtype, (count, *spec.shape[1:])))
            for name, spec in source.tensors.items()
            if naming.has_token_rows(name, spec.shape, sizes[at])
        }
        back = {theirs: ours for ours, theirs in pairs[at].items()}
        sources[at] = Aligned(source, rows, (model, back) if chosen == 0 and new_rows == "model" else None)


def match_rows(
    own: Mapping[str, int], size: int, wanted: Mapping[str, int], count: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """For each of `count` rows of the wanted vocabulary the row of `own`, or -1; and what was found.

    Rows without a token (padding to a round size) meet by number where neither side names them.

    >>> rows, facts = match_rows({"a": 0, "b": 1}, 3, {"b": 0, "a": 1, "new": 2}, 4)
    >>> rows.tolist(), facts["shared"], facts["new"]
    ([1, 0, -1, -1], 2, 1)
    """
    places = torch.full((count,), -1, dtype=torch.int64)
    named = set(own.values())
    taken = set(wanted.values())
    shared = 0
    for token, row in wanted.items():
        if row < count and (at := own.get(token)) is not None and at < size:
            places[row] = at
            shared += 1
    for row in range(min(size, count)):
        if row not in named and row not in taken:
            places[row] = row
    dropped = [token for token in own if token not in wanted]
    facts = {
        "shared": shared,
        "moved": sum(1 for token, row in wanted.items() if own.get(token, row) != row),
        "new": len(wanted) - shared,
        "dropped": len(dropped),
    }
    return places, {**facts, "first dropped": dropped[:5]} if dropped else facts


def _tied(model: Source, others: Sequence[Source]) -> dict[str, str]:
    """{copy: owner} of token-row tensors that a file holds twice because the model ties them; in every source or absent there."""
    owners = [name for name in model.tensors if naming.TOKEN_ROWS.search(name) and not naming.is_vision(name)]
    out: dict[str, str] = {}
    if (
        not owners
        or not isinstance(model, (Folder, Merged, Aligned))
        or model.config.get("tie_word_embeddings") is False
    ):
        return out
    for name, spec in model.tensors.items():
        twin = naming.HEAD.search(name) or naming.TOKEN_ROWS.search(name)
        if name != owners[0] and twin and spec == model.tensors[owners[0]]:
            sides = [side for side in (model, *others) if name in side.tensors and owners[0] in side.tensors]
            if all(_equal(side, name, owners[0]) for side in sides):
                out[name] = owners[0]
    return out


def _equal(source: Source, left: str, right: str) -> bool:
    spec = source.tensors[left]
    step = max(1, (1 << 20) // spec.width)
    return spec == source.tensors[right] and all(
        torch.equal(source.raw(left, at, min(at + step, spec.rows)), source.raw(right, at, min(at + step, spec.rows)))
        for at in range(0, spec.rows, step)
    )


def _check_keys(
    model: Source,
    other: Source,
    pairs: Mapping[str, str],
    tied: Mapping[str, str],
    notes: dict[str, Any],
    missing: str,
) -> None:
    used = set(pairs.values())
    vision_differs = {naming.is_vision(n) for n in model.tensors} != {naming.is_vision(n) for n in other.tensors}

    def counts(name: str, side: Source) -> bool:
        """Whether it matters that the other side lacks this tensor."""
        if (
            naming.is_buffer(name)
            or side.tensors[name].dtype not in ADDED
            or (vision_differs and naming.is_vision(name))
        ):
            return False
        return name not in tied

    absent = [name for name in model.tensors if name not in pairs and counts(name, model)]
    extra = [name for name in other.tensors if name not in used and counts(name, other)]
    owners = [name for name in other.tensors if naming.TOKEN_ROWS.search(name) and not naming.is_vision(name)]
    extra = [
        name
        for name in extra
        if not (
            owners and (naming.HEAD.search(name) or naming.TOKEN_ROWS.search(name)) and _equal(other, name, owners[0])
        )
    ]
    if vision_differs:
        notes.setdefault("copied, not shared", {})[_label(other)] = "vision parts"
    if not absent and not extra:
        return
    if missing == "error" or len(absent) * 2 > len(model.tensors):
        heads = [name for name in (*absent, *extra) if naming.HEAD.search(name)]
        hint = " One ties its head to the embedding and the other does not." if heads == [*absent, *extra] else ""
        unlike = model.config.get("model_type") != other.config.get("model_type")
        hint += (
            f" They are a {model.config.get('model_type')} and a {other.config.get('model_type')}." if unlike else ""
        )
        difference = naming.key_difference(absent, extra, _label(model), _label(other))
        raise InputError(
            f"{model.where} and {other.where} hold different tensors: {difference}.{hint} "
            "Say allow_missing to keep the first model's where the other has none"
        )
    notes.setdefault("missing", {})[_label(other)] = {"copied from the model": absent, "not used": extra}


def _check_shapes(model: Source, other: Source, pairs: Mapping[str, str]) -> None:
    wrong = []
    for name, theirs in pairs.items():
        if model.tensors[name].shape != other.tensors[theirs].shape:
            wrong.append((name, model.tensors[name].shape, other.tensors[theirs].shape))
    if not wrong:
        return
    lines = "; ".join(f"{name}: {_label(model)} {a}, {_label(other)} {b}" for name, a, b in wrong[:5])
    rows = all(naming.TOKEN_ROWS.search(name) or naming.HEAD.search(name) for name, _, _ in wrong)
    hint = (
        "The vocabularies differ: rows are matched by token if both configurations say their vocab_size and both tokenizers are there"
        if rows
        else "The models are not of one family, or of different sizes"
    )
    raise InputError(f"{len(wrong)} tensors have different shapes: {lines}. {hint}")
