"""Products of whole tiles, sixteen rows of sixteen pairs of bf16 each, by a CPU's own unit for them (Intel's AMX).

What is laid out by pairs for vectors is what the unit reads as its right side; so nothing is laid out anew for it.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from preftune.kernels import tiles
from preftune.kernels.cpu import has, has_pairs
from preftune.kernels.tiles import LANES, PAIRS, fetch

ROWS = 16
"""Rows of a tile."""
_PANEL = 2 * LANES
_BYTE, _I64 = ir.IntType(8), ir.IntType(64)
_POINTER = _BYTE.as_pointer()
_LINE = 64
_SYSTEM_CALL, _ASK, _TILES = 158, 0x1023, 18
"""arch_prctl, ARCH_REQ_XCOMP_PERM and the number of the tiles' state: Linux wants to be asked before a process uses them."""


def compiled() -> bool:
    """Whether products of bf16 are compiled for that unit."""
    return has("amx-bf16") and has_pairs()


def _permitted() -> bool:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(_SYSTEM_CALL, _ASK, _TILES) == 0


_PERMITTED = compiled() and _permitted()


def multiplies_pairs() -> bool:
    """Whether the CPU multiplies bf16 by pairs and, where that is compiled for the unit, the system lets this process use it."""
    return _PERMITTED if compiled() else has_pairs()


def _call(builder: Any, name: str, kinds: Any, values: Any) -> None:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}")
    builder.call(function, values)


def _on_tiles(name: str, *numbers: int) -> Any:
    """An instruction that names tiles alone."""

    @intrinsic
    def instruction(typing: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, __: Any) -> Any:
            _call(builder, name, [_BYTE] * len(numbers), [ir.Constant(_BYTE, n) for n in numbers])
            return context.get_dummy_value()

        return types.void(), generate

    return instruction


def _with_memory(name: str, tile: int) -> Any:
    """One that reads or writes a tile at an address, with so many bytes from one row to the next."""

    @intrinsic
    def instruction(typing: Any, address: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            values = [ir.Constant(_BYTE, tile), builder.inttoptr(args[0], _POINTER), args[1]]
            _call(builder, name, [_BYTE, _POINTER, _I64], values)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return instruction


@intrinsic
def _shape(typing: Any, bytes_of_four: Any, bytes_of_rest: Any, rows: Any) -> Any:
    """Set up the eight tiles: bytes of a row as four numbers of 16 bits, twice, and rows as eight of 8."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        told = cgutils.alloca_once(builder, ir.ArrayType(_I64, 8))
        nothing = ir.Constant(_I64, 0)
        for i, word in enumerate([ir.Constant(_I64, 1), nothing, args[0], args[1], nothing, nothing, args[2], nothing]):
            builder.store(word, builder.gep(told, [ir.Constant(_I64, 0), ir.Constant(_I64, i)]))
        _call(builder, "ldtilecfg", [_POINTER], [builder.bitcast(told, _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


_WHOLE_LINES = 0x0040_0040_0040_0040
_clear0, _clear1, _clear2, _clear3 = (_on_tiles("tilezero", n) for n in range(4))
_load0, _load1, _load2, _load3, _load4, _load5, _load6, _load7 = (_with_memory("tileloadd64", n) for n in range(8))
_store0, _store1, _store2, _store3 = (_with_memory("tilestored64", n) for n in range(4))
release = _on_tiles("tilerelease")
"""Give the tiles back: a thread's state is small again, and other code finds it as it expects."""


# --- weights in panels: sums 0 and 1 over 2 and 3, rows of the left side in 4 over 5, columns of the right in 6 beside 7 -----------

_add046, _add147, _add256, _add357 = (_on_tiles("tdpbf16ps", *n) for n in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)))


@njit(inline="always")
def blocks_of(above, below):
    """Set up tiles, all of them zero, for blocks of so many rows over so many."""
    rows = above * 0x0000_0001_0000_0101 + below * 0x0000_0100_0101_0000 + ROWS * 0x0101_0000_0000_0000
    _shape(_WHOLE_LINES, _WHOLE_LINES, rows)


@njit(inline="always")
def panel_product(a, b, c, m, k, ahead, lines):
    """c [m, 32] floats = a [m, k] @ b [k, 32] of pairs, all without gaps; m at most 32, k a multiple of 16.

    While it computes it asks for what will be read next, so many lines of the cache at each 16 of k, from `ahead` on.
    """
    row = 4 * k
    blocks_of(min(m, ROWS), max(m - ROWS, 1))
    for at in range(0, k, ROWS):
        for line in range(lines):
            fetch(ahead + _LINE * line)
        ahead += _LINE * lines
        left, right = a + 4 * at, b + 4 * _PANEL * at
        _load4(left, row)
        _load6(right, 4 * _PANEL)
        _add046()
        _load7(right + 4 * LANES, 4 * _PANEL)
        _add147()
        if m > ROWS:
            _load5(left + ROWS * row, row)
            _add256()
            _add357()
    _store0(c, 4 * _PANEL)
    _store1(c + 4 * LANES, 4 * _PANEL)
    if m > ROWS:
        _store2(c + 4 * _PANEL * ROWS, 4 * _PANEL)
        _store3(c + 4 * _PANEL * ROWS + 4 * LANES, 4 * _PANEL)


# --- small products: four sums side by side, the left side in 4 and its end in 5, the right in 6 and its end in 7 --------------------


def _step_of(left: int, right: int) -> Any:
    """Add to the sums the product of a tile of the left side, read to tile `left`, and up to four of the right, read to `right`."""
    load_left, load_right = _with_memory("tileloadd64", left), _with_memory("tileloadd64", right)
    add0, add1, add2, add3 = (_on_tiles("tdpbf16ps", n, left, right) for n in range(4))

    @njit(inline="always")
    def step(a, a_row, b, b_row, n):
        load_left(a, a_row)
        load_right(b, b_row)
        add0()
        if n > LANES:
            load_right(b + 4 * LANES, b_row)
            add1()
        if n > 2 * LANES:
            load_right(b + 8 * LANES, b_row)
            add2()
        if n > 3 * LANES:
            load_right(b + 12 * LANES, b_row)
            add3()

    return step


_whole, _end = _step_of(4, 6), _step_of(5, 7)


def _columns(fresh: bool) -> Any:
    @njit(inline="always")
    def columns(a, a_row, b, b_row, c, c_row, k, n):
        if fresh:
            _clear0()
            _clear1()
            _clear2()
            _clear3()
        else:
            _load0(c, c_row)
            if n > LANES:
                _load1(c + 4 * LANES, c_row)
            if n > 2 * LANES:
                _load2(c + 8 * LANES, c_row)
            if n > 3 * LANES:
                _load3(c + 12 * LANES, c_row)
        whole = k // ROWS * ROWS
        for at in range(0, whole, ROWS):
            _whole(a + 4 * at, a_row, b + b_row * at, b_row, n)
        if k > whole:
            _end(a + 4 * whole, a_row, b + b_row * whole, b_row, n)
        _store0(c, c_row)
        if n > LANES:
            _store1(c + 4 * LANES, c_row)
        if n > 2 * LANES:
            _store2(c + 8 * LANES, c_row)
        if n > 3 * LANES:
            _store3(c + 12 * LANES, c_row)

    return columns


def small_product(numbers: str, fresh: bool) -> Any:
    """As `tiles.small_product`; of pairs by whole tiles where the CPU has the unit."""
    if numbers != PAIRS or not compiled():
        return tiles.small_product(numbers, fresh)

    columns = _columns(fresh)

    @tiles.named(f"product_{'fresh' if fresh else 'further'}_tiles")
    def product(a, a_row, b, b_row, c, c_row, m, k, n):
        end, a_bytes, b_bytes, c_bytes, before = (k - 1) % ROWS + 1, 4 * a_row, 4 * b_row, 4 * c_row, 0
        while m > 0:
            rows = min(m, ROWS)
            if rows != before:
                lines = 0x0040_0040_0000_0040 + 4 * end * 0x0001_0000
                _shape(_WHOLE_LINES, lines, rows * 0x0000_0101_0101_0101 + ROWS * 0x0001_0000_0000_0000 + end * 0x0100_0000_0000_0000)
                before = rows
            for first in range(0, n, 4 * LANES):
                columns(a, a_bytes, b + 4 * first, b_bytes, c + 4 * first, c_bytes, k, n - first)
            m -= rows
            a += a_bytes * rows
            c += c_bytes * rows
        release()

    return product
