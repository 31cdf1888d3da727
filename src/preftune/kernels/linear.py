"""Products of a linear layer as training makes them, by pairs of bf16: of its rows, back to them, and the gradient of its weight.

A thread lays out 32 columns of a weight, which stay in its core's cache while all rows are multiplied with them; so weights are read once,
in their own type, and no copy of them is written. Gradients of weights are written as the fp32 sums that they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from preftune.kernels import amx
from preftune.kernels.launch import Kernel, given, my_share
from preftune.kernels.pairs import across
from preftune.kernels.tiles import LANES, PAIRS, at16, at32i, memory, narrow, paired, panel_product, tile_of

PANEL = 2 * LANES
"""Columns made at a time."""
_ROWS = 192
"""Rows at a time: what is made of them is rounded before it leaves the cache."""
_HEIGHT = 8
"""Rows of a weight's gradient that are held in registers."""
_by_rows = panel_product(PANEL // LANES, PAIRS, 6)
_by_columns = tile_of(_HEIGHT, PANEL // LANES, PAIRS, True, a_step=PANEL)


@njit(inline="always")
def _multiply(x, panel, first, last, inner, out, row):
    """Rows `first` to `last` of x [.., inner pairs] with a panel, rounded, to columns of `out`."""
    result = np.empty((_ROWS, PANEL), np.float32)
    for top in range(first, last, _ROWS):
        some = min(last - top, _ROWS)
        _by_rows(x + 4 * top * inner, panel, result.ctypes.data, some, inner)
        for i in range(some):
            line = at16(out + 2 * (top + i) * row)
            for c in range(PANEL):
                line[c] = narrow(result[i, c])


def _times(half: bool) -> Any:
    size, get, _ = memory(half)

    @njit(inline="always")
    def times(address):
        ask = given(address)
        x, out, rows, inner, row, chunks, weight, columns = ask[0], ask[1], ask[2], ask[3], ask[4], ask[5], ask[6], ask[7]
        lines, panel = np.empty((PANEL, inner), np.int16), np.empty((inner // 2, PANEL), np.int32)
        start, end = my_share(address, columns // PANEL * chunks)
        for part in range(start, end):
            at, chunk = part // chunks * PANEL, part % chunks
            if chunk == 0 or part == start:
                for j in range(PANEL):
                    source = weight + size * (at + j) * inner
                    for c in range(inner):
                        lines[j, c] = narrow(get(source, c))
                across(lines.ctypes.data, inner, PANEL, inner, panel, 0)
            _multiply(x, panel.ctypes.data, rows * chunk // chunks, rows * (chunk + 1) // chunks, inner // 2, out + 2 * at, row)

    return times


def _times_back(half: bool) -> Any:
    size, get, _ = memory(half)

    @njit(inline="always")
    def times_back(address):
        ask = given(address)
        grads, out, rows, columns, inner, chunks, weights = ask[0], ask[1], ask[2], ask[3], ask[4], ask[5], ask[6]
        panel = np.empty((inner // 2, PANEL), np.int32)
        start, end = my_share(address, columns // PANEL * chunks)
        for part in range(start, end):
            at, chunk = part // chunks * PANEL, part % chunks
            if chunk == 0 or part == start:
                pair = 0
                for i in range(weights):
                    weight, high = ask[7 + 2 * i] + size * at, ask[8 + 2 * i]
                    for line in range(high // 2):
                        low = weight + 2 * size * line * columns
                        for c in range(PANEL):
                            panel[pair + line, c] = paired(narrow(get(low, c)), narrow(get(low + size * columns, c)))
                    pair += high // 2
            _multiply(grads, panel.ctypes.data, rows * chunk // chunks, rows * (chunk + 1) // chunks, inner // 2, out + 2 * at, columns)

    return times_back


@njit(inline="always")
def _stand_columns(matrix, rows, columns, to):
    """32 columns of all rows of a bf16 matrix: pairs of rows that follow each other, the last with nothing where there is no other."""
    for i in range(0, rows - 1, 2):
        low, high = at16(matrix + 2 * i * columns), at16(matrix + 2 * (i + 1) * columns)
        for c in range(PANEL):
            to[i // 2, c] = paired(low[c], high[c])
    if rows % 2:
        low = at16(matrix + 2 * (rows - 1) * columns)
        for c in range(PANEL):
            to[rows // 2, c] = paired(low[c], 0)


@njit(inline="always")
def _stand(address):
    ask = given(address)
    matrix, to, rows, columns = ask[0], ask[1], ask[2], ask[3]
    pairs = (rows + 1) // 2
    start, end = my_share(address, columns // PANEL)
    for panel in range(start, end):
        _stand_columns(matrix + 2 * panel * PANEL, rows, columns, carray(at32i(to + 4 * panel * PANEL * pairs), (pairs, PANEL)))


@njit(inline="always")
def _pull(address):
    ask = given(address)
    grads, panels, out, rows, high, wide = ask[0], ask[1], ask[2], ask[3], ask[4], ask[5]
    pairs = (rows + 1) // 2
    own = np.empty((pairs, PANEL), np.int32)
    start, end = my_share(address, high // PANEL * (wide // PANEL))
    for part in range(start, end):
        top, left = part // (wide // PANEL) * PANEL, part % (wide // PANEL) * PANEL
        if left == 0 or part == start:
            _stand_columns(grads + 2 * top, rows, high, own)
        for line in range(0, PANEL, _HEIGHT):
            to = out + 4 * ((top + line) * wide + left)
            _by_columns(own.ctypes.data + 4 * line, 1, panels + 4 * left * pairs, PANEL, to, wide, pairs, 0, 0)


_times_halves, _times_floats, _times_back_halves, _times_back_floats = _times(True), _times(False), _times_back(True), _times_back(False)


def _times16(address: int) -> None:
    _times_halves(address)


def _times32(address: int) -> None:
    _times_floats(address)


def _times_back16(address: int) -> None:
    _times_back_halves(address)


def _times_back32(address: int) -> None:
    _times_back_floats(address)


def _stand16(address: int) -> None:
    _stand(address)


def _pull16(address: int) -> None:
    _pull(address)


_STAND, _PULL = Kernel(_stand16), Kernel(_pull16)
_TIMES = {torch.bfloat16: Kernel(_times16), torch.float32: Kernel(_times32)}
_TIMES_BACK = {torch.bfloat16: Kernel(_times_back16), torch.float32: Kernel(_times_back32)}


def takes(rows: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether both products of [T, ..] rows in bf16 with [V_i, D] weights of one type are made here: see `takes_pairs`."""
    of_one_type = len({w.dtype for w in weights}) == 1 and weights[0].dtype in _TIMES
    return of_one_type and takes_pairs(rows) and all(_whole(w, len(w)) for w in weights)


def takes_pairs(*rows: Tensor) -> bool:
    """Whether [T, C] rows in bf16 are multiplied here: on a CPU that does so by pairs, but not by whole tiles, which PyTorch's products use
    well, and in whole panels.
    """
    return amx.multiplies_pairs() and not amx.compiled() and all(r.dtype == torch.bfloat16 and _whole(r) for r in rows)


def _whole(matrix: Tensor, rows: int = 0) -> bool:
    return matrix.device.type == "cpu" and matrix.is_contiguous() and matrix.shape[1] % PANEL == rows % PANEL == 0


def times(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[T, V] = rows @ weight.T of [T, D] rows and [V_i, D] weights, side by side; sums in fp32, rounded once, each row's on its own."""
    out = rows.new_empty((len(rows), sum(map(len, weights))))
    to = out.data_ptr()
    for w in weights:
        _TIMES[w.dtype](rows.data_ptr(), to, *rows.shape, out.shape[1], _chunks(len(w)), w.data_ptr(), len(w))
        to += out.element_size() * len(w)
    return out


def times_back(grads: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[T, D] = grads @ weights of [T, V] gradients of what `times` makes; sums in fp32, rounded once, each row's on its own."""
    out = grads.new_empty((len(grads), weights[0].shape[1]))
    lie = [number for w in weights for number in (w.data_ptr(), len(w))]
    where = grads.data_ptr(), out.data_ptr(), len(out), out.shape[1], grads.shape[1], _chunks(out.shape[1])
    _TIMES_BACK[weights[0].dtype](*where, len(weights), *lie)
    return out


def pulled(grads: Tensor, rows: Tensor) -> Tensor:
    """[V, D] in fp32 = grads.T @ rows of [T, V] gradients of what `times` makes and the [T, D] rows that it took."""
    panels = rows.new_empty((rows.shape[1], len(rows) + len(rows) % 2))
    _STAND(rows.data_ptr(), panels.data_ptr(), *rows.shape)
    out = grads.new_empty((grads.shape[1], rows.shape[1]), dtype=torch.float32)
    _PULL(grads.data_ptr(), panels.data_ptr(), out.data_ptr(), len(rows), *out.shape)
    return out


def _chunks(columns: int) -> int:
    """Into how many parts rows are split where there are more threads than panels; each thread then lays out its own."""
    return -(-torch.get_num_threads() // (columns // PANEL))
