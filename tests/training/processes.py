"""Real processes for tests that kill: forked from a clean server that has torch loaded, so that each costs milliseconds."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "preftune.training.run",
        "preftune.cli.main",
        "transformers.models.llama.modeling_llama",
        "peft",
        "tests.tiny",
        "pytest",
        "hypothesis.strategies",
    ]
)


def start(target: Callable[..., Any], *args: Any, failpoint: str = "") -> multiprocessing.process.BaseProcess:
    """`target(*args)` in a new process, with PREFTUNE_FAILPOINT set to `failpoint` there."""
    process = _context.Process(target=_call, args=(failpoint, target, args))
    process.start()
    return process


def run(target: Callable[..., Any], *args: Any, failpoint: str = "") -> int:
    """Run to the end; the exit code, negative for a signal."""
    process = start(target, *args, failpoint=failpoint)
    process.join(60)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def _call(failpoint: str, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["PREFTUNE_FAILPOINT"] = failpoint
    target(*args)
