"""Methods that learn to write what was written: supervised fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from preftune.configfile import problem
from preftune.errors import UserError
from preftune.methods.base import Knobs, Method, Outputs, keep_best
from preftune.objectives.likelihood import negative_log_likelihood
from preftune.objectives.metrics import Metrics
from preftune.packing.batch import Batch, by_token
from preftune.packing.chat import SCORE, Tree


class SFTKnobs(Knobs):
    """Supervised fine-tuning."""

    turns: Literal["last", "all"] = Field(
        "last", description="which assistant turns of a conversation carry loss: the response alone, or those of its history too"
    )
    responses: Literal["best", "all"] = Field("best", description="which of several ordered responses are learned")
    weights: Literal["none", "score", "exp_score"] = Field(
        "none", description="how much a response's tokens count: all the same, as its score says, or by exp(score / temperature)"
    )
    temperature: float | None = Field(
        None, gt=0, description="for exp_score: the difference in score that multiplies a weight by e; null is 1"
    )

    @model_validator(mode="after")
    def _consistent(self) -> SFTKnobs:
        if self.temperature is not None and self.weights != "exp_score":
            raise problem("`temperature` has no effect without `weights: exp_score`", "method.temperature")
        if self.turns == "all" and self.weights != "none":
            raise problem("`weights` cannot stand beside `turns: all`: the turns of the history have no score", "method.weights")
        return self


STEEPEST = 20.0
"""Largest |score / temperature| of a weight exp(score / temperature): beyond it one response of a step would silence all others."""


def _keep(tree: Tree, knobs: SFTKnobs) -> Tree | str:
    kept = tree if knobs.responses == "all" else keep_best(tree, knobs)
    return kept if knobs.weights == "none" or isinstance(kept, str) else _weighted(kept, knobs)


def _weighted(tree: Tree, knobs: SFTKnobs) -> Tree | str:
    """The tree with its responses' weights, without those that weigh nothing. Raises UserError for a score that can be no weight."""
    scores = tree.ratings.get(SCORE, tree.ratings.get("overall"))
    if scores is None or not np.isfinite(scores).all():
        raise UserError("a response has no score to weigh it by", where=tree.where, fix="Score all, or set method.weights to none.")
    if knobs.weights == "score":
        if scores.min() < 0:
            fix = "Set method.weights to exp_score, or give scores from 0 on."
            raise UserError(f"a response's score is {scores.min():g}, and a weight cannot be negative", where=tree.where, fix=fix)
        weights = scores
    else:
        exponents = scores / (knobs.temperature or 1.0)
        steepest = exponents[np.abs(exponents).argmax()]
        if abs(steepest) > STEEPEST:
            what = f"score / temperature is {steepest:g}, and beyond {STEEPEST:g} one response would silence all others"
            raise UserError(what, where=tree.where, fix="Raise method.temperature.")
        weights = np.exp(exponents)
    some = np.flatnonzero(weights > 0)
    return replace(tree, weights=weights).keep(some.tolist()) if len(some) else "no_weight"


def _sft(out: Outputs, batch: Batch, knobs: SFTKnobs) -> tuple[Tensor, Metrics]:
    assert out.token_logp is not None
    return negative_log_likelihood(out.token_logp, batch.token_weight)


ROWS = (
    Method(
        name="sft",
        title="Supervised fine-tuning",
        paper="2203.02155",
        summary="learn to write the best response of each record, token by token",
        when="First, to give policy and reference a common start. Not enough where people can compare but not write good responses.",
        needs="a response (of several ordered ones the best is used, unless all are asked for)",
        model="policy",
        knobs=SFTKnobs,
        loss=_sft,
        keep=_keep,
        reduction=by_token,
        defaults={"lr": 2e-5},
        every_turn=lambda knobs: knobs.turns == "all",
    ),
)
