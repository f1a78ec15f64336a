"""The losses of unlearning, as plain functions of tensors: one a method, each beside its source. `train/unlearn.py` puts them to work.
Source: TOFU (arXiv:2401.06121), NPO (2404.05868), SimNPO (2410.07163), RMU (2403.03218), UNDIAL (2402.10052), WGA (2502.19301),
SatImp (2505.11953), CE-U (2503.01224), PDU (2506.05314).

logits: (rows, places, vocabulary), already shifted, so that place t predicts labels[:, t].  labels: (rows, places), -100 where nothing
is learnt.  All means over tokens are over the labelled ones of the whole batch; all sums of log probabilities are over a row's answer.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
IGNORED = -100


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-ln p of every labelled token, (rows, places); 0 elsewhere.

    >>> token_nll(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).tolist()
    [[1.3862943649291992, 0.0]]
    """
    return F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


def mean_nll(nll: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled tokens. Its negative is the forget loss of GradAscent and GradDiff."""
    return nll.sum() / (labels != IGNORED).sum().clamp(min=1)


def npo(logp: Tensor, logp_ref: Tensor, beta: float) -> Tensor:
    """-(2/beta) mean ln sigmoid(-beta (ln p - ln p_ref)) (NPO, equation 3); both (rows,), summed over the answer.

    At the start it is (2/beta) ln 2, and it tends to GradDiff's forget loss (plus a constant) as beta goes to 0.

    >>> round(float(npo(torch.tensor([-1.0]), torch.tensor([-1.0]), 0.1)), 4)
    13.8629
    """
    return -(2 / beta) * F.logsigmoid(-beta * (logp - logp_ref)).mean()


def dpo_idk(win: Tensor, win_ref: Tensor, lose: Tensor, lose_ref: Tensor, beta: float) -> Tensor:
    """-(2/beta) mean ln sigmoid(beta [(win - win_ref) - (lose - lose_ref)]): "I don't know" is preferred to the answer."""
    return -(2 / beta) * F.logsigmoid(beta * ((win - win_ref) - (lose - lose_ref))).mean()


def simnpo(nll: Tensor, tokens: Tensor, beta: float, delta: float) -> Tensor:
    """-(2/beta) mean ln sigmoid(beta (nll/n - delta)) (SimNPO, equation 4); nll, tokens: (rows,). No reference model.

    >>> round(float(simnpo(torch.tensor([2.0]), torch.tensor([2.0]), 1.0, 1.0)), 4)
    1.3863
    """
    return -(2 / beta) * F.logsigmoid(beta * (nll / tokens - delta)).mean()


def wga(nll: Tensor, labels: Tensor, beta: float) -> Tensor:
    """-mean of p^beta nll, p held fixed: tokens that are forgotten already stop pulling (WGA)."""
    return mean_nll(-((-nll).exp().detach() ** beta) * nll, labels)


def satimp(nll: Tensor, labels: Tensor, beta1: float, beta2: float) -> Tensor:
    """-mean of p^beta1 (1-p)^beta2 nll, weights held fixed (SatImp)."""
    p = (-nll).exp().detach()
    return mean_nll(-(p**beta1) * (1 - p) ** beta2 * nll, labels)


def undial(logits: Tensor, ref_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Cross-entropy with softmax(reference logits - beta at the true token), mean over tokens (UNDIAL)."""
    lowered = ref_logits.float() - beta * F.one_hot(labels.clamp(min=0), ref_logits.shape[-1])
    return _soft(logits, lowered.softmax(-1), labels)


def ceu(logits: Tensor, labels: Tensor, skip: int) -> Tensor:
    """Cross-entropy with the model's own distribution without the true token; each answer's first `skip` tokens are left out (CE-U).

    >>> float(ceu(torch.zeros(1, 1, 3), torch.tensor([[0]]), 0)) == float(torch.log(torch.tensor(3.0)))
    True
    """
    own = logits.detach().float().scatter(2, labels.clamp(min=0).unsqueeze(-1), float("-inf")).softmax(-1)
    labelled = labels != IGNORED
    return _soft(logits, own, labels.masked_fill(labelled & (labelled.cumsum(1) <= skip), IGNORED))


def pdu(logits: Tensor, labels: Tensor) -> Tensor:
    """mean of (max logit - mean logit)^2 over labelled tokens: flat logits (PDU's forget loss)."""
    flat = logits.float()
    return (flat.amax(-1) - flat.mean(-1)).square()[labels != IGNORED].mean()


def kl(ref_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """KL(reference || model), mean over labelled tokens: retain by staying as one was.

    >>> float(kl(torch.randn(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[1, 2]]))) > 0
    True
    """
    ref, own = ref_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (ref.exp() * (ref - own)).sum(-1)[labels != IGNORED].mean()


def steering_target(width: int, coefficient: float, uniform: Tensor) -> Tensor:
    """c u, where u = r/||r|| and r ~ U[0, 1)^width is given (RMU, section 4): length `coefficient`, no negative part.

    >>> float(steering_target(2, 5.0, torch.tensor([0.3, 0.4])).norm())
    5.0
    """
    if uniform.shape != (width,):
        raise ValueError(f"expected {width} numbers, got {tuple(uniform.shape)}")
    return coefficient * uniform / uniform.norm()


def rmu(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over rows, tokens and width of (h - target)^2; target: (width,) to steer to, or (rows, tokens, width) to stay at.

    Code bases differ by the factor width (a sum over it): here it is a mean, to which coefficients must be converted.
    mask: (rows, tokens) 1 where there is a token.
    """
    square = (hidden.float() - target.to(hidden.dtype).float()).square().mean(-1) * mask
    return (square.sum(1) / mask.sum(1)).mean()


def _soft(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with a distribution per token, mean over labelled tokens; 0 if there are none."""
    crossed = -(target * logits.float().log_softmax(-1)).sum(-1) * (labels != IGNORED)
    return crossed.sum() / (labels != IGNORED).sum().clamp(min=1)
