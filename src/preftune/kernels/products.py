"""Products with weights that lie as the CPU multiplies them: what a decoding step reads of memory, it reads once and in order.

Bf16 is multiplied by pairs that follow each other along the inner dimension, a pair in the place of a float; so both types lie alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from preftune.kernels import amx
from preftune.kernels.cpu import has
from preftune.kernels.launch import Kernel, given, my_share
from preftune.kernels.pairs import across
from preftune.kernels.tiles import FLOATS, LANES, PAIRS, at32i, memory, narrow_line, panel_product

_WIDE = has("avx512f")
_VECTORS = 2 if _WIDE else 1
PANEL = LANES * _VECTORS
"""Columns made at a time: their weights stay in the core's cache from one block of rows to the next."""
_ROWS = 192
"""Rows at a time: they stay there, too, from one panel to the next."""
_AT_ONCE = 2**19
"""Bytes of rows that stay there where whole tiles multiply, faster than a panel comes from the third level."""
_TALLEST = {PAIRS: 6, FLOATS: 12 if _WIDE else 6}
"""Rows whose results are held in registers."""


def _multiply(half: bool) -> Any:
    size, get, put = memory(half)
    numbers, tiles = PAIRS if half else FLOATS, half and amx.compiled()
    by_vectors = panel_product(_VECTORS, numbers, _TALLEST[numbers], not half)
    block = 2 * amx.ROWS if tiles else _ROWS

    @njit(inline="always")
    def multiply(address):
        ask = given(address)
        x, weights, bias, out, rows, inner, columns = ask[0], ask[1], ask[2], ask[3], ask[4], ask[5], ask[6]
        result = np.empty((block, PANEL), np.float32)
        start, end = my_share(address, columns // PANEL)
        together = max(_AT_ONCE // (4 * inner * block), 1) * block if tiles else _ROWS
        for first in range(0, rows, together):
            last = min(first + together, rows)
            lines = block * block // (last - first + block - 1) + 1
            for panel in range(start, end):
                weight = weights + 4 * panel * PANEL * inner
                ahead = weight + 4 * PANEL * inner
                for top in range(first, last, block):
                    some = min(last - top, block)
                    if tiles:
                        amx.panel_product(x + 4 * top * inner, weight, result.ctypes.data, some, inner, ahead, lines)
                        ahead += 4 * lines * inner
                    else:
                        by_vectors(x + 4 * top * inner, weight, result.ctypes.data, some, inner)
                    if bias:
                        for i in range(some):
                            for c in range(PANEL):
                                result[i, c] += get(bias + size * panel * PANEL, c)
                    for i in range(some):
                        line = out + size * ((top + i) * columns + panel * PANEL)
                        if tiles:
                            narrow_line(result.ctypes.data + 4 * PANEL * i, line)
                        else:
                            for c in range(PANEL):
                                put(line, c, result[i, c])
        if tiles:
            amx.release()

    return multiply


@njit(inline="always")
def _lay_out(address):
    ask = given(address)
    weight, to, inner, columns = ask[0], ask[1], ask[2], ask[3]
    start, end = my_share(address, columns // PANEL)
    for panel in range(start, end):
        offset = 4 * panel * PANEL * inner
        across(weight + offset, 2 * inner, PANEL, 2 * inner, carray(at32i(to + offset), (inner, PANEL)), 0)


multiply_halves, multiply_floats = _multiply(True), _multiply(False)


def _multiply16(address: int) -> None:
    multiply_halves(address)


def _multiply32(address: int) -> None:
    multiply_floats(address)


def _lay_out_any(address: int) -> None:
    _lay_out(address)


_MULTIPLY = {torch.bfloat16: Kernel(_multiply16), torch.float32: Kernel(_multiply32)}
_LAY_OUT = Kernel(_lay_out_any)


def takes(weight: Tensor) -> bool:
    """Whether a weight [V, D] may be laid out: on a CPU that multiplies its type by vectors, in whole panels (of whole pairs)."""
    if weight.device.type != "cpu" or weight.shape[0] % PANEL:
        return False
    if weight.dtype == torch.bfloat16:
        return weight.shape[1] % (2 * amx.ROWS if amx.compiled() else 2) == 0 and amx.multiplies_pairs()
    return weight.dtype == torch.float32 and has("fma")


def lay_out(weight: Tensor) -> Tensor:
    """A weight [V, D] as panels for `multiply`: [V / PANEL, D, PANEL], or [V / PANEL, D / 2, PANEL] pairs of bf16 as int32.

    Raises ValueError for one that is not taken.
    """
    if not takes(weight):
        raise ValueError(f"a weight of {list(weight.shape)} {weight.dtype} is not multiplied by panels here")
    weight = weight.contiguous()
    columns, inner = len(weight), weight.nbytes // 4 // len(weight)
    made = weight.new_empty((columns // PANEL, inner, PANEL), dtype=torch.int32 if weight.dtype == torch.bfloat16 else torch.float32)
    _LAY_OUT(weight.data_ptr(), made.data_ptr(), inner, columns)
    return made


def multiply(x: Tensor, panels: Tensor, bias: Tensor | None = None) -> Tensor:
    """[.., V] = x @ weight.T + bias of x [.., D], the weight as `lay_out` gave it, all of one type; sums in fp32, rounded once.

    A row's numbers do not depend on the rows beside it.
    """
    count, inner, _ = panels.shape
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], count * PANEL))
    where = x.data_ptr(), panels.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    _MULTIPLY[x.dtype](*where, x.nbytes // 4 // inner, inner, count * PANEL)
    return out
