"""Coefficients that move from rollout to rollout: the leash to the reference, PPO-penalty's trust region, a cost's multiplier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from preftune.objectives.kl import reference_coefficient, trust_region_coefficient
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
    if constraint is not None:
        found["cost"] *= math.exp(constraint.lr * (figures[f"score_{constraint.part}"] - constraint.at_most))
    return found


def after_step(coefficients: dict[str, float], knobs: Any, step_kl: float) -> dict[str, float]:
    """After a rollout's last step, whose KL to where it was drawn was `step_kl` (1707.06347, section 4)."""
    if "penalty" not in coefficients:
        return coefficients
    return coefficients | {"penalty": trust_region_coefficient(coefficients["penalty"], step_kl, knobs.penalty_target)}
