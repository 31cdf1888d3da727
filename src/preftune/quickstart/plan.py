"""What the quickstart does: its stages, their settings, and why they are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.configfile import load as load_config
from preftune.methods import METHODS, Method
from preftune.online.methods import ONLINE, Online, config_kind
from preftune.training.config import RunConfig

MODEL = "smollm2"
DATA = "sample:hh_pairs"
SHARED: Mapping[str, Any] = {
    "data": DATA,
    "eval_fraction": 0.2,
    "seed": 0,
    "prompts_per_step": 8,
    "max_steps": 10,
    "max_length": 384,
    "tokens_per_microbatch": 1024,
    "save_every": 5,
    "lora": {"rank": 16, "alpha": 32.0},
}
NEW_TOKENS = 48
WRITTEN = 16
"""Held-out prompts that the models answer."""


@dataclass(frozen=True)
class StagePlan:
    """One training stage: its method, what it starts from, what it changes, and why it is there, in plain words."""

    method: str
    start: str
    settings: Mapping[str, Any]
    what: str
    why: str


PLAN = (
    StagePlan(
        "sft",
        "base",
        {"lr": 1e-4},
        "The model learned to write the response that people preferred, token by token.",
        "It gives the next stages a common start: the preferred responses become likely.",
    ),
    StagePlan(
        "reward",
        "sft/final",
        {"lr": 3e-4, "method.centering": 0.01},
        "A copy of the model learned to give each response a number, so that the preferred one of a pair gets the higher.",
        "It stands in for a person: it can judge responses that nobody has compared.",
    ),
    StagePlan(
        "dpo",
        "sft/final",
        {"lr": 1e-4},
        "The model learned from the pairs directly: preferred responses became likelier, relative to where it started, than the others.",
        "It moves the model towards what people prefer without a reward model, held near its start by the reference.",
    ),
    StagePlan(
        "rloo",
        "sft/final",
        {
            "lr": 3e-4,
            "prompts_per_step": 4,
            "rollout.n": 4,
            "rollout.max_new_tokens": 48,
            "judge.use": "{output}/reward/final",
            "method.kl": 0.05,
            "method.missing_eos": "keep",
        },
        "The model wrote several responses of its own to each prompt; those that the reward model scored above the others became likelier.",
        "It is the other way to the same end, reinforcement learning from human feedback: it learns from what the model itself writes.",
    ),
)


def row(plan: StagePlan) -> Method | Online:
    """The stage's row of the tables of methods."""
    return ONLINE.get(plan.method) or METHODS[plan.method]


def config(plan: StagePlan, output: Path) -> RunConfig:
    """The stage as `preftune train` is told it."""
    settings = {**SHARED, **plan.settings}
    base: dict[str, Any] = {}
    for key, value in settings.items():
        section, dot, leaf = key.partition(".")
        told = value.format(output=output) if isinstance(value, str) else value
        if dot:
            base.setdefault(section, {})[leaf] = told
        else:
            base[key] = told
    own = {"model": str(output / plan.start), "output": str(output / plan.method)}
    return load_config(config_kind(plan.method), None, (), base={**base, **own})
