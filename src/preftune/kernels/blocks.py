"""Attention of a decoding step in bf16: responses over the prompt they share, and each over its own tokens, which lie in blocks.

A block has the keys and values of `TOKENS` tokens that follow each other, one head behind the other, laid out once as the CPU multiplies
bf16: keys [d / 2, TOKENS] by pairs of neighbours, values [TOKENS / 2, d] by pairs of tokens. What nobody has written yet may hold anything.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from preftune.kernels.launch import Kernel, bits, given, next_part
from preftune.kernels.pairs import across, along
from preftune.kernels.tiles import (
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
    multiplies_pairs,
    narrow,
    paired,
    real,
    small_product,
    widen,
)

TOKENS = 64
_TOGETHER = 48
"""Queries of one part, about: the values they are multiplied with stay in the core's cache."""
_LINE = 64
"""Bytes that memory is read by."""
_LOWEST, _ONE, _ZERO = np.float32(-3e38), np.float32(1), np.float32(0)
_product, _further = small_product(PAIRS, True), small_product(PAIRS, False)


@njit(inline="always")
def _turned(source, to, angles, d):
    """Copy bf16 numbers of one head, turned by the angles [2, d] unless there are none (arXiv 2104.09864, eq. 34)."""
    low, into = at16(source), at16(to)
    if angles:
        c, half = at32(angles), d // 2
        high, into_high, c_high = at16(source + 2 * half), at16(to + 2 * half), at32(angles + 4 * half)
        s, s_high = at32(angles + 4 * d), at32(angles + 4 * (d + half))
        for i in range(half):
            a, b = widen(low[i]), widen(high[i])
            into[i] = narrow(a * c[i] - b * s[i])
            into_high[i] = narrow(b * c_high[i] + a * s_high[i])
    else:
        for i in range(d):
            into[i] = low[i]


@njit(inline="always")
def _add_token(key, v, block, at, d):
    """Put a token's key and value into a block."""
    to, pairs = at32i(block), at32i(key)
    for c in range(d // 2):
        to[c * TOKENS + at] = pairs[c]
    value, values = at16(v), block + 2 * TOKENS * d + 4 * (at // 2) * d
    if at % 2:
        halves = at16(values)
        for c in range(d):
            halves[2 * c + 1] = value[c]
    else:
        whole = at32i(values)
        for c in range(d):
            whole[c] = paired(value[c], 0)  # else what stood there, even NaN, would count nothing times


@njit(inline="always")
def _fetch(block, tokens, d):
    """Ask for the keys and values of a block's first tokens: they lie anywhere in memory, and waiting for each takes long."""
    for c in range(d // 2):
        for at in range(4 * c * TOKENS, 4 * (c * TOKENS + tokens), _LINE):
            fetch(block + at)
    for at in range(2 * TOKENS * d, 2 * TOKENS * d + 4 * (tokens + 1) // 2 * d, _LINE):
        fetch(block + at)


@njit(inline="always")
def _softmax(line, to, whole, scaling):
    """Weights in bf16 of a row of scores, not yet divided by their sum, and one over it."""
    top, total = highest(line.ctypes.data, whole, _LOWEST), _ZERO
    for c in range(whole):
        one = exp((line[c] - top) * scaling)
        total += one
        to[c] = narrow(one)
    return _ONE / total


@njit(inline="always")
def _step(address):
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
    shared, size = heads // kv, 4 * TOKENS * d
    key, queries = np.empty(d, np.int16), np.empty((most * shared, d), np.int16)
    scores, weights = np.empty((most * shared, width), np.float32), np.empty((most * shared, width), np.int16)
    result, inverse = np.empty((most * shared, d), np.float32), np.empty(most * shared, np.float32)
    to, seen, weighed, into = queries.ctypes.data, scores.ctypes.data, weights.ctypes.data, result.ctypes.data
    while True:
        taken = next_part(address)
        if taken >= count * kv:
            break
        piece, head = 3 * (taken // kv), taken % kv
        group, first, rows = pieces[piece], pieces[piece + 1], pieces[piece + 2]
        prompt, room, shares = lengths[group], head * size, rows * shared
        behind = (prompt + TOKENS - 1) // TOKENS * TOKENS
        for r in range(rows):
            row = order[first + r]
            turn = angles + 8 * row * d if angles else 0
            block = where[own_blocks[row * own_wide + own[row] // TOKENS]] + room
            _turned(k + 2 * (row * k_row + head * k_head), key.ctypes.data, turn, d)
            for start in range(0, own[row] + 1, TOKENS):
                _fetch(where[own_blocks[row * own_wide + start // TOKENS]] + room, min(own[row] + 1 - start, TOKENS), d)
            _add_token(key.ctypes.data, v + 2 * (row * v_row + head * v_head), block, own[row] % TOKENS, d)
            for s in range(shared):
                _turned(q + 2 * (row * q_row + (head * shared + s) * q_head), to + 2 * (r * shared + s) * d, turn, d)
        for start in range(0, prompt, TOKENS):
            block = where[prompt_blocks[group * prompt_wide + start // TOKENS]] + room
            _product(to, d // 2, block, TOKENS, seen + 4 * start, width, shares, d // 2, min(prompt - start, TOKENS))
        for r in range(rows):
            row, at = order[first + r], r * shared
            mine = own[row] + 1
            whole = behind + (mine + TOKENS - 1) // TOKENS * TOKENS
            unseen = max(prompt + mine - window, 0)  # tokens of the prompt, then of the row's own, that lie before the window
            for start in range(0, mine, TOKENS):
                block = where[own_blocks[row * own_wide + start // TOKENS]] + room
                into_scores = seen + 4 * (at * width + behind + start)
                _product(to + 2 * at * d, d // 2, block, TOKENS, into_scores, width, shared, d // 2, min(mine - start, TOKENS))
            for s in range(at, at + shared):
                line = seen + 4 * s * width
                fill(line, min(unseen, prompt), _LOWEST)
                fill(line + 4 * prompt, behind - prompt + max(unseen - prompt, 0), _LOWEST)
                fill(line + 4 * (behind + mine), whole - behind - mine, _LOWEST)
                inverse[s] = _softmax(scores[s], weights[s], whole, scaling)
        result[:shares] = 0
        for start in range(0, prompt, TOKENS):
            block = where[prompt_blocks[group * prompt_wide + start // TOKENS]] + room + size // 2
            pairs = (min(prompt - start, TOKENS) + 1) // 2
            _further(weighed + 2 * start, width // 2, block, d, into, d, shares, pairs, d)
        for r in range(rows):
            row, at = order[first + r], r * shared
            mine = own[row] + 1
            for start in range(0, mine, TOKENS):
                block = where[own_blocks[row * own_wide + start // TOKENS]] + room + size // 2
                pairs = (min(mine - start, TOKENS) + 1) // 2
                _further(weighed + 2 * (at * width + behind + start), width // 2, block, d, into + 4 * at * d, d, shared, pairs, d)
            for s in range(shared):
                line_to = at16(out + 2 * (row * heads + head * shared + s) * d)
                for c in range(d):
                    line_to[c] = narrow(result[at + s, c] * inverse[at + s])


@njit(inline="always")
def _store(address):
    ask = given(address)
    k, v, where, jobs = ask[0], ask[1], at64(ask[2]), at64(ask[3])
    count, kv, d, k_row, k_head, v_row, v_head = ask[4], ask[5], ask[6], ask[7], ask[8], ask[9], ask[10]
    while True:
        taken = next_part(address)
        if taken >= count * kv:
            break
        job, head = 3 * (taken // kv), taken % kv
        block, first, tokens = where[jobs[job]] + 4 * head * TOKENS * d, jobs[job + 1], jobs[job + 2]
        keys, values = k + 2 * (first * k_row + head * k_head), v + 2 * (first * v_row + head * v_head)
        across(keys, k_row, tokens, d, carray(at32i(block), (d // 2, TOKENS)), 0)
        along(values, v_row, tokens, d, carray(at32i(block + 2 * TOKENS * d), (TOKENS // 2, d)), 0)


def _step_blocks(address: int) -> None:
    _step(address)


def _store_blocks(address: int) -> None:
    _store(address)


_STEP, _STORE = Kernel(_step_blocks), Kernel(_store_blocks)


def takes(v: Tensor) -> bool:
    """Whether keys and values like these [Hkv, .., d] may lie in blocks: bf16 on a CPU that multiplies it by pairs, d a multiple of 16."""
    return v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.shape[-1] % LANES == 0 and multiplies_pairs()


def size(kv: int, width: int) -> int:
    """Numbers of int32 in a block of so many heads of this width."""
    return kv * TOKENS * width


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
    _STORE(*(x.data_ptr() for x in (k, v, where, jobs)), len(jobs), len(k), k.shape[2], *strides)


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
    """[B, H, d] attention of bf16 queries [B, H, d], after new keys and values [B, Hkv, d] of the rows have been put into their blocks.

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
    _STEP(*addresses, *sizes, heads, k.shape[1], width, *strides, window or 2**40, bits(scaling))
    return out
