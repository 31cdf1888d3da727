"""Pairwise objectives: Bradley-Terry over any number of responses to one prompt, as a reward model's loss and as DPO's.

Shapes: G prompts, N responses. `preference[g, i, j]` says how strongly response i is held better than j: 1 and 0 for a strict pair,
p and 1 - p for a soft one, 0 and 0 for a tie or an absent response.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from preftune.objectives.metrics import Metrics, mean_over


def bradley_terry(values: Tensor, preference: Tensor) -> Tensor:
    """Mean over a prompt's pairs of -log sigmoid(v_i - v_j): `values` [G, N], `preference` [G, N, N], to [G].

    All pairs of a prompt come from one scoring of its K responses and weigh 1 / P each, P its number of pairs
    (arXiv:2203.02155, eq. 1). A prompt without any pair gives 0.

    >>> import torch
    >>> round(bradley_terry(torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3, 3).triu(1)).item(), 6)
    0.25115
    """
    gap = values.unsqueeze(2) - values.unsqueeze(1)
    loss = -(F.logsigmoid(gap) * preference).sum((1, 2))
    return loss / preference.sum((1, 2)).clamp(min=1e-9)


def reward_pairwise(rewards: Tensor, preference: Tensor, weight: Tensor, centering: float = 0.0) -> tuple[Tensor, Metrics]:
    """Reward-model loss: Bradley-Terry over all pairs, plus `centering` * mean over pairs of (r_i + r_j)^2.

    `rewards` [G, N], `preference` [G, N, N], `weight` [G] summing to 1 over the step. The centering term (arXiv:2312.09244, eq. 2)
    fixes the constant that Bradley-Terry leaves free.
    """
    loss = bradley_terry(rewards, preference)
    if centering:
        total = rewards.unsqueeze(2) + rewards.unsqueeze(1)
        loss = loss + centering * (total.square() * preference).sum((1, 2)) / preference.sum((1, 2)).clamp(min=1e-9)
    return (loss * weight).sum(), pair_metrics(rewards, preference)


def dpo_sigmoid(logp: Tensor, reference: Tensor, preference: Tensor, weight: Tensor, beta: float) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta * [(logp_w - ref_w) - (logp_l - ref_l)]), arXiv:2305.18290, eq. 7.

    `logp` and `reference` [G, N] are sums over response tokens, the end-of-turn token included; `preference` [G, N, N]; `weight` [G]
    sums to 1 over the step. With more than two responses a prompt's pairs weigh 1 / P each.

    >>> import torch
    >>> one = torch.ones(1)
    >>> loss, _ = dpo_sigmoid(torch.tensor([[-3.0, -5.0]]), torch.tensor([[-4.0, -4.5]]), torch.ones(1, 2, 2).triu(1), one, 0.1)
    >>> round(loss.item(), 6)
    0.620957
    """
    implicit = beta * (logp - reference)
    metrics = pair_metrics(implicit, preference)
    lead = preference - preference.mT
    unbeaten = lead.gt(0).any(2) & ~lead.lt(0).any(2)
    metrics["logp_chosen"] = mean_over(logp, unbeaten)
    return (bradley_terry(implicit, preference) * weight).sum(), metrics


def pair_metrics(values: Tensor, preference: Tensor) -> Metrics:
    """Accuracy (a tie counts half), margin, and the mean value of preferred and dispreferred responses, each pair counted once.

    `values` [G, N], `preference` [G, N, N]; a prompt's pairs share its weight of 1.
    """
    share = preference / preference.sum((1, 2), keepdim=True).clamp(min=1e-9)
    gap = values.unsqueeze(2) - values.unsqueeze(1)
    right = gap.gt(0).to(values.dtype) + 0.5 * gap.eq(0).to(values.dtype)
    return {
        "accuracy": mean_over(right, share),
        "margin": mean_over(gap, share),
        "chosen_reward": mean_over(values.unsqueeze(2).expand_as(gap), share),
        "rejected_reward": mean_over(values.unsqueeze(1).expand_as(gap), share),
    }
