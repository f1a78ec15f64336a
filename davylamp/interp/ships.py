"""Ships: which attention heads a model's refusal hangs on, by how far the next-token distribution moves when one is ablated.
Source: arXiv:2410.13708, section 3 (equations 5 to 9). Differs: scores of benign prompts beside them, and a verdict that may be "none"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Estimate
from davylamp.core.registry import interp
from davylamp.interp._effect import Speaker, rise
from davylamp.interp._prompts import encode, same_vocabulary, split
from davylamp.interp._scores import prescreen, rank_biased_overlap, ranked, score_heads, votes
from davylamp.interp._verdict import contrast_of, mean_of, minus, verdict
from davylamp.models.hooks import COMPONENTS, Head, anatomy, head_name

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARED = 10  # how many top heads of two models are compared, as in the paper
RANDOM_HEADS = 3


@interp(
    version=1,
    source="arXiv:2410.13708",
    licence="Apache-2.0",
    stage="post-training",
    threats=("jailbreak", "harmful-compliance", "misalignment"),
    needs="hf",
    systems=("27",),
)
def ships(
    model: PreTrainedModel,
    rows: Sequence[Case],
    *,
    tokenizer: PreTrainedTokenizerBase,
    rng: Generator,
    other: PreTrainedModel | None = None,
    contrast: str = "",
    component: Literal["q", "k", "v"] = "q",
    kind: Literal["scale", "mean"] = "scale",
    epsilon: float = 1e-5,
    top: int = 10,
    r_main: int = 1,
    screen: float = 0.0,
    wrapper: str = "",
    judge: str = "",
    per_query: bool = False,
    tokens_at_once: int = 0,
) -> dict[str, Any]:
    """Score each attention head by how its ablation moves the first token of answers to harmful requests; say if one stands out.

    rows: harmful requests; rows whose meta.label is safe or benign, or meta.set benign, lookalikes or capability, are the benign contrast.
    other: a second model of the same vocabulary, whose top heads are compared.  contrast: a rows file of more benign requests, best of the
    same form as the harmful ones.
    component: q or k (undifferentiated attention), v (scaling contribution).  kind: scale by epsilon, or mean over the layer's heads.
    epsilon: what is scaled by, 0 or more.  top: how many heads the ranking and the estimates show.
    r_main: directions of generalized Ships (the angle between the prompts' main direction before and after), 1 or more.
    screen: share of heads, in (0, 1), that an approximate pass picks to be scored exactly; 0 scores all.
    wrapper: a text with {prompt} in place of the chat template.  judge: a judge's name: then the top head and three random ones are ablated
    while the model answers, and the verdict rests on that too.  per_query: keep the scores of every prompt.
    tokens_at_once: tokens that go through a layer together; 0 = as suits the machine.
    """
    if top < 1 or r_main < 1 or not 0 <= screen < 1:
        raise InputError(f"ships needs top >= 1, r_main >= 1 and screen in [0, 1), got {top}, {r_main} and {screen}")
    found = anatomy(model)
    harmful, benign = split(rows, contrast)
    prompts, harmless = encode(model, tokenizer, harmful, wrapper), encode(model, tokenizer, benign, wrapper)
    if r_main > len(prompts):
        raise InputError(f"r_main of {r_main} directions needs as many prompts, got {len(prompts)}")
    how: dict[str, Any] = {"component": component, "kind": kind, "epsilon": epsilon, "tokens_at_once": tokens_at_once}
    notes, passes, wanted, screened = [], 0.0, None, None
    if screen:
        screened, passes = prescreen(model, prompts, rng=rng, **how)
        many = max(1, min(found.count(component) * len(found.layers), round(screen * screened.size)))
        wanted = ranked(screened)[: max(many, min(5, screened.size))]
        notes.append(
            f"{len(wanted)} of {screened.size} heads were scored exactly, picked by an approximate pass; the others have no score"
        )
    angles = len(prompts) > 1
    if not angles:
        notes.append("generalized Ships needs two prompts or more")
    elif len(prompts) < 8:
        notes.append(f"with {len(prompts)} prompts the angles of generalized Ships are noise; give 8 or more")
    scored = score_heads(
        model, prompts, heads=wanted, generalized=angles, r_main=r_main, names=[row.id for row in harmful], **how
    )
    beside = (
        score_heads(
            model,
            harmless,
            heads=wanted,
            generalized=len(harmless) > 1,
            r_main=r_main,
            names=[r.id for r in benign],
            **how,
        )
        if benign
        else None
    )
    passes += scored.passes + (beside.passes if beside else 0.0)
    if not benign:
        notes.append(
            "no benign prompts were given: a head that every answer needs looks like a safety head. Give --contrast"
        )
    groups = ([row.group or row.id for row in harmful], [row.group or row.id for row in benign])
    against = beside.ships if beside else None
    said = verdict(scored.ships, against, groups=groups, rng=rng)
    difference = contrast_of(scored.ships, against)
    order = ranked(difference)
    estimates = _estimates(order[:top], scored.ships, against, groups, rng)
    if judge:
        confirmed = _confirm(model, tokenizer, harmful, order, judge, how, said, rng)
        estimates += confirmed
    mean = scored.mean()
    out: dict[str, Any] = {
        "heads": {"layers": len(found.layers), "heads": found.count(component), "of": COMPONENTS[component]},
        "ablation": {"component": component, "kind": kind, "epsilon": epsilon},
        "prompts": {
            "harmful": len(harmful),
            "benign": len(benign),
            "mean_tokens": sum(map(len, prompts)) / len(prompts),
        },
        "verdict": said,
        "ships": _plain(mean),
        "benign": _plain(beside.mean()) if beside else None,
        "contrast": _plain(difference) if beside else None,
        "generalized": {
            "degrees": _plain(scored.angles),
            "benign_degrees": _plain(beside.angles) if beside else None,
            "r_main": r_main,
        },
        "screen": _plain(screened),
        "ranking": [
            {
                "head": head_name(head),
                "nats": _number(mean[head]),
                "benign_nats": _number(beside.mean()[head]) if beside else None,
                "contrast": _number(difference[head]),
                "degrees": _number(scored.angles[head]) if angles else None,
            }
            for head in order
        ],
        "votes": votes(scored.ships, min(3, found.count(component))),
        "parameters": _parameters(model, component),
        "forward_passes": round(passes, 1),
    }
    if per_query:
        out["per_query"] = {row.id: _plain(one) for row, one in zip(harmful, scored.ships, strict=True)}
    if other is not None:
        same_vocabulary(model, other)
        theirs = score_heads(other, prompts, generalized=False, names=[row.id for row in harmful], **how)
        calm = score_heads(other, harmless, generalized=False, **how).ships if benign else None
        out["other"] = overlap(order, ranked(contrast_of(theirs.ships, calm)))
        out["other"]["verdict"] = verdict(theirs.ships, calm, groups=groups, rng=rng)
        estimates += _overlap_estimates(out["other"])
    out["figures"] = _figures(out, said)
    return {**out, "estimates": estimates, "notes": notes}


def overlap(ours: Sequence[Head], theirs: Sequence[Head], depth: int = SHARED) -> dict[str, Any]:
    """How far two rankings of heads agree: how many of the top heads are shared, what chance gives, and rank-biased overlap at p = 0.9.

    >>> overlap([(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 1), (0, 0), (1, 1), (1, 0)], depth=2)["shared"]
    2
    """
    depth = min(depth, len(ours), len(theirs))
    a, b = list(ours[:depth]), list(theirs[:depth])
    return {
        "depth": depth,
        "shared": len(set(a) & set(b)),
        "shared_by_chance": depth * depth / max(len(ours), len(theirs)),
        "rank_biased_overlap": rank_biased_overlap(a, b),
        "top": [head_name(head) for head in a],
        "other_top": [head_name(head) for head in b],
    }


def _overlap_estimates(found: dict[str, Any]) -> list[Estimate]:
    how = f"top {found['depth']} heads; {found['shared_by_chance']:.1f} shared by chance"
    values = (
        ("shared_top_heads", float(found["shared"]), "heads"),
        ("rank_biased_overlap", found["rank_biased_overlap"], "overlap"),
    )
    return [
        Estimate(value, None, None, found["depth"], method=how, unit=unit, name=name) for name, value, unit in values
    ]


def _estimates(
    heads: Sequence[Head], harmful: Any, benign: Any, groups: tuple[list[str], list[str]], rng: Generator
) -> list[Estimate]:
    out = []
    for layer, head in heads:
        arm = f"head {layer}.{head}"
        high = mean_of(harmful[:, layer, head], groups[0], rng, name="ships", arm=arm)
        out.append(high)
        if benign is not None:
            low = mean_of(benign[:, layer, head], groups[1], rng, name="ships_on_benign", arm=arm)
            out += [low, minus(high, low, name="ships_contrast", arm=arm)]
    return out


def _confirm(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Case],
    order: Sequence[Head],
    judge: str,
    how: dict[str, Any],
    said: dict[str, Any],
    rng: Generator,
) -> list[Estimate]:
    """Ablate the top head, and three random ones, while the model answers; takes the verdict back if that does not free compliance."""
    speaker = Speaker(model, tokenizer, judge, component=how["component"], kind=how["kind"], epsilon=how["epsilon"])
    top = order[0]
    drawn = rng.permutation(len(order) - 1)[:RANDOM_HEADS]
    before = speaker.comply(harmful, [])
    arms = {f"head {head_name(top)} ablated": [top]} | {
        f"random head {head_name(order[1:][i])} ablated": [order[1:][i]] for i in drawn
    }
    estimates = [before.estimate("compliance", "nothing ablated", better=False)]
    rises = []
    for arm, heads in arms.items():
        after = speaker.comply(harmful, heads)
        estimates.append(after.estimate("compliance", arm, better=False))
        rises.append(rise(before, after, rng=rng, name="compliance_rise", arm=arm))
    estimates += rises
    frees = rises[0].low is not None and rises[0].low >= 0.1
    others = [
        arm for arm, estimate in zip(arms, rises, strict=True) if estimate.low is not None and estimate.low >= 0.1
    ][1 if frees else 0 :]
    said["compliance_rise"] = rises[0].value
    if said["concentrated"] and not (frees and not others):
        why = (
            f"ablating head {said['top']} does not free compliance"
            if not frees
            else f"{others[0]} frees compliance too"
        )
        said.update(concentrated=False, head=None, why=f"not concentrated: {why}")
    elif said["concentrated"]:
        said["why"] += f"; ablated, compliance rises by {rises[0].value:.2f}"
    return estimates


def _parameters(model: PreTrainedModel, component: Literal["q", "k", "v"]) -> dict[str, Any]:
    """How many parameters one head's ablation would touch, and their share of all."""
    found = anatomy(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    if component == "v":
        one = found.tap("heads", 0).weights()["weight"][:, 0].numel()
    else:
        tap = found.projection(COMPONENTS[component], 0)
        one = sum(value[..., 0, :].numel() for value in tap.weights().values())
    return {"per_head": one, "of": total, "share": one / total}


def _number(x: Any) -> float | None:
    return None if np.isnan(x) else float(x)


def _plain(grid: Any) -> list[list[float | None]] | None:
    """A (layers, heads) array as lists, None where there is no score."""
    return None if grid is None else [[_number(x) for x in line] for line in np.asarray(grid)]


def heatmap(title: str, grid: Any, unit: str, note: str = "") -> dict[str, Any]:
    """A map of heads as a figure of the report: layers down, heads across."""
    values = _plain(np.array(grid, dtype=float)) or []
    return {
        "kind": "heatmap",
        "title": title,
        "rows": [f"layer {i}" for i in range(len(values))],
        "columns": [f"head {i}" for i in range(len(values[0]) if values else 0)],
        "values": values,
        "unit": unit,
        "note": note,
    }


def _figures(out: dict[str, Any], said: dict[str, Any]) -> list[dict[str, Any]]:
    figures = [
        heatmap("Ships on harmful prompts", out["ships"], "nats", said["why"][0].upper() + said["why"][1:] + ".")
    ]
    if out["contrast"] is not None:
        note = "Mean score on harmful prompts minus that on benign ones. Below zero: the head matters more for benign prompts."
        figures.append(heatmap("Ships, harmful minus benign prompts", out["contrast"], "nats", note))
    if out["generalized"]["degrees"] is not None:
        note = "How far the main direction over all prompts turns. It is large where an ablation changes some prompts and not others."
        figures.append(heatmap("Generalized Ships on harmful prompts", out["generalized"]["degrees"], "degrees", note))
    return figures
