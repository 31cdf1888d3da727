"""What kernels are made of: bf16 and exp as plain arithmetic, memory by address, and small products of matrices held in registers.

LLVM turns plain loops over floats into vector instructions by itself, but keeps no block of a product in registers; the blocks here are
therefore written with vectors of sixteen. All of it is portable LLVM: a CPU with narrower registers takes several for one vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Floats of one vector."""

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS, _HALVES, _INTS = (ir.VectorType(kind, LANES) for kind in (_F32, _I16, _I32))


@intrinsic
def _float_of(context: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda _, builder, __, args: builder.bitcast(args[0], _F32)


@intrinsic
def _bits_of(context: Any, x: Any) -> Any:
    return types.int32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], _I32)


@intrinsic
def at16(context: Any, address: Any) -> Any:
    """Pointer to bf16 numbers, as their bits."""
    return types.CPointer(types.int16)(types.int64), lambda _, builder, __, args: builder.inttoptr(args[0], _I16.as_pointer())


@intrinsic
def at32(context: Any, address: Any) -> Any:
    """Pointer to floats."""
    return types.CPointer(types.float32)(types.int64), lambda _, builder, __, args: builder.inttoptr(args[0], _F32.as_pointer())


@intrinsic
def at64(context: Any, address: Any) -> Any:
    """Pointer to integers."""
    return types.CPointer(types.int64)(types.int64), lambda _, builder, __, args: builder.inttoptr(args[0], _I64.as_pointer())


@njit(inline="always")
def real(argument: Any) -> Any:
    """The float that a kernel was given by `launch.bits`."""
    return _float_of(np.int32(argument))


@njit(inline="always")
def widen(half: Any) -> Any:
    """The float that bf16 bits stand for."""
    return _float_of(np.int32(half) << np.int32(16))


@njit(inline="always")
def narrow(x: Any) -> Any:
    """The bf16 bits nearest to a float, ties to even."""
    bits = _bits_of(x)
    rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    return np.int16(rounded) if x == x else np.int16(0x7FC0)


def memory(half: bool) -> tuple[int, Any, Any]:
    """Bytes of a number in bf16 or float, and how the i-th one at an address is read, as a float, and written."""

    @njit(inline="always")
    def get(address, i):
        return widen(at16(address)[i]) if half else at32(address)[i]

    @njit(inline="always")
    def put(address, i, x):
        if half:
            at16(address)[i] = narrow(x)
        else:
            at32(address)[i] = x

    return (2 if half else 4), get, put


_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
_C7, _C6, _C5, _C4, _C3, _C2 = (np.float32(1 / f) for f in (5040, 720, 120, 24, 6, 2))
_LOWEST, _HIGHEST, _ONE, _ZERO = np.float32(-87.0), np.float32(88.0), np.float32(1), np.float32(0)
_SHIFT, _SHIFT_BITS = np.float32(1.5 * 2**23), np.int32(np.float32(1.5 * 2**23).view(np.int32))


@njit(fastmath={"contract"})
def exp(x: Any) -> Any:
    """e^x to one unit in the last place, 0 below e^-87, e^88 above it: 2^n times the Taylor series of the rest, at most ln(2) / 2.

    Adding 1.5 * 2^23 leaves n, the nearest integer, in the last bits of a float; so no sum here may be reordered.
    """
    near = min(max(x, _LOWEST), _HIGHEST)
    shifted = near * _LOG2E + _SHIFT
    n = shifted - _SHIFT
    r = near - n * _LN2_HIGH - n * _LN2_LOW
    series = ((((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r + _ONE) * r + _ONE
    found = series * _float_of((_bits_of(shifted) - _SHIFT_BITS + np.int32(127)) << np.int32(23))
    return found if x >= _LOWEST else (_ZERO if x < _LOWEST else x)  # the last is NaN


def _tile(rows: int, vectors: int, half: bool, fresh: bool) -> Any:
    """Product of a few rows: c [rows, 16 * vectors] (+)= a [rows, k] @ b [k, 16 * vectors], all of c in registers.

    Arguments are addresses and row lengths in numbers; `b` is bf16 where `half`, else float. `fresh` starts from zero.
    """

    def place(builder: Any, base: Any, offset: Any, kind: Any, size: int) -> Any:
        return builder.inttoptr(builder.add(base, builder.mul(offset, ir.Constant(_I64, size))), kind.as_pointer())

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, a_row, b, b_row, c, c_row, k = args
        number = lambda n: ir.Constant(_I64, n)
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
        cells = [(i, w) for i in range(rows) for w in range(vectors)]
        kept = {cell: cgutils.alloca_once(builder, _FLOATS) for cell in cells}
        home = {(i, w): place(builder, c, builder.add(builder.mul(c_row, number(i)), number(LANES * w)), _FLOATS, 4) for i, w in cells}
        for cell in cells:
            builder.store(ir.Constant(_FLOATS, [0.0] * LANES) if fresh else builder.load(home[cell], align=4), kept[cell])
        with cgutils.for_range(builder, k) as loop:
            right = []
            for w in range(vectors):
                offset = builder.add(builder.mul(b_row, loop.index), number(LANES * w))
                if half:
                    bits = builder.zext(builder.load(place(builder, b, offset, _HALVES, 2), align=2), _INTS)
                    right.append(builder.bitcast(builder.shl(bits, ir.Constant(_INTS, [16] * LANES)), _FLOATS))
                else:
                    right.append(builder.load(place(builder, b, offset, _FLOATS, 4), align=4))
            for i in range(rows):
                one = builder.load(place(builder, a, builder.add(builder.mul(a_row, number(i)), loop.index), _F32, 4), align=4)
                nothing = ir.Constant(_FLOATS, ir.Undefined)
                left = builder.insert_element(nothing, one, ir.Constant(_I32, 0))
                left = builder.shuffle_vector(left, nothing, ir.Constant(_INTS, [0] * LANES))
                for w in range(vectors):
                    builder.store(builder.call(fma, [left, right[w], builder.load(kept[i, w])]), kept[i, w])
        for cell in cells:
            builder.store(builder.load(kept[cell]), home[cell], align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(context: Any, a: Any, a_row: Any, b: Any, b_row: Any, c: Any, c_row: Any, k: Any) -> Any:
        return types.void(*[types.int64] * 7), generate

    return tile


def small_product(half: bool, fresh: bool) -> Any:
    """c [m, n] (+)= a [m, k] @ b [k, n] for few rows; it reads columns of b and writes columns of c up to the next multiple of 16.

    A number depends on its row of a and its column of b alone, not on how many there are.
    """
    size = 2 if half else 4

    def columns(vectors: int) -> Any:
        six, three, one = (_tile(rows, vectors, half, fresh) for rows in (6, 3, 1))

        @njit
        def walk(a, a_row, b, b_row, c, c_row, m, k):
            while m > 0:
                if m >= 6:
                    six(a, a_row, b, b_row, c, c_row, k)
                    done = 6
                elif m >= 3:
                    three(a, a_row, b, b_row, c, c_row, k)
                    done = 3
                else:
                    one(a, a_row, b, b_row, c, c_row, k)
                    done = 1
                m -= done
                a += 4 * a_row * done
                c += 4 * c_row * done

        return walk

    wide, middle, slim = columns(4), columns(2), columns(1)

    @njit
    def product(a, a_row, b, b_row, c, c_row, m, k, n):
        while n > 0:
            if n > 48:
                wide(a, a_row, b, b_row, c, c_row, m, k)
                done = 64
            elif n > 16:
                middle(a, a_row, b, b_row, c, c_row, m, k)
                done = 32
            else:
                slim(a, a_row, b, b_row, c, c_row, m, k)
                done = 16
            n -= done
            b += size * done
            c += 4 * done

    return product
