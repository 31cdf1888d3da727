"""What an online run may be told: a training run's settings, how responses are drawn and scored, and what is watched. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator

from preftune.configfile import Section, problem
from preftune.rewards.config import JudgeConfig, PartConfig
from preftune.rounds.config import RoundsRollout
from preftune.training.config import DataConfig, Positive, RunConfig, Text


class OnlineRollout(RoundsRollout):
    """How responses are drawn."""

    prompts: Positive | None = Field(
        None, description="Prompts of each rollout, from which all its steps are made; null takes those of one step: on policy."
    )
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="Temperature; every log-probability of the run is taken at it.")

    ahead: bool = Field(
        False,
        description="Draw the next rollout while this one is learned, from weights one rollout old; `method.importance_cap` corrects "
        "for that. For machines where sampling and training do not share the same cores.",
    )

    @model_validator(mode="after")
    def _plain(self) -> OnlineRollout:
        if self.repetition_penalty != 1:
            raise problem("`repetition_penalty` draws from another distribution than the one that is trained", "rollout.repetition_penalty")
        return self


class DenseConfig(PartConfig):
    """A judge that is asked at the end of every segment of a response, and rewards that place (2306.01693)."""

    per: Literal["sentence", "line", "clause"] = Field(
        "sentence", description="where segments end: at sentences, at line breaks (steps of a solution), or at clauses"
    )
    weight: float = Field(1.0, description="factor of its rewards")
    of: Literal["segment", "so_far", "gain"] = Field(
        "so_far",
        description="what is scored: the segment alone, the response up to its end, or what the segment adds to the score before it",
    )


class PretrainingConfig(Section):
    """Text that the policy goes on learning beside the reward, as InstructGPT's ptx (2203.02155)."""

    data: DataConfig = Field(description="Records whose best response is learned.")
    weight: float = Field(1.0, gt=0, description="Factor of its loss, a mean over tokens; InstructGPT took 27.8.")
    prompts_per_step: Positive = Field(8, description="Records beside each step.")


class ConstraintConfig(Section):
    """One part of the judge is a cost that must stay low; the others are the reward (Safe RLHF, 2310.12773)."""

    part: Text = Field(description="Name of the judge's part that is the cost.")
    at_most: float = Field(0.0, description="Mean cost that is allowed.")
    start: float = Field(1.0, gt=0, description="Where the multiplier of the cost starts.")
    lr: float = Field(0.1, gt=0, description="How fast its logarithm follows the mean cost of a rollout above `at_most`.")


class AlarmConfig(Section):
    """When to say that the reward is being exploited."""

    action: Literal["tell", "stop", "rollback"] = Field(
        "tell",
        description="tell goes on; stop ends the run; rollback ends it with the weights of the newest checkpoint before the alarm",
    )
    window: Positive = Field(4, description="Rollouts whose means are compared; the first so many make the bands.")
    perplexity: float = Field(2.0, gt=1, description="Perplexity under the reference leaves its band when it changes by this factor.")
    length: float = Field(1.5, gt=1, description="Mean length leaves its band when it changes by this factor.")
    kl: float | None = Field(None, gt=0, description="Largest KL to the reference of a response, in nats; null sets no bound.")


class OnlineConfig(RunConfig):
    """Everything an online run may be told."""

    known_as: ClassVar[dict[str, str]] = RunConfig.known_as | {
        "judge": "reward_model reward_funcs reward_model_path",
        "pretraining": "ptx ptx_coef pretrain_data",
        "critic_lr": "critic_learning_rate value_lr",
    }

    data: DataConfig = Field(description="Prompts: rows without a response, or any records, whose responses are left out.")
    eval_data: DataConfig | None = Field(None, description="Prompts by which the policy is judged as it learns, never trained on.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts of `data` to hold out for that when there is no `eval_data`."
    )
    judge: JudgeConfig = Field(description="What scores responses: a reward model, a rule, an endpoint, or several parts.")
    normalise_parts: bool = Field(
        False, description="Give each of several parts mean 0 and deviation 1 within a rollout before they are added up."
    )
    constraint: ConstraintConfig | None = Field(
        None,
        description="Keep one part of the judge, a cost, below a bound while the others' sum is raised; its weight is found on the way.",
    )
    dense: dict[str, DenseConfig] = Field({}, description="Judges by name that reward the ends of segments, beside `judge`.")
    gold: JudgeConfig | None = Field(None, description="A second judge that is only watched: what the first one is a proxy for.")
    gold_every: Positive = Field(1, description="Rollouts between two looks at `gold`.")
    rollout: OnlineRollout = Field(OnlineRollout.model_validate({}), description="How responses are drawn.")
    pretraining: PretrainingConfig | None = Field(None, description="Text to go on learning beside the reward (ptx).")
    watch_reference: bool = Field(
        True,
        description="Measure KL and perplexity under the reference also where the method does without it: one more pass, and with full "
        "weights a second model in memory.",
    )
    alarms: AlarmConfig | None = Field(AlarmConfig.model_validate({}), description="When to say that the reward is being exploited.")
    keep_responses: Positive | None = Field(10, description="Rollouts between two that leave their best, worst and some random responses.")

    @property
    def knobs(self) -> Any:
        """The method's own: OnlineKnobs, which need torch and are therefore not named here."""
        return self.method

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that are answered before the first step is made of them."""
        return self.rollout.prompts or self.prompts_per_step

    @model_validator(mode="after")
    def _online_fits(self) -> OnlineConfig:
        if self.cache_reference:
            raise problem("`cache_reference` has no effect here: no response is known before the run", "cache_reference")
        if self.gold is None and self.gold_every != type(self).model_fields["gold_every"].default:
            raise problem("`gold_every` has no effect without `gold`", "gold_every")
        if self.normalise_parts and len(self.judge.parts) < 2:
            raise problem("`normalise_parts` needs a judge of several `parts`", "normalise_parts")
        if self.normalise_parts and self.judge.safety:
            raise problem("`normalise_parts` and the judge's `safety` rule exclude each other: the rule chooses a part", "normalise_parts")
        parts = self.judge.parts
        if self.constraint is not None and (self.constraint.part not in parts or len(parts) < 2 or self.judge.safety):
            raise problem(
                f"`constraint.part` ({self.constraint.part}) must be one of two or more `parts` of a judge that adds them up",
                "constraint.part",
            )
        if self.rollout.ahead and self.knobs.importance_cap is None:
            raise problem(
                "`rollout.ahead` draws from weights that are one rollout old: set `method.importance_cap` (2 is usual) to correct for it",
                "rollout.ahead",
            )
        if self.prompts_per_rollout < self.prompts_per_step:
            raise problem(
                f"`rollout.prompts` ({self.rollout.prompts}) must be at least `prompts_per_step` ({self.prompts_per_step})",
                "rollout.prompts",
            )
        return self

    @model_validator(mode="after")
    def _has_effect(self) -> OnlineConfig:
        """Refuse what would change nothing, or could not be done."""
        knobs, rollout, alarms = self.knobs, self.rollout, self.alarms
        compares = self.watch_reference or knobs.kl > 0
        one_step = knobs.passes == 1 and self.prompts_per_rollout == self.prompts_per_step
        truncates = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        own = lambda name, default=None: getattr(knobs, name, default)
        rolls_back = alarms is not None and alarms.action == "rollback"
        without = "has no effect with `watch_reference: false` and `method.kl: 0`, which do without a reference"
        rules = (
            (not compares and self.reference is not None, "reference", f"`reference` {without}"),
            (not compares and self.reference_sync is not None, "reference_sync", f"`reference_sync` {without}"),
            (not compares and alarms is not None and alarms.kl is not None, "alarms.kl", f"`alarms.kl` {without}"),
            (
                not self.watch_reference and knobs.kl > 0,
                "watch_reference",
                "`watch_reference: false` has no effect where `method.kl` is above 0: the reference is needed anyway",
            ),
            (
                rolls_back and (self.keep_checkpoints < 2 or self.save_every is None),
                "alarms.action",
                "`alarms.action: rollback` needs an older checkpoint: set `save_every`, and `keep_checkpoints` to 2 or more",
            ),
            (
                one_step and knobs.target_kl is not None,
                "method.target_kl",
                "`target_kl` has no effect where a rollout makes one step: there is no later one to leave out",
            ),
            (
                one_step and own("objective") == "penalty",
                "method.objective",
                "`objective: penalty` has no effect where a rollout makes one step: the policy is still where it was drawn",
            ),
            (
                truncates and knobs.old_logp == "rollout",
                "method.old_logp",
                "`old_logp: rollout` would begin ratios elsewhere than at 1: `top_p`, `top_k` and `min_p` draw from fewer tokens",
            ),
            (
                knobs.importance_cap is not None and knobs.old_logp == "rollout",
                "method.importance_cap",
                "`importance_cap` has no effect with `old_logp: rollout`: the sampler's own log-probabilities are taken",
            ),
            (
                knobs.overlong is not None and knobs.overlong > rollout.max_new_tokens,
                "method.overlong",
                f"`overlong` ({knobs.overlong}) must be at most `rollout.max_new_tokens` ({rollout.max_new_tokens})",
            ),
            (
                bool(self.dense) and own("scale", "group") != "group",
                "method.scale",
                "`scale` has no effect with `dense`: rewards of segments are divided by their group's deviation",
            ),
            (
                self.lora is not None and self.lora.dropout > 0,
                "lora.dropout",
                "`lora.dropout` would make the policy differ from the one that drew: set it to 0",
            ),
        )
        for broken, key, message in rules:
            if broken:
                raise problem(message, key)
        return self


def online_config(knobs: type[Section], defaults: Mapping[str, Any], compares: Callable[[Any], bool]) -> type[OnlineConfig]:
    """The config of one online method, its knobs as the `method` section and `defaults` in place of the general ones."""
    fields: dict[str, Any] = {"method": (knobs, Field(knobs(), description="The method's own knobs."))}
    for name, value in defaults.items():
        general = OnlineConfig.model_fields[name]
        fields[name] = (general.rebuild_annotation(), Field(value, description=general.description))
    kind = create_model("OnlineConfig", __base__=OnlineConfig, __module__=__name__, __doc__=OnlineConfig.__doc__, **fields)
    kind.compares = staticmethod(compares)
    return kind
