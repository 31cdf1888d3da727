"""What a row of the table of methods says: what it needs of the records, what it keeps of them, how tokens weigh, its objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from preftune.configfile import Section
from preftune.models.scoring import Scoring
from preftune.objectives.metrics import Metrics, Ratio
from preftune.packing.batch import Batch, Reduction
from preftune.packing.chat import Tree
from preftune.records import Example


class Knobs(Section):
    """A method's own settings; the defaults are its paper's."""


@dataclass(frozen=True)
class Outputs:
    """What the models said of a batch; a method reads what it asked for."""

    token_logp: Tensor | None = None
    """[M] log-probability of each response token under the policy."""
    rewards: Tensor | None = None
    """[G, N] what the reward head says of each response; [G, N, A] of a model with several heads."""
    reference_logp: Tensor | None = None
    """[G, N] summed log-probability under the frozen reference."""
    survey: float | None = None
    """What the method's survey found for the whole step."""
    entropy: Tensor | None = None
    """[M] entropy (nats) of the policy where it drew each token."""
    values: Tensor | None = None
    """[M] the critic's value of the state in which each token was drawn."""
    coefficients: Mapping[str, float] | None = None
    """Weights that are steered from rollout to rollout, as they stand."""


Keep = Callable[[Tree, Any], Tree | str]
"""A record's tree and the knobs, to the tree as this method trains on it, or the reason why it cannot."""


@dataclass(frozen=True)
class Survey:
    """A mean that the loss needs of a whole step before it can be computed, measured without gradient on trees of the method's own."""

    trees: Callable[[Sequence[Tree]], list[Tree]]
    """The step's trees to those that are looked at; none give the mean 0."""
    measure: Callable[[Outputs, Batch], Ratio]
    """Numerator and denominator over one micro-batch of them."""


KEEP_REASONS = {
    "no_preference": "no response is preferred over another (one response only, ties, or no rank, score or comparison)",
    "no_ranking": "its responses are not ranked: it takes two or more of them with ranks, scores or comparisons that put one above another",
    "no_score_gaps": "its responses have no numeric scores that differ: give two or more a `score`, or set `method.temperatures` to none",
    "no_score": "no response has a score to be learned: give at least one a `score`, a number or numbers by attribute",
    "no_weight": "the score of every response that it keeps is 0, so none of them would count",
    "no_label": "it has no label, and none follows: give a `label`, two responses of which one is preferred, "
    "or a `score` beside `method.threshold`",
}
"""Why a method keeps nothing of a record, each with what the record lacks."""


Pairs = Literal["all", "adjacent", "best_vs_rest", "best_vs_worst"]


class PairKnobs(Knobs):
    """Settings of every method that compares two responses at a time."""

    pairs: Pairs = Field(
        "all",
        description="which pairs of K responses are compared: all, neighbours in the order, the best with each, the best with the worst",
    )


def keep_best(tree: Tree, knobs: Any) -> Tree | str:
    """The best response; all of them where nothing orders them."""
    if len(tree.responses) == 1 or np.isnan(tree.scores).all():
        return tree
    return tree.keep([int(np.nanargmax(tree.scores))])


def keep_preferred(tree: Tree, knobs: Any) -> Tree | str:
    """Every response, if people prefer at least one over another; of the pairs those that `knobs.pairs` names."""
    if not tree.preference.any():
        return "no_preference"
    wanted: Pairs = getattr(knobs, "pairs", "all")
    return tree if wanted == "all" else replace(tree, preference=tree.preference * chosen_pairs(tree.scores, wanted))


def keep_ranked(tree: Tree, knobs: Any) -> Tree | str:
    """The responses that have a place in the ranking, if it has more than one level; their scores are then their levels, from 0.

    Levels, because a batch holds scores in single precision, in which two that nearly agree would be a tie.
    """
    known = np.flatnonzero(~np.isnan(tree.scores))
    levels, level = np.unique(tree.scores[known], return_inverse=True)
    if len(levels) < 2:
        return "no_ranking"
    return replace(tree if len(known) == len(tree.scores) else tree.keep(known.tolist()), scores=level.astype(float))


def chosen_pairs(scores: np.ndarray, pairs: Pairs) -> np.ndarray:
    """[N, N] symmetric mask of the pairs that are compared, from [N] scores (higher is better, NaN is in no pair but of `all`).

    Adjacent responses are those with no third score strictly between theirs. Responses tied as best, or as worst, all count as that.
    """
    if pairs == "all":
        return np.ones((len(scores), len(scores)), dtype=bool)
    levels = np.unique(scores[~np.isnan(scores)])
    level = np.searchsorted(levels, np.nan_to_num(scores, nan=-np.inf)).astype(float)
    level[np.isnan(scores)] = np.nan
    top, one, other = len(levels) - 1, level[:, None], level[None, :]
    if pairs == "adjacent":
        return np.abs(one - other) == 1
    known = ~np.isnan(one) & ~np.isnan(other)
    if pairs == "best_vs_rest":
        return known & (np.maximum(one, other) == top)
    return known & (np.maximum(one, other) == top) & (np.minimum(one, other) == 0)


def never(knobs: Any) -> bool:
    """For no knobs at all."""
    return False


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
    """Whether the loss compares the policy with a frozen reference."""
    reference_free: Callable[[Any], bool] = never
    """For which knobs it does without the reference after all; none is loaded then."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of the shared settings that this method changes."""
    better: tuple[str, Literal["min", "max"]] = ("loss", "min")
    """The evaluation metric that says how well it went, and which way is better."""
    first_loss: Callable[[Sequence[Tree], Any], float | None] = lambda trees, knobs: None
    """The loss of a step on these trees while policy and reference are still the same, where theory fixes it."""
    heads: Callable[[Any], int] = lambda knobs: 1
    """Scores that a reward model gives each response."""
    scoring: Callable[[Any], Scoring] = lambda knobs: Scoring()
    """How a reward model's heads become the one score of a response."""
    language_head: Callable[[Any], bool] = never
    """Whether a reward model must give token log-probabilities too."""
    survey: Survey | None = None
    min_prompts_per_step: int = 1
    """Fewest prompts in a step with which the loss means something."""
    advise: Callable[[Sequence[Tree], Any], str | None] = lambda trees, knobs: None
    """What the user should know of the training records and the knobs before the run, if there is anything."""
    demands: Callable[[Sequence[Example], Any], None] = lambda examples, knobs: None
    """Raises UserError where the knobs ask for something that none of the training records has."""
    fit: Callable[[Sequence[Example], Any], Callable[[Example], Example]] | None = None
    """Learns from the training records how every record, the held-out ones too, is changed before it is tokenised."""
    every_turn: Callable[[Any], bool] = never
    """Whether every assistant turn of a conversation carries loss, not the last one alone."""
    also_known_as: tuple[str, ...] = ()
    """Names that other tools and papers have for it, lower case; whoever asks for one is told this row's name."""

    def compares(self, knobs: Any) -> bool:
        """Whether the loss needs the reference's log-probabilities with these knobs."""
        return self.reference and not self.reference_free(knobs)
