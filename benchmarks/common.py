"""What the benchmarks share: our learner, a process of its own for each side, clocks and memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from preftune.cli.preload import allocator, environment
from preftune.configfile import load as load_config
from preftune.methods import Method
from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.models.save import save_model
from preftune.packing.chat import ChatTokenizer, Tree
from preftune.rounds.methods import config_kind
from preftune.training.config import RunConfig
from preftune.training.distributed import World
from preftune.training.learner import Learner, Schedule, make_optimizer
from preftune.training.reference import frozen_reference
from preftune.training.setup import compute_dtype, load_model

ROOT = Path(__file__).resolve().parents[1]
HH = ROOT / ".." / "shared" / "data" / "hh" / "helpful_base_train.jsonl.gz"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def data_file(path: Path) -> Path:
    """The file itself, or a line that says what to give instead."""
    if not path.exists():
        raise SystemExit(f"{path} is not here; give --data FILE with HH transcripts or other pairs")
    return path


SYSTEM = ", system allocator"
"""Behind the name of a side that runs without the caching allocator which Preftune brings."""


def under(allocators: str) -> list[bool]:
    """Whether mimalloc is preloaded, for each word of `mimalloc,system`; False alone where there is no choice."""
    if odd := set(allocators.split(",")) - {"mimalloc", "system"}:
        raise SystemExit(f"--allocators {allocators}: {odd.pop()} is none of mimalloc, system")
    return [False] if allocator() is None or torch.cuda.is_available() else [one == "mimalloc" for one in allocators.split(",")]


def beside(side: str, mine: str, known: Sequence[str]) -> dict[str, str]:
    """Which of our sides, whose names begin with `mine`, the peer's `side` is compared with: under the same allocator, and as installed."""
    found = {"the same allocator": mine + SYSTEM if side.endswith(SYSTEM) else mine}
    if side.endswith(SYSTEM):
        found["each as installed"] = mine
    return {how: one for how, one in found.items() if one in known}


def settled_precision(wanted: str) -> str:
    """`auto` as this machine has it: bf16 where its units multiply it, else fp32."""
    if wanted != "auto":
        return wanted
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if compute_dtype("auto", device) == torch.bfloat16 else "fp32"


def unpack(model: str, folder: Path) -> tuple[ChatTokenizer, Any]:
    """Write the model as a plain directory that both sides load; its tokenizer and config."""
    source = load.locate(model)
    tokenizer = load.load_tokenizer(source)
    language_model = LanguageModel(load.load_causal_lm(source))
    save_model(language_model, tokenizer, folder)
    return tokenizer, language_model.hf.config


def configured(method: Method, **settings: Any) -> RunConfig:
    """The method's config with its defaults, as `preftune train` resolves it; what no benchmark reads is a dash."""
    return load_config(config_kind(method.name), None, (), base={"data": "-", "output": "-", **settings})


def with_optimizer(learner: Learner, steps: int) -> Learner:
    """The learner with the optimizer that every side gets."""
    learner.optimizer = make_optimizer(learner.parameters, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    learner.schedule = Schedule(1e-6, steps, 0.0, "constant")
    return learner


def our_learner(method: Method, model: Path, *, precision: str, budget: int, steps: int, checkpointing: bool = False) -> Learner:
    """The learner of `preftune train`, full fine-tuning with the method's default knobs, and a live reference where it needs one."""
    config, compute, world = configured(method, model=str(model), gradient_checkpointing=checkpointing), DTYPES[precision], World.join()
    source = load.locate(config.model)
    torch.manual_seed(0)
    trained, _, _ = load_model(method, config, source, compute, world)
    learner = Learner(method, config.method, trained, world, budget)
    if method.compares(config.method):
        learner.reference = frozen_reference(source, compute, world.device)
    return with_optimizer(learner, steps)


def timed(learner: Learner, steps: Sequence[Sequence[Tree]]) -> dict[str, Any]:
    """Seconds and loss of each step: forward, backward, clipping and optimizer."""
    seconds, losses = [], []
    for index, trees in enumerate(steps):
        synchronise()
        start = time.perf_counter()
        done = learner.step(trees, index)
        synchronise()
        seconds.append(time.perf_counter() - start)
        losses.append(done.loss)
    return {"seconds": seconds, "losses": losses}


def synchronise() -> None:
    """Wait for the device, so that a clock read afterwards tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: the device's allocations, or this process's largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hand_over(result: dict[str, Any]) -> None:
    """Print a side's result for `own_process`, with its peak memory and allocator."""
    used = "mimalloc" if "mimalloc" in os.environ.get("LD_PRELOAD", "") else "system"
    print("\n" + json.dumps({**result, "peak_memory": peak_memory(), "allocator": used}), file=sys.stdout, flush=True)


def own_process(module: str, words: Sequence[str], *, mimalloc: bool) -> dict[str, Any]:
    """Run `python -m module words`, so that its peak memory is its own; {} where the system killed it for want of memory."""
    command = [sys.executable, "-m", module, *words]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("LD_PRELOAD", None)
    library = allocator()
    if mimalloc and library is not None:
        env = environment(env, library)
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == -signal.SIGKILL:
        return {}
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
