"""The critic's loss, and how much of the returns it foresees."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    """0.5 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) of each token, [M]; 0.5 (V - G)^2 with `clip` None.

    `values` [M] carry the gradient; `old` [M], the values when the tokens were drawn, and `returns` [M] are constants. The form of
    OpenAI's PPO code, held near the old values as the policy is near the old policy.

    >>> value_loss(torch.tensor([0.5, 0.5]), torch.zeros(2), torch.tensor([1.0, -1.0])).mul(1000).round().tolist()
    [320.0, 1125.0]
    """
    old, returns = old.detach(), returns.detach()
    squared = (values - returns).square()
    if clip is not None:
        squared = torch.maximum(squared, (values.clamp(old - clip, old + clip) - returns).square())
    return squared / 2


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - var(G - V) / var(G) over the `mask`, 0-dimensional: 1 is a perfect critic, 0 one that says one number always.

    `values` and `returns` are of one shape. Where the returns do not vary, which includes rounding, it is 0.
    """
    if mask is not None:
        values, returns = values[mask.bool()], returns[mask.bool()]
    values, returns = values.flatten(), returns.flatten()
    if len(returns) < 2:
        return torch.zeros((), dtype=returns.dtype, device=returns.device)
    spread = returns.var()
    noise = 8 * torch.finfo(returns.dtype).eps * returns.abs().amax()
    varies = spread > noise.square()
    explained = 1 - (returns - values).var() / torch.where(varies, spread, torch.ones_like(spread))
    return torch.where(varies, explained, torch.zeros_like(explained))
