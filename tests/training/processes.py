"""Real processes for tests that kill: forked from a clean server that has torch loaded, so that each costs milliseconds."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

_starting_or_reading = threading.Lock()
"""Starting a process reads the exit status of any other that has ended; two threads that read one status at a time make it 255."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "preftune.training.run",
        "preftune.online.run",
        "preftune.cli.main",
        "preftune.kernels.blocks",
        "preftune.kernels.logprobs",
        "preftune.kernels.pointwise",
        "preftune.kernels.products",
        "preftune.kernels.trees",
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
    with _starting_or_reading:
        process.start()
    return process


def run(target: Callable[..., Any], *args: Any, failpoint: str = "") -> int:
    """Run to the end; the exit code, negative for a signal."""
    process = start(target, *args, failpoint=failpoint)
    assert connection.wait([process.sentinel], 300), "the process hangs"
    with _starting_or_reading:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _call(failpoint: str, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["PREFTUNE_FAILPOINT"] = failpoint
    target(*args)
