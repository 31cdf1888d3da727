"""What a run in rounds may be told: the settings of a training run, and how responses are drawn, scored and kept. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator

from preftune.configfile import Section, problem
from preftune.rewards.config import JudgeConfig
from preftune.rollout.config import EngineName, VllmConfig
from preftune.training.config import DataConfig, Positive, RunConfig, Share


class RolloutConfig(Section):
    """How responses are drawn."""

    known_as: ClassVar[dict[str, str]] = {
        "n": "num_generations num_return_sequences n_samples_per_prompt k",
        "max_new_tokens": "max_completion_length max_tokens generate_max_len",
        "prompts": "rollout_batch_size",
    }

    n: Positive = Field(8, description="Responses to each prompt.")
    prompts: Positive | None = Field(
        None, description="Prompts of each round, the next in a shuffled order; null takes all in every round."
    )
    temperature: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...] = Field(
        1.0, description="Temperature, or one for each round."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens that hold this share.")
    top_k: int = Field(0, ge=0, description="Draw from so many likeliest tokens; 0 is off.")
    min_p: Share = Field(0.0, description="Never draw a token this many times less likely than the likeliest.")
    repetition_penalty: float = Field(1.0, gt=0, description="Divide the logits of tokens that were there already; 1 is off.")
    max_new_tokens: Positive = Field(256, description="Longest response, in tokens.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="Texts that end a response and are left out.")
    cache_gb: float = Field(2.0, gt=0, description="Keys and values in memory at once: lower it when memory runs out.")
    eval_n: Positive = Field(1, description="Responses to each held-out prompt, by which a round is judged.")
    eval_temperature: float = Field(0.0, ge=0, description="Their temperature; 0 takes the likeliest token.")

    def temperature_of(self, number: int) -> float:
        """The temperature of round `number`, counted from 1."""
        return self.temperature[number - 1] if isinstance(self.temperature, tuple) else self.temperature


class RoundsRollout(RolloutConfig):
    """How responses are drawn, and by which engine."""

    known_as: ClassVar[dict[str, str]] = RolloutConfig.known_as | {"engine": "backend use_vllm inference_engine", "vllm": "vllm_config"}

    engine: EngineName = Field(EngineName.local, description="What draws: the engine here, or a vLLM server.")
    vllm: VllmConfig = Field(VllmConfig.model_validate({}), description="The vLLM server, for `engine: vllm`.")

    @model_validator(mode="after")
    def _engine_fits(self) -> RoundsRollout:
        if self.engine is EngineName.local and self.vllm != VllmConfig.model_validate({}):
            raise problem("`vllm` has no effect with `engine: local`", "rollout.vllm")
        return self


class RoundsConfig(RunConfig):
    """Everything a run in rounds may be told."""

    known_as: ClassVar[dict[str, str]] = RunConfig.known_as | {
        "judge": "reward_model reward_funcs",
        "rounds": "iterations num_rounds",
    }

    data: DataConfig = Field(description="Prompts: rows without a response, or any records, whose responses are left out.")
    eval_data: DataConfig | None = Field(None, description="Prompts by which each round is judged, never trained on.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts of `data` to hold out for that when there is no `eval_data`."
    )
    judge: JudgeConfig = Field(description="What scores responses: a reward model, a rule, an endpoint, or several parts.")
    rounds: Positive = Field(3, description="Rounds of sampling, scoring, selecting and training.")
    pool: Literal["last", "all"] = Field(
        "last",
        description="Select from the responses of this round, or of all rounds so far, as Llama 2 does against forgetting.",
    )
    start: Literal["last", "first"] = Field(
        "last", description="Train each round from the last round's model, or from the first model anew, as Llama 2 does."
    )
    keep_models: bool = Field(False, description="Keep every round's model; else only the newest is kept.")
    rollout: RoundsRollout = Field(RoundsRollout.model_validate({}), description="How responses are drawn.")

    @model_validator(mode="after")
    def _rounds_fit(self) -> RoundsConfig:
        for name in ("eval_every", "early_stopping", "best_metric", "reference_sync"):
            if getattr(self, name) is not None:
                raise problem(f"`{name}` has no effect here: a run in rounds is judged after each round", name)
        temperature = self.rollout.temperature
        if isinstance(temperature, tuple) and len(temperature) != self.rounds:
            raise problem(f"`temperature` has {len(temperature)} values for {self.rounds} rounds", "rollout.temperature")
        return self


def rounds_config(knobs: type[Section], defaults: Mapping[str, Any]) -> type[RoundsConfig]:
    """The config of one iterated method, its knobs as the `method` section and `defaults` in place of the general ones."""
    fields: dict[str, Any] = {"method": (knobs, Field(knobs(), description="The method's own knobs."))}
    for name, value in defaults.items():
        general = RoundsConfig.model_fields[name]
        fields[name] = (general.rebuild_annotation(), Field(value, description=general.description))
    return create_model("RoundsConfig", __base__=RoundsConfig, __module__=__name__, __doc__=RoundsConfig.__doc__, **fields)
