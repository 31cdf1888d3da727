"""Coefficients that move from rollout to rollout: the leash to the reference, PPO-penalty's trust region, a cost's multiplier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from preftune.objectives.kl import reference_coefficient, trust_region_coefficient
from preftune.objectives.whitening import VARIANCE_FLOOR
from preftune.online.config import OnlineConfig


def start(config: OnlineConfig, critic_shared: bool) -> dict[str, float]:
    """Where they start."""
    knobs = config.knobs
    found = {"kl": float(knobs.kl)}
    if config.constraint is not None:
        found["cost"] = config.constraint.start
    if getattr(knobs, "objective", "clip") == "penalty":
        found["penalty"] = float(knobs.penalty)
    if hasattr(knobs, "value_weight"):
        found["value"] = float(knobs.value_weight or (0.1 if critic_shared else 1.0))
    return found


def after_rollout(coefficients: dict[str, float], config: OnlineConfig, figures: Mapping[str, float], responses: int) -> dict[str, float]:
    """After a rollout of so many responses: the KL's leash (1909.08593), and a cost's multiplier, in its logarithm (2310.12773)."""
    knobs, constraint, found = config.knobs, config.constraint, dict(coefficients)
    kl = figures.get("kl_response")
    if knobs.kl_target is not None and kl is not None:
        found["kl"] = reference_coefficient(found["kl"], kl, knobs.kl_target, responses, knobs.kl_horizon)
    if constraint is not None and f"score_{constraint.part}" in figures:  # else the cost of no response is known
        found["cost"] *= math.exp(constraint.lr * (figures[f"score_{constraint.part}"] - constraint.at_most))
    return found


def after_step(coefficients: dict[str, float], knobs: Any, step_kl: float) -> dict[str, float]:
    """After a rollout's last step, whose KL to where it was drawn was `step_kl` (1707.06347, section 4)."""
    if "penalty" not in coefficients:
        return coefficients
    return coefficients | {"penalty": trust_region_coefficient(coefficients["penalty"], step_kl, knobs.penalty_target)}


def taken_in(seen: tuple[float, float, float], scores: Tensor) -> tuple[float, float, float]:
    """Number, mean and summed squared deviations of what was seen before and of `scores` (Chan et al., 1979)."""
    count, mean, squares = seen
    new = scores[~scores.isnan()].double()
    total = count + len(new)
    if not len(new):
        return seen
    gap = float(new.mean()) - mean
    return total, mean + gap * len(new) / total, squares + float((new - new.mean()).square().sum()) + gap**2 * count * len(new) / total


def normalised(scores: Tensor, seen: tuple[float, float, float]) -> Tensor:
    """Scores on the scale of all that was seen: mean 0, deviation 1."""
    count, mean, squares = seen
    return (scores - mean) / (squares / max(count - 1, 1) + VARIANCE_FLOOR) ** 0.5
