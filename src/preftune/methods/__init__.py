"""A method is a row: what it needs of the records, which responses it keeps, how tokens or prompts weigh, and its pure objective.

To add a method, write its objective as a pure function and add one row here; the loop never learns its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from preftune.configfile import Section
from preftune.configschema import closest
from preftune.errors import UserError
from preftune.objectives.likelihood import negative_log_likelihood
from preftune.objectives.metrics import Metrics
from preftune.objectives.pairwise import dpo_sigmoid, reward_pairwise
from preftune.packing.batch import Batch, Reduction, by_prompt, by_token
from preftune.packing.chat import Tree


class Knobs(Section):
    """A method's own settings; the defaults are its paper's."""


@dataclass(frozen=True)
class Outputs:
    """What the models said of a batch; a method reads what it asked for."""

    token_logp: Tensor | None = None
    """[M] log-probability of each response token under the policy."""
    rewards: Tensor | None = None
    """[G, N] what the reward head says of each response."""
    reference_logp: Tensor | None = None
    """[G, N] summed log-probability under the frozen reference."""


Keep = Callable[[Tree], Tree | str]
"""A record's tree as this method trains on it, or the reason why it cannot."""


def keep_best(tree: Tree) -> Tree | str:
    """The best response; all of them where nothing orders them."""
    if len(tree.responses) == 1 or np.isnan(tree.scores).all():
        return tree
    return tree.keep([int(np.nanargmax(tree.scores))])


def keep_preferred(tree: Tree) -> Tree | str:
    """Every response, if people prefer at least one over another."""
    return tree if tree.preference.any() else "no_preference"


KEEP_REASONS = {"no_preference": "no response is preferred over another (one response only, ties, or no rank, score or comparison)"}


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    title: str
    paper: str
    """arXiv id, or empty where there is no one paper."""
    summary: str
    when: str
    """When to use it, and when not."""
    needs: str
    """What each record must have, in plain words."""
    model: Literal["policy", "reward"]
    knobs: type[Knobs]
    loss: Callable[[Outputs, Batch, Any], tuple[Tensor, Metrics]]
    keep: Keep
    reduction: Reduction
    reference: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of the shared settings that this method changes."""
    better: tuple[str, Literal["min", "max"]] = ("loss", "min")
    """The evaluation metric that says how well it went, and which way is better."""
    first_loss: float | None = None
    """The loss before any update, where theory fixes it (policy equal to reference)."""


class SFTKnobs(Knobs):
    """Supervised fine-tuning has no settings of its own."""


class RewardKnobs(Knobs):
    """Pairwise reward model."""

    centering: float = Field(0.0, ge=0.0, description="weight of (r_i + r_j)^2, which keeps rewards centred on 0 (0.01 is usual; 0 is off)")


class DPOKnobs(Knobs):
    """Direct preference optimisation."""

    beta: float = Field(0.1, gt=0.0, description="strength of the pull towards the reference: smaller moves further")


def _sft(out: Outputs, batch: Batch, knobs: SFTKnobs) -> tuple[Tensor, Metrics]:
    assert out.token_logp is not None
    return negative_log_likelihood(out.token_logp, batch.token_weight)


def _reward(out: Outputs, batch: Batch, knobs: RewardKnobs) -> tuple[Tensor, Metrics]:
    assert out.rewards is not None
    return reward_pairwise(out.rewards, batch.preference, batch.prompt_weight, knobs.centering)


def _dpo(out: Outputs, batch: Batch, knobs: DPOKnobs) -> tuple[Tensor, Metrics]:
    assert out.token_logp is not None and out.reference_logp is not None
    logp = batch.per_response(out.token_logp)
    return dpo_sigmoid(logp, out.reference_logp, batch.preference, batch.prompt_weight, knobs.beta)


_ROWS = (
    Method(
        name="sft",
        title="Supervised fine-tuning",
        paper="2203.02155",
        summary="learn to write the best response of each record, token by token",
        when="First, to give policy and reference a common start. Not enough where people can compare but not write good responses.",
        needs="a response (the best one is used where several are ordered)",
        model="policy",
        knobs=SFTKnobs,
        loss=_sft,
        keep=keep_best,
        reduction=by_token,
        defaults={"lr": 2e-5},
    ),
    Method(
        name="reward",
        title="Reward model, pairwise",
        paper="2203.02155",
        summary="learn to score responses from comparisons: Bradley-Terry over all pairs of K responses in one forward",
        when="To score samples (Best-of-N, rejection, RL) or to measure. A policy that trains on it for long over-optimises it.",
        needs="two or more responses with a rank, a score or comparisons",
        model="reward",
        knobs=RewardKnobs,
        loss=_reward,
        keep=keep_preferred,
        reduction=by_prompt,
        defaults={"lr": 1e-5},
        better=("accuracy", "max"),
    ),
    Method(
        name="dpo",
        title="Direct preference optimisation",
        paper="2305.18290",
        summary="raise preferred over dispreferred responses relative to a frozen reference, without a reward model",
        when="The usual first choice with pairs. Start from a model that saw the chosen responses; watch the chosen log-probability.",
        needs="two or more responses with a rank, a score or comparisons",
        model="policy",
        knobs=DPOKnobs,
        loss=_dpo,
        keep=keep_preferred,
        reduction=by_prompt,
        reference=True,
        defaults={"lr": 1e-6},
        better=("accuracy", "max"),
        first_loss=float(np.log(2.0)),
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def find(name: str) -> Method:
    """The row of this name. Raises UserError for an unknown one, with the nearest."""
    if name in METHODS:
        return METHODS[name]
    near = closest(name, METHODS)
    raise UserError(f"there is no method '{name}'", fix=f"Did you mean {near}?" if near else f"The methods are {', '.join(METHODS)}.")
