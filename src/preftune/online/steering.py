"""Coefficients that move from rollout to rollout: the leash to the reference and PPO-penalty's trust region, which are kept apart."""

from __future__ import annotations

from typing import Any

from preftune.objectives.kl import reference_coefficient, trust_region_coefficient


def start(knobs: Any, critic_shared: bool) -> dict[str, float]:
    """Where they start."""
    found = {"kl": float(knobs.kl)}
    if getattr(knobs, "objective", "clip") == "penalty":
        found["penalty"] = float(knobs.penalty)
    if hasattr(knobs, "value_weight"):
        found["value"] = float(knobs.value_weight or (0.1 if critic_shared else 1.0))
    return found


def after_rollout(coefficients: dict[str, float], knobs: Any, kl: float | None, responses: int) -> dict[str, float]:
    """After a rollout of so many responses whose mean KL to the reference was `kl` (1909.08593)."""
    if knobs.kl_target is None or kl is None:
        return coefficients
    return coefficients | {"kl": reference_coefficient(coefficients["kl"], kl, knobs.kl_target, responses, knobs.kl_horizon)}


def after_step(coefficients: dict[str, float], knobs: Any, step_kl: float) -> dict[str, float]:
    """After a rollout's last step, whose KL to where it was drawn was `step_kl` (1707.06347, section 4)."""
    if "penalty" not in coefficients:
        return coefficients
    return coefficients | {"penalty": trust_region_coefficient(coefficients["penalty"], step_kl, knobs.penalty_target)}
