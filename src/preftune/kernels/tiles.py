"""What kernels are made of: bf16 and exp as plain arithmetic, memory by address, and small products of matrices held in registers.

LLVM turns plain loops over floats into vector instructions by itself, but keeps no block of a product in registers; the blocks here are
therefore written with vectors of sixteen. All of it is portable LLVM: a CPU with narrower registers takes several for one vector.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from preftune.kernels.cpu import has

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
def at32i(context: Any, address: Any) -> Any:
    """Pointer to pairs of bf16 numbers, as their bits."""
    return types.CPointer(types.int32)(types.int64), lambda _, builder, __, args: builder.inttoptr(args[0], _I32.as_pointer())


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


def _highest(half: bool) -> Any:
    def larger(builder: Any, one: Any, other: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", one, other), one, other)

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        address, n, least = args
        number = lambda n: ir.Constant(_I64, n)
        lines, ones, size = (_HALVES, _I16, 2) if half else (_FLOATS, _F32, 4)

        def read(at: Any, kind: Any, wide: Any, real: Any) -> Any:
            place = builder.inttoptr(builder.add(address, builder.mul(at, number(size))), kind.as_pointer())
            found = builder.load(place, align=size)
            if not half:
                return found
            shift = ir.Constant(wide, [16] * LANES if wide == _INTS else 16)
            return builder.bitcast(builder.shl(builder.zext(found, wide), shift), real)

        kept, found = cgutils.alloca_once(builder, _FLOATS), cgutils.alloca_once(builder, _F32)
        spread = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), least, ir.Constant(_I32, 0))
        builder.store(builder.shuffle_vector(spread, spread, ir.Constant(_INTS, [0] * LANES)), kept)
        whole = builder.sdiv(n, number(LANES))
        with cgutils.for_range(builder, whole) as loop:
            line = read(builder.mul(loop.index, number(LANES)), lines, _INTS, _FLOATS)
            builder.store(larger(builder, line, builder.load(kept)), kept)
        lanes, apart = builder.load(kept), LANES // 2
        while apart:
            moved = builder.shuffle_vector(lanes, lanes, ir.Constant(_INTS, [(lane + apart) % LANES for lane in range(LANES)]))
            lanes, apart = larger(builder, lanes, moved), apart // 2
        builder.store(builder.extract_element(lanes, ir.Constant(_I32, 0)), found)
        with cgutils.for_range_slice(builder, builder.mul(whole, number(LANES)), n, number(1)) as (at, _):
            builder.store(larger(builder, read(at, ones, _I32, _F32), builder.load(found)), found)
        return builder.load(found)

    @intrinsic
    def highest(context: Any, address: Any, n: Any, least: Any) -> Any:
        return types.float32(types.int64, types.int64, types.float32), generate

    return highest


highest, highest_half = _highest(False), _highest(True)
"""The largest of n floats, or bf16, at an address and of `least`; NaN is passed over. LLVM makes no vectors of that by itself."""


@intrinsic
def fill(typing: Any, address: Any, n: Any, value: Any) -> Any:
    """Write n floats of one value, the last of them through a mask."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        address, n, value = args
        number = lambda n: ir.Constant(_I64, n)
        place = lambda at: builder.inttoptr(builder.add(address, builder.mul(at, number(4 * LANES))), _FLOATS.as_pointer())
        spread = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_I32, 0))
        spread = builder.shuffle_vector(spread, spread, ir.Constant(_INTS, [0] * LANES))
        some = builder.select(builder.icmp_signed(">", n, number(0)), n, number(0))
        whole = builder.sdiv(some, number(LANES))
        with cgutils.for_range(builder, whole) as loop:
            builder.store(spread, place(loop.index), align=4)
        left = builder.trunc(builder.srem(some, number(LANES)), _I32)
        left = builder.insert_element(ir.Constant(_INTS, ir.Undefined), left, ir.Constant(_I32, 0))
        left = builder.shuffle_vector(left, left, ir.Constant(_INTS, [0] * LANES))
        mask = builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), left)
        kind = ir.FunctionType(ir.VoidType(), [_FLOATS, _FLOATS.as_pointer(), _I32, mask.type])
        store = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.store.v16f32.p0")
        builder.call(store, [spread, place(whole), ir.Constant(_I32, 4), mask])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


def _ask(builder: Any, address: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, into_the_second_level, data = (ir.Constant(_I32, n) for n in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, pointer), to_read, into_the_second_level, data])


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, without waiting for it."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        _ask(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


class _BrainFloat(ir.Type):
    """bf16, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BrainFloat)

    def __hash__(self) -> int:
        return hash(_BrainFloat)


_PAIRS = ir.VectorType(_BrainFloat(), 2 * LANES)


@intrinsic
def narrow_line(typing: Any, address: Any, to: Any) -> Any:
    """Write 32 floats as bf16; by AVX512-BF16, which writes 0 for numbers below 2^-126."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        places = (builder.add(args[0], ir.Constant(_I64, at)) for at in (0, 4 * LANES))
        low, high = (builder.load(builder.inttoptr(at, _FLOATS.as_pointer()), align=4) for at in places)
        kind, name = ir.FunctionType(_PAIRS, [_FLOATS, _FLOATS]), "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        found = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [high, low])
        builder.store(found, builder.inttoptr(args[1], _PAIRS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@njit(inline="always")
def paired(low: Any, high: Any) -> Any:
    """Two bf16 numbers, as their bits, as one int32."""
    return (np.int32(high) << np.int32(16)) | (np.int32(low) & np.int32(0xFFFF))


FLOATS, HALVES, PAIRS = "floats", "halves", "pairs"
"""What a product reads of its right side: floats, bf16, or, of both sides, two bf16 that follow each other along k in one int32."""


def tile_of(rows: int, vectors: int, numbers: str, fresh: bool, asks: bool = False, a_step: int = 1) -> Any:
    """Product of a few rows: c [rows, 16 * vectors] (+)= a [rows, k] @ b [k, 16 * vectors], all of c in registers.

    Arguments are addresses and row lengths in numbers (or pairs of them), those of a row of a `a_step` apart; `fresh` starts from zero.
    One that `asks` does so, at each of k, for `step` bytes of what will be read next, from `ahead` on.
    """

    def place(builder: Any, base: Any, offset: Any, kind: Any, size: int) -> Any:
        return builder.inttoptr(builder.add(base, builder.mul(offset, ir.Constant(_I64, size))), kind.as_pointer())

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, a_row, b, b_row, c, c_row, k, ahead, step = args
        number = lambda n: ir.Constant(_I64, n)
        if numbers == PAIRS:
            kind, name = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS]), "llvm.x86.avx512bf16.dpbf16ps.512"
        else:
            kind, name = ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        add = lambda left, right, sum: builder.call(function, [sum, left, right] if numbers == PAIRS else [left, right, sum])
        one_of, all_of = (_I32, _INTS) if numbers == PAIRS else (_F32, _FLOATS)
        kept = {(i, w): cgutils.alloca_once(builder, _FLOATS) for i in range(rows) for w in range(vectors)}
        home = {(i, w): place(builder, c, builder.add(builder.mul(c_row, number(i)), number(LANES * w)), _FLOATS, 4) for i, w in kept}
        for cell in kept:
            builder.store(ir.Constant(_FLOATS, [0.0] * LANES) if fresh else builder.load(home[cell], align=4), kept[cell])
        with cgutils.for_range(builder, k) as loop:
            next_line = builder.add(ahead, builder.mul(step, loop.index))
            for w in range(vectors if asks else 0):
                _ask(builder, builder.add(next_line, number(4 * LANES * w)))
            right = []
            for w in range(vectors):
                offset = builder.add(builder.mul(b_row, loop.index), number(LANES * w))
                if numbers == PAIRS:
                    right.append(builder.bitcast(builder.load(place(builder, b, offset, _INTS, 4), align=4), _PAIRS))
                elif numbers == HALVES:
                    bits = builder.zext(builder.load(place(builder, b, offset, _HALVES, 2), align=2), _INTS)
                    right.append(builder.bitcast(builder.shl(bits, ir.Constant(_INTS, [16] * LANES)), _FLOATS))
                else:
                    right.append(builder.load(place(builder, b, offset, _FLOATS, 4), align=4))
            for i in range(rows):
                along = builder.mul(loop.index, number(a_step))
                one = builder.load(place(builder, a, builder.add(builder.mul(a_row, number(i)), along), one_of, 4), align=4)
                nothing = ir.Constant(all_of, ir.Undefined)
                left = builder.insert_element(nothing, one, ir.Constant(_I32, 0))
                left = builder.shuffle_vector(left, nothing, ir.Constant(_INTS, [0] * LANES))
                left = builder.bitcast(left, _PAIRS) if numbers == PAIRS else left
                for w in range(vectors):
                    builder.store(add(left, right[w], builder.load(kept[i, w])), kept[i, w])
        for cell in kept:
            builder.store(builder.load(kept[cell]), home[cell], align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(context: Any, a: Any, a_row: Any, b: Any, b_row: Any, c: Any, c_row: Any, k: Any, ahead: Any, step: Any) -> Any:
        return types.void(*[types.int64] * 9), generate

    return tile


def named(name: str) -> Any:
    """Compile a function under a name of its own.

    Compiled functions are linked by name, also those that were compiled elsewhere and kept: of two by one name, one would run for both.
    """

    def apply(function: Any) -> Any:
        function.__name__ = function.__qualname__ = name
        return njit(function)

    return apply


def small_product(numbers: str, fresh: bool) -> Any:
    """c [m, n] (+)= a [m, k] @ b [k, n] for few rows; it reads columns of b and writes columns of c up to the next multiple of 16.

    A number depends on its row of a and its column of b alone, not on how many there are.
    """
    size, called = 2 if numbers == HALVES else 4, f"product_{'fresh' if fresh else 'further'}_{numbers}"

    def columns(vectors: int) -> Any:
        six, three, one = (tile_of(rows, vectors, numbers, fresh) for rows in (6, 3, 1))

        @named(f"{called}_{vectors}")
        def walk(a, a_row, b, b_row, c, c_row, m, k):
            while m > 0:
                if m >= 6:
                    six(a, a_row, b, b_row, c, c_row, k, 0, 0)
                    done = 6
                elif m >= 3:
                    three(a, a_row, b, b_row, c, c_row, k, 0, 0)
                    done = 3
                else:
                    one(a, a_row, b, b_row, c, c_row, k, 0, 0)
                    done = 1
                m -= done
                a += 4 * a_row * done
                c += 4 * c_row * done

        return walk

    roomy = has("avx512f")  # else a register holds half a vector, and there are half as many
    wide, middle, slim = columns(4), columns(2), columns(1)

    @named(called)
    def product(a, a_row, b, b_row, c, c_row, m, k, n):
        while n > 0:
            if roomy and n > 48:
                wide(a, a_row, b, b_row, c, c_row, m, k)
                done = 64
            elif roomy and n > 16:
                middle(a, a_row, b, b_row, c, c_row, m, k)
                done = 32
            else:
                slim(a, a_row, b, b_row, c, c_row, m, k)
                done = 16
            n -= done
            b += size * done
            c += 4 * done

    return product


def panel_product(vectors: int, numbers: str, tallest: int, asks: bool = False) -> Any:
    """c [m, n] = a [m, k] @ b [k, n], n = 16 * `vectors`, all without gaps: in tiles of `tallest` rows and one of the rest.

    One that `asks` does so, while it computes, for the numbers that lie behind b, as many as b has.
    """
    n, product = LANES * vectors, cast(Any, None)

    def with_tile(rows: int, rest: Any) -> Any:
        tile = tile_of(rows, vectors, numbers, True, asks)

        @named(f"panel_product_{numbers}_{vectors}_{rows}")
        def walk(a, b, c, m, k, ahead, step):
            while m >= rows:
                tile(a, k, b, n, c, n, k, ahead, step)
                ahead += step * k
                m -= rows
                a += 4 * rows * k
                c += 4 * rows * n
            if rest is not None and m > 0:
                rest(a, b, c, m, k, ahead, step)

        return walk

    for rows in range(1, tallest + 1):
        product = with_tile(rows, product)

    @named(f"panel_product_{numbers}_{vectors}")
    def whole(a, b, c, m, k):
        tiles = (m + tallest - 1) // tallest
        product(a, b, c, m, k, b + 4 * n * k, 4 * n // tiles)

    return whole
