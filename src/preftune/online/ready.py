"""Before the first rollout: prompts, judges and settings are read and tried, then the models are loaded."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from preftune.errors import UserError
from preftune.models import load
from preftune.models.lora import Adapter
from preftune.models.policy import LanguageModel, RewardModel, settle_layout
from preftune.online.actor import ActorCritic, OnlineLearner, Pretraining, critic_of
from preftune.online.config import OnlineConfig
from preftune.online.judging import Judges
from preftune.online.methods import IMITATION, ONLINE, Online
from preftune.online.steering import start
from preftune.packing.chat import ChatTokenizer
from preftune.records import Example, Response
from preftune.rewards.config import JudgeConfig
from preftune.rewards.judge import ask, open_judge
from preftune.rewards.rules import is_rule
from preftune.rounds.ready import read_prompts
from preftune.training.check import Line, show
from preftune.training.distributed import World
from preftune.training.reference import MovingReference, Reference, RunningAverage, frozen_reference, live_reference
from preftune.training.setup import Records, Setup, compute_dtype, read, seed, tokenise


@dataclass
class Ready:
    """What was read and tried before any long work."""

    row: Online
    config: OnlineConfig
    source: load.Source
    tokenizer: ChatTokenizer
    prompts: list[Example]
    held_out: list[Example]
    hashes: dict[str, str]
    judges: Judges
    pretraining: Pretraining | None
    compute: torch.dtype
    notices: list[str]
    critic: load.Source | None
    """Where the critic starts; None where there is none of its own."""


def ready(name: str, config: OnlineConfig, world: World) -> Ready:
    """Read the prompts, open the judges and ask each once. Raises UserError for whatever the user can mend."""
    row = ONLINE[name]
    if row.group and config.rollout.n < 2:
        raise UserError(
            f"{row.title} compares the responses to a prompt with each other, and {config.rollout.n} is too few",
            where="rollout.n",
            fix="Draw 2 or more.",
        )
    prompts, held_out, hashes = read_prompts(config)
    if row.greedy and (config.normalise_parts or config.constraint):
        key = "normalise_parts" if config.normalise_parts else "constraint"
        raise UserError(f"{row.title} compares with the score of another response, on another scale", where=key, fix="Leave it out.")
    source = load.locate(config.model)
    tokenizer = load.load_tokenizer(source, template=_template(config))
    critic, notices = _critic_source(config, source, tokenizer) if row.critic else (None, [])
    hashes |= _more_hashes(config, source, critic)
    prompts, cut = _fitting(prompts, tokenizer, config)
    held_out, cut_too = _fitting(held_out, tokenizer, config) if held_out else ([], [])
    compute = compute_dtype(config.precision, world.device)
    judges, told = _judges(config, compute, world.device, prompts[0])
    pretraining, sha256 = _pretraining(config, tokenizer) if config.pretraining else (None, {})
    notices = [*cut, *cut_too, *notices, *told]
    return Ready(row, config, source, tokenizer, prompts, held_out, hashes | sha256, judges, pretraining, compute, notices, critic)


def _fitting(prompts: list[Example], tokenizer: ChatTokenizer, config: OnlineConfig) -> tuple[list[Example], list[str]]:
    """The prompts that leave room for a whole response, and a notice of the others. Raises UserError where none is left."""
    room = config.max_length - config.rollout.max_new_tokens
    short = [example for example in prompts if len(tokenizer.encode_prompt(example.prompt)) <= room]
    if len(short) == len(prompts):
        return prompts, []
    kept = {id(example) for example in short}
    where = [example.where for example in prompts if id(example) not in kept]
    what = (
        f"{len(where)} of {len(prompts)} prompts are left out: with {config.rollout.max_new_tokens} new tokens they are longer than "
        f"max_length ({config.max_length}): {', '.join(where[:3])}{' ...' if len(where) > 3 else ''}"
    )
    if not short:
        raise UserError(what, where="max_length", fix="Raise it, or lower rollout.max_new_tokens.")
    return short, [f"{what}."]


def _more_hashes(config: OnlineConfig, policy: load.Source, critic: load.Source | None) -> dict[str, str]:
    """What else a resumed run must find as it was: other models, and the template."""
    found = {}
    if config.reference:
        found[config.reference] = load.fingerprint(load.locate(config.reference))
    if critic is not None and critic is not policy:
        found[f"critic {critic.name}"] = load.fingerprint(critic)
    if config.chat_template:
        found[config.chat_template] = hashlib.sha256(Path(config.chat_template).read_bytes()).hexdigest()
    return found


def _template(config: OnlineConfig) -> str | None:
    if not config.chat_template:
        return None
    try:
        return Path(config.chat_template).read_text()
    except OSError as error:
        raise UserError(f"the chat template cannot be read: {error.strerror}", where=config.chat_template) from error


def _judges(config: OnlineConfig, compute: torch.dtype, device: torch.device, first: Example) -> tuple[Judges, list[str]]:
    sizes = {"max_length": config.max_length, "tokens_per_microbatch": config.tokens_per_microbatch}
    opened = lambda one: open_judge(one, compute=compute, device=device, **sizes)
    weights = config.judge.weights if config.constraint is None else {**config.judge.weights, config.constraint.part: 0.0}
    judge = opened(config.judge.model_copy(update={"weights": weights}))  # a cost is no part of the score that is told
    part = lambda dense: JudgeConfig.model_validate({"use": dense.use, "options": dense.options, "endpoint": dense.endpoint})
    judges = Judges(judge, {name: opened(part(one)) for name, one in config.dense.items()}, opened(config.gold) if config.gold else None)
    for one in judges.everyone:
        ask(one.judge, [replace(first, responses=(Response("I do not know."),))])
    return judges, [notice for one in judges.everyone for notice in one.notices]


def _pretraining(config: OnlineConfig, tokenizer: ChatTokenizer) -> tuple[Pretraining, dict[str, str]]:
    """The text to go on learning, and the hashes of its files."""
    assert config.pretraining is not None
    found = tokenise(read(config.pretraining.data), tokenizer, IMITATION, IMITATION.knobs(), config.max_length)
    return Pretraining(found.trees, config.pretraining.weight, config.pretraining.prompts_per_step, config.seed), found.hashes


def prepare(found: Ready, world: World) -> Setup:
    """Load policy, critic and reference, and put a learner around them."""
    row, config = found.row, found.config
    knobs = config.knobs
    seed(config.seed)
    policy = LanguageModel(load.load_causal_lm(found.source), compute=found.compute).to(world.device)
    notices = [notice for notice in (settle_layout(policy),) if notice]
    found.tokenizer.turn_ends = found.tokenizer.turn_ends | frozenset(load.eos_ids(policy.hf))
    adapter = _adapter(config, policy, world)
    shared = row.critic and knobs.critic == "shared"
    critic, critic_adapter = _critic(found, world) if row.critic and not shared else (None, None)
    actor = ActorCritic(policy, critic, shared=shared)
    actor.to(world.device)
    if config.gradient_checkpointing:
        both: list[LanguageModel | RewardModel] = [policy, *([critic] if critic else [])]
        for model in both:
            model.hf.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    learner = OnlineLearner(
        row.method(knobs, config.rollout.max_new_tokens), knobs, actor, world, config.tokens_per_microbatch, clip_norm=config.clip_norm,
        temperature=config.rollout.temperature, pretraining=found.pretraining, coefficients=start(config, shared),
    )  # fmt: skip
    if row.critic:
        learner.critic_warmup, learner.critic_adapter = knobs.critic_warmup, critic_adapter
        learner.critic_lr_scale = (knobs.critic_lr / config.lr) if knobs.critic_lr else 9.0
    if config.average is not None:
        learner.average = RunningAverage(
            {name: p for name, p in learner.parameters.items() if name.startswith("backbone.")}, config.average
        )
    if knobs.kl > 0 or config.watch_reference:
        learner.reference = _reference(found, learner, adapter, world)
    records = Records(len(found.prompts), len(found.prompts), [], Counter(), {}, "prompts", found.hashes, found.prompts)
    model_hash = load.fingerprint(found.source)
    return Setup(
        learner.method, config, world, found.source, found.tokenizer, records, None, learner, adapter, found.compute, model_hash, notices
    )


def _adapter(config: OnlineConfig, model: LanguageModel | RewardModel, world: World) -> Adapter | None:
    if config.lora is None:
        return None
    lora = config.lora
    adapter = Adapter(model.hf, rank=lora.rank, alpha=lora.alpha, dropout=0.0, targets=lora.targets)
    model.backbone.hf.to(world.device)
    return adapter


def _critic_source(config: OnlineConfig, policy: load.Source, tokenizer: ChatTokenizer) -> tuple[load.Source | None, list[str]]:
    """Where a critic of its own starts, and a notice where that is elsewhere than was to be expected."""
    wanted, judge = config.knobs.critic, config.judge
    if wanted == "shared":
        return None, []
    if wanted not in ("auto", "policy"):
        source = load.locate(wanted)
        if not _same_tokens(source, tokenizer):
            raise UserError("the critic must read the policy's tokens, and this model has another tokenizer", where="method.critic")
        return source, []
    if wanted == "policy" or judge.use is None or is_rule(judge.use):
        return policy, []
    source = load.locate(judge.use)
    if _same_tokens(source, tokenizer):
        return source, []
    return policy, [f"The critic starts as a copy of the policy: {judge.use} has another tokenizer."]


def _critic(found: Ready, world: World) -> tuple[RewardModel, Adapter | None]:
    """The critic where it starts, and its adapter where the run has one."""
    config, source = found.config, found.critic
    assert source is not None
    classifier = load.load_classifier(source)
    if classifier is None:
        critic = critic_of(load.load_causal_lm(source), found.compute)
    else:
        critic = RewardModel(classifier, head=load.score_head(classifier)[1], compute=found.compute)
        if critic.head.out_features > 1:
            raise UserError("a critic has one value, and this reward model has several heads", where="method.critic")
    critic.to(world.device)
    settle_layout(critic)
    adapter = _adapter(config, critic, world)
    critic.head.requires_grad_(True)
    return critic, adapter


def _same_tokens(source: load.Source, tokenizer: ChatTokenizer) -> bool:
    """Whether the model's tokenizer gives every token the policy's number."""
    other = load.load_tokenizer(source).tokenizer
    return bool(other.get_vocab() == tokenizer.tokenizer.get_vocab())


def _reference(found: Ready, learner: OnlineLearner, adapter: Adapter | None, world: World) -> Reference:
    config, policy = found.config, learner.actor
    if config.reference_sync is not None:
        own = {name: p for name, p in learner.parameters.items() if name.startswith("backbone.")}
        return MovingReference(policy, own, config.reference_sync.every, config.reference_sync.mix)
    if config.reference is None and adapter is not None:
        return live_reference(policy, adapter.off)
    source = load.locate(config.reference or config.model)
    return frozen_reference(source, found.compute, world.device, packed=policy.backbone.packed)


def check(name: str, config: OnlineConfig, console: Console) -> bool:
    """`preftune check` of an online method: what `train` looks at before its first rollout, and that the models load."""
    world = World.join(config.device)
    found = ready(name, config, world)
    show(Line("prompts", True, f"{len(found.prompts)} to train on, {len(found.held_out)} held out"), console)
    show(Line("judges", True, "each answers for a response to the first prompt"), console)
    setup = prepare(found, world)
    notice = next((n for n in setup.notices if "padded rows" in n), None)
    show(Line("packed = padded", notice is None, notice or "hidden states of both layouts agree"), console)
    return notice is None
