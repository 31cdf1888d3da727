"""Listwise objectives: the Plackett-Luce model of a ranking, as a reward model's loss and as a policy's."""

from __future__ import annotations

import torch
from torch import Tensor


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
