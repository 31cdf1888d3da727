"""All layers of a decoding step in one call: it is hundreds of kernels, and where rows are few to call one takes as long as it runs.

What a kernel is given stands in a record; the threads go through the records together and wait for each other after each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from preftune.kernels import blocks, pointwise, products
from preftune.kernels.launch import TOLD, Kernel, barrier, bits, given, told
from preftune.kernels.tiles import at64

_NORM, _PRODUCT, _ATTENTION, _GATED = range(4)
_RECORD = 32
"""Numbers of a record: its kind, what every kernel is told, and its arguments."""
_FIRST = 1 + TOLD


@intrinsic
def _wait(context: Any, function: Any) -> Any:
    """Wait for the other threads, by the function at an address."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _run(norm: Any, multiply: Any, attend: Any, gate: Any) -> Any:
    @njit(inline="always")
    def run(address):
        ask = given(address)
        records, count, waiting = ask[0], ask[1], ask[2]
        for i in range(count):
            record = records + 8 * _RECORD * i
            kind, here = at64(record)[0], record + 8
            if kind == _NORM:
                norm(here)
            elif kind == _PRODUCT:
                multiply(here)
            elif kind == _ATTENTION:
                attend(here)
            else:
                gate(here)
            _wait(waiting)

    return run


_run_halves = _run(pointwise.norm_halves, products.multiply_halves, blocks.step_halves, pointwise.gated_halves)
_run_floats = _run(pointwise.norm_floats, products.multiply_floats, blocks.step_floats, pointwise.gated_floats)


def _run16(address: int) -> None:
    _run_halves(address)


def _run32(address: int) -> None:
    _run_floats(address)


_RUN = {torch.bfloat16: Kernel(_run16), torch.float32: Kernel(_run32)}


@dataclass(frozen=True)
class Weights:
    """A weight as `products.lay_out` gave it, and its bias."""

    panels: Tensor
    bias: Tensor | None

    @property
    def columns(self) -> int:
        """How many numbers it makes of a row."""
        return self.panels.shape[0] * self.panels.shape[2]


@dataclass(frozen=True)
class Layer:
    """A layer of Llama's form: RMSNorm, attention, RMSNorm, gated feed-forward block; norms are an fp32 weight and epsilon.

    `inward` makes queries, keys and values of a row, `wide` gate and up.
    """

    before: tuple[Tensor, float]
    inward: Weights
    outward: Weights
    between: tuple[Tensor, float]
    wide: Weights
    narrow: Weights
    window: int | None
    scaling: float


class Layers:
    """Layers, and the norm behind them, as records. All numbers between the layers are of `dtype`, the states are fp32."""

    def __init__(self, layers: Sequence[Layer], last: tuple[Tensor, float], heads: int, kv: int, width: int, dtype: torch.dtype) -> None:
        self.layers, self.last, self.heads, self.kv, self.width, self.dtype = layers, last, heads, kv, width, dtype
        self.room = 0

    def _make(self, rows: int) -> None:
        """Records, and room for what lies between the kernels, for at most so many rows."""
        dim, wide, fed = len(self.last[0]), self.layers[0].wide.columns, self.layers[0].wide.columns // 2
        made = lambda columns: torch.empty((rows, columns), dtype=self.dtype)
        x, both, added, gate_up, inner = map(made, (dim, self.layers[0].inward.columns, dim, wide, fed))
        seen = made(self.heads * self.width)
        self.between, self.room = (x, both, seen, added, gate_up, inner), rows
        records: list[list[int]] = []

        def add(kind: int, *arguments: int) -> None:
            records.append([kind, *told(), *arguments, *[0] * (_RECORD - _FIRST - len(arguments))])

        def norm(weight: tuple[Tensor, float], has_added: bool, out: int) -> None:
            add(_NORM, 0, added.data_ptr() if has_added else 0, weight[0].data_ptr(), out, 0, dim, dim, bits(weight[1]))

        def product(source: Tensor, weights: Weights, out: Tensor) -> None:
            bias = 0 if weights.bias is None else weights.bias.data_ptr()
            add(_PRODUCT, source.data_ptr(), weights.panels.data_ptr(), bias, out.data_ptr(), 0, weights.panels.shape[1], weights.columns)

        size, row = self.dtype.itemsize, both.shape[1]
        parts = [both.data_ptr() + size * self.width * first for first in (0, self.heads, self.heads + self.kv)]
        strides = [row, self.width] * 3
        for at, layer in enumerate(self.layers):
            norm(layer.before, at > 0, x.data_ptr())
            product(x, layer.inward, both)
            rest = self.heads, self.kv, self.width, *strides, layer.window or 2**40, bits(layer.scaling)
            add(_ATTENTION, *parts, 0, seen.data_ptr(), *[0] * 12, *rest)
            product(seen, layer.outward, added)
            norm(layer.between, True, x.data_ptr())
            product(x, layer.wide, gate_up)
            add(_GATED, gate_up.data_ptr(), gate_up.data_ptr() + size * fed, inner.data_ptr(), 0, fed, wide, wide)
            product(inner, layer.narrow, added)
        norm(self.last, True, 0)
        self.records = np.array(records)
        self.of = {kind: np.flatnonzero(self.records[:, 0] == kind) for kind in range(4)}

    def __call__(self, states: Tensor, angles: Tensor, where: Sequence[Tensor], told: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """[B, D] states behind the last norm, in `dtype`, of contiguous fp32 states [B, D], which are written over.

        `angles` [B, 2, d] in fp32 turn queries and keys; `where` has each layer's blocks; `told` and `sizes` as in `blocks.step`.
        """
        rows = len(states)
        if rows > self.room:
            self._make(rows)
        out = states.new_empty(states.shape, dtype=self.dtype)
        to, of = self.records[:, _FIRST:], self.of
        self.records[:, 1] = 0
        to[of[_NORM], 0], to[of[_NORM], 4] = states.data_ptr(), rows
        to[of[_NORM][-1], 3] = out.data_ptr()
        to[of[_PRODUCT], 4], to[of[_GATED], 3] = rows, rows
        attention = of[_ATTENTION]
        to[attention, 3], to[attention, 5] = angles.data_ptr(), [one.data_ptr() for one in where]
        to[attention, 6:17] = [*(one.data_ptr() for one in told), *sizes]
        _RUN[self.dtype](self.records.ctypes.data, len(self.records), barrier())
        return out
