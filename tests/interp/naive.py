"""The reference: one prompt at a time, one head at a time, the whole model each time, and full SVDs. Slow and plain on purpose."""

import numpy as np
import torch

from davylamp.models import hooks


def states(model, prompt, heads, **how):
    """(hidden state after the final norm, logits), both at the last token, with heads ablated."""
    kept = []
    handle = hooks.anatomy(model).norm.register_forward_hook(lambda module, args, output: kept.append(output[0, -1]))
    try:
        with torch.no_grad(), hooks.ablate_heads(model, heads, **how):
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return kept[0], logits


def kl(plain, ablated):
    p, q = (logits.float().softmax(-1).double() + 1e-12 for logits in (plain, ablated))
    return float((p * (p / q).log()).sum())


def angle(z0, z1, r=1):
    """Sum of principal angles in degrees between the first r left singular vectors, by numpy's full SVD and arccos."""
    u, v = (np.linalg.svd(np.asarray(z, dtype=float), full_matrices=False)[0][:, :r] for z in (z0, z1))
    return float(np.degrees(np.arccos(np.clip(np.linalg.svd(u.T @ v)[1], 0, 1))).sum())


def scores(model, prompts, group=(), r=1, against=None, **how):
    """(ships (prompts, layers, heads), angles (layers, heads), plain states); group members are left at NaN."""
    found = hooks.anatomy(model)
    many = found.count(how.get("component", "q"))
    ships = np.full((len(prompts), len(found.layers), many), np.nan)
    angles = np.full((len(found.layers), many), np.nan)
    plain = [states(model, prompt, group, **how) for prompt in prompts]
    z0 = np.array([z.numpy() for z, _ in plain])
    for layer in range(len(found.layers)):
        for head in range(many):
            if (layer, head) in group:
                continue
            cut = [states(model, prompt, [*group, (layer, head)], **how) for prompt in prompts]
            ships[:, layer, head] = [kl(a, b) for (_, a), (_, b) in zip(plain, cut, strict=True)]
            angles[layer, head] = angle(z0 if against is None else against, [z.numpy() for z, _ in cut], r)
    return ships, angles, z0
