"""Pointwise objectives: a reward model that learns people's ratings themselves."""

from __future__ import annotations

from torch import Tensor

from preftune.objectives.metrics import Metrics, mean_over
from preftune.objectives.pairwise import pair_metrics


def squared_error(rewards: Tensor, rated: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
    """sum over rated responses of w (r - s)^2: `rewards`, `rated` (NaN: no rating) and `weight` [G, N], weights summing to 1 over the step.

    The best constant is the mean rating and loses the ratings' variance. `accuracy` and its like count pairs of a prompt's responses
    whose ratings differ.

    >>> import torch
    >>> loss, _ = squared_error(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, float("nan")]]), torch.tensor([[1.0, 0.0]]))
    >>> loss.item()
    4.0
    """
    known = ~rated.isnan()
    error = ((rewards - rated.nan_to_num()) * known).square()
    metrics = {"mse": mean_over(error, known)}
    if rewards.shape[1] > 1:
        metrics |= pair_metrics(rewards, higher(rated).to(rewards.dtype))
    return (error * weight).sum(), metrics


def higher(rated: Tensor) -> Tensor:
    """[G, N, N] True where response i is rated above j, from [G, N] ratings; NaN is above and below nothing."""
    return rated.unsqueeze(2) > rated.unsqueeze(1)
