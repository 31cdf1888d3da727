"""Attention of a decoding step: responses over the prompt they share, and each over its own tokens, which lie in blocks.

A block has the keys and values of `TOKENS` tokens that follow each other, one head behind the other, laid out once as they are multiplied:
keys [d, TOKENS] and values [TOKENS, d] of floats; of bf16 two that follow each other along the first of these in the place of a float. What
nobody has written yet may hold anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from preftune.kernels.amx import multiplies_pairs, small_product
from preftune.kernels.launch import Kernel, bits, given, next_part
from preftune.kernels.pairs import across, along
from preftune.kernels.tiles import (
    FLOATS,
    LANES,
    PAIRS,
    at16,
    at32,
    at32i,
    at64,
    exp,
    fetch,
    fill,
    highest,
    memory,
    paired,
    real,
)

TOKENS = 64
_TOGETHER = 48
"""Queries of one part, about: the values they are multiplied with stay in the core's cache."""
_LINE = 64
"""Bytes that memory is read by."""
_LOWEST, _ONE, _ZERO = np.float32(-3e38), np.float32(1), np.float32(0)


def _pieces_of(half: bool) -> Any:
    """How a token is turned and put into a block, what is asked for ahead, and the softmax of a line."""
    size, get, put = memory(half)
    each = 4 // size

    @njit(inline="always")
    def turned(source, to, angles, d):
        """Copy the numbers of one head, turned by the angles [2, d] unless there are none (arXiv 2104.09864, eq. 34)."""
        if angles:
            c, half_width = at32(angles), d // 2
            high, to_high, c_high = source + size * half_width, to + size * half_width, at32(angles + 4 * half_width)
            s, s_high = at32(angles + 4 * d), at32(angles + 4 * (d + half_width))
            for i in range(half_width):
                a, b = get(source, i), get(high, i)
                put(to, i, a * c[i] - b * s[i])
                put(to_high, i, b * c_high[i] + a * s_high[i])
        else:
            for i in range(d):
                put(to, i, get(source, i))

    @njit(inline="always")
    def add_token(key, v, block, at, d):
        """Put a token's key and value into a block."""
        to, parts = at32i(block), at32i(key)
        for c in range(d // each):
            to[c * TOKENS + at] = parts[c]
        values = block + 4 * TOKENS * (d // each) + 4 * (at // each) * d
        if not half:
            whole, floats = at32(values), at32(v)
            for c in range(d):
                whole[c] = floats[c]
        elif at % 2:
            halves, value = at16(values), at16(v)
            for c in range(d):
                halves[2 * c + 1] = value[c]
        else:
            pairs, value = at32i(values), at16(v)
            for c in range(d):
                pairs[c] = paired(value[c], 0)  # else what stood there, even NaN, would count nothing times

    @njit(inline="always")
    def ask_for(block, tokens, d):
        """Ask for the keys and values of a block's first tokens: they lie anywhere in memory, and waiting for each takes long."""
        for c in range(d // each):
            for at in range(4 * c * TOKENS, 4 * (c * TOKENS + tokens), _LINE):
                fetch(block + at)
        values = 4 * TOKENS * (d // each)
        for at in range(values, values + 4 * ((tokens + each - 1) // each) * d, _LINE):
            fetch(block + at)

    @njit(inline="always")
    def softmax(line, to, whole, scaling):
        """Weights of a line of scores, not yet divided by their sum, and one over it."""
        top, total, scores = highest(line, whole, _LOWEST), _ZERO, at32(line)
        for c in range(whole):
            one = exp((scores[c] - top) * scaling)
            total += one
            put(to, c, one)
        return _ONE / total

    return turned, add_token, ask_for, softmax


def _step(half: bool) -> Any:
    size, put, each, kind = *memory(half)[::2], 2 if half else 1, np.int16 if half else np.float32
    turned, add_token, ask_for, softmax = _pieces_of(half)
    product, further = (small_product(PAIRS if half else FLOATS, fresh) for fresh in (True, False))

    @njit(inline="always")
    def step(address):
        ask = given(address)
        q, k, v, angles, out, where = ask[0], ask[1], ask[2], ask[3], ask[4], at64(ask[5])
        pieces, order, lengths, own, prompt_blocks, own_blocks = (
            at64(ask[6]),
            at64(ask[7]),
            at64(ask[8]),
            at64(ask[9]),
            at64(ask[10]),
            at64(ask[11]),
        )
        count, prompt_wide, own_wide, most, width, heads, kv, d = ask[12], ask[13], ask[14], ask[15], ask[16], ask[17], ask[18], ask[19]
        q_row, q_head, k_row, k_head, v_row, v_head, window, scaling = (
            ask[20],
            ask[21],
            ask[22],
            ask[23],
            ask[24],
            ask[25],
            ask[26],
            real(ask[27]),
        )
        shared, room_of = heads // kv, 8 * TOKENS * (d // each)
        key, queries = np.empty(d, kind), np.empty((most * shared, d), kind)
        scores, weights = np.empty((most * shared, width), np.float32), np.empty((most * shared, width), kind)
        result, inverse = np.empty((most * shared, d), np.float32), np.empty(most * shared, np.float32)
        to, seen, weighed, into = queries.ctypes.data, scores.ctypes.data, weights.ctypes.data, result.ctypes.data
        while True:
            taken = next_part(address)
            if taken >= count * kv:
                break
            piece, head = 3 * (taken // kv), taken % kv
            group, first, rows = pieces[piece], pieces[piece + 1], pieces[piece + 2]
            prompt, room, shares = lengths[group], head * room_of, rows * shared
            behind = (prompt + TOKENS - 1) // TOKENS * TOKENS
            for r in range(rows):
                row = order[first + r]
                turn = angles + 8 * row * d if angles else 0
                block = where[own_blocks[row * own_wide + own[row] // TOKENS]] + room
                turned(k + size * (row * k_row + head * k_head), key.ctypes.data, turn, d)
                for start in range(0, own[row] + 1, TOKENS):
                    ask_for(where[own_blocks[row * own_wide + start // TOKENS]] + room, min(own[row] + 1 - start, TOKENS), d)
                add_token(key.ctypes.data, v + size * (row * v_row + head * v_head), block, own[row] % TOKENS, d)
                for s in range(shared):
                    turned(q + size * (row * q_row + (head * shared + s) * q_head), to + size * (r * shared + s) * d, turn, d)
            for start in range(0, prompt, TOKENS):
                block = where[prompt_blocks[group * prompt_wide + start // TOKENS]] + room
                product(to, d // each, block, TOKENS, seen + 4 * start, width, shares, d // each, min(prompt - start, TOKENS))
            for r in range(rows):
                row, at = order[first + r], r * shared
                mine = own[row] + 1
                whole = behind + (mine + TOKENS - 1) // TOKENS * TOKENS
                unseen = max(prompt + mine - window, 0)  # tokens of the prompt, then of the row's own, that lie before the window
                for start in range(0, mine, TOKENS):
                    block = where[own_blocks[row * own_wide + start // TOKENS]] + room
                    into_scores = seen + 4 * (at * width + behind + start)
                    product(to + size * at * d, d // each, block, TOKENS, into_scores, width, shared, d // each, min(mine - start, TOKENS))
                for s in range(at, at + shared):
                    line = seen + 4 * s * width
                    fill(line, min(unseen, prompt), _LOWEST)
                    fill(line + 4 * prompt, behind - prompt + max(unseen - prompt, 0), _LOWEST)
                    fill(line + 4 * (behind + mine), whole - behind - mine, _LOWEST)
                    inverse[s] = softmax(line, weighed + size * s * width, whole, scaling)
            result[:shares] = 0
            for start in range(0, prompt, TOKENS):
                block = where[prompt_blocks[group * prompt_wide + start // TOKENS]] + room + room_of // 2
                lines = (min(prompt - start, TOKENS) + each - 1) // each
                further(weighed + size * start, width // each, block, d, into, d, shares, lines, d)
            for r in range(rows):
                row, at = order[first + r], r * shared
                mine = own[row] + 1
                for start in range(0, mine, TOKENS):
                    block = where[own_blocks[row * own_wide + start // TOKENS]] + room + room_of // 2
                    lines = (min(mine - start, TOKENS) + each - 1) // each
                    further(weighed + size * (at * width + behind + start), width // each, block, d, into + 4 * at * d, d, shared, lines, d)
                for s in range(shared):
                    line_to = out + size * (row * heads + head * shared + s) * d
                    for c in range(d):
                        put(line_to, c, result[at + s, c] * inverse[at + s])

    return step


def _store(half: bool) -> Any:
    size, each = (2, 2) if half else (4, 1)

    @njit(inline="always")
    def store(address):
        ask = given(address)
        k, v, where, jobs = ask[0], ask[1], at64(ask[2]), at64(ask[3])
        count, kv, d, k_row, k_head, v_row, v_head = ask[4], ask[5], ask[6], ask[7], ask[8], ask[9], ask[10]
        while True:
            taken = next_part(address)
            if taken >= count * kv:
                break
            job, head = 3 * (taken // kv), taken % kv
            block, first, tokens = where[jobs[job]] + 8 * head * TOKENS * (d // each), jobs[job + 1], jobs[job + 2]
            keys, values = k + size * (first * k_row + head * k_head), v + size * (first * v_row + head * v_head)
            across(keys, k_row * size // 2, tokens, d * size // 2, carray(at32i(block), (d // each, TOKENS)), 0)
            rest = block + 4 * TOKENS * (d // each)
            if half:
                along(values, v_row, tokens, d, carray(at32i(rest), (TOKENS // 2, d)), 0)
            else:
                for t in range(tokens):
                    line, line_to = at32(values + 4 * t * v_row), at32(rest + 4 * t * d)
                    for c in range(d):
                        line_to[c] = line[c]

    return store


step_halves, step_floats = _step(True), _step(False)
_store_halves, _store_floats = _store(True), _store(False)


def _step_blocks16(address: int) -> None:
    step_halves(address)


def _step_blocks32(address: int) -> None:
    step_floats(address)


def _store_blocks16(address: int) -> None:
    _store_halves(address)


def _store_blocks32(address: int) -> None:
    _store_floats(address)


_STEP = {torch.bfloat16: Kernel(_step_blocks16), torch.float32: Kernel(_step_blocks32)}
_STORE = {torch.bfloat16: Kernel(_store_blocks16), torch.float32: Kernel(_store_blocks32)}


def takes(v: Tensor) -> bool:
    """Whether keys and values like these [Hkv, .., d] may lie in blocks: on a CPU that multiplies their type, d a multiple of 16."""
    known = v.dtype == torch.float32 or (v.dtype == torch.bfloat16 and multiplies_pairs())
    return v.device.type == "cpu" and known and v.shape[-1] % LANES == 0


def size(kv: int, width: int, dtype: torch.dtype) -> int:
    """Numbers of 32 bits in a block of so many heads of this width."""
    return kv * TOKENS * width * 2 * dtype.itemsize // 4


def pieces(counts: list[int], shared: int) -> list[int]:
    """Group, first row, rows: each group's rows, which stand side by side, in parts of about `_TOGETHER` queries."""
    found, first, most = [], 0, max(1, _TOGETHER // shared)
    for group, count in enumerate(counts):
        for start in range(0, count, most):
            found += [group, first + start, min(most, count - start)]
        first += count
    return found


def store(k: Tensor, v: Tensor, where: Tensor, jobs: Tensor) -> None:
    """Put keys and values [Hkv, T, d] into blocks whose addresses are in `where`; `jobs` [n, 3]: a block, its first token and how many."""
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    strides = [n for x in (k, v) for n in (x.stride(1), x.stride(0))]
    _STORE[v.dtype](*(x.data_ptr() for x in (k, v, where, jobs)), len(jobs), len(k), k.shape[2], *strides)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor | None,
    where: Tensor,
    told: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int, int, int],
    window: int | None,
    scaling: float,
) -> Tensor:
    """[B, H, d] attention of queries [B, H, d], after new keys and values [B, Hkv, d] of the rows have been put into their blocks.

    Queries and keys are first turned by `angles` [B, 2, d] (cosine and sine, fp32) where those are given. `where` has the address of each
    block. `told`: the parts as `pieces` says them, [B] rows group by group, [G] lengths of the prompts, [B] tokens of each row before this
    one, [G, ..] and [B, ..] the numbers of their blocks. `sizes`: parts, lengths of the two tables' lines, most rows of a part, most places
    that a row sees (a multiple of TOKENS). All indices are int64.
    """
    rows, heads, width = q.shape
    out = q.new_empty((rows, heads, width))
    strides = [n for x in (q, k, v) for n in (x.stride(0), x.stride(1))]
    turn = 0 if angles is None else angles.data_ptr()
    addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), turn, out.data_ptr(), where.data_ptr(), *(x.data_ptr() for x in told))
    _STEP[v.dtype](*addresses, *sizes, heads, k.shape[1], width, *strides, window or 2**40, bits(scaling))
    return out
