"""From a config to what a run works with: records, trees, model, reference. Data is read and judged before any model is loaded."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console

from preftune import formats
from preftune.errors import UserError
from preftune.methods import KEEP_REASONS, METHODS, Method
from preftune.models import load
from preftune.models.lora import Adapter
from preftune.models.policy import LanguageModel, RewardModel, settle_layout
from preftune.models.scoring import Scoring
from preftune.packing.chat import REASONS as packing_reasons
from preftune.packing.chat import ChatTokenizer, Tree, judgements
from preftune.records import Example
from preftune.training.config import DataConfig, RunConfig
from preftune.training.distributed import World
from preftune.training.learner import Learner
from preftune.training.progress import meter
from preftune.training.reference import (
    MovingReference,
    Reference,
    RunningAverage,
    attach,
    cache_key,
    cached,
    frozen_reference,
    live_reference,
)

REASONS = packing_reasons | KEEP_REASONS


@dataclass
class Records:
    """One side of the data as trees. rows == kept + sum(dropped.values()); a record whose every turn is learned may give several trees."""

    rows: int
    kept: int
    trees: list[Tree]
    dropped: Counter[str]
    where: dict[str, list[str]]
    format: str
    hashes: dict[str, str]
    examples: list[Example]
    truncated: int = 0

    def sentence(self) -> str:
        """What was kept and dropped, in words."""
        tokens = sum(t.tokens for t in self.trees)
        parts = f" in {len(self.trees)} parts" if len(self.trees) > self.kept else ""
        text = f"{self.rows} records read as {self.format}: {self.kept} kept{parts} ({tokens:,} tokens)"
        for reason, count in self.dropped.items():
            text += f"; {count} dropped, {reason}: {REASONS.get(reason, reason)} ({', '.join(self.where.get(reason, [])[:3])})"
        return text + (f"; {self.truncated} responses cut to max_length" if self.truncated else "")


@dataclass
class Setup:
    """Everything a run needs before its first step."""

    method: Method
    config: RunConfig
    world: World
    source: load.Source
    tokenizer: ChatTokenizer
    train: Records
    held_out: Records | None
    learner: Learner
    adapter: Adapter | None
    compute: torch.dtype
    model_hash: str
    notices: list[str] = field(default_factory=list)


@dataclass
class Read:
    """Examples as they were read, before tokens."""

    rows: int
    examples: list[Example]
    dropped: Counter[str]
    where: dict[str, list[str]]
    format: str
    hashes: dict[str, str]


def read(config: DataConfig) -> Read:
    """Read the records of a data section."""
    data = formats.read(list(config.path), format=config.format, on_error=config.on_error, limit=config.limit)
    where: dict[str, list[str]] = {}
    for one in data.dropped:
        where.setdefault(one.reason, []).append(one.where)
    name = ", ".join(config.path)
    return Read(data.rows, list(data.examples), Counter(data.dropped_by_reason()), where, data.format, {name: data.sha256})


def read_sides(config: RunConfig) -> tuple[Read, Read | None]:
    """Training and held-out records: from two files, or one cut by prompt."""
    train = read(config.data)
    if config.eval_data is not None:
        return train, read(config.eval_data)
    if not config.eval_fraction:
        return train, None
    kept, held = formats.split_by_prompt(train.examples, config.eval_fraction, config.seed)
    side = dataclasses.replace(train, rows=len(held), examples=held, dropped=Counter(), where={})
    return dataclasses.replace(train, rows=train.rows - len(held), examples=kept), side


def require_settings(method: Method, config: RunConfig) -> None:
    """Say before any record is read when the method cannot work with these settings."""
    if config.prompts_per_step < method.min_prompts_per_step:
        raise UserError(
            f"the loss compares the prompts of a step with each other, and {config.prompts_per_step} is too few",
            where="prompts_per_step",
            fix=f"Set prompts_per_step to {method.min_prompts_per_step} or more; tokens_per_microbatch is what limits memory.",
        )
    if config.cache_reference and method.survey is not None:
        raise UserError(
            "the loss needs the reference on prompts and responses that are put together anew in each step, so it cannot be cached",
            where="cache_reference",
            fix="Set cache_reference to false.",
        )


def require(method: Method, knobs: Any, examples: Sequence[Example], name: str) -> None:
    """Say before any model is loaded when no record has what the method needs, or what its knobs ask for."""
    method.demands(examples, knobs)
    if any(not isinstance(method.keep(_untokenised(e), knobs), str) for e in examples):
        return
    first = _untokenised(examples[0])
    reason = method.keep(first, knobs)
    others = [one.name for one in METHODS.values() if _takes(one, first)]
    named = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    raise UserError(
        f"no record has what {method.title[:1].lower() + method.title[1:]} needs, {method.needs}: {REASONS.get(str(reason), reason)}",
        where=first.where or name,
        fix="Give other data" + (f", or a method that takes these: {named}." if others else " (`preftune methods` says who needs what)."),
    )


def _takes(method: Method, tree: Tree) -> bool:
    """Whether the method, with its defaults, can train on this record."""
    try:
        return not isinstance(method.keep(tree, method.knobs()), str)
    except (UserError, ValidationError):  # a score that it cannot use, or knobs that must be given
        return False


def _untokenised(example: Example) -> Tree:
    one = np.zeros(1, dtype=np.int64)
    count = len(example.responses)
    return Tree(example.id, example.where, one, (one,) * count, (True,) * count, **judgements(example))


def tokenise(read: Read, tokenizer: ChatTokenizer, method: Method, knobs: Any, max_length: int) -> Records:
    """Trees of the records as the method keeps them; every record is kept or counted under a reason."""
    tokens = tokenizer.tokenize(read.examples, max_length, keep=lambda tree: method.keep(tree, knobs), every_turn=method.every_turn(knobs))
    records = Records(
        rows=read.rows,
        kept=tokens.kept,
        trees=tokens.trees,
        dropped=read.dropped + tokens.dropped,
        where=read.where | tokens.dropped_where,
        format=read.format,
        hashes=read.hashes,
        examples=read.examples,
        truncated=tokens.truncated_responses,
    )
    if records.rows != records.kept + sum(records.dropped.values()):
        raise AssertionError(f"{records.rows} rows in, {records.kept} kept and {sum(records.dropped.values())} dropped")
    if not records.trees:
        raise UserError(records.sentence(), where="data", fix="Nothing is left to train on: raise max_length or give other data.")
    return records


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it (AMX, AVX512-BF16, CUDA from Ampere on), else fp32; `bf16` asks for it in any case."""
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return torch.bfloat16 if "amx_bf16" in flags or "avx512_bf16" in flags else torch.float32


def seed(value: int) -> None:
    """Seed every global random generator."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def prepare(method_name: str, config: RunConfig, world: World, console: Console) -> Setup:
    """Read, judge and tokenise the data, then load the model. Raises UserError for whatever the user can mend."""
    method = METHODS[method_name]
    require_settings(method, config)
    train_read, held_read = read_sides(config)
    require(method, config.method, train_read.examples, ", ".join(config.data.path))
    if method.fit is not None:
        change = method.fit(train_read.examples, config.method)
        train_read = dataclasses.replace(train_read, examples=[change(e) for e in train_read.examples])
        held_read = held_read and dataclasses.replace(held_read, examples=[change(e) for e in held_read.examples])
    if config.lora is not None and config.lora.dropout and method.compares(config.method):
        raise UserError(
            "dropout would make policy and reference differ before training", where="lora.dropout", fix="Set lora.dropout to 0."
        )
    source = load.locate(config.model)
    if config.reference:
        load.locate(config.reference)
    template = None
    if config.chat_template:
        try:
            template = Path(config.chat_template).read_text()
        except OSError as error:
            raise UserError(f"the chat template cannot be read: {error.strerror}", where=config.chat_template) from error
    tokenizer = load.load_tokenizer(source, template=template)
    train = tokenise(train_read, tokenizer, method, config.method, config.max_length)
    held = tokenise(held_read, tokenizer, method, config.method, config.max_length) if held_read else None
    seed(config.seed)
    compute = compute_dtype(config.precision, world.device)
    advice = method.advise(train.trees, config.method)
    notices = [advice] if advice else []
    model, adapter, notice = load_model(method, config, source, compute, world)
    if notice:
        notices.append(notice)
    tokenizer.turn_ends = tokenizer.turn_ends | frozenset(load.eos_ids(model.hf))
    model_hash = load.fingerprint(source)
    learner = Learner(method, config.method, model, world, config.tokens_per_microbatch, clip_norm=config.clip_norm)
    if config.average is not None:
        learner.average = RunningAverage(learner.parameters, config.average)
    setup = Setup(method, config, world, source, tokenizer, train, held, learner, adapter, compute, model_hash, notices)
    if method.compares(config.method):
        learner.reference = make_reference(setup)
    return setup


def load_model(
    method: Method, config: RunConfig, source: load.Source, compute: torch.dtype, world: World
) -> tuple[LanguageModel | RewardModel, Adapter | None, str | None]:
    """The model to train on its device, its adapter if it has one, and a notice about its layout if there is one."""
    model: LanguageModel | RewardModel
    if method.model == "reward":
        classifier = load.load_classifier(source)
        imitates = method.language_head(config.method)
        if classifier is not None:
            if imitates:
                raise UserError(
                    "a reward model has no language head to imitate with",
                    where="model",
                    fix="Start from the language model, or set it to 0.",
                )
            model = RewardModel(classifier, head=load.score_head(classifier)[1], compute=compute)
            model.scoring = _rescored(model.scoring, method.scoring(config.method))
        else:
            inner = load.load_causal_lm(source)
            scoring = method.scoring(config.method)
            model = RewardModel(inner, heads=method.heads(config.method), scoring=scoring, compute=compute)
            output = inner.get_output_embeddings()
            if output is not None and output.weight is not inner.get_input_embeddings().weight and not imitates:
                output.requires_grad_(False)  # no use for it
    else:
        model = LanguageModel(load.load_causal_lm(source), compute=compute)
    model.to(world.device)
    notice = settle_layout(model)
    adapter = None
    if config.lora is not None:
        lora = config.lora
        adapter = Adapter(model.hf, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
        model.backbone.hf.to(world.device)
        if isinstance(model, RewardModel):
            model.head.requires_grad_(True)
    if config.gradient_checkpointing:
        model.hf.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model, adapter, notice


def _rescored(saved: Scoring, wanted: Scoring) -> Scoring:
    """The scoring of a reward model that goes on training: as the knobs say, if they mean the heads that it has."""
    if saved.heads == wanted.heads and (saved.heads == 1 or saved.attributes == wanted.attributes):
        return wanted
    named = lambda scoring: ", ".join(scoring.attributes) or "one reward without a name"
    raise UserError(
        f"the reward model to start from has heads for {named(saved)}, and method.attributes asks for {named(wanted)}",
        where="model",
        fix="Name the attributes that it has, in its order, or start from the language model.",
    )


def make_reference(setup: Setup) -> Reference:
    """The reference: one that moves, the adapter switched off, the named model, or a second copy of the starting model."""
    config, policy = setup.config, setup.learner.model
    assert isinstance(policy, LanguageModel)
    if config.reference_sync is not None:
        return MovingReference(policy, setup.learner.parameters, config.reference_sync.every, config.reference_sync.mix)
    if config.reference is None and setup.adapter is not None:
        return live_reference(policy, setup.adapter.off)
    source = load.locate(config.reference or config.model)
    return frozen_reference(source, setup.compute, setup.world.device, packed=policy.backbone.packed)


def cache_reference(setup: Setup, folder: Path, console: Console) -> None:
    """Compute the reference of all trees once, keep it in `folder`, and let the reference model go."""
    learner, config = setup.learner, setup.config
    assert learner.reference is not None
    model = load.fingerprint(load.locate(config.reference)) if config.reference else setup.model_hash
    learner.model.eval()
    for records in filter(None, (setup.train, setup.held_out)):
        file = folder / f"reference-{cache_key(records.trees, model, setup.compute)}.safetensors"
        if setup.world.first:
            with meter(console, "reference log-probs", len(records.trees)) as shown:
                for done in cached(records.trees, learner.reference, file, config.tokens_per_microbatch, setup.world.device):
                    shown.at(done)
        setup.world.share(None)
        records.trees = attach(records.trees, file)
    learner.reference = None
