"""Attention of trees, forward and backward: each branch over its prompt and itself, no score of what it does not see.

A part is one tree and one head of keys, with all its heads of queries or, where threads would wait for each other, one of them. Its keys
and values are laid out once as they are multiplied, bf16 by pairs and every branch from an even place. Then come blocks of queries: the
scores of a block stay in the core's cache from their product to the last that needs them (FlashAttention, arXiv 2205.14135, where a row of
scores is short enough to be whole). Sums are in fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from preftune.kernels.amx import multiplies_pairs, small_product
from preftune.kernels.launch import Kernel, bits, given, next_part
from preftune.kernels.pairs import across, along, along_turned, by_pairs, down, former, latter, straight, straight_turned, up
from preftune.kernels.tiles import (
    FLOATS,
    LANES,
    PAIRS,
    at32,
    at64,
    exp,
    fill,
    highest,
    memory,
    real,
)

_BLOCK = 48
"""Queries at a time, of one head and one branch."""
_PARTS = 4
"""Parts that each thread should find, else it waits for the longest of another's."""
_WIDE = 64
"""Columns that a product may write at once: what is behind a piece of the scores begins at such a multiple."""
_LOWEST, _ONE, _ZERO = np.float32(-3e38), np.float32(1), np.float32(0)


@njit(inline="always")
def _lay(put, source, line, branches, sizes, common, width, to, together):
    """Lay out all branches of a tree by `put`, each from an even place, `together` places in one; returns the first place behind them."""
    first, prompt, responses, sized = branches
    put(source, line, common, width, to, 0)
    row, place = first + common, common
    for branch in range(responses + 1):
        n = prompt - common if branch == 0 else sizes[sized + branch - 1]
        put(source + 2 * row * line, line, n, width, to, place // together)
        row, place = row + n, place + up(n, 2)
    return place


@njit(inline="always")
def _pieces(branch, prompt, r, rows, window):
    """Keys that queries r to r + rows of a branch see: from where in the prompt and how many, from where of their own and how many."""
    position = r if branch == 0 else prompt + r
    seen = max(position - window + 1, 0) // 2 * 2
    if branch == 0:
        return seen, r + rows - seen, 0, 0
    own = max(seen - prompt, 0) // 2 * 2
    seen = min(seen, (prompt + 1) // 2 * 2)
    return seen, max(prompt - seen, 0), own, r + rows - own


def _products(half: bool) -> Any:
    """Products of queries with what they see, and of weights with it, in bf16 or float."""
    size, each = (2, 2) if half else (4, 1)
    product, further = (small_product(PAIRS if half else FLOATS, fresh) for fresh in (True, False))

    @njit(inline="always")
    def scores_of(lines, line_row, columns, seen, own, to, rows, width, many, behind, more):
        """to [rows, ..] = lines [rows, width] @ those columns of [width, ..] that stand for what is seen, and, behind it, for the own."""
        at, row, into, wide = columns.ctypes.data, columns.shape[1], to.ctypes.data, to.shape[1]
        product(lines, line_row // each, at + 4 * seen, row, into, wide, rows, width // each, many)
        product(lines, line_row // each, at + 4 * own, row, into + 4 * behind, wide, rows, width // each, more)

    @njit(inline="always")
    def gather(weights, lines, seen, own, to, rows, width, many, behind, more):
        """to [rows, width] = weights [rows, ..] @ those rows of [.., width] that stand for what is seen and for the own."""
        to[:rows] = 0
        at, row, from_lines = weights.ctypes.data, weights.shape[1] // each, lines.ctypes.data
        further(at, row, from_lines + size * seen * width, width, to.ctypes.data, width, rows, (many + each - 1) // each, width)
        further(
            at + size * behind, row, from_lines + size * own * width, width, to.ctypes.data, width, rows, (more + each - 1) // each, width
        )

    @njit(inline="always")
    def scatter(turned, weights, seen, own, to, n, width, many, behind, more):
        """Add turned [width, n] @ weights [n, ..] to those columns of [width, ..] that stand for what is seen and for the own."""
        left, left_row, at, row = turned.ctypes.data, turned.shape[1], weights.ctypes.data, weights.shape[1]
        into, room = to.ctypes.data, to.shape[1]
        further(left, left_row, at, row, into + 4 * seen, room, width, n, many)
        further(left, left_row, at + 4 * behind, row, into + 4 * own, room, width, n, more)

    return scores_of, gather, scatter


@njit(inline="always")
def _hide(at, branch, prompt, r, window, seen, many, own, behind, whole):
    """Make least the scores of all that query r of a branch does not see, and of what is no key at all."""
    position = r if branch == 0 else prompt + r
    low = max(position - window + 1, 0)
    fill(at, min(low - seen, many), _LOWEST)
    if branch == 0:
        fill(at + 4 * (position + 1 - seen), whole - (position + 1 - seen), _LOWEST)
    else:
        fill(at + 4 * many, behind - many + max(low - prompt - own, 0), _LOWEST)
        last = behind + r + 1 - own
        fill(at + 4 * last, whole - last, _LOWEST)


@njit(inline="always")
def _begin(branch, first, common):
    """The first query of a branch that is its tree's own: of what all prompts begin with, those of the tree at the row's start."""
    return common if branch == 0 and first > 0 else 0


def _forward(half: bool) -> Any:
    size, put, unit, each, kind = *memory(half)[::2], 1 if half else 2, 2 if half else 1, np.int16 if half else np.float32
    (scores_of, gather, _), line_up = _products(half), along if half else straight

    @njit(inline="always")
    def forward_of(address):
        ask = given(address)
        q, k, v, out, stats, trees, sizes = ask[0], ask[1], ask[2], ask[3], ask[4], at64(ask[5]), at64(ask[6])
        count, tokens, heads, kv, d, longest, window = ask[7], ask[8], ask[9], ask[10], ask[11], ask[12], ask[13]
        q_row, q_head, k_row, k_head, v_row, v_head, shares = ask[14], ask[15], ask[16], ask[17], ask[18], ask[19], ask[20]
        scaling, common = real(ask[21]), ask[22]
        room, wide = longest + _WIDE, longest + 2 * _WIDE
        keys, values = np.empty((d // each, room), np.int32), np.empty((room // each, d), np.int32)
        scores, weights = np.empty((_BLOCK, wide), np.float32), np.empty((_BLOCK, wide), kind)
        result = np.empty((_BLOCK, d), np.float32)
        while True:
            taken = next_part(address)
            if taken >= count * kv * shares:
                break
            tree, head, share = 4 * (taken // (kv * shares)), taken // shares % kv, taken % shares
            first, prompt, responses, sized = trees[tree], trees[tree + 1], trees[tree + 2], trees[tree + 3]
            branches = first, prompt, responses, sized
            _lay(across, k + size * head * k_head, k_row * unit, branches, sizes, common, d * unit, keys, 1)
            _lay(line_up, v + size * head * v_head, v_row * unit, branches, sizes, common, d * unit, values, each)
            row, place = first, 0
            for branch in range(responses + 1):
                n = prompt if branch == 0 else sizes[sized + branch - 1]
                begin = _begin(branch, first, common)
                shared = heads // kv // shares
                blocks = (n - begin + _BLOCK - 1) // _BLOCK
                for block in range(blocks * shared):
                    h, r = (head * shares + share) * shared + block // blocks, begin + block % blocks * _BLOCK
                    rows = min(n - r, _BLOCK)
                    seen, many, own, more = _pieces(branch, prompt, r, rows, window)
                    behind = up(many, _WIDE)
                    whole = behind + up(more, _WIDE)
                    queries = q + size * ((row + r) * q_row + h * q_head)
                    scores_of(queries, q_row, keys, seen, place + own, scores, rows, d, many, behind, more)
                    for i in range(rows):
                        at = scores.ctypes.data + 4 * i * wide
                        _hide(at, branch, prompt, r + i, window, seen, many, own, behind, whole)
                        line, to, top, total = scores[i], weights.ctypes.data + size * i * wide, highest(at, whole, _LOWEST), _ZERO
                        for c in range(whole):
                            one = exp((line[c] - top) * scaling)
                            total += one
                            put(to, c, one)
                        told = at32(stats + 8 * (h * tokens + row + r + i))
                        told[0], told[1] = top, _ONE / total
                    gather(weights, values, seen, place + own, result, rows, d, many, behind, more)
                    for i in range(rows):
                        token = row + r + i
                        inverse, to_out = at32(stats + 8 * (h * tokens + token))[1], out + size * (token * heads + h) * d
                        for c in range(d):
                            put(to_out, c, result[i, c] * inverse)
                row, place = row + n, place + up(n, 2)

    return forward_of


@njit(inline="always")
def _softmax_back(line, slope, told, whole, scaling):
    """The weights of one query's scores, in their place, and the gradients of the scores, in that of the weights'."""
    top, inverse, along = told[0], told[1], _ZERO
    for c in range(whole):
        one = exp((line[c] - top) * scaling) * inverse
        line[c] = one
        along += one * slope[c]
    for c in range(whole):
        slope[c] = line[c] * (slope[c] - along) * scaling


@njit(inline="always")
def _hand_over(source, branches, sizes, common, to, part, to_common, of_common, lines, width):
    """A part's gradients of what was laid out by `_lay`: to the lines of its tokens, and to its own lines for the common ones."""
    first, prompt, responses, sized = branches
    down(source, 0, to_common, of_common, lines, common, width)
    row, place = first + common, common
    for branch in range(responses + 1):
        n = prompt - common if branch == 0 else sizes[sized + branch - 1]
        down(source, place, to, row * lines + part, lines, n, width)
        row, place = row + n, place + up(n, 2)


def _backward(half: bool) -> Any:
    size, put, unit, each = *memory(half)[::2], 1 if half else 2, 2 if half else 1
    scores_of, gather, scatter = _products(half)
    line_up, turn, of, copied = (along, along_turned, former, _BLOCK) if half else (straight, straight_turned, latter, 0)

    @njit(inline="always")
    def backward_of(address):
        ask = given(address)
        q, k, v, grad, stats, trees, sizes = ask[0], ask[1], ask[2], ask[3], ask[4], at64(ask[5]), at64(ask[6])
        count, tokens, heads, kv, d, longest, window = ask[7], ask[8], ask[9], ask[10], ask[11], ask[12], ask[13]
        q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head = ask[14], ask[15], ask[16], ask[17], ask[18], ask[19], ask[20], ask[21]
        d_q, d_k, d_v, shares, scaling, common, d_common = ask[22], ask[23], ask[24], ask[25], real(ask[26]), ask[27], ask[28]
        room, wide = longest + _WIDE, longest + 2 * _WIDE
        keys, values, keys_along = (
            np.empty((d // each, room), np.int32),
            np.empty((d // each, room), np.int32),
            np.empty((room // each, d), np.int32),
        )
        of_keys, of_values = np.empty((d, room), np.float32), np.empty((d, room), np.float32)
        scores, slopes = np.empty((_BLOCK, wide), np.float32), np.empty((_BLOCK, wide), np.float32)
        weights, pulls = np.empty((copied // 2, wide), np.int32), np.empty((copied // 2, wide), np.int32)
        pulls_along = np.empty((copied, wide), np.int16)
        turned, result = np.empty((d, _BLOCK // each), np.int32), np.empty((_BLOCK, d), np.float32)
        while True:
            taken = next_part(address)
            if taken >= count * kv * shares:
                break
            tree, head, share = 4 * (taken // (kv * shares)), taken // shares % kv, taken % shares
            first, prompt, responses, sized = trees[tree], trees[tree + 1], trees[tree + 2], trees[tree + 3]
            branches = first, prompt, responses, sized
            _lay(across, k + size * head * k_head, k_row * unit, branches, sizes, common, d * unit, keys, 1)
            _lay(across, v + size * head * v_head, v_row * unit, branches, sizes, common, d * unit, values, 1)
            place = _lay(line_up, k + size * head * k_head, k_row * unit, branches, sizes, common, d * unit, keys_along, each)
            of_keys[:, : place + _WIDE] = 0
            of_values[:, : place + _WIDE] = 0
            row, place = first, 0
            for branch in range(responses + 1):
                n = prompt if branch == 0 else sizes[sized + branch - 1]
                begin = _begin(branch, first, common)
                shared = heads // kv // shares
                blocks = (n - begin + _BLOCK - 1) // _BLOCK
                for block in range(blocks * shared):
                    h, r = (head * shares + share) * shared + block // blocks, begin + block % blocks * _BLOCK
                    rows = min(n - r, _BLOCK)
                    seen, many, own, more = _pieces(branch, prompt, r, rows, window)
                    behind = up(many, _WIDE)
                    whole = behind + up(more, _WIDE)
                    queries, pull = q + size * ((row + r) * q_row + h * q_head), grad + size * ((row + r) * g_row + h * g_head)
                    scores_of(queries, q_row, keys, seen, place + own, scores, rows, d, many, behind, more)
                    scores_of(pull, g_row, values, seen, place + own, slopes, rows, d, many, behind, more)
                    told = stats + 8 * (h * tokens + row + r)
                    for i in range(rows):
                        _hide(scores.ctypes.data + 4 * i * wide, branch, prompt, r + i, window, seen, many, own, behind, whole)
                        at = slopes.ctypes.data + 4 * i * wide
                        fill(at + 4 * many, behind - many, _ZERO)  # no key is there; times a weight of nothing, NaN would still be NaN
                        fill(at + 4 * (behind + more), whole - behind - more, _ZERO)
                        _softmax_back(scores[i], slopes[i], at32(told + 8 * i), whole, scaling)
                    if half:
                        by_pairs(scores, slopes, weights, pulls, pulls_along, rows, whole)
                    turn(pull, g_row * unit, rows, d * unit, turned)
                    scatter(turned, of(weights, scores), seen, place + own, of_values, (rows + each - 1) // each, d, many, behind, more)
                    turn(queries, q_row * unit, rows, d * unit, turned)
                    scatter(turned, of(pulls, slopes), seen, place + own, of_keys, (rows + each - 1) // each, d, many, behind, more)
                    gather(of(pulls_along, slopes), keys_along, seen, place + own, result, rows, d, many, behind, more)
                    for i in range(rows):
                        to = d_q + size * ((row + r + i) * heads + h) * d
                        for c in range(d):
                            put(to, c, result[i, c])
                row, place = row + n, place + up(n, 2)
            part, of_common = head * shares + share, (tree // 4 * common * kv + head) * shares + share
            _hand_over(of_keys, branches, sizes, common, d_k, part, d_common, of_common, kv * shares, d)
            _hand_over(of_values, branches, sizes, common, d_v, part, d_common, of_common + count * common * kv * shares, kv * shares, d)

    return backward_of


_forward_halves, _forward_floats = _forward(True), _forward(False)
_backward_halves, _backward_floats = _backward(True), _backward(False)


def _forward16(address: int) -> None:
    _forward_halves(address)


def _forward32(address: int) -> None:
    _forward_floats(address)


def _backward16(address: int) -> None:
    _backward_halves(address)


def _backward32(address: int) -> None:
    _backward_floats(address)


_FORWARD = {torch.bfloat16: Kernel(_forward16), torch.float32: Kernel(_forward32)}
_BACKWARD = {torch.bfloat16: Kernel(_backward16), torch.float32: Kernel(_backward32)}

Trees = Sequence[tuple[int, Sequence[int]]]
"""Tokens of the prompt, and of each response, of the trees of a row."""


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels can do it: in fp32, or bf16 on a CPU that multiplies it by pairs; a head's width a multiple of sixteen."""
    known = q.dtype == v.dtype and (q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and multiplies_pairs()))
    return known and q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.shape[-1] % LANES == 0


def forward(q: Tensor, k: Tensor, v: Tensor, trees: Trees, common: int, window: int | None, scaling: float) -> tuple[Tensor, Tensor]:
    """[H, T, d] attention of queries [H, T, d] over keys and values [Hkv, T, d], its scores times `scaling` > 0.

    The first `common` tokens of all prompts, an even number, lie once at the start of the row, the rest of each tree behind them.
    With the result what `backward` needs, fp32 [H, T, 2].
    """
    q, k, v = (_readable(x) for x in (q, k, v))
    heads, tokens, width = q.shape
    out, stats = q.new_empty((tokens, heads, width)), q.new_empty((heads, tokens, 2), dtype=torch.float32)
    rows, sizes, numbers = _told(trees, common, q, k, window)
    where = [x.data_ptr() for x in (q, k, v, out, stats, rows, sizes)]
    _FORWARD[q.dtype](*where, *numbers, *_strides(q, k, v), _shares(trees, q, k), bits(scaling), common)
    return out.transpose(0, 1), stats


def backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, stats: Tensor, trees: Trees, common: int, window: int | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what `forward` was given, from that of its result, `grad` [H, T, d]."""
    q, k, v, grad = (_readable(x) for x in (q, k, v, grad))
    heads, tokens, width = q.shape
    shares = _shares(trees, q, k)
    d_q = q.new_empty((tokens, heads, width))
    d_k, d_v = (k.new_empty((tokens, len(k), shares, width), dtype=torch.float32) for _ in range(2))
    d_common = k.new_empty((2, len(trees), common, len(k), shares, width), dtype=torch.float32)
    rows, sizes, numbers = _told(trees, common, q, k, window)
    where = [x.data_ptr() for x in (q, k, v, grad, stats, rows, sizes)]
    into = [x.data_ptr() for x in (d_q, d_k, d_v)]
    _BACKWARD[q.dtype](*where, *numbers, *_strides(q, k, v, grad), *into, shares, bits(scaling), common, d_common.data_ptr())
    d_k[:common], d_v[:common] = d_common.sum(1)
    d_k, d_v = (x.sum(2) if shares > 1 else x.squeeze(2) for x in (d_k, d_v))
    return d_q.transpose(0, 1), d_k.to(k.dtype).transpose(0, 1), d_v.to(v.dtype).transpose(0, 1)


def _shares(trees: Trees, q: Tensor, k: Tensor) -> int:
    """Into how many parts the heads of queries that share a head of keys are cut: each alone where there are few parts for the threads."""
    return 1 if len(trees) * len(k) >= _PARTS * torch.get_num_threads() else len(q) // len(k)


def _readable(x: Tensor) -> Tensor:
    """With the numbers of a head side by side, and pairs of them where int32 are."""
    return x if x.stride(2) == 1 and x.stride(0) % 2 == x.stride(1) % 2 == 0 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in (x.stride(1), x.stride(0))]


def _told(trees: Trees, common: int, q: Tensor, k: Tensor, window: int | None) -> tuple[Tensor, Tensor, list[int]]:
    """Trees, the longest first, and sizes of their responses, each int64; and the numbers that a kernel is told.

    A tree begins where the first token of its prompt would lie if it followed the others' in the row.
    """
    rows: list[tuple[int, ...]] = []
    sizes: list[int] = []
    start = 0
    for prompt, responses in trees:
        rows.append((start, prompt, len(responses), len(sizes)))
        sizes.extend(responses)
        start += prompt - common + sum(responses)
    places = [-(-prompt // 2) * 2 + sum(-(-n // 2) * 2 for n in responses) for prompt, responses in trees]
    order = sorted(range(len(rows)), key=lambda i: -places[i])
    told = [len(rows), q.shape[1], len(q), len(k), q.shape[2], max(places), window or 2**40]
    return torch.tensor([rows[i] for i in order], dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64), told
