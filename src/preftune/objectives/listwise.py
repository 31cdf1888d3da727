"""Listwise objectives: the Plackett-Luce model of a ranking, as a reward model's loss and as a policy's."""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.objectives.metrics import Metrics
from preftune.objectives.pairwise import pair_metrics


def plackett_luce(values: Tensor, better: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking, summed over its stages: `values` [G, N], `better` [G, N, N] True where i ranks above j; to [G].

    - sum_k [v_k - logsumexp over k and all that rank below it], over each response k that has any below it. Without ties this is
    ListMLE, - log of the Plackett-Luce probability of the order (Xia et al. 2008, eq. 9). Tied responses are not compared with each
    other: each of them meets itself and what ranks strictly below.

    >>> order = torch.ones(1, 3, 3).triu(1).bool()
    >>> round(plackett_luce(torch.tensor([[2.0, 1.0, 0.0]]), order).item(), 6)
    0.720868
    """
    itself = torch.eye(values.shape[1], dtype=torch.bool, device=values.device)
    field = values.unsqueeze(1).masked_fill(~(better | itself), -torch.inf).logsumexp(2)
    return ((field - values) * better.any(2)).sum(1)


def reward_listwise(rewards: Tensor, better: Tensor, weight: Tensor, mean_over_stages: bool = False) -> tuple[Tensor, Metrics]:
    """Reward-model loss: the Plackett-Luce likelihood of each prompt's ranking; with `mean_over_stages` divided by its stages, K - 1.

    `rewards` [G, N], `better` [G, N, N] True where i ranks above j, `weight` [G] summing to 1 over the step. A stage is a response that
    has any below it. Summed, a prompt weighs the more the more responses it has (ListMLE, Xia et al. 2008).

    >>> order = torch.ones(1, 3, 3).triu(1).bool()
    >>> round(reward_listwise(torch.tensor([[2.0, 1.0, 0.0]]), order, torch.ones(1), mean_over_stages=True)[0].item(), 6)
    0.360434
    """
    loss = plackett_luce(rewards, better)
    if mean_over_stages:
        loss = loss / better.any(2).sum(1).clamp(min=1)
    return (loss * weight).sum(), pair_metrics(rewards, better.to(rewards.dtype))
