"""Products of whole tiles, sixteen rows of sixteen pairs of bf16 each, by a CPU's own unit for them (Intel's AMX).

A weight's panel of pairs (`products.lay_out`) is what the unit reads as its right side; so nothing is laid out anew for it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from preftune.kernels.cpu import has, has_pairs
from preftune.kernels.tiles import LANES, at64, fetch

ROWS = 16
"""Rows of a tile."""
_PANEL = 2 * LANES
_BYTES, _I64 = ir.IntType(8), ir.IntType(64)
_POINTER = _BYTES.as_pointer()
_LINE = 64
_SYSTEM_CALL, _ASK, _TILES = 158, 0x1023, 18
"""arch_prctl, ARCH_REQ_XCOMP_PERM and the number of the tiles' state: Linux wants to be asked before a process uses them."""


def compiled() -> bool:
    """Whether products of bf16 are compiled for that unit."""
    return has("amx-bf16") and has_pairs()


@functools.cache
def multiplies_tiles() -> bool:
    """Whether the CPU has the unit and the system lets this process use it."""
    if not compiled() or platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(_SYSTEM_CALL, _ASK, _TILES) == 0


def _named(name: str, arguments: int, body: Any) -> Any:
    """An intrinsic of int64 arguments that calls LLVM's function of that name as `body` says: its types, and how to make its values."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        kinds, values = body(builder, args)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}")
        builder.call(function, values)
        return context.get_dummy_value()

    kind = types.void(*[types.int64] * arguments)
    if arguments == 0:
        return intrinsic(lambda context: (kind, generate))
    if arguments == 1:
        return intrinsic(lambda context, address: (kind, generate))
    return intrinsic(lambda context, address, row: (kind, generate))


def _number(n: int) -> Any:
    return ir.Constant(_BYTES, n)


def _load(tile: int) -> Any:
    """Read a tile from an address, with so many bytes from one row to the next."""
    return _named(
        "tileloadd64", 2, lambda builder, args: ([_BYTES, _POINTER, _I64], [_number(tile), builder.inttoptr(args[0], _POINTER), args[1]])
    )


def _store(tile: int) -> Any:
    return _named(
        "tilestored64", 2, lambda builder, args: ([_BYTES, _POINTER, _I64], [_number(tile), builder.inttoptr(args[0], _POINTER), args[1]])
    )


def _clear(tile: int) -> Any:
    return _named("tilezero", 0, lambda builder, args: ([_BYTES], [_number(tile)]))


def _add(to: int, left: int, right: int) -> Any:
    """to += left @ right."""
    return _named("tdpbf16ps", 0, lambda builder, args: ([_BYTES] * 3, [_number(n) for n in (to, left, right)]))


_configure = _named("ldtilecfg", 1, lambda builder, args: ([_POINTER], [builder.inttoptr(args[0], _POINTER)]))
release = _named("tilerelease", 0, lambda builder, args: ([], []))
"""Give the tiles back: the thread's state is small again, and other code finds it as it expects."""

_SUMS = [[0, 1], [2, 3]]
_ABOVE, _BELOW, _LEFT, _RIGHT = 4, 5, 6, 7
_clear00, _clear01, _clear10, _clear11 = (_clear(tile) for line in _SUMS for tile in line)
_store00, _store01, _store10, _store11 = (_store(tile) for line in _SUMS for tile in line)
_add00, _add01, _add10, _add11 = (_add(_SUMS[i][j], (_ABOVE, _BELOW)[i], (_LEFT, _RIGHT)[j]) for i in range(2) for j in range(2))
_load_above, _load_below, _load_left, _load_right = map(_load, (_ABOVE, _BELOW, _LEFT, _RIGHT))
_WHOLE_LINES = 0x0040_0040_0040_0040
"""Four tiles' bytes of a row."""


@njit(inline="always")
def shape(told, above, below):
    """Set up tiles for so many rows of the left side: `told` is the address of 64 bytes."""
    words = at64(told)
    words[0], words[1], words[2], words[3], words[4], words[5], words[7] = 1, 0, _WHOLE_LINES, _WHOLE_LINES, 0, 0, 0
    words[6] = above * 0x0000_0001_0000_0101 + below * 0x0000_0100_0101_0000 + ROWS * 0x0101_0000_0000_0000
    _configure(told)


@njit(inline="always")
def product(told, a, b, c, m, k):
    """c [m, 32] floats = a [m, k] @ b [k, 32] of pairs, k a multiple of 16, all without gaps; tiles are set up for 16 and 16 rows.

    While it computes it asks for what lies behind b, as much as b has.
    """
    blocks = (m + 2 * ROWS - 1) // (2 * ROWS)
    ahead, each = b + 4 * _PANEL * k, (2 * ROWS + blocks - 1) // blocks
    row = 4 * k
    while m > 0:
        if m < 2 * ROWS:
            shape(told, min(m, ROWS), max(m - ROWS, 1))
        _clear00()
        _clear01()
        if m > ROWS:
            _clear10()
            _clear11()
        below = a + ROWS * row
        for at in range(0, k, ROWS):
            for line in range(each):
                fetch(ahead + _LINE * line)
            ahead += _LINE * each
            here = b + 4 * _PANEL * at
            _load_above(a + 4 * at, row)
            _load_left(here, 4 * _PANEL)
            _add00()
            _load_right(here + 4 * LANES, 4 * _PANEL)
            _add01()
            if m > ROWS:
                _load_below(below + 4 * at, row)
                _add10()
                _add11()
        _store00(c, 4 * _PANEL)
        _store01(c + 4 * LANES, 4 * _PANEL)
        if m > ROWS:
            _store10(c + 4 * _PANEL * ROWS, 4 * _PANEL)
            _store11(c + 4 * _PANEL * ROWS + 4 * LANES, 4 * _PANEL)
        if m < 2 * ROWS:
            shape(told, ROWS, ROWS)
        m -= 2 * ROWS
        a += 2 * ROWS * row
        c += 4 * 2 * ROWS * _PANEL
