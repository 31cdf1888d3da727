"""Before the first round: prompts, judge and settings are read and tried, so that a mistake costs no time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from preftune import formats
from preftune.configfile import load as load_config
from preftune.errors import UserError
from preftune.methods import METHODS
from preftune.models import load
from preftune.models.policy import LanguageModel, settle_layout
from preftune.records import Example, Response
from preftune.rewards.judge import Opened, ask, open_judge
from preftune.rounds.config import RoundsConfig
from preftune.rounds.methods import ITERATED, Iterated
from preftune.training.check import Line, show
from preftune.training.config import DataConfig, RunConfig, run_config
from preftune.training.setup import compute_dtype


@dataclass
class Ready:
    """What was read and tried before any long work."""

    source: load.Source
    prompts: list[Example]
    held_out: list[Example]
    hashes: dict[str, str]
    judge: Opened
    device: torch.device
    compute: torch.dtype


def ready(row: Iterated, config: RoundsConfig) -> Ready:
    """Read the prompts, open the judge and ask it once. Raises UserError for whatever the user can mend."""
    prompts, held_out, hashes = read_prompts(config)
    source = load.locate(config.model)
    if config.reference:
        load.locate(config.reference)
    training_config(row, config, config.model, Path("selected.jsonl"), Path(config.output))
    tokenizer = load.load_tokenizer(source, template=template(config))
    for example in (*prompts, *held_out):
        if len(tokenizer.encode_prompt(example.prompt)) >= config.max_length:
            what = f"the prompt alone fills max_length ({config.max_length})"
            raise UserError(what, where=example.where, fix="Raise it, or leave the prompt out.")
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    compute = compute_dtype(config.precision, device)
    sizes = {"max_length": config.max_length, "tokens_per_microbatch": config.tokens_per_microbatch}
    judge = open_judge(config.judge, compute=compute, device=device, **sizes)
    ask(judge.judge, [replace(prompts[0], responses=(Response("I do not know."),))])
    return Ready(source, prompts, held_out, hashes, judge, device, compute)


def check(name: str, config: RoundsConfig, console: Console) -> bool:
    """`preftune check` of an iterated method: what `train` looks at before its first round, and that the model takes a packed row."""
    row = ITERATED[name]
    found = ready(row, config)
    show(Line("prompts", True, f"{len(found.prompts)} to train on, {len(found.held_out)} held out"), console)
    show(Line("judge", True, "answers for a response to the first prompt"), console)
    policy = LanguageModel(load.load_causal_lm(found.source), compute=found.compute).to(found.device)
    notice = settle_layout(policy)
    show(Line("packed = padded", notice is None, notice or "hidden states of both layouts agree"), console)
    return notice is None


def training_config(row: Iterated, config: RoundsConfig, model: str, data: Path, output: Path) -> tuple[str, RunConfig]:
    """The method that trains a round, and its config: the run's own settings with the round's model, data and folder."""
    name, knobs = row.trains(config.method)
    method = METHODS[name]
    shared = config.model_dump(mode="json", include=set(RunConfig.model_fields))
    own = {"use": name, "model": model, "data": {"path": [str(data)]}, "output": str(output), "method": knobs}
    alone = {"eval_data": None, "eval_fraction": 0.0, "resume": "auto"}
    return name, load_config(run_config(method.knobs, method.defaults, compares=method.compares), None, base={**shared, **own, **alone})


def read_prompts(config: RunConfig) -> tuple[list[Example], list[Example], dict[str, str]]:
    """Prompts to train on, those held out, and the hashes of their files."""

    def read(data: DataConfig) -> tuple[list[Example], dict[str, str]]:
        found = formats.read_prompts(list(data.path), format=data.format, on_error=data.on_error, limit=data.limit)
        return list(found.examples), {", ".join(data.path): found.sha256}

    prompts, hashes = read(config.data)
    if config.eval_data is not None:
        held, more = read(config.eval_data)
        return prompts, held, hashes | more
    if not config.eval_fraction:
        return prompts, [], hashes
    kept, out = formats.split_by_prompt(prompts, config.eval_fraction, config.seed)
    return kept, out, hashes


def template(config: RoundsConfig) -> str | None:
    """The chat template that the config names, or None for the tokenizer's own."""
    return Path(config.chat_template).read_text() if config.chat_template else None
