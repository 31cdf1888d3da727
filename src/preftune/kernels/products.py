"""Products with weights that lie as the CPU multiplies bf16: what a decoding step reads of memory, it reads once and in order."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from preftune.kernels.launch import Kernel, given, my_share
from preftune.kernels.pairs import across
from preftune.kernels.tiles import LANES, at16, at32i, multiplies_pairs, narrow, panel_product

_VECTORS = 2
PANEL = LANES * _VECTORS
"""Columns made at a time: their weights stay in the core's cache from one block of rows to the next."""
_ROWS = 192
"""Rows at a time: they stay there, too, from one panel to the next."""
_product = panel_product(_VECTORS)


@njit(inline="always")
def _multiply(address):
    ask = given(address)
    x, weights, out, rows, pairs, columns = ask[0], ask[1], ask[2], ask[3], ask[4], ask[5]
    result = np.empty((_ROWS, PANEL), np.float32)
    start, end = my_share(address, columns // PANEL)
    for top in range(0, rows, _ROWS):
        some = min(rows - top, _ROWS)
        for panel in range(start, end):
            _product(x + 4 * top * pairs, weights + 4 * panel * PANEL * pairs, result.ctypes.data, some, pairs)
            for i in range(some):
                line = at16(out + 2 * ((top + i) * columns + panel * PANEL))
                for c in range(PANEL):
                    line[c] = narrow(result[i, c])


@njit(inline="always")
def _lay_out(address):
    ask = given(address)
    weight, to, pairs, columns = ask[0], ask[1], ask[2], ask[3]
    start, end = my_share(address, columns // PANEL)
    for panel in range(start, end):
        offset = 4 * panel * PANEL * pairs
        across(weight + offset, 2 * pairs, PANEL, 2 * pairs, carray(at32i(to + offset), (pairs, PANEL)), 0)


def _multiply16(address: int) -> None:
    _multiply(address)


def _lay_out16(address: int) -> None:
    _lay_out(address)


_MULTIPLY, _LAY_OUT = Kernel(_multiply16), Kernel(_lay_out16)


def takes(weight: Tensor) -> bool:
    """Whether a weight [V, D] may be laid out: bf16 on a CPU that multiplies it by pairs, in whole panels of whole pairs."""
    whole = weight.shape[0] % PANEL == 0 and weight.shape[1] % 2 == 0
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and whole and multiplies_pairs()


def lay_out(weight: Tensor) -> Tensor:
    """A weight [V, D] as panels [V / PANEL, D / 2, PANEL] of pairs, for `multiply`."""
    weight = weight.contiguous()
    columns, pairs = len(weight), weight.shape[1] // 2
    made = weight.new_empty((columns // PANEL, pairs, PANEL), dtype=torch.int32)
    _LAY_OUT(weight.data_ptr(), made.data_ptr(), pairs, columns)
    return made


def multiply(x: Tensor, panels: Tensor) -> Tensor:
    """[.., V] = x @ weight.T of x [.., D] in bf16, the weight as `lay_out` gave it; sums in fp32, rounded once.

    A row's numbers do not depend on the rows beside it.
    """
    count, pairs, _ = panels.shape
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], count * PANEL))
    _MULTIPLY(x.data_ptr(), panels.data_ptr(), out.data_ptr(), x.numel() // (2 * pairs), pairs, count * PANEL)
    return out
