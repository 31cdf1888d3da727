"""Likelihood objectives: supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.objectives.metrics import Metrics, mean_over


def negative_log_likelihood(logp: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
    """- sum_t w_t l_t over response tokens: `logp` [M] and `weight` [M], weights summing to 1 over the optimizer step.

    With the weights 1 / (tokens of the step) this is the token mean of InstructGPT's SFT (arXiv:2203.02155, section 3.5).

    >>> loss, _ = negative_log_likelihood(torch.tensor([-1.0, -3.0]), torch.tensor([0.5, 0.5]))
    >>> loss.item()
    2.0
    """
    count = torch.ones((), dtype=logp.dtype, device=logp.device) * len(logp)
    return -(logp * weight).sum(), {"nll": (-logp.detach().sum(), count)}


def best_response_likelihood(mean_logp: Tensor, best: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
    """- sum_g w_g mean_t l_t of the best responses: `mean_logp` [G, N], `best` [G, N] weights that sum to 1 a prompt, `weight` [G].

    The imitation term beside a ranking loss: long and short best responses count the same.

    >>> loss, _ = best_response_likelihood(torch.tensor([[-1.0, -3.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1))
    >>> loss.item()
    1.0
    """
    return -((mean_logp * best).sum(1) * weight).sum(), {"nll": mean_over(-mean_logp, best)}
