"""Methods that train a reward model: a score for each response."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from preftune.methods.base import Method, Outputs, PairKnobs, keep_preferred
from preftune.objectives.metrics import Metrics
from preftune.objectives.pairwise import reward_pairwise
from preftune.packing.batch import Batch, by_prompt


class RewardKnobs(PairKnobs):
    """Pairwise reward model."""

    centering: float = Field(0.0, ge=0.0, description="weight of (r_i + r_j)^2, which keeps rewards centred on 0 (0.01 is usual; 0 is off)")


def _reward(out: Outputs, batch: Batch, knobs: RewardKnobs) -> tuple[Tensor, Metrics]:
    assert out.rewards is not None
    return reward_pairwise(out.rewards, batch.preference, batch.prompt_weight, knobs.centering)


ROWS = (
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
)
