"""Online runs on a small model, a few prompts and a rule: whole ones, and ones that are opened and looked into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from preftune.cli.main import resolve
from preftune.online.collect import EXPERIENCE, Collector
from preftune.online.experience import Experience
from preftune.online.ready import prepare, ready
from preftune.online.run import OnlineRun
from preftune.training.distributed import World
from preftune.training.metrics import read_metrics
from preftune.training.rundir import RunDirectory
from preftune.training.signals import GracefulStop
from tests import tiny
from tests.training import runs

RULE = "def rule(example, response):\n    return sum(c in 'aeiou' for c in response.text) / (1 + len(response.text))\n"
PROMPTS = 9


def place(folder: Path, ends: float = 1.7, **shape: int) -> Path:
    """A folder with a model, prompts of several lengths and a rule; the larger `ends`, the sooner responses end by themselves.

    `shape` changes the model's config.
    """
    model = tiny.model(scale=2.0, **shape)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0.05  # what all states have in common,
        model.get_output_embeddings().weight[2] = 0.0
        model.get_output_embeddings().weight[2, 0] = ends  # and what ends a turn is read from
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    asked = [f"Say {'again ' * (i % 3)}{i}!" for i in range(PROMPTS)]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in asked]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text(RULE)
    return folder


def words(place: Path, output: Path, method: str, *more: str) -> list[str]:
    """The words after `preftune train`; later words win."""
    settings = {
        "model": place / "model",
        "data": place / "prompts.jsonl",
        "output": output,
        "judge": f"{place}/rule.py:rule",
        "eval_fraction": 0.2,
        "rollout.max_new_tokens": 8,
        "rollout.n": 3,
        "prompts_per_step": 2,
        "max_length": 48,
        "tokens_per_microbatch": 80,
        "lr": 5e-4,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "save_every": 1,
    }
    settings |= dict(word.split("=", 1) for word in more)
    return [method, *(f"{key}={value}" for key, value in settings.items())]


def trained(place: Path, output: Path, method: str, *more: str) -> list[dict[str, Any]]:
    """A whole run, of which all rollouts stay on disk; its rows of steps."""
    with mock.patch.object(Collector, "tidy"):
        assert runs.train(words(place, output, method, *more)) == 0
    return steps(output)


def steps(output: Path) -> list[dict[str, Any]]:
    """The rows of a run's steps."""
    return [row for row in read_metrics(output / "metrics.jsonl") if row["kind"] == "train"]


@contextmanager
def opened(place: Path, output: Path, method: str, *more: str) -> Iterator[OnlineRun]:
    """A run that is ready for its first rollout, as `train` makes it."""
    name, config = resolve(words(place, output, method, *more))
    torch.set_num_threads(1)
    world = World.join("cpu")
    found = ready(name, config, world)
    setup = prepare(found, world)
    with RunDirectory(Path(config.output)) as directory, GracefulStop() as stop:
        run = OnlineRun(setup, directory, Console(quiet=True), stop, found=found)
        run.total = run.plan()
        yield run


def rollout(run: OnlineRun) -> Experience:
    """The first rollout of an opened run."""
    return run.collector.experience(1, 0, run.position.cursor, run.phase.coefficients, run.phase.seen)[0]


def kept(output: Path, number: int = 1) -> Experience:
    """A rollout that a run has left on disk."""
    return Experience.load(output / "rollouts" / str(number) / EXPERIENCE)


def lines(output: Path, number: int = 1, name: str = "samples") -> list[dict[str, Any]]:
    """The lines of a rollout's journal, its header left out."""
    return [json.loads(line) for line in (output / "rollouts" / str(number) / f"{name}.jsonl").read_text().splitlines()[1:]]
