"""Likelihood objectives: supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.objectives.metrics import Metrics


def negative_log_likelihood(logp: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
    """- sum_t w_t l_t over response tokens: `logp` [M] and `weight` [M], weights summing to 1 over the optimizer step.

    With the weights 1 / (tokens of the step) this is the token mean of InstructGPT's SFT (arXiv:2203.02155, section 3.5).

    >>> loss, _ = negative_log_likelihood(torch.tensor([-1.0, -3.0]), torch.tensor([0.5, 0.5]))
    >>> loss.item()
    2.0
    """
    count = torch.ones((), dtype=logp.dtype, device=logp.device) * len(logp)
    return -(logp * weight).sum(), {"nll": (-logp.detach().sum(), count)}
