"""How the pure objectives meet a batch: per-token terms, weighted and summed, and what a step says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from preftune.methods import Outputs
from preftune.objectives.kl import kl_estimate
from preftune.objectives.metrics import Metrics, mean_over
from preftune.objectives.policy_gradient import (
    approximate_kl,
    cispo,
    clipped,
    penalised,
    reinforce,
    sequence_log_ratio,
    truncated_importance,
)
from preftune.objectives.value import value_loss
from preftune.packing.batch import Batch

OLD, DRAWN, REFERENCE, ADVANTAGE, VALUE, RETURN = "old", "drawn", "reference", "advantage", "value", "return"
"""What is known of each token of a rollout: log-probabilities of the policy that drew it, by trainer and by sampler, and of the reference;
advantage; the critic's value and what it should have been."""

Terms = Callable[[Tensor, Outputs, Batch, Any], tuple[Tensor, Tensor]]
"""[M] log ratio, outputs, batch and knobs to [M] losses and [M] which of them were clipped."""


def policy_loss(out: Outputs, batch: Batch, knobs: Any, terms: Terms) -> tuple[Tensor, Metrics]:
    """The step's loss on a micro-batch, from the [M] terms of a method: with KL, entropy and value loss where knobs and outputs ask."""
    assert out.token_logp is not None and out.entropy is not None and out.coefficients is not None
    logp, told = out.token_logp, batch.told
    valid = batch.token_weight > 0
    log_ratio = logp - told.get(OLD, logp.detach())
    losses, was_clipped = terms(log_ratio, out, batch, knobs)
    metrics = {
        "entropy": mean_over(out.entropy, valid),
        "clip_fraction": mean_over(was_clipped.float(), valid),
        "step_kl": mean_over(approximate_kl(log_ratio), valid),
        "ratio": mean_over(log_ratio.clamp(-20, 20).exp(), valid),
    }
    if OLD not in told and DRAWN in told:  # the policy is still what drew these tokens
        metrics["sampler_gap"] = mean_over((logp - told[DRAWN]).abs(), valid)
    if knobs.importance_cap is not None:
        weight = truncated_importance(told.get(OLD, logp.detach()), told[DRAWN], knobs.importance_cap)
        losses = losses * weight
        metrics["importance"] = mean_over(weight, valid)
    if REFERENCE in told:
        metrics["kl"] = mean_over(logp - told[REFERENCE], valid)
        if OLD not in told:
            metrics |= _of_responses(logp.detach() - told[REFERENCE], valid, batch)
        estimate: Any = getattr(knobs, "kl_loss", "reward")
        if estimate != "reward" and knobs.kl > 0:
            kl = kl_estimate(logp, told[REFERENCE], estimate, told.get(OLD, logp.detach()))
            losses = losses + out.coefficients["kl"] * kl
            metrics["kl_loss"] = mean_over(kl, valid)
    if knobs.entropy:
        losses = losses - knobs.entropy * out.entropy
    loss = (batch.token_weight * losses).sum()
    metrics["policy_loss"] = (loss.detach(), batch.token_weight.new_tensor(_share(batch)))
    if out.values is not None:
        errors = value_loss(out.values, told[VALUE], told[RETURN], knobs.value_clip)
        loss = loss + out.coefficients["value"] * (batch.token_weight * errors).sum()
        metrics["value_loss"] = mean_over(errors, valid)
    return loss, metrics


def _of_responses(gap: Tensor, valid: Tensor, batch: Batch) -> Metrics:
    """KL to the reference of a token and a response, from [M] log ratios; else a rollout says it of itself before the first step."""
    gap = gap.clamp(-20, 20) * valid
    count = (batch.per_response(valid.float()) > 0).sum()
    sums = {"kl_response": gap.sum(), "kl_response_k3": ((-gap).expm1() + gap).sum()}
    return {"kl_token": (gap.sum(), valid.sum())} | {name: (total, count) for name, total in sums.items()}


def _share(batch: Batch) -> float:
    """What this micro-batch is of the step, so that a weighted sum over micro-batches is shown as it is."""
    return float(batch.prompt_weight.sum())


def clip_terms(log_ratio: Tensor, out: Outputs, batch: Batch, knobs: Any) -> tuple[Tensor, Tensor]:
    """PPO-clip on every token."""
    return clipped(log_ratio, batch.told[ADVANTAGE], knobs.clip, knobs.clip_high, knobs.dual_clip)


def ppo_terms(log_ratio: Tensor, out: Outputs, batch: Batch, knobs: Any) -> tuple[Tensor, Tensor]:
    """PPO-clip, or PPO-penalty."""
    if knobs.objective == "clip":
        return clip_terms(log_ratio, out, batch, knobs)
    assert out.coefficients is not None
    losses = penalised(log_ratio, batch.told[ADVANTAGE], out.coefficients["penalty"])
    return losses, torch.zeros_like(losses, dtype=torch.bool)


def sequence_terms(mean: bool) -> Terms:
    """A clipped ratio of whole responses: of their mean log ratio (GSPO), or of its sum (RLOO)."""

    def terms(log_ratio: Tensor, out: Outputs, batch: Batch, knobs: Any) -> tuple[Tensor, Tensor]:
        whole = sequence_log_ratio(log_ratio, batch.response, batch.present.numel(), mean)
        return clipped(whole, batch.told[ADVANTAGE], knobs.clip, knobs.clip_high, knobs.dual_clip)

    return terms


def cispo_terms(log_ratio: Tensor, out: Outputs, batch: Batch, knobs: Any) -> tuple[Tensor, Tensor]:
    """A clipped importance weight on a plain policy gradient."""
    assert out.token_logp is not None
    high = knobs.clip if knobs.clip_high is None else knobs.clip_high
    return cispo(log_ratio, out.token_logp, batch.told[ADVANTAGE], knobs.clip, high)


def plain_terms(log_ratio: Tensor, out: Outputs, batch: Batch, knobs: Any) -> tuple[Tensor, Tensor]:
    """The plain policy gradient."""
    assert out.token_logp is not None
    losses = reinforce(out.token_logp, batch.told[ADVANTAGE])
    return losses, torch.zeros_like(losses, dtype=torch.bool)
