"""Pairwise objectives: Bradley-Terry over any number of responses to one prompt, as a reward model's loss; what every pair reports.

Shapes: G prompts, N responses. `preference[g, i, j]` says how strongly response i is held better than j: 1 and 0 for a strict pair,
p and 1 - p for a soft one, 0 and 0 for a tie or an absent response.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from preftune.objectives.metrics import Metrics, mean_over


def bradley_terry(values: Tensor, preference: Tensor, margin: Tensor | None = None) -> Tensor:
    """Mean over a prompt's pairs of -log sigmoid(v_i - v_j - m_ij): `values` [G, N], `preference` and `margin` [G, N, N], to [G].

    All pairs of a prompt come from one scoring of its K responses and weigh 1 / P each, P its number of pairs
    (arXiv:2203.02155, eq. 1). A prompt without any pair gives 0.

    >>> import torch
    >>> round(bradley_terry(torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3, 3).triu(1)).item(), 6)
    0.25115
    """
    gap = values.unsqueeze(2) - values.unsqueeze(1)
    if margin is not None:
        gap = gap - margin
    loss = -(F.logsigmoid(gap) * preference).sum((1, 2))
    return loss / preference.sum((1, 2)).clamp(min=1e-9)


def smoothed(preference: Tensor, smoothing: float) -> Tensor:
    """Labels of which each may be wrong with probability e = `smoothing`: p becomes (1 - e) p + e (1 - p); [G, N, N] to the same.

    Strict labels become 1 - e and e, soft ones come closer to one half; ties and absent responses stay 0 and 0.
    """
    return preference + smoothing * (preference.mT - preference)


def signed_margin(strength: Tensor, preference: Tensor) -> Tensor:
    """[G, N, N] m_ij = -m_ji: the `strength` [G, N, N] of the preference that is held, positive for the better response of a pair.

    Under it P(i beats j) = sigmoid(r_i - r_j - m_ij) and P(j beats i) still sum to 1, so that soft labels keep their meaning. The strength
    that a minority of annotators gave the other way round does not count.
    """
    held = strength * preference.gt(preference.mT)
    return held - held.mT


def reward_pairwise(
    rewards: Tensor,
    preference: Tensor,
    weight: Tensor,
    centering: float = 0.0,
    label_smoothing: float = 0.0,
    strength: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Reward-model loss: Bradley-Terry over all pairs, plus `centering` * mean over pairs of (r_i + r_j)^2.

    `rewards` [G, N], `preference` [G, N, N], `weight` [G] summing to 1 over the step. The centering term (arXiv:2312.09244, eq. 2)
    fixes the constant that Bradley-Terry leaves free. `strength` [G, N, N] of a preference is the margin by which rewards shall differ
    (arXiv:2307.09288, eq. 2): -log sigmoid(r_w - r_l - m); `label_smoothing` as in `smoothed`.

    >>> import torch
    >>> pair = torch.ones(1, 2, 2).triu(1)
    >>> round(reward_pairwise(torch.tensor([[2.0, 0.0]]), pair, torch.ones(1), strength=3 * pair)[0].item(), 6)
    1.313262
    """
    preference = preference.to(rewards.dtype)
    margin = None if strength is None else signed_margin(strength, preference)
    loss = bradley_terry(rewards, smoothed(preference, label_smoothing), margin)
    if centering:
        total = rewards.unsqueeze(2) + rewards.unsqueeze(1)
        loss = loss + centering * (total.square() * preference).sum((1, 2)) / preference.sum((1, 2)).clamp(min=1e-9)
    return (loss * weight).sum(), pair_metrics(rewards, preference)


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
