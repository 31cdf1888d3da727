"""Losses of a policy on tokens that it drew itself, one number a token; the caller weighs and sums them.

Shapes: M tokens. `log_ratio` = log pi - log pi_old, differentiable, and rho is its exp; `advantage` is a constant. Log ratios are held
within +-20 before exp(), beyond which there is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.objectives.kl import FARTHEST


def clipped(
    log_ratio: Tensor, advantage: Tensor, low: float = 0.2, high: float | None = None, dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """- min(rho A, clip(rho, 1 - low, 1 + high) A) and where the clip bites, both [M]: PPO (arXiv:1707.06347, eq. 7).

    `high` is `low` unless given (DAPO: 0.28, arXiv:2503.14476). With `dual` > 1 the loss of a token with A < 0 is at most - dual * A
    (arXiv:1912.09729). Where the clip bites there is no gradient.

    >>> losses, was_clipped = clipped(torch.tensor([1.3, 1.3, 0.7, 0.7]).log(), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    >>> [round(x, 4) for x in losses.tolist()], was_clipped.tolist()
    ([-1.2, 1.3, -0.7, 0.8], [True, False, False, True])
    """
    advantage, ratio = advantage.detach(), _ratio(log_ratio)
    free, bound = ratio * advantage, ratio.clamp(1 - low, 1 + (low if high is None else high)) * advantage
    gain, was_clipped = torch.minimum(free, bound), bound < free
    if dual is not None:
        floor = torch.where(advantage < 0, dual * advantage, -torch.inf)
        was_clipped = was_clipped | (gain < floor)
        gain = torch.where(gain < floor, floor, gain)
    return -gain, was_clipped


def penalised(log_ratio: Tensor, advantage: Tensor, coefficient: float) -> Tensor:
    """- rho A + coefficient * (rho - 1 - log rho), [M]: PPO with a KL penalty (arXiv:1707.06347, eq. 8).

    The penalty estimates KL(old || new) without bias on the old policy's tokens; `kl.trust_region_coefficient` moves the coefficient.
    """
    return coefficient * _distance(log_ratio) - _ratio(log_ratio) * advantage.detach()


def cispo(log_ratio: Tensor, logp: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """- clip(rho, 1 - low, 1 + high) A log pi with the clipped rho a constant, and where it was clipped, both [M].

    CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4): a clipped token weighs less and still has its gradient. The paper clips above only, which
    is `low` = 1. TRL's `epsilon_high` is the bound itself, ours 1 + `high`: its recommended 5 is `high` = 4.
    """
    ratio = _ratio(log_ratio.detach())
    held = ratio.clamp(1 - low, 1 + high)
    return -held * advantage.detach() * logp, held != ratio


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """- A log pi, [M]: the policy gradient of Williams (1992), for tokens that the very policy drew."""
    return -advantage.detach() * logp


def sequence_log_ratio(log_ratio: Tensor, response: Tensor, count: int, mean: bool) -> Tensor:
    """The log ratio of each token's whole response, [M], differentiable.

    `response` [M] is the index of each token's response, below `count`. Summed it is the ratio of RLOO, where a response is one action
    (arXiv:2402.14740); with `mean` that of GSPO, per token (arXiv:2507.18071).

    >>> sequence_log_ratio(torch.tensor([0.1, 0.3, 0.5]), torch.tensor([0, 0, 1]), 2, mean=False).mul(10).round().tolist()
    [4.0, 4.0, 5.0]
    """
    whole = torch.zeros(count, dtype=torch.float64, device=log_ratio.device).index_add(0, response, log_ratio.double())
    if mean:
        whole = whole / response.bincount(minlength=count).clamp(min=1)
    return whole.to(log_ratio.dtype)[response]


def truncated_importance(old: Tensor, drawn: Tensor, cap: float) -> Tensor:
    """min(exp(old - drawn), cap), [M], constants: weights for tokens drawn under other numbers than training reads them with.

    `drawn` [M] are the sampler's log-probabilities, `old` [M] those of the same weights as training computes them. Truncated importance
    sampling: Ionides (2008).
    """
    return _ratio((old - drawn).detach()).clamp(max=cap)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """rho - 1 - log rho, [M], constants: how far the policy has moved from the one that drew the tokens, for the log."""
    return _distance(log_ratio.detach())


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-FARTHEST, FARTHEST).exp()


def _distance(log_ratio: Tensor) -> Tensor:
    near = log_ratio.clamp(-FARTHEST, FARTHEST)
    return torch.expm1(near) - near
