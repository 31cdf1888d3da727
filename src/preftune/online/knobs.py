"""The knobs of online methods: what they share, and what is each one's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from preftune.configfile import problem
from preftune.methods import Knobs
from preftune.training.config import Positive, Share, Text


class OnlineKnobs(Knobs):
    """What every online method may be told."""

    kl: float = Field(0.05, ge=0, description="coefficient of the KL to the reference; 0 does without a reference")
    kl_target: float | None = Field(
        None, gt=0, description="KL of a response, in nats, that `kl` is steered to (1909.08593); null keeps `kl` fixed"
    )
    kl_horizon: Positive = Field(10000, description="responses over which `kl` is steered: larger is slower")
    entropy: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    missing_eos: Literal["keep", "subtract", "replace", "mask"] = Field(
        "subtract",
        description="what becomes of a response that was cut: its score stays, loses `missing_eos_penalty`, becomes minus that penalty, "
        "or the response is left out of the loss",
    )
    missing_eos_penalty: float = Field(1.0, ge=0, description="the penalty of `missing_eos`")
    overlong: Positive | None = Field(
        None, description="DAPO's soft penalty (2503.14476): from 0 to -1 over the last so many tokens before max_new_tokens; null is none"
    )
    reward_clip: float | None = Field(None, gt=0, description="scores are cut to +- this; null is no bound")
    normalise: Literal["none", "running"] = Field(
        "none", description="running gives scores mean 0 and deviation 1 by all scores seen so far in the run"
    )
    passes: Positive = Field(1, description="passes over a rollout")
    target_kl: float | None = Field(
        None, gt=0, description="a rollout's later steps are left out once the approximate KL to where it was drawn passes this"
    )
    old_logp: Literal["auto", "recomputed", "rollout"] = Field(
        "auto",
        description="log-probabilities that ratios start from: computed again by the trainer, or as the sampler gave them; auto takes the "
        "trainer's, and its first step's own where a rollout makes one step",
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="weigh tokens by trainer over sampler probability, at most this, where the sampler differs; null is off",
    )

    @model_validator(mode="after")
    def _used(self) -> OnlineKnobs:
        fields = type(self).model_fields
        changed = lambda name: getattr(self, name) != fields[name].default
        if self.kl_target is not None and self.kl == 0:
            raise problem("`kl_target` steers `kl`, which must not start at 0", "method.kl_target")
        if self.kl_target is None and changed("kl_horizon"):
            raise problem("`kl_horizon` has no effect without `kl_target`", "method.kl_horizon")
        if self.kl == 0 and "kl_loss" in fields and changed("kl_loss"):
            raise problem("`kl_loss` has no effect with `kl: 0`", "method.kl_loss")
        if self.missing_eos in ("keep", "mask") and changed("missing_eos_penalty"):
            raise problem(f"`missing_eos_penalty` has no effect with `missing_eos: {self.missing_eos}`", "method.missing_eos_penalty")
        return self


class ClipKnobs(OnlineKnobs):
    """A clipped ratio."""

    clip: float = Field(0.2, gt=0, description="how far the ratio may fall below 1, and rise above it, before it earns nothing more")
    clip_high: float | None = Field(None, gt=0, description="how far the ratio may rise above 1; null is `clip`")
    dual_clip: float | None = Field(None, gt=1, description="bound of the loss where the advantage is negative (1912.09729); null is none")


class WhitenedKnobs(ClipKnobs):
    """Advantages on one scale."""

    whiten: bool = Field(True, description="give the advantages of a rollout's tokens mean 0 and deviation 1")
    gamma: float = Field(1.0, gt=0, le=1, description="discount from token to token")


class PPOKnobs(WhitenedKnobs):
    """Proximal policy optimisation with a critic."""

    objective: Literal["clip", "penalty"] = Field("clip", description="how a step is kept near: a clipped ratio, or a KL penalty")
    penalty: float = Field(1.0, gt=0, description="for objective penalty: where its coefficient starts")
    penalty_target: float = Field(
        0.01, gt=0, description="for objective penalty: KL of a step, by which the coefficient is halved or doubled"
    )
    lam: Share = Field(0.95, description="GAE's lambda: 0 trusts the critic, 1 the rewards")
    k_step: Positive | None = Field(None, description="k-step advantages instead of GAE; small k trusts the critic")
    whiten_rewards: bool = Field(False, description="give token rewards deviation 1 before advantages are made")
    value_clip: float | None = Field(0.2, gt=0, description="how far a value may move from the old one; null is any way")
    value_weight: float | None = Field(
        None, gt=0, description="weight of the value loss; null is 1 with a critic of its own and 0.1 with a shared trunk"
    )
    critic: Text = Field(
        "auto",
        description="where the critic starts: a model, `policy` for a copy of the policy, `shared` for a head on the policy itself; auto "
        "takes the reward model that judges where it is one with the policy's tokenizer, else `policy`",
    )
    critic_lr: Annotated[float, Field(gt=0)] | None = Field(None, description="the critic's peak learning rate; null is 9 times `lr`")
    critic_warmup: Annotated[int, Field(ge=0)] = Field(0, description="first steps in which the critic alone learns")

    @model_validator(mode="after")
    def _consistent(self) -> PPOKnobs:
        fields = type(self).model_fields
        changed = lambda *names: next((name for name in names if getattr(self, name) != fields[name].default), None)
        if self.objective == "clip" and (name := changed("penalty", "penalty_target")):
            raise problem(f"`{name}` has no effect with `objective: clip`", f"method.{name}")
        if self.objective == "penalty" and (name := changed("clip", "clip_high", "dual_clip")):
            raise problem(f"`{name}` has no effect with `objective: penalty`", f"method.{name}")
        if self.k_step is not None and changed("lam"):
            raise problem("`lam` has no effect with `k_step`", "method.lam")
        if self.critic == "shared" and self.critic_lr is not None:
            raise problem("`critic_lr` has no effect with `critic: shared`, which trains with the policy", "method.critic_lr")
        return self


class ReinforceKnobs(OnlineKnobs):
    """Policy gradient without a critic, and without a ratio that could be clipped."""

    whiten: bool = Field(False, description="give the advantages of a rollout's tokens mean 0 and deviation 1")
    gamma: float = Field(1.0, gt=0, le=1, description="discount from token to token")


class BaselineKnobs(ClipKnobs):
    """REINFORCE++ with the group's mean as baseline."""

    kl_loss: Literal["k2", "k3", "reward"] = Field("k2", description="into the loss as this estimate, or into the reward")


class GroupKnobs(ClipKnobs):
    """Advantages relative to the other responses to the prompt."""

    kl: float = Field(0.0, ge=0, description="coefficient of the KL to the reference; 0 does without a reference")
    kl_loss: Literal["k2", "k3", "k3_is"] = Field(
        "k3", description="estimate of the KL in the loss: k3 as published, k2 with the gradient of the KL, k3_is as TRL weighs it"
    )
    scale: Literal["group", "batch", "none"] = Field("group", description="deviation that centred scores are divided by")
    weigh: Literal["token", "response", "budget"] = Field(
        "token",
        description="every token of the step counts the same (dapo), every response (grpo), or every token as a share of max_new_tokens "
        "(dr_grpo)",
    )
    redraw: Annotated[int, Field(ge=0)] = Field(
        0, description="how often prompts whose responses all score the same are replaced by the next ones (DAPO's dynamic sampling)"
    )


class GSPOKnobs(GroupKnobs):
    """The ratio of whole responses."""

    clip: float = Field(3e-4, gt=0, description="how far the ratio may fall below 1, and rise above it, before it earns nothing more")
    clip_high: float | None = Field(4e-4, gt=0, description="how far the ratio may rise above 1; null is `clip`")
    weigh: Literal["token", "response", "budget"] = Field("response", description="every token, every response, or by budget")


class CISPOKnobs(GroupKnobs):
    """Clipped importance weights."""

    clip: float = Field(1.0, gt=0, description="how far below 1 the weight may fall; 1 is no bound")
    clip_high: float | None = Field(4.0, gt=0, description="how far above 1 the weight may rise; null is `clip`")

    @model_validator(mode="after")
    def _one_bound(self) -> CISPOKnobs:
        if self.dual_clip is not None:
            raise problem("`dual_clip` has no effect here: weights are clipped whatever the advantage", "method.dual_clip")
        return self


class RLOOKnobs(ClipKnobs):
    """Leave-one-out baseline."""


class ReMaxKnobs(OnlineKnobs):
    """The greedy response as baseline."""
