"""Losses of a policy over pairs without a reward model: DPO and its family, one function with a loss of the pair's gap put in.

Shapes: G prompts, N responses. `preference[g, i, j]` says how strongly response i is held better than j: 1 and 0 for a strict pair,
p and 1 - p for a soft one, 0 and 0 for a tie or an absent response. A gap is the reward of i less that of j, in the loss's own scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from preftune.objectives.metrics import Metrics, mean_over
from preftune.objectives.pairwise import pair_metrics

PairLoss = Callable[[Tensor], Tensor]
"""The loss of a pair as a function of its gap, elementwise."""

STEEPEST = 30.0
"""From this exponent on exp() goes on as its tangent, so that a value and its gradient's norm stay finite in fp32."""

LIKELIEST = -1e-7
"""Mean log-probabilities above this are taken as this: fp32 knows nothing between it and 0, where odds are infinite."""


def preference_loss(
    rewards: Tensor,
    logp: Tensor,
    preference: Tensor,
    weight: Tensor,
    pair_loss: PairLoss,
) -> tuple[Tensor, Metrics]:
    """Mean over each prompt's pairs of `pair_loss`(r_i - r_j), summed over prompts by `weight`.

    `rewards` [G, N] are what the row holds as a response's reward, in its own scale; `logp` [G, N] sums over response tokens, for the
    metrics; `preference` [G, N, N]; `weight` [G] sums to 1 over the step. A prompt's pairs weigh 1 / P each, and a soft pair is
    p * loss(gap) + (1 - p) * loss(-gap).

    >>> import torch
    >>> order, one = torch.ones(1, 2, 2).triu(1), torch.ones(1)
    >>> logp, reference = torch.tensor([[-3.0, -5.0]]), torch.tensor([[-4.0, -4.5]])
    >>> loss, _ = preference_loss(0.1 * (logp - reference), logp, order, one, sigmoid)
    >>> round(loss.item(), 6)
    0.620957
    """
    gap = rewards.unsqueeze(2) - rewards.unsqueeze(1)
    loss = (pair_loss(gap) * preference).sum((1, 2)) / preference.sum((1, 2)).clamp(min=1e-9)
    metrics = pair_metrics(rewards, preference)
    lead = preference - preference.mT
    wins, loses = lead.gt(0).any(2), lead.lt(0).any(2)
    metrics["logp_chosen"] = mean_over(logp, wins & ~loses)
    metrics["logp_rejected"] = mean_over(logp, loses & ~wins)
    return (loss * weight).sum(), metrics


# ---------------------------------------------------------------- what a pair loses


def sigmoid(gap: Tensor) -> Tensor:
    """- log sigmoid(gap): DPO, arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(gap)


def hinge(gap: Tensor) -> Tensor:
    """max(0, 1 - gap): SLiC, arXiv:2305.10425, and RSO, arXiv:2309.06657."""
    return F.relu(1.0 - gap)


def squared(beta: float) -> PairLoss:
    """(gap / beta - 1 / (2 beta))^2, with gap = beta * D: IPO, arXiv:2310.12036, eq. 17. Least at D = 1 / (2 beta)."""
    return lambda gap: ((gap - 0.5) / beta).square()


def smoothed(epsilon: float) -> PairLoss:
    """(1 - e) L(gap) + e L(-gap): conservative DPO, for labels of which a share e is wrong. Least at gap = ln((1 - e) / e)."""
    return lambda gap: (1 - epsilon) * sigmoid(gap) + epsilon * sigmoid(-gap)


def unbiased(epsilon: float) -> PairLoss:
    """((1 - e) L(gap) - e L(-gap)) / (1 - 2e): robust DPO, arXiv:2403.00409, eq. 9.

    Its mean over labels flipped with probability e is the clean loss. It has no lower bound, so it can be negative.
    """
    return lambda gap: ((1 - epsilon) * sigmoid(gap) - epsilon * sigmoid(-gap)) / (1 - 2 * epsilon)


def with_margin(gamma: float) -> PairLoss:
    """- log sigmoid(gap - gamma): SimPO, arXiv:2405.14734, eq. 6."""
    return lambda gap: sigmoid(gap - gamma)


# ---------------------------------------------------------------- what a response is worth


def divergence(log_ratio: Tensor, kind: str, alpha: float | None = None) -> Tensor:
    """f'(pi / ref) as a function of u = log pi - log ref, elementwise, 0 at u = 0. f-DPO (arXiv:2309.16240, table 1).

    `reverse_kl` u; `forward_kl` 1 - exp(-u); `js` u - softplus(u) + ln 2; `alpha` (1 - exp(-alpha u)) / alpha, which lies between the
    first (alpha to 0) and the second (alpha = 1). Far below the reference, exp goes on as its tangent.

    >>> u = torch.tensor([1.0, -1.0])
    >>> [[round(x, 4) for x in divergence(u, *one).tolist()] for one in (("forward_kl",), ("js",), ("alpha", 0.5))]
    [[0.6321, -1.7183], [0.3799, -0.6201], [0.7869, -1.2974]]
    """
    if kind == "reverse_kl":
        return log_ratio
    if kind == "js":
        return F.logsigmoid(log_ratio) + math.log(2.0)
    power = 1.0 if kind == "forward_kl" else alpha
    assert power is not None
    return -_expm1(-power * log_ratio) / power


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, from STEEPEST on its tangent there."""
    near = x.clamp(max=STEEPEST)
    return near.expm1() + near.exp() * (x - near)


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(mean_logp), elementwise: ORPO, arXiv:2403.07691, eq. 4.

    >>> round(log_odds(torch.tensor(-0.5)).item(), 4)
    0.4328
    """
    sure = mean_logp.clamp(max=LIKELIEST)
    return sure - torch.log(-torch.expm1(sure))
