"""Loops that PyTorch has no single call for, compiled for this machine's CPU by numba the first time they are needed.

A model's linear layers stay with PyTorch. What lies between them is a chain of small operations each of which reads and writes all
of its numbers; here such a chain is one loop. Every kernel has a twin in plain PyTorch beside its caller, which runs where numba is not
installed, on other devices, and with `PREFTUNE_KERNELS=off`; the tests hold the two against each other.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

log = logging.getLogger(__name__)
SWITCH = "PREFTUNE_KERNELS"


def find(name: str) -> ModuleType | None:
    """The kernels of this room's module `name`, or None where PyTorch must do."""
    return None if os.environ.get(SWITCH) == "off" else _load(name)


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        importlib.import_module(f"{__name__}.launch").probe()
        return importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # whatever numba, LLVM or the system lack here, PyTorch does the same
        log.info("no compiled kernels on this machine, PyTorch does without: %s", error)
        return None
