"""Compile a kernel once, keep it, and run it on the threads of PyTorch's own loops.

PyTorch brings its own OpenMP library. A second one, as numba would start, has a second set of threads, and each set spins for a while
after its work is done, on the cores that the other needs.
"""

from __future__ import annotations

import array
import ctypes
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from preftune.home import cache_home

_SIGNATURE = types.void(types.int64)


class Kernel:
    """A function of the address of int64 arguments, run by all threads at once; each takes parts of the work by `next_part`.

    Argument 0 counts the parts taken, the others are those of the call. Compiled at the first call, or read from the user's cache.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function
        self._address = 0

    def __call__(self, *arguments: int) -> None:
        """Run it; arguments are addresses, counts, and floats by `bits`."""
        if not self._address:
            self._code = _compiled(self.function)  # kept: its memory goes with it
            self._address = self._code.address
        data = array.array("q", (0, *arguments))
        _openmp().GOMP_parallel(self._address, data.buffer_info()[0], torch.get_num_threads(), 0)


@intrinsic
def next_part(context: Any, arguments: Any) -> Any:
    """The number of a part that no thread has taken yet, from 0."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate


def bits(x: float) -> int:
    """A float32 as an argument; kernels read it by `tiles.real`."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(x)).value


def probe() -> None:
    """Raise OSError or AttributeError where PyTorch's loops do not run on GNU OpenMP."""
    _ = _openmp().GOMP_parallel


@functools.cache
def _openmp() -> Any:
    """The OpenMP library that PyTorch has loaded."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        return library
    raise OSError("PyTorch does not bring GNU OpenMP")


def _compiled(function: Callable[[int], None]) -> Any:
    kept = numba.config.CACHE_DIR
    try:
        numba.config.CACHE_DIR = _folder()
        return numba.cfunc(_SIGNATURE, cache=True)(function)
    finally:
        numba.config.CACHE_DIR = kept


@functools.cache
def _folder() -> str:
    """Where compiled code is kept, by the sources and versions it comes from; for the user's eyes alone, it is code to be run."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    versions = f"{numba.__version__} {llvmlite.__version__}".encode()
    key = hashlib.sha256(b"\0".join([versions, *(source.read_bytes() for source in sources)])).hexdigest()[:16]
    folder = cache_home() / "kernels" / key
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return str(folder)
