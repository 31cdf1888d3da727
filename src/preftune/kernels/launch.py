"""Compile a kernel once, keep it, and run it on the threads of PyTorch's own loops.

PyTorch brings its own OpenMP library. A second one, as numba would start, has a second set of threads, and each set spins for a while
after its work is done, on the cores that the other needs.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import threading
import time
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

log = logging.getLogger(__name__)
_SIGNATURE = types.void(types.int64)
_KEPT_DAYS = 30
_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy"}
"""Liberties taken with sums and products, infinities and NaN keep their meaning; and no check before each division.

What a kernel calls must be inlined before it is compiled (`inline="always"`), where it has a sum that may be reordered: numba compiles a
function that is called on its own, too, in another order, and which of the two runs depends on whether the code was compiled or read.
"""


class Kernel:
    """A function of one address, run by all threads at once; compiled at the first call, or read from the user's cache.

    `given` reads the arguments of the call there. A thread takes the rows that are its own by `my_share`, so that it finds in its core's
    cache what it left there, or, where parts differ in size, one part after the other by `next_part`.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function
        self._address = 0

    def __call__(self, *arguments: int) -> None:
        """Run it; arguments are addresses, counts, and floats by `bits`."""
        if not self._address:
            self._code = _compiled(self.function)  # kept: its memory goes with it
            self._address = self._code.address
        library, _ = _openmp()
        data = array.array("q", (*told(), *arguments))
        library.GOMP_parallel(self._address, data.buffer_info()[0], torch.get_num_threads(), 0)


_INTEGER = ir.IntType(64)
TOLD = 3
"""Numbers before the arguments: how many parts are taken, and where OpenMP says which thread this is and how many there are."""


@intrinsic
def given(context: Any, address: Any) -> Any:
    """Pointer to the arguments of the call. A kernel, which begins with it, is told to use the widest vectors that the CPU has: LLVM makes
    them half as wide on CPUs of Intel's, for the sake of code that uses them now and then.
    """

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        # not by `add`, which knows no attribute with a value; and not inlined, since what would take the kernel in has another one
        set.update(builder.function.attributes, ('"prefer-vector-width"="512"', "noinline"))
        return builder.inttoptr(builder.add(args[0], ir.Constant(_INTEGER, 8 * TOLD)), _INTEGER.as_pointer())

    return types.CPointer(types.int64)(types.int64), generate


@intrinsic
def my_share(context: Any, address: Any, rows: Any) -> Any:
    """The first of this thread's rows, and the first that are not its own any more."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        told = builder.inttoptr(args[0], _INTEGER.as_pointer())

        def ask(at: int) -> Any:
            place = builder.load(builder.gep(told, [ir.Constant(_INTEGER, at)]))
            function = builder.inttoptr(place, ir.FunctionType(ir.IntType(32), []).as_pointer())
            return builder.sext(builder.call(function, []), _INTEGER)

        thread, threads = ask(1), ask(2)
        bound = lambda n: builder.sdiv(builder.mul(args[1], n), threads)
        found = ir.Constant(ir.ArrayType(_INTEGER, 2), ir.Undefined)
        found = builder.insert_value(found, bound(thread), 0)
        return builder.insert_value(found, bound(builder.add(thread, ir.Constant(_INTEGER, 1))), 1)

    return types.UniTuple(types.int64, 2)(types.int64, types.int64), generate


@intrinsic
def next_part(context: Any, address: Any) -> Any:
    """The number of a part that no thread has taken yet, from 0."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], _INTEGER.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(_INTEGER, 1), "monotonic")

    return types.int64(types.int64), generate


def bits(x: float) -> int:
    """A float32 as an argument; kernels read it by `tiles.real`."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(x)).value


def told() -> tuple[int, int, int]:
    """What a kernel is told before its arguments."""
    return _openmp()[1]


def barrier() -> int:
    """The address of a function by which threads of one call wait for each other."""
    return ctypes.cast(_openmp()[0].GOMP_barrier, ctypes.c_void_p).value or 0


def probe() -> None:
    """Raise OSError or AttributeError where PyTorch's loops do not run on GNU OpenMP."""
    _openmp()


@functools.cache
def _openmp() -> tuple[Any, tuple[int, int, int]]:
    """The OpenMP library that PyTorch has loaded, and what a kernel is told before its arguments."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.GOMP_barrier.restype = None
        thread, threads = (
            ctypes.cast(one, ctypes.c_void_p).value or 0 for one in (library.omp_get_thread_num, library.omp_get_num_threads)
        )
        return library, (0, thread, threads)
    raise OSError("PyTorch does not bring GNU OpenMP")


_ONE_AT_A_TIME = threading.RLock()
"""Where numba keeps code is a setting of the process: set back while another thread compiles, code would lie in the current folder."""


def _compiled(function: Callable[[int], None]) -> Any:
    with _ONE_AT_A_TIME:
        kept = numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = _folder()
            return numba.cfunc(_SIGNATURE, cache=True, **_OPTIONS)(function)
        except Exception as error:  # no room, no right to write, or a file that something else has damaged: seconds lost, nothing more
            log.info("a kernel is compiled for this run alone: %s", error)
            return numba.cfunc(_SIGNATURE, **_OPTIONS)(function)
        finally:
            numba.config.CACHE_DIR = kept


@functools.cache
def _folder() -> str:
    """Where compiled code is kept, by the sources and versions it comes from; it will be run, so nobody else may write there."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    versions = f"{numba.__version__} {llvmlite.__version__}".encode()
    key = hashlib.sha256(b"\0".join([versions, *(source.read_bytes() for source in sources)])).hexdigest()[:16]
    folder = cache_home() / "kernels" / key
    if not folder.exists():
        log.warning("Compiling for this machine's CPU, once: up to a minute in all.")
        _remove_old(folder.parent)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"others may write to {folder}")
    return str(folder)


def _remove_old(home: Path) -> None:
    """Remove what other versions compiled more than `_KEPT_DAYS` ago; one that still runs compiles again."""
    for old in home.glob("*"):
        with contextlib.suppress(OSError):
            if old.is_dir() and not old.is_symlink() and time.time() - old.stat().st_mtime > _KEPT_DAYS * 86400:
                shutil.rmtree(old)
