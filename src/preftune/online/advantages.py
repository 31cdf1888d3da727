"""From a gathered rollout to each token's advantage: the rows' own ways, put together of the pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from preftune.objectives.advantages import gae, group_relative, k_step, leave_one_out, process_relative, reward_to_go
from preftune.objectives.token_rewards import placed, shaped
from preftune.objectives.whitening import whiten
from preftune.online.gathered import Gathered

Advantages = Callable[[Gathered, Any, float], tuple[Tensor, Tensor | None]]
"""A rollout, the knobs and the KL coefficient as it stands, to [R, T] advantages, and [R, T] returns where a critic learns them."""


def token_rewards(found: Gathered, kl: float, scores: Tensor | None = None) -> Tensor:
    """[R, T] rewards: the score on the last token, those of segments on theirs, less kl * (log pi - log reference) on each (D.1).

    `scores` [G, N] replaces the responses' own; one that could not be scored is given 0, and no method learns from it.
    """
    each = (found.scores if scores is None else scores).nan_to_num().flatten()
    rewards = placed(each, found.lengths, found.mask.shape[1]) + found.dense
    if found.reference is None or kl == 0:
        return rewards
    return shaped(rewards, found.old, found.reference, found.mask, kl)


def with_critic(found: Gathered, knobs: Any, kl: float) -> tuple[Tensor, Tensor | None]:
    """GAE or k-step advantages, whitened over the rollout's tokens; returns are not whitened."""
    assert found.values is not None
    rewards = token_rewards(found, kl)
    if knobs.whiten_rewards:
        rewards = whiten(rewards, found.counted, shift_mean=False)
    if knobs.k_step is not None:
        advantages, returns = k_step(rewards, found.values, found.mask, knobs.k_step, knobs.gamma)
    else:
        advantages, returns = gae(rewards, found.values, found.mask, knobs.gamma, knobs.lam)
    return _whitened(advantages, found, knobs), returns


def to_go(found: Gathered, knobs: Any, kl: float) -> tuple[Tensor, Tensor | None]:
    """Sum of all rewards from the token on."""
    return _whitened(reward_to_go(token_rewards(found, kl), found.mask, knobs.gamma), found, knobs), None


def group_baseline(found: Gathered, knobs: Any, kl: float) -> tuple[Tensor, Tensor | None]:
    """REINFORCE++ with baseline: the score less its group's mean, then whitened over all tokens; the KL in the reward where it is asked."""
    centred = group_relative(found.scores, found.scored, "none")
    rewards = token_rewards(found, kl if knobs.kl_loss == "reward" else 0.0, centred)
    return whiten(reward_to_go(rewards, found.mask), found.counted), None


def group(found: Gathered, knobs: Any, kl: float) -> tuple[Tensor, Tensor | None]:
    """GRPO: the score relative to its group, on every token; with rewards of segments, those that end at or after the token count."""
    if not found.ends.any():
        return found.spread(group_relative(found.scores, found.scored, knobs.scale)), None
    prompts, count = found.scores.shape
    grid = lambda values: values.view(prompts, count, -1)
    rewards = token_rewards(found, 0.0)
    last = placed(torch.ones(prompts * count, dtype=rewards.dtype), found.lengths, rewards.shape[1]).bool()
    found_of = process_relative(grid(rewards), grid(_of_scored(found.ends | last, found)), grid(found.mask))
    return _of_scored(found_of.view(prompts * count, -1), found), None


def left_out(found: Gathered, knobs: Any, kl: float) -> tuple[Tensor, Tensor | None]:
    """RLOO: the whole reward less the mean of the other responses'."""
    whole = token_rewards(found, kl).sum(1).view(found.scores.shape)
    return found.spread(leave_one_out(whole, found.scored)), None


def over_greedy(found: Gathered, knobs: Any, kl: float) -> tuple[Tensor, Tensor | None]:
    """ReMax: the whole reward less the likeliest response's score; 0 where that could not be scored."""
    assert found.greedy is not None
    whole = token_rewards(found, kl).sum(1).view(found.scores.shape)
    above = whole - found.greedy.unsqueeze(1)
    return found.spread(above.masked_fill(~found.scored | above.isnan(), 0.0)), None


def _whitened(advantages: Tensor, found: Gathered, knobs: Any) -> Tensor:
    return whiten(advantages, found.counted) if knobs.whiten else _of_scored(advantages, found)


def _of_scored(values: Tensor, found: Gathered) -> Tensor:
    """[R, T] values, 0 (or False) on the tokens of responses without a score."""
    return torch.where(found.scored.reshape(-1, 1), values, torch.zeros_like(values))
