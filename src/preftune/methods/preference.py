"""Methods that train a policy on pairs without a reward model: DPO and its family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from preftune.configfile import problem
from preftune.methods.base import Method, Outputs, PairKnobs, keep_preferred
from preftune.objectives import dpo as family
from preftune.objectives.likelihood import best_response_likelihood
from preftune.objectives.metrics import Metrics
from preftune.packing.batch import Batch, by_prompt

_PULL = "strength of the pull towards the reference: smaller moves further"
_FLIPPED = "share of the preferences that are the wrong way round"
_SFT = "weight of the negative log-likelihood of the best response, a mean over its tokens"
_SFT_NAMES = "rpo_alpha cpo_alpha nll_weight sft_coef sft_lambda"


class ComparedKnobs(PairKnobs):
    """Settings of every method that compares two responses relative to a reference."""

    known_as: ClassVar[dict[str, str]] = {
        "sft_weight": _SFT_NAMES,
        "epsilon": "label_smoothing",
        "f_divergence": "f_divergence_type",
        "alpha": "f_alpha_divergence_coef",
    }

    reference_free: bool = Field(False, description="take the reference's log-probabilities as 0, so that no reference is needed")
    sft_weight: float = Field(0.0, ge=0.0, description=_SFT)


class DPOKnobs(ComparedKnobs):
    """Direct preference optimisation."""

    beta: float = Field(0.1, gt=0.0, description=_PULL)
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="how the distance from the reference is measured (arXiv 2309.16240); reverse_kl is plain DPO"
    )
    alpha: float | None = Field(
        None, gt=0.0, lt=1.0, description="for `f_divergence: alpha`: near 0 it is reverse_kl, near 1 forward_kl; null is 0.5"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DPOKnobs:
        if self.alpha is not None and self.f_divergence != "alpha":
            raise problem("`alpha` has no effect without `f_divergence: alpha`", "method.alpha")
        if self.reference_free and self.f_divergence != "reverse_kl":
            raise problem("`f_divergence` measures a distance from the reference, which `reference_free` leaves out", "method.f_divergence")
        return self


class CDPOKnobs(DPOKnobs):
    """Conservative direct preference optimisation."""

    epsilon: float = Field(0.1, gt=0.0, lt=0.5, description=_FLIPPED)


class RobustKnobs(DPOKnobs):
    """Robust direct preference optimisation."""

    epsilon: float = Field(0.1, gt=0.0, lt=0.5, description=_FLIPPED)


class IPOKnobs(ComparedKnobs):
    """Identity preference optimisation."""

    beta: float = Field(0.1, gt=0.0, description="strength of the pull towards the reference: the gap of log-ratios is led to 1 / (2 beta)")


class LengthKnobs(ComparedKnobs):
    """Length-normalised direct preference optimisation."""

    beta: float = Field(5.0, gt=0.0, description=f"{_PULL}; for mean log-probabilities, so larger than in plain DPO")


class RSOKnobs(ComparedKnobs):
    """Losses of statistical rejection sampling optimisation."""

    known_as: ClassVar[dict[str, str]] = {**ComparedKnobs.known_as, "gamma": "beta"}

    gamma: float = Field(0.05, gt=0.0, description="slope of the loss over the gap of log-ratios; what DPO calls beta")


class SLiCKnobs(PairKnobs):
    """Sequence likelihood calibration."""

    known_as: ClassVar[dict[str, str]] = {"sft_weight": _SFT_NAMES, "beta": "delta margin"}

    beta: float = Field(1.0, gt=0.0, description="slope of the hinge: the better response should lead by 1 / beta in log-probability")
    sft_weight: float = Field(0.5, ge=0.0, description=_SFT)


class CPOKnobs(PairKnobs):
    """Contrastive preference optimisation."""

    known_as: ClassVar[dict[str, str]] = {"sft_weight": _SFT_NAMES}

    beta: float = Field(0.1, gt=0.0, description="slope of the loss over the gap of log-probabilities")
    sft_weight: float = Field(1.0, ge=0.0, description=_SFT)


class SimPOKnobs(PairKnobs):
    """Simple preference optimisation."""

    known_as: ClassVar[dict[str, str]] = {"sft_weight": _SFT_NAMES, "gamma_ratio": "gamma simpo_gamma gamma_beta_ratio"}

    beta: float = Field(2.0, gt=0.0, description="slope of the loss over the gap of mean log-probabilities")
    gamma_ratio: float = Field(0.5, ge=0.0, description="lead in mean log-probability that is asked of the better response")
    sft_weight: float = Field(0.0, ge=0.0, description=_SFT)


class ORPOKnobs(PairKnobs):
    """Odds ratio preference optimisation."""

    known_as: ClassVar[dict[str, str]] = {"weight": "beta lambda orpo_alpha"}

    weight: float = Field(0.1, gt=0.0, description="weight of the odds ratio beside the negative log-likelihood of the best response")


# ---------------------------------------------------------------- from log-probabilities to a loss

Loss = Callable[[Outputs, Batch, Any], tuple[Tensor, Metrics]]
Reward = Callable[[Tensor, Outputs, Batch, Any], Tensor]
"""Log-probabilities [G, N] of whole responses, what the models said, batch and knobs, to the [G, N] rewards whose gaps are compared."""


def _loss(
    reward: Reward, pair_loss: Callable[[Any], family.PairLoss], sft_weight: Callable[[Any], float] = lambda knobs: knobs.sft_weight
) -> Loss:
    def loss(out: Outputs, batch: Batch, knobs: Any) -> tuple[Tensor, Metrics]:
        assert out.token_logp is not None
        logp, imitate = batch.per_response(out.token_logp), sft_weight(knobs)
        rewards = reward(logp, out, batch, knobs)
        loss, metrics = family.preference_loss(rewards, logp, batch.preference, batch.prompt_weight, pair_loss(knobs))
        if not imitate:
            return loss, metrics
        nll, more = best_response_likelihood(_for_a_token(logp, batch), batch.best, batch.prompt_weight)
        return loss + imitate * nll, metrics | more

    return loss


def _for_a_token(values: Tensor, batch: Batch) -> Tensor:
    return values / batch.length.clamp(min=1)


def _log_ratio(logp: Tensor, out: Outputs, knobs: ComparedKnobs) -> Tensor:
    if knobs.reference_free:
        return logp
    assert out.reference_logp is not None
    return logp - out.reference_logp


def _diverging(logp: Tensor, out: Outputs, batch: Batch, knobs: DPOKnobs) -> Tensor:
    return knobs.beta * family.divergence(_log_ratio(logp, out, knobs), knobs.f_divergence, knobs.alpha or 0.5)


def _whole(logp: Tensor, out: Outputs, batch: Batch, knobs: IPOKnobs) -> Tensor:
    return knobs.beta * _log_ratio(logp, out, knobs)


def _mean(logp: Tensor, out: Outputs, batch: Batch, knobs: IPOKnobs | LengthKnobs) -> Tensor:
    return knobs.beta * _for_a_token(_log_ratio(logp, out, knobs), batch)


def _sloped(logp: Tensor, out: Outputs, batch: Batch, knobs: RSOKnobs) -> Tensor:
    return knobs.gamma * _log_ratio(logp, out, knobs)


def _likelihood(logp: Tensor, out: Outputs, batch: Batch, knobs: SLiCKnobs | CPOKnobs) -> Tensor:
    return knobs.beta * logp


def _mean_likelihood(logp: Tensor, out: Outputs, batch: Batch, knobs: SimPOKnobs) -> Tensor:
    return knobs.beta * _for_a_token(logp, batch)


def _odds(logp: Tensor, out: Outputs, batch: Batch, knobs: ORPOKnobs) -> Tensor:
    return family.log_odds(_for_a_token(logp, batch))


def _sigmoid(knobs: Any) -> family.PairLoss:
    return family.sigmoid


def _hinge(knobs: Any) -> family.PairLoss:
    return family.hinge


def _odds_ratio(knobs: ORPOKnobs) -> family.PairLoss:
    return lambda gap: knobs.weight * family.sigmoid(gap)


# ---------------------------------------------------------------- the rows


def _row(**row: Any) -> Method:
    return Method(
        **{
            "needs": "two or more responses with a rank, a score or comparisons",
            "model": "policy",
            "keep": keep_preferred,
            "reduction": by_prompt,
            "defaults": {"lr": 1e-6},
            "better": ("accuracy", "max"),
            **row,
        }
    )


def _compared(first: Callable[[Any], float], **row: Any) -> Method:
    """A row with a reference; `first` is the loss of a pair whose gap is 0."""
    known = lambda trees, knobs: None if knobs.reference_free or knobs.sft_weight else first(knobs)
    return _row(reference=True, reference_free=lambda knobs: knobs.reference_free, first_loss=known, **row)


def _ln_2(knobs: Any) -> float:
    return math.log(2.0)


def _one(knobs: Any) -> float:
    return 1.0


def _squared_target(knobs: IPOKnobs) -> float:
    return 1 / (4 * knobs.beta**2)


ROWS = (
    _compared(
        _ln_2,
        name="dpo",
        title="Direct preference optimisation",
        paper="2305.18290",
        summary="raise preferred over dispreferred responses relative to a frozen reference, without a reward model",
        when="The usual first choice with pairs. Start from a model that saw the chosen responses; watch the chosen log-probability.",
        knobs=DPOKnobs,
        loss=_loss(_diverging, _sigmoid),
        also_known_as=("sigmoid", "rpo", "f_dpo", "fdpo"),
    ),
    _compared(
        _one,
        name="dpo_hinge",
        title="Direct preference optimisation with a hinge loss",
        paper="2309.06657",
        summary="as DPO, but a pair whose gap is large enough teaches nothing more",
        when="When DPO drives gaps ever wider on pairs that it has long learned. Its gradient does not fade as a pair is nearly right.",
        knobs=DPOKnobs,
        loss=_loss(_diverging, _hinge),
        also_known_as=("hinge",),
    ),
    _compared(
        _squared_target,
        name="ipo",
        title="Identity preference optimisation, mean log-ratios",
        paper="2310.12036",
        summary="lead the gap of mean log-ratios to a fixed target instead of ever further",
        when="When pairs are few or always agree, where DPO overfits. Its target is for a token, so lengths do not matter.",
        knobs=IPOKnobs,
        loss=_loss(_mean, lambda knobs: family.squared(knobs.beta)),
    ),
    _compared(
        _squared_target,
        name="ipo_sum",
        title="Identity preference optimisation, summed log-ratios",
        paper="2310.12036",
        summary="lead the gap of log-ratios of whole responses to a fixed target, as the paper writes it",
        when="To follow the paper's formula. The target is the same for short and long responses, so `ipo` is the usual choice.",
        knobs=IPOKnobs,
        loss=_loss(_whole, lambda knobs: family.squared(knobs.beta)),
        also_known_as=("ipo_paper",),
    ),
    _compared(
        _ln_2,
        name="cdpo",
        title="Conservative DPO (smoothed labels)",
        paper="https://ericmitchell.ai/cdpo.pdf",
        summary="as DPO with labels that are wrong with a known probability, so that no gap grows without end",
        when="With noisy labels. Where each comparison has a probability of its own, give that to DPO instead.",
        knobs=CDPOKnobs,
        loss=_loss(_diverging, lambda knobs: family.smoothed(knobs.epsilon)),
        also_known_as=("label_smoothing", "dpo_conservative", "conservative_dpo"),
    ),
    _compared(
        _ln_2,
        name="dpo_robust",
        title="Robust DPO",
        paper="2403.00409",
        summary="as DPO with labels that are flipped with a known probability, corrected so that their mean is the loss of clean labels",
        when="With randomly flipped labels whose rate is known. The loss can be negative and has no lower bound: watch held-out accuracy.",
        knobs=RobustKnobs,
        loss=_loss(_diverging, lambda knobs: family.unbiased(knobs.epsilon)),
        also_known_as=("robust", "rdpo", "robust_dpo"),
    ),
    _compared(
        _ln_2,
        name="dpo_len",
        title="Length-normalised DPO, TRL's sigmoid_norm",
        paper="2411.15124",
        summary="as DPO on mean log-ratios of a token instead of sums",
        when="When DPO makes responses longer. A response's own end then weighs little, so watch that responses still end.",
        knobs=LengthKnobs,
        loss=_loss(_mean, _sigmoid),
        defaults={"lr": 5e-7},
        also_known_as=("sigmoid_norm", "sigmoid_len", "ln_dpo", "dpo_norm"),
    ),
    _compared(
        _ln_2,
        name="rso_sigmoid_norm",
        title="Sigmoid loss normalised by the reference, RSO's sigmoid-norm",
        paper="2309.06657",
        summary="DPO's loss under RSO's name, with a slope apart from the temperature that its samples were drawn with",
        when="On pairs that rejection sampling made of the policy's own samples. With other pairs it is DPO with a smaller beta.",
        knobs=RSOKnobs,
        loss=_loss(_sloped, _sigmoid),
        also_known_as=("sigmoid_norm", "rso", "rso_sigmoid"),
    ),
    _compared(
        _one,
        name="rso_hinge_norm",
        title="Hinge loss normalised by the reference, RSO's hinge-norm",
        paper="2309.06657",
        summary="the hinge loss relative to the reference under RSO's name, with a slope apart from the temperature of its samples",
        when="As `rso_sigmoid_norm`, where pairs that are right by a margin should teach nothing more.",
        knobs=RSOKnobs,
        loss=_loss(_sloped, _hinge),
        also_known_as=("hinge_norm", "rso_hinge"),
    ),
    _row(
        name="slic",
        title="Sequence likelihood calibration",
        paper="2305.10425",
        summary="the better response should be likelier by a margin, and the best one is imitated; no reference model",
        when="When memory has no room for a reference. It knows lengths only as likelihood, so longer responses lose by themselves.",
        knobs=SLiCKnobs,
        loss=_loss(_likelihood, _hinge),
        also_known_as=("hinge_noref", "slic_hf"),
    ),
    _row(
        name="cpo",
        title="Contrastive preference optimisation",
        paper="2401.08417",
        summary="raise preferred over dispreferred responses by likelihood alone, and imitate the best one; no reference model",
        when="When memory has no room for a reference and chosen responses are good enough to imitate, as in translation.",
        knobs=CPOKnobs,
        loss=_loss(_likelihood, _sigmoid),
    ),
    _row(
        name="simpo",
        title="Simple preference optimisation",
        paper="2405.14734",
        summary="the better response should lead by a margin in mean log-probability; no reference model",
        when="When responses differ in length and a reference costs too much. Nothing holds it near its start: keep the learning rate low.",
        knobs=SimPOKnobs,
        loss=_loss(_mean_likelihood, lambda knobs: family.with_margin(knobs.gamma_ratio * knobs.beta)),
    ),
    _row(
        name="orpo",
        title="Odds ratio preference optimisation",
        paper="2403.07691",
        summary="learn to write the best response while its odds rise over the others', in one stage; no reference model",
        when="From a base model, instead of SFT and DPO one after the other. Not on top of a model that is tuned already.",
        knobs=ORPOKnobs,
        loss=_loss(_odds, _odds_ratio, sft_weight=lambda knobs: 1.0),
        defaults={"lr": 8e-6},
    ),
)
