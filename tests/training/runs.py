"""Whole training runs on tiny models: in this process or in one that can be killed, and what they left behind."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from preftune.errors import EXIT_NONFINITE, EXIT_USER, NonFiniteError, UserError
from preftune.training.metrics import read_metrics
from tests.training import processes

BASE = (
    "data.path=sample:hh_pairs",
    "data.limit=14",
    "eval_fraction=0.25",
    "epochs=2",
    "prompts_per_step=3",
    "max_length=160",
    "tokens_per_microbatch=160",
    "precision=fp32",
    "device=cpu",
    "save_every=2",
    "eval_every=3",
    "threads=1",
    "lr=1e-3",
)
"""Several micro-batches a step, an epoch whose last step is smaller, saves and evaluations that do not coincide."""

RATED = ("data.path=sample:kwise", "max_length=256", "tokens_per_microbatch=256")
"""In place of pairs, for a method that learns ratings."""
NEEDS_RATINGS = ("reward_pointwise",)

LORA = ("lora.rank=4", "lora.alpha=8")
TIMINGS = ("seconds", "peak_memory", "sampled_tokens_per_second")
"""What no two runs share; keys that begin with one of these go too."""


def command(method: str, model: Path, output: Path, *words: str) -> list[str]:
    """The words after `preftune train` for this run; later words win over BASE."""
    rated = RATED if method in NEEDS_RATINGS else ()
    settings = dict(word.split("=", 1) for word in (*BASE, *rated, *words))
    return [method, f"model={model}", f"output={output}", *(f"{key}={value}" for key, value in settings.items())]


def train(words: list[str]) -> int:
    """The command in this process, without the report after it; its exit code, or whatever it raises."""
    from preftune.cli.console import progress_console
    from preftune.cli.main import resolve, start

    name, config = resolve(words)
    return start(name, config, progress_console())


def _child(words: list[str], log: str, trace: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if trace:
        _trace_failpoints(trace)
    try:
        code = train(words)
    except (UserError, NonFiniteError) as error:
        print(error, flush=True)
        code = EXIT_USER if isinstance(error, UserError) else EXIT_NONFINITE
    sys.stdout.flush()
    os._exit(code)


def _trace_failpoints(trace: str) -> None:
    """Append the name of every failpoint passed to the file `trace`, so that a killed process tells how far it came."""
    from preftune.online import collect, drawing, judging
    from preftune.online import run as online
    from preftune.rounds import run as rounds
    from preftune.training import checkpoint, durable, failpoints, metrics, run

    descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def traced(name: str) -> None:
        os.write(descriptor, f"{name}\n".encode())
        failpoints.failpoint(name)

    for module in (checkpoint, durable, metrics, run, rounds, collect, drawing, judging, online):
        module.failpoint = traced


def start(words: list[str], log: Path, trace: Path | None = None) -> Any:
    """The command in a process of its own, its output appended to `log`."""
    return processes.start(_child, words, str(log), str(trace or ""))


def run(words: list[str], log: Path, trace: Path | None = None, failpoint: str = "") -> int:
    """The command in a process of its own, to its end; the exit code, negative for a signal."""
    return processes.run(_child, words, str(log), str(trace or ""), failpoint=failpoint)


def passed(trace: Path) -> list[str]:
    """The failpoints that a traced process passed, in order."""
    return trace.read_text().split("\n")[:-1] if trace.exists() else []


def digests(output: Path, *, last_only: bool = False) -> dict[str, str]:
    """SHA-256 of every file of every checkpoint (or of the newest), and of the weights of the final model and of its critic."""
    checkpoints = sorted((output / "checkpoints").glob("step-*"))
    files = [file for path in (checkpoints[-1:] if last_only else checkpoints) for file in sorted(path.iterdir())]
    files += [output / "final" / "model.safetensors", *(output / "critic").glob("*.safetensors")]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def is_timing(key: str) -> bool:
    """Whether no two runs share it."""
    return any(key == name or key.startswith(f"{name}_") for name in TIMINGS)


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of the run's metrics without what no two runs share."""
    return [{key: value for key, value in row.items() if not key.startswith(TIMINGS)} for row in read_metrics(output / "metrics.jsonl")]


def assert_same(output: Path, whole: Path, *, last_only: bool = False) -> None:
    """The run in `output` ended as the one in `whole` did: every byte and every row."""
    for ours, theirs in itertools.zip_longest(rows(output), rows(whole)):
        assert ours == theirs
    assert digests(output, last_only=last_only) == digests(whole, last_only=last_only)
    hidden = [path.name for path in (*output.iterdir(), *(output / "checkpoints").iterdir()) if path.name.startswith(".tmp")]
    assert not hidden


def digests_of_tree(output: Path) -> dict[str, str]:
    """SHA-256 of everything in the run directory but the lock."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
