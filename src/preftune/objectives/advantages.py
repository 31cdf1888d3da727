"""How much better a token or a response was than expected: GAE, k-step returns, and baselines made of a prompt's other responses.

Shapes: R responses, T tokens padded on the right, with `mask` [R, T] true where a token was drawn by the policy; or G prompts with N
responses each, with `present` [G, N] true where there is one. What stands outside the mask never matters, NaN included, and results are
0 there. Masked tokens inside a response (a tool's output) are stepped over, as if they were not there. Nothing here carries a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
"""What a response's distance from its group's mean is divided by."""


# ---------------------------------------------------------------- with a value of each token


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16): advantages and returns, both [R, T].

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with V and A 0 after the last valid token; the returns are
    A + V. `rewards`, `values` and `mask` are [R, T].

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.6]])
    >>> advantages, returns = gae(rewards, values, torch.ones(1, 3).bool())
    >>> [[round(x, 3) for x in one.tolist()[0]] for one in (advantages, returns)]
    [[0.451, 0.58, 0.4], [0.951, 0.98, 1.0]]
    """
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for at in reversed(range(values.shape[1])):
        valid = mask[:, at].bool()
        delta = rewards[:, at] + gamma * next_value - values[:, at]
        next_advantage = torch.where(valid, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(valid, values[:, at], next_value)
        advantages[:, at] = torch.where(valid, next_advantage, advantages[:, at])
    return advantages, _kept(advantages + values, mask)


@torch.no_grad()
def k_step(rewards: Tensor, values: Tensor, mask: Tensor, k: int, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """r_t + gamma r_{t+1} + ... + gamma^{k-1} r_{t+k-1} + gamma^k V_{t+k} - V_t: advantages and returns (= advantages + values), [R, T].

    Rewards and values past the end are 0. From the length of the response on, k no longer matters; larger k is less bias and more
    variance. `rewards`, `values` and `mask` are [R, T], `k` is 1 or more (k = 1 is `gae` with lam = 0).
    """
    if k < 1:
        raise ValueError(f"k is a number of steps, 1 or more, not {k}")
    front = mask.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # valid tokens to the left, in their order
    left = lambda x: _kept(x, mask).gather(1, front)
    rewards, values = left(rewards), left(values)
    steps = min(k, values.shape[1])
    returns = gamma**steps * _later(values, steps)
    for i in range(steps):
        returns += gamma**i * _later(rewards, i)
    back = lambda x: _kept(torch.zeros_like(x).scatter(1, front, x), mask)
    return back(returns - values), back(returns)


@torch.no_grad()
def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """sum_{i >= t} gamma^{i-t} r_i over a response's valid tokens: `rewards` and `mask` [R, T] to [R, T].

    With the rewards of a KL penalty this is REINFORCE++'s advantage before whitening (arXiv:2501.03262).
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


# ---------------------------------------------------------------- with a prompt's other responses


@torch.no_grad()
def group_relative(scores: Tensor, present: Tensor, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """(score - mean of its group) / (deviation + eps), [G, N]: GRPO (arXiv:2402.03300, section 4.1.2).

    `scores` [G, N] and `present` [G, N]. The deviation is unbiased (divided by n - 1): with `scale` "group" that of the group's scores,
    with "batch" that of all scores, and with "none" nothing is divided (Dr. GRPO, arXiv:2503.20783). A score that is no finite number is
    unscorable: it counts in no mean and no deviation, and gets 0. Equal scores give exactly 0, and so does one score alone.

    >>> scores = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    >>> [round(x, 4) for x in group_relative(scores, torch.ones(1, 4).bool()).tolist()[0]]
    [0.8659, -0.8659, -0.8659, 0.8659]
    """
    rated = _rated(scores, present)
    centred = _centred(scores, rated)
    if scale == "none":
        return centred
    if scale == "group":
        deviation = _deviation(centred, rated)
    elif scale == "batch":
        deviation = _deviation(_centred(scores.reshape(1, -1), rated.reshape(1, -1)), rated.reshape(1, -1))
    else:
        raise ValueError(f"scale is group, batch or none, not {scale!r}")
    return centred / (deviation + eps)


@torch.no_grad()
def leave_one_out(scores: Tensor, present: Tensor) -> Tensor:
    """Score less the mean of the group's other scores, [G, N]: RLOO (arXiv:2402.14740).

    `scores` [G, N] and `present` [G, N]. A score that is no finite number is unscorable: it is nobody's baseline and gets 0. A score
    alone in its group has no baseline and gets 0.

    >>> leave_one_out(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.ones(1, 4).bool()).mul(3).round().tolist()
    [[6.0, -2.0, 2.0, -6.0]]
    """
    rated = _rated(scores, present)
    count = rated.sum(1, keepdim=True)
    return _centred(scores, rated) * count / (count - 1).clamp(min=1)


@torch.no_grad()
def process_relative(rewards: Tensor, ends: Tensor, mask: Tensor, eps: float = 1e-4) -> Tensor:
    """GRPO with a reward for each step (arXiv:2402.03300, section 4.1.3), [G, N, T].

    All step rewards of a group are normalised together, as in `group_relative`; a token's advantage is the sum of those whose steps end
    at it or later. `rewards` [G, N, T] are read where `ends` [G, N, T] is true inside `mask` [G, N, T]. One step a response is GRPO.
    """
    normalised = group_relative(rewards.flatten(1), (ends.bool() & mask.bool()).flatten(1), "group", eps)
    return reward_to_go(normalised.view_as(rewards).flatten(0, 1), mask.flatten(0, 1)).view_as(rewards)


# ---------------------------------------------------------------- parts


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    """0 outside the mask, also where NaN stood."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def _later(values: Tensor, by: int) -> Tensor:
    """Column t holds column t + by, 0 past the end."""
    return torch.cat([values[:, by:], torch.zeros_like(values[:, :by])], 1)


def _rated(scores: Tensor, present: Tensor) -> Tensor:
    return present.bool() & scores.isfinite()


def _centred(scores: Tensor, rated: Tensor) -> Tensor:
    """Each row less its mean over `rated`, 0 elsewhere. Taken from the row's least score, so that equal scores give 0 to the last bit."""
    least = torch.where(rated, scores, torch.inf).amin(1, keepdim=True)
    above = _kept(scores - least, rated)
    return _kept(above - above.sum(1, keepdim=True) / rated.sum(1, keepdim=True).clamp(min=1), rated)


def _deviation(centred: Tensor, rated: Tensor) -> Tensor:
    """Unbiased deviation of each row [G, 1], 0 of fewer than two."""
    return (centred.square().sum(1, keepdim=True) / (rated.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
