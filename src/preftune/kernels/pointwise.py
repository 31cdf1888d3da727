"""What lies between the products of a decoder layer, each a single pass over its numbers: norm, rotary embedding, gated activation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from preftune.kernels.launch import Kernel, bits, next_part
from preftune.kernels.tiles import FAST, at32, at64, exp, memory, real

_ONE = np.float32(1)


def _share(rows: int) -> int:
    """Rows of one part: a few parts for each thread, so that they end together."""
    return max(1, rows // (4 * torch.get_num_threads()))


def _norm(half: bool) -> Any:
    size, get, put = memory(half)

    @njit(fastmath=FAST, error_model="numpy")
    def norm(arguments):
        given = at64(arguments)
        states, added, weight, out = given[1], given[2], at32(given[3]), given[4]
        rows, width, added_row, share, eps = given[5], given[6], given[7], given[8], real(given[9])
        while True:
            first = next_part(arguments) * share
            if first >= rows:
                break
            for row in range(first, min(first + share, rows)):
                line, more, to = at32(states + 4 * row * width), added + size * row * added_row, out + size * row * width
                total = np.float32(0)
                if added:
                    for c in range(width):
                        one = line[c] + get(more, c)
                        line[c] = one
                        total += one * one
                else:
                    for c in range(width):
                        total += line[c] * line[c]
                scale = _ONE / np.sqrt(total / np.float32(width) + eps)
                for c in range(width):
                    put(to, c, line[c] * scale * weight[c])

    return norm


def _turn(half: bool) -> Any:
    size, get, put = memory(half)

    @njit(fastmath=FAST, error_model="numpy")
    def turn(arguments):
        given = at64(arguments)
        both, cos, sin, q, k = given[1], given[2], given[3], given[4], given[5]
        rows, heads, kv, width, both_row, share = given[6], given[7], given[8], given[9], given[10], given[11]
        half_width = width // 2
        while True:
            first = next_part(arguments) * share
            if first >= rows:
                break
            for row in range(first, min(first + share, rows)):
                c, s = at32(cos + 4 * row * width), at32(sin + 4 * row * width)
                for head in range(heads + kv):
                    low = both + size * (row * both_row + head * width)
                    high = low + size * half_width
                    if head < heads:
                        to = at32(q + 4 * (row * heads + head) * width)
                        for i in range(half_width):
                            a, b = get(low, i), get(high, i)
                            to[i] = a * c[i] - b * s[i]
                            to[half_width + i] = b * c[half_width + i] + a * s[half_width + i]
                    else:
                        into = k + size * (row * kv + head - heads) * width
                        for i in range(half_width):
                            a, b = get(low, i), get(high, i)
                            put(into, i, a * c[i] - b * s[i])
                            put(into, half_width + i, b * c[half_width + i] + a * s[half_width + i])

    return turn


def _gated(half: bool) -> Any:
    size, get, put = memory(half)

    @njit(fastmath=FAST, error_model="numpy")
    def gated(arguments):
        given = at64(arguments)
        gate, up, out = given[1], given[2], given[3]
        rows, width, gate_row, up_row, share = given[4], given[5], given[6], given[7], given[8]
        while True:
            first = next_part(arguments) * share
            if first >= rows:
                break
            for row in range(first, min(first + share, rows)):
                g, u, to = gate + size * row * gate_row, up + size * row * up_row, out + size * row * width
                for c in range(width):
                    x = get(g, c)
                    put(to, c, x / (_ONE + exp(-x)) * get(u, c))

    return gated


_norm_halves, _norm_floats, _turn_halves, _turn_floats, _gated_halves, _gated_floats = (
    make(half) for make in (_norm, _turn, _gated) for half in (True, False)
)


def _norm16(arguments: int) -> None:
    _norm_halves(arguments)


def _norm32(arguments: int) -> None:
    _norm_floats(arguments)


def _turn16(arguments: int) -> None:
    _turn_halves(arguments)


def _turn32(arguments: int) -> None:
    _turn_floats(arguments)


def _gated16(arguments: int) -> None:
    _gated_halves(arguments)


def _gated32(arguments: int) -> None:
    _gated_floats(arguments)


_NORMS = {torch.bfloat16: Kernel(_norm16), torch.float32: Kernel(_norm32)}
_TURNS = {torch.bfloat16: Kernel(_turn16), torch.float32: Kernel(_turn32)}
_GATES = {torch.bfloat16: Kernel(_gated16), torch.float32: Kernel(_gated32)}


def takes(x: Tensor) -> bool:
    """Whether the kernels read its type."""
    return x.device.type == "cpu" and x.dtype in _NORMS


def add_norm(states: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm, in `dtype`, of fp32 states [T, D] to which `added` [T, D], of that type, is added in place; arXiv 1910.07467, eq. 4."""
    rows, width = states.shape
    out = states.new_empty((rows, width), dtype=dtype)
    more = (0, 0) if added is None else (added.data_ptr(), added.stride(0))
    _NORMS[dtype](states.data_ptr(), more[0], weight.data_ptr(), out.data_ptr(), rows, width, more[1], _share(rows), bits(eps))
    return out


def turn(both: Tensor, heads: int, kv: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, d] queries in fp32 and [T, Hkv, d] keys of `both` [T, (H + Hkv) d], turned by fp32 [T, d] angles; arXiv 2104.09864."""
    rows, width = cos.shape
    q, k = both.new_empty((rows, heads, width), dtype=torch.float32), both.new_empty((rows, kv, width))
    where = [x.data_ptr() for x in (both, cos, sin, q, k)]
    _TURNS[both.dtype](*where, rows, heads, kv, width, both.stride(0), _share(rows))
    return q, k


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of [T, F] each, rounded once."""
    rows, width = gate.shape
    out = gate.new_empty((rows, width))
    where = [x.data_ptr() for x in (gate, up, out)]
    _GATES[gate.dtype](*where, rows, width, gate.stride(0), up.stride(0), _share(rows))
    return out
