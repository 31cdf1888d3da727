"""Matrices of bf16 turned over, a square that fits the core's cache at a time."""

from __future__ import annotations

from typing import Any

import torch
from numba import njit
from torch import Tensor

from preftune.kernels.amx import compiled
from preftune.kernels.launch import Kernel, given, my_share
from preftune.kernels.tiles import at16, at32, widen

_SQUARE = 64


def _turn(wide: bool) -> Any:
    @njit(inline="always")
    def turn(address):
        ask = given(address)
        source, out, rows, columns, row = ask[0], ask[1], ask[2], ask[3], ask[4]
        first, last = my_share(address, (columns + _SQUARE - 1) // _SQUARE)
        for left in range(first * _SQUARE, min(last * _SQUARE, columns), _SQUARE):
            right = min(left + _SQUARE, columns)
            for top in range(0, rows, _SQUARE):
                some = min(rows - top, _SQUARE)
                for c in range(left, right):
                    line = source + 2 * (top * row + c)
                    if wide:
                        to = at32(out + 4 * (c * rows + top))
                        for i in range(some):
                            to[i] = widen(at16(line)[i * row])
                    else:
                        copy = at16(out + 2 * (c * rows + top))
                        for i in range(some):
                            copy[i] = at16(line)[i * row]

    return turn


_turn_halves, _turn_to_floats = _turn(False), _turn(True)


def _turned16(address: int) -> None:
    _turn_halves(address)


def _turned32(address: int) -> None:
    _turn_to_floats(address)


_HALVES, _FLOATS = Kernel(_turned16), Kernel(_turned32)


def takes_pairs(grads: Tensor, rows: Tensor) -> bool:
    """Whether `pulled` is faster than PyTorch's product: in bf16 on a CPU with AMX, where PyTorch turns the left side over slowly."""
    return compiled() and all(x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.stride(1) == 1 for x in (grads, rows))


def pulled(grads: Tensor, rows: Tensor) -> Tensor:
    """grads.T @ rows, [V, D] in fp32 of [T, V] and [T, D] in bf16; the narrower side is turned over, and the product where it must be."""
    if grads.shape[1] <= rows.shape[1]:
        return (turned(grads) @ rows).float()
    return turned(turned(rows) @ grads, torch.float32)


def turned(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, M], contiguous and in bf16 or fp32, of [M, N] in bf16."""
    out = x.new_empty((x.shape[1], x.shape[0]), dtype=dtype)
    (_FLOATS if dtype == torch.float32 else _HALVES)(x.data_ptr(), out.data_ptr(), *x.shape, x.stride(0))
    return out
