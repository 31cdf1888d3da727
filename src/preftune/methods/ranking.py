"""Methods that train a policy on a whole ranking of responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from preftune.methods.base import Knobs, Method, Outputs, keep_ranked
from preftune.objectives.metrics import Metrics
from preftune.objectives.ranking import Ranked, knowpat, listwise_dpo, pro, rrhf
from preftune.packing.batch import Batch, by_prompt
from preftune.packing.chat import SCORE, Tree


class RRHFKnobs(Knobs):
    """Rank responses to align with human feedback."""

    weight: float = Field(1.0, gt=0.0, description="weight of the ranking term beside the likelihood of the best response")
    length_exponent: float = Field(
        1.0, ge=0.0, description="a response's log-probability is divided by its tokens to this power: 1 is the mean, 0 the sum"
    )
    sft_reduction: Literal["mean", "sum"] = Field(
        "mean", description="the likelihood of the best response: mean over its tokens, or their sum as in the paper"
    )


class PROKnobs(Knobs):
    """Preference ranking optimisation."""

    sft_weight: float = Field(
        0.05, ge=0.0, description="weight of the best response's summed log-probability, times (responses - 1) squared; 0 is off"
    )
    temperatures: Literal["none", "score_gaps"] = Field(
        "none", description="none contrasts all responses alike, score_gaps by how far their numeric scores lie apart, as in the paper"
    )


class KnowPATKnobs(Knobs):
    """Knowledgeable preference alignment."""

    weight: float = Field(0.01, gt=0.0, description="weight of the alignment term beside the likelihood of the best response")


class ListwiseDPOKnobs(Knobs):
    """Direct preference optimisation of whole rankings."""

    beta: float = Field(0.1, gt=0.0, description="strength of the pull towards the reference: smaller moves further")


def _ranked(out: Outputs, batch: Batch, order: Tensor) -> Ranked:
    assert out.token_logp is not None
    return Ranked(batch.per_response(out.token_logp), batch.length, order, batch.best, batch.prompt_weight)


def _rrhf(out: Outputs, batch: Batch, knobs: RRHFKnobs) -> tuple[Tensor, Metrics]:
    # A sum over pairs needs no order of the whole: where people compared, just the pairs that they compared, each as most of them held.
    judged = batch.preference > batch.preference.mT
    return rrhf(_ranked(out, batch, judged), knobs.weight, knobs.length_exponent, knobs.sft_reduction == "sum")


def _pro(out: Outputs, batch: Batch, knobs: PROKnobs) -> tuple[Tensor, Metrics]:
    gaps = knobs.temperatures == "score_gaps"
    assert not gaps or batch.rated is not None
    ratings = batch.rated[..., 0] if gaps and batch.rated is not None else None
    return pro(_ranked(out, batch, batch.better), knobs.sft_weight, ratings)


def _knowpat(out: Outputs, batch: Batch, knobs: KnowPATKnobs) -> tuple[Tensor, Metrics]:
    return knowpat(_ranked(out, batch, batch.better), knobs.weight)


def _listwise_dpo(out: Outputs, batch: Batch, knobs: ListwiseDPOKnobs) -> tuple[Tensor, Metrics]:
    assert out.reference_logp is not None
    return listwise_dpo(_ranked(out, batch, batch.better), out.reference_logp, knobs.beta)


def _keep_for_pro(tree: Tree, knobs: PROKnobs) -> Tree | str:
    """As `keep_ranked`; for temperatures the numeric scores are the order, whatever else was said."""
    if knobs.temperatures == "none":
        return keep_ranked(tree, knobs)
    ratings = tree.ratings.get(SCORE, tree.ratings.get("overall"))
    if ratings is None:
        return "no_score_gaps"
    from_best = (ratings - np.nanmax(ratings))[:, None]  # only gaps count, and single precision holds small numbers best
    kept = keep_ranked(replace(tree, scores=ratings, rated=from_best), knobs)
    return "no_score_gaps" if isinstance(kept, str) else kept


def _log_orders(trees: Sequence[Tree], knobs: Any) -> float:
    """Mean over the trees of the sum, over responses with any below them, of the log of how many compete; ln K! without ties."""
    below = [(t.scores[:, None] > t.scores[None, :]).sum(1) for t in trees]
    return sum(math.log1p(count) for counts in below for count in counts) / len(trees)


_NEEDS = "two or more responses with a rank, a score or comparisons, not all of them tied"

ROWS = (
    Method(
        name="rrhf",
        title="Rank responses to align with human feedback",
        paper="2304.05302",
        summary="learn to write the best response, and lower any response that is likelier than a better one; no reference model",
        when="With several scored responses a prompt and memory for one model. It stops pushing once the order is right, without a margin.",
        needs=_NEEDS,
        model="policy",
        knobs=RRHFKnobs,
        loss=_rrhf,
        keep=keep_ranked,
        reduction=by_prompt,
        defaults={"lr": 2e-5},
        better=("accuracy", "max"),
    ),
    Method(
        name="pro",
        title="Preference ranking optimisation",
        paper="2306.17492",
        summary="the best response against all others, then the second against the rest, and so on; no reference model",
        when="With full rankings, longer ones above all. On pairs it is a contrast of mean log-probabilities that nothing bounds.",
        needs=f"{_NEEDS}; numeric scores for temperatures",
        model="policy",
        knobs=PROKnobs,
        loss=_pro,
        keep=_keep_for_pro,
        reduction=by_prompt,
        defaults={"lr": 5e-6},
        better=("accuracy", "max"),
    ),
    Method(
        name="knowpat",
        title="Knowledgeable preference alignment",
        paper="2311.06503",
        summary="fine-tuning on the best response, with a weak push that makes better responses likely and worse ones unlikely",
        when="To teach a domain's answers where worse answers are at hand, from weaker models or misleading facts. A gentle method: "
        "most of its gradient is fine-tuning.",
        needs=_NEEDS,
        model="policy",
        knobs=KnowPATKnobs,
        loss=_knowpat,
        keep=keep_ranked,
        reduction=by_prompt,
    ),
    Method(
        name="dpo_listwise",
        title="Direct preference optimisation, listwise",
        paper="2305.18290",
        summary="raise better over worse responses of a whole ranking relative to a frozen reference, by the Plackett-Luce model",
        when="With rankings that one person made in one go. On pairs it is plain DPO; comparisons of single pairs are better left pairs.",
        needs=_NEEDS,
        model="policy",
        knobs=ListwiseDPOKnobs,
        loss=_listwise_dpo,
        keep=keep_ranked,
        reduction=by_prompt,
        reference=True,
        defaults={"lr": 1e-6},
        better=("accuracy", "max"),
        first_loss=_log_orders,
    ),
)
