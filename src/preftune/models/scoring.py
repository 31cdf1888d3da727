"""From what a reward model's heads say of a response to its one score: combined, then put on a scale; saved in the model's config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from preftune.errors import UserError
from preftune.objectives.whitening import moments
from preftune.packing.batch import collate, microbatches
from preftune.packing.chat import Tree

if TYPE_CHECKING:
    from preftune.models.policy import RewardModel

KEY = "preftune_scoring"
"""Where config.json holds it. A model with one head and nothing to say has no such key."""

Normalise = Literal["none", "best", "all"]
"""Whose scores are put on a scale of mean 0 and deviation 1: nobody's, the best responses', or all responses'."""


@dataclass(frozen=True)
class Scoring:
    """How heads become a score: score = (combined - mean) / std.

    Combined is the sum of weight times head; or, where `safety` names one of two heads, Llama 2's rule (2307.09288, section 3.2.2): the
    safety head where the prompt is flagged or sigma(safety) is below `threshold`, else the other head. Llama 2 takes the logit of the
    chosen probability, which is the head itself, and whitens it, which is what mean and std are for.
    """

    attributes: tuple[str, ...] = ()
    """A name for each head, in order; none where there is one head without a name."""
    weights: tuple[float, ...] = ()
    """A weight for each attribute, in order; none is 1 for each."""
    safety: str | None = None
    threshold: float = 0.15
    mean: float = 0.0
    std: float = 1.0
    fitted_on: str = ""
    """Whose scores have this mean and std, in words."""

    def __post_init__(self) -> None:
        named, others = len(self.attributes), len(self.attributes) - 1
        if len(set(self.attributes)) < named or (self.weights and len(self.weights) != named):
            raise ValueError(f"attributes {list(self.attributes)} with weights {list(self.weights)}")
        if self.safety is not None and (self.safety not in self.attributes or others != 1 or self.weights):
            raise ValueError(f"a safety rule needs `{self.safety}`, one other attribute and no weights, not {list(self.attributes)}")
        if not (0 < self.threshold < 1 and self.std > 0 and all(map(math.isfinite, (self.mean, self.std, *self.weights)))):
            raise ValueError(f"threshold {self.threshold}, mean {self.mean}, std {self.std}, weights {list(self.weights)}")

    @property
    def heads(self) -> int:
        """How many heads it reads."""
        return max(1, len(self.attributes))

    def combine(self, rewards: Tensor, flagged: Tensor | None = None) -> Tensor:
        """[..., A] what the heads say (or [...] of one head) to [...] one number, before it is put on a scale.

        `flagged` marks safety prompts and has the shape of the result, or one that broadcasts to it; only the safety rule reads it.
        """
        if self.heads == 1:
            single = rewards
            return single * self.weights[0] if self.weights else single
        if self.safety is None:
            return (rewards * rewards.new_tensor(self.weights or (1.0,) * self.heads)).sum(-1)
        at = self.attributes.index(self.safety)
        return safety_first(rewards[..., at], rewards[..., 1 - at], flagged, self.threshold)

    def scale(self, combined: Tensor) -> Tensor:
        """The combined number on the scale of the normaliser."""
        return (combined - self.mean) / self.std

    def to_config(self) -> dict[str, Any]:
        """What config.json holds under KEY; empty where there is nothing to say."""
        return {} if self == Scoring() else {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def safety_first(safety: Tensor, other: Tensor, flagged: Tensor | None = None, threshold: float = 0.15) -> Tensor:
    """Llama 2's rule on rewards before the sigmoid, all of one shape: safety where flagged or sigma(safety) < threshold, else the other.

    The threshold is one of probability: 0.15 is a reward of -1.7346.
    """
    unsafe = safety.sigmoid() < threshold
    return torch.where(unsafe if flagged is None else unsafe | flagged, safety, other)


def scoring_of(config: Any, heads: int, where: str = "model") -> Scoring:
    """What the config of a model with so many heads says. Raises UserError where it does not fit them."""
    saved: Mapping[str, Any] | None = getattr(config, KEY, None)
    if saved is None:
        if heads == 1:
            return Scoring()
        raise UserError(
            f"this classifier has {heads} labels, a reward model has one",
            where=where,
            fix=f"A model with several is read where its config.json says how they make one score, under {KEY}.",
        )
    try:
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
        found = Scoring(**values)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{KEY} in config.json cannot be read: {error}", where=where) from error
    if found.heads != heads:
        raise UserError(f"{KEY} in config.json is of {found.heads} heads, the model has {heads}", where=where)
    return found


@torch.no_grad()
def fit_normaliser(model: RewardModel, trees: Sequence[Tree], which: Normalise, *, budget: int = 4096, name: str = "") -> None:
    """Put the model's scores on a scale: those of `which` responses of the trees get mean 0 and deviation 1 (unbiased).

    All of several responses tied as best count. `name` says in words what the trees are. A single score becomes 0, its scale stays.
    """
    if which == "none":
        return
    model.eval()
    found: dict[int, Tensor] = {}
    for part in microbatches(trees, budget):
        batch = collate([trees[i] for i in part]).to(model.backbone.device)
        counted = batch.present if which == "all" else batch.best > 0
        combined = model.scoring.combine(model(batch)).double()
        found.update({index: combined[row][counted[row]].cpu() for row, index in enumerate(part)})
    values = torch.cat([found[i] for i in range(len(trees))])
    mean, deviation = moments(values)
    said = f"{'all' if which == 'all' else 'the best'} responses of {len(trees)} {name or 'records'}"
    model.scoring = replace(model.scoring, mean=mean.item(), std=deviation.item(), fitted_on=said)
