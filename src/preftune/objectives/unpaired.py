"""Objectives over single responses that are labelled desirable or undesirable, without pairs.

Shapes: G prompts, N responses. `labels[g, n]` is 1 for a desirable and 0 for an undesirable response, NaN where there is none.
"""

from __future__ import annotations

from torch import Tensor

from preftune.objectives.metrics import Metrics, mean_over
from preftune.objectives.pairwise import pair_metrics


def kto(
    logp: Tensor,
    reference: Tensor,
    labels: Tensor,
    weight: Tensor,
    baseline: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Kahneman-Tversky loss, arXiv:2402.01306, eq. 7 and 8, written as what is lost: with h = logp - ref,

    lambda_D * sigmoid(beta * (z0 - h)) for a desirable, lambda_U * sigmoid(beta * (h - z0)) for an undesirable response.

    `logp` and `reference` [G, N] are sums over response tokens; `weight` [G, N] sums to 1 over the step. z0 = max(0, `baseline`), where
    `baseline` is the mean log-ratio (nats) of the whole step's mismatched pairs: a plain number, so no gradient flows through it. One
    that is not finite makes the loss so.

    >>> import torch
    >>> h, labels = torch.tensor([[1.5, -1.0]]), torch.tensor([[1.0, 0.0]])
    >>> loss, _ = kto(h, torch.zeros(1, 2), labels, torch.full((1, 2), 0.5), 0.25, 0.1)
    >>> round(loss.item(), 6)
    0.468791
    """
    good, bad = ((labels == kind).to(logp.dtype) for kind in (1, 0))
    ratio = (logp - reference).masked_fill(good + bad == 0, 0.0)
    z0 = ratio.new_tensor(baseline).clamp(min=0.0)  # unlike max(), this keeps NaN
    lost = (beta * (z0 - ratio) * (good - bad)).sigmoid()
    each = lost * (desirable_weight * good + undesirable_weight * bad)
    return (each * weight).sum(), _metrics(beta * ratio, good, bad, z0, weight)


def _metrics(implicit: Tensor, good: Tensor, bad: Tensor, z0: Tensor, weight: Tensor) -> Metrics:
    """z0, the mean implicit reward of each kind, and accuracy and margin over the prompts that have both; nothing that has no response."""
    share = weight.to(z0.dtype).sum()
    pairs = pair_metrics(implicit, good.unsqueeze(2) * bad.unsqueeze(1))
    metrics = {
        "kl": (z0 * share, share),
        "chosen_reward": mean_over(implicit, good),
        "rejected_reward": mean_over(implicit, bad),
        "accuracy": pairs["accuracy"],
        "margin": pairs["margin"],
    }
    return {name: ratio for name, ratio in metrics.items() if ratio[1] > 0}
