"""Methods that train a reward model: a score for each response, or one for each of several attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from preftune.configfile import problem
from preftune.configschema import closest
from preftune.errors import UserError
from preftune.feedback.annotators import additive, calibrator, ratings_of, shared_items, zscore
from preftune.methods.base import Knobs, Method, Outputs, PairKnobs, keep_preferred, keep_ranked
from preftune.models.scoring import Normalise, Scoring
from preftune.objectives.likelihood import best_response_likelihood
from preftune.objectives.listwise import reward_listwise
from preftune.objectives.metrics import Metrics
from preftune.objectives.pairwise import reward_pairwise
from preftune.objectives.pointwise import higher, squared_error
from preftune.packing.batch import Batch, by_prompt, by_response
from preftune.packing.chat import SCORE, Tree
from preftune.records import Example

# ---------------------------------------------------------------- knobs


class ImitationKnobs(Knobs):
    """Settings of every reward model that may keep its language head."""

    imitation: float = Field(
        0.0, ge=0.0, description="weight of the best response's negative log-likelihood beside the reward's loss; 0 has no language head"
    )
    normalise: Normalise = Field(
        "none",
        description="after training, put scores on a scale where those of the best responses, or of all, have mean 0 and deviation 1: "
        "over the held-out records where there are any, else over the training records",
    )


class AttributeKnobs(ImitationKnobs):
    """Settings of reward models that may have a head for each of several attributes."""

    attributes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="attributes of the records' scores to be learned, with one head each; none is the one order or score of a record"
    )
    weights: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        {}, description="weight of an attribute's loss by its name; 1 where none is given"
    )
    score_weights: dict[str, float] = Field(
        {},
        description="weight of an attribute in a response's one score by its name; 1 where none is given, below 0 where less is better",
    )

    @model_validator(mode="after")
    def _attributes_once(self) -> AttributeKnobs:
        if len(set(self.attributes)) < len(self.attributes):
            raise problem("`attributes` names one twice", "method.attributes")
        for key, weights in (("weights", self.weights), ("score_weights", self.score_weights)):
            unknown = [name for name in weights if name not in self.attributes]
            if unknown:
                raise problem(f"`{key}` has `{unknown[0]}`, which `attributes` does not name", f"method.{key}")
        if self.attributes and not any(self.score_weights.get(name, 1.0) for name in self.attributes):
            raise problem("`score_weights` are all 0, so every response would score 0", "method.score_weights")
        return self


class RewardKnobs(PairKnobs, AttributeKnobs):
    """Pairwise reward model."""

    centering: float = Field(0.0, ge=0.0, description="weight of (r_i + r_j)^2, which keeps rewards centred on 0 (0.01 is usual; 0 is off)")
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=0.5, description="probability with which a comparison is taken to be the wrong way round"
    )
    margin: Literal["none", "given"] = Field(
        "none", description="by how much the better reward must lead: not at all, or by the strength that people gave the comparison"
    )
    margin_scale: float | None = Field(None, gt=0.0, description="what a strength is multiplied by to give the margin; null is 1")
    safety: str | None = Field(
        None,
        min_length=1,
        description="of two attributes the one that is the score where it finds a response unsafe, the other one is it elsewhere "
        "(Llama 2's rule, 2307.09288); null adds attributes up",
    )
    safety_threshold: float | None = Field(
        None, gt=0.0, lt=1.0, description="for `safety`: a response is unsafe where the sigmoid of its reward is below this; null is 0.15"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RewardKnobs:
        if self.margin_scale is not None and self.margin == "none":
            raise problem("`margin_scale` has no effect without `margin: given`", "method.margin_scale")
        if self.attributes and self.margin == "given":
            raise problem(
                "`margin: given` and `attributes` exclude each other: a strength is a comparison's, not an attribute's", "method.margin"
            )
        if self.attributes and self.pairs != "all":
            raise problem("`pairs` and `attributes` exclude each other: each attribute has an order of its own", "method.pairs")
        if self.safety_threshold is not None and self.safety is None:
            raise problem("`safety_threshold` has no effect without `safety`", "method.safety_threshold")
        if self.safety is not None and (self.safety not in self.attributes or len(self.attributes) != 2):
            raise problem("`safety` must name one of two `attributes`", "method.safety")
        if self.safety is not None and self.score_weights:
            raise problem("`score_weights` has no effect beside `safety`: one attribute at a time is the score", "method.score_weights")
        return self


class PointwiseKnobs(AttributeKnobs):
    """Pointwise reward model."""

    annotators: Literal["none", "zscore", "additive"] = Field(
        "none",
        description="how lenient and strict annotators are made comparable: not at all, by each one's mean and deviation, "
        "or by their offsets on responses that several scored",
    )
    shrinkage: float | None = Field(
        None, ge=0.0, description="for zscore: ratings of all annotators that are counted with each one's own; null is 5"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PointwiseKnobs:
        if self.shrinkage is not None and self.annotators != "zscore":
            raise problem("`shrinkage` has no effect without `annotators: zscore`", "method.shrinkage")
        return self


class ListwiseKnobs(ImitationKnobs):
    """Listwise reward model."""

    mean_over_stages: bool = Field(
        False, description="divide a ranking's loss by its stages, so that long rankings weigh no more than pairs"
    )


# ---------------------------------------------------------------- what is kept of a record


def _with_ratings(tree: Tree, knobs: AttributeKnobs) -> Tree | str:
    """The responses that have any of the ratings to be learned, with them; scored by their weighted mean where nothing orders them."""
    unrated = np.full(len(tree.responses), np.nan)
    named = [tree.ratings.get(name, unrated) for name in knobs.attributes]
    rated = np.stack(named or [tree.ratings.get(SCORE, tree.ratings.get("overall", unrated))], 1)
    known = ~np.isnan(rated)
    some = np.flatnonzero(known.any(1))
    if not len(some):
        return "no_score"
    scores = tree.scores
    if np.isnan(scores).all():
        weight = known * np.array(_scoring(knobs).weights or _weights(knobs))
        total, size = (np.nan_to_num(rated) * weight).sum(1), np.abs(weight).sum(1)
        scores = np.divide(total, size, out=unrated.copy(), where=size > 0)
    return replace(tree, rated=rated, scores=scores).keep(some.tolist())


def _keep_pairs(tree: Tree, knobs: RewardKnobs) -> Tree | str:
    """As `keep_preferred`; with attributes every response that has one, if any of them tells two responses apart."""
    if not knobs.attributes:
        return keep_preferred(tree, knobs)
    kept = _with_ratings(tree, knobs)
    if isinstance(kept, str) or kept.rated is None:
        return kept
    apart = (kept.rated[:, None] > kept.rated[None, :]).any()
    return kept if apart else "no_preference"


# ---------------------------------------------------------------- what the records as a whole must have


def _demand_attributes(examples: Sequence[Example], knobs: AttributeKnobs) -> None:
    if not knobs.attributes:
        return
    found = sorted(name for name in ratings_of(examples) if name is not None)
    for name in knobs.attributes:
        if name not in found:
            near = closest(name, found)
            fix = f"Did you mean {near}?" if near else f"The attributes that are scored: {', '.join(found) or 'none'}."
            raise UserError(f"no record has a score for `{name}`, which method.attributes names", where=examples[0].where, fix=fix)


def _demand_pairs(examples: Sequence[Example], knobs: RewardKnobs) -> None:
    _demand_attributes(examples, knobs)
    if knobs.margin == "given" and not any(one.strength is not None for example in examples for one in example.comparisons):
        raise UserError(
            "no comparison has the strength that `margin: given` takes",
            where=examples[0].where,
            fix="Give comparisons a `strength` (pairs a `margin`), or set method.margin to none.",
        )


def _demand_ratings(examples: Sequence[Example], knobs: PointwiseKnobs) -> None:
    _demand_attributes(examples, knobs)
    if knobs.annotators == "none":
        return
    where, fix = examples[0].where, "set method.annotators to none."
    if all(example.annotator is None for example in examples):
        raise UserError("no record names its annotator", where=where, fix=f"Give records an `annotator`, or {fix}")
    if knobs.annotators == "additive" and not any(shared_items(ratings) for ratings in ratings_of(examples).values()):
        what = (
            "no response is scored by two annotators, so `annotators: additive` cannot tell a lenient one from one who saw better responses"
        )
        raise UserError(what, where=where, fix=f"Take zscore, or {fix}")


def _calibrate(examples: Sequence[Example], knobs: PointwiseKnobs) -> Callable[[Example], Example]:
    if knobs.annotators == "none":
        return lambda example: example
    by_mean = partial(zscore, shrinkage=5.0 if knobs.shrinkage is None else knobs.shrinkage)
    return calibrator(examples, by_mean if knobs.annotators == "zscore" else additive)


# ---------------------------------------------------------------- losses


def _weights(knobs: AttributeKnobs) -> list[float]:
    """Weight of each head's loss."""
    return [knobs.weights.get(name, 1.0) for name in knobs.attributes] or [1.0]


def _heads(knobs: AttributeKnobs) -> int:
    return max(len(knobs.attributes), 1)


def _scoring(knobs: AttributeKnobs) -> Scoring:
    """How the heads become one score."""
    safety, threshold = getattr(knobs, "safety", None), getattr(knobs, "safety_threshold", None)
    weights = tuple(knobs.score_weights.get(name, 1.0) for name in knobs.attributes) if knobs.score_weights else ()
    return Scoring(knobs.attributes, weights, safety, 0.15 if threshold is None else threshold)


def _over_heads(out: Outputs, knobs: AttributeKnobs, loss_of: Callable[[Tensor, int], tuple[Tensor, Metrics]]) -> tuple[Tensor, Metrics]:
    """sum_a w_a L_a, from the loss of head a's [G, N] rewards; metrics over all heads, of several the accuracy of each by its name."""
    assert out.rewards is not None
    rewards = out.rewards if out.rewards.ndim == 3 else out.rewards.unsqueeze(2)
    losses, metrics = zip(*(loss_of(rewards[..., a], a) for a in range(rewards.shape[2])), strict=True)
    total = sum(weight * loss for weight, loss in zip(_weights(knobs), losses, strict=True))
    merged: Metrics = {name: (_sum(m[name][0] for m in metrics), _sum(m[name][1] for m in metrics)) for name in metrics[0]}
    if len(metrics) > 1:
        merged |= {f"accuracy_{name}": m["accuracy"] for name, m in zip(knobs.attributes, metrics, strict=True) if "accuracy" in m}
    return total, merged


def _sum(values: Iterable[Tensor]) -> Tensor:
    first, *rest = values
    return sum(rest, start=first)


def _imitating(found: tuple[Tensor, Metrics], out: Outputs, batch: Batch, knobs: ImitationKnobs) -> tuple[Tensor, Metrics]:
    """The loss with the imitation of the best response beside it."""
    if not knobs.imitation:
        return found
    assert out.token_logp is not None
    loss, metrics = best_response_likelihood(batch.mean_per_response(out.token_logp), batch.best, batch.prompt_weight)
    return found[0] + knobs.imitation * loss, found[1] | metrics


def _imitates(knobs: ImitationKnobs) -> bool:
    return knobs.imitation > 0


def _pairwise(out: Outputs, batch: Batch, knobs: RewardKnobs) -> tuple[Tensor, Metrics]:
    strength = None
    if knobs.margin == "given" and batch.margin is not None:
        strength = batch.margin if knobs.margin_scale is None else knobs.margin_scale * batch.margin

    def loss_of(rewards: Tensor, a: int) -> tuple[Tensor, Metrics]:
        preference = batch.preference
        if knobs.attributes:
            assert batch.rated is not None
            preference = higher(batch.rated[..., a]).to(preference.dtype)
        return reward_pairwise(rewards, preference, batch.prompt_weight, knobs.centering, knobs.label_smoothing, strength)

    return _imitating(_over_heads(out, knobs, loss_of), out, batch, knobs)


def _pointwise(out: Outputs, batch: Batch, knobs: PointwiseKnobs) -> tuple[Tensor, Metrics]:
    rated = batch.rated
    assert rated is not None
    found = _over_heads(out, knobs, lambda rewards, a: squared_error(rewards, rated[..., a], batch.response_weight))
    return _imitating(found, out, batch, knobs)


def _listwise(out: Outputs, batch: Batch, knobs: ListwiseKnobs) -> tuple[Tensor, Metrics]:
    assert out.rewards is not None
    found = reward_listwise(out.rewards, batch.better, batch.prompt_weight, knobs.mean_over_stages)
    return _imitating(found, out, batch, knobs)


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
        loss=_pairwise,
        keep=_keep_pairs,
        reduction=by_prompt,
        defaults={"lr": 1e-5},
        better=("accuracy", "max"),
        heads=_heads,
        scoring=_scoring,
        language_head=_imitates,
        demands=_demand_pairs,
    ),
    Method(
        name="reward_pointwise",
        title="Reward model, pointwise",
        paper="",
        summary="learn people's ratings themselves, by squared error on each response",
        when="Where ratings mean the same across prompts and annotators, or responses were rated alone. Of comparisons it learns nothing.",
        needs="a response with a score",
        model="reward",
        knobs=PointwiseKnobs,
        loss=_pointwise,
        keep=_with_ratings,
        reduction=by_response,
        defaults={"lr": 1e-5},
        heads=_heads,
        scoring=_scoring,
        language_head=_imitates,
        demands=_demand_ratings,
        fit=_calibrate,
    ),
    Method(
        name="reward_listwise",
        title="Reward model, listwise",
        paper="",
        summary="learn to score responses from whole rankings, by the Plackett-Luce likelihood of the order (ListMLE)",
        when="With rankings that one person made in one go: the best against all, the second against the rest. Pairs are Bradley-Terry.",
        needs="two or more responses with a rank, a score or comparisons, not all of them tied",
        model="reward",
        knobs=ListwiseKnobs,
        loss=_listwise,
        keep=keep_ranked,
        reduction=by_prompt,
        defaults={"lr": 1e-5},
        better=("accuracy", "max"),
        language_head=_imitates,
    ),
)
