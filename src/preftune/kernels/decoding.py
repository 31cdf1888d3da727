"""Attention of a decoding step: responses over the prompt they share, and each over its own tokens, in one pass over what is cached."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from preftune.kernels.launch import Kernel, bits, given, next_part
from preftune.kernels.tiles import FLOATS, HALVES, LANES, at32, at64, exp, memory, real, small_product

_LOWEST = np.float32(-1e30)


def _step(half: bool) -> Any:
    """A step with keys and values in bf16 or float; a part of it is one group of rows and one head of keys."""
    scores, weighted = (small_product(HALVES if half else FLOATS, fresh) for fresh in (True, False))
    size, get, put = memory(half)

    @njit(inline="always")
    def step(address):
        ask = given(address)
        q, k, v, prompt_k, prompt_v, own_k, own_v, out = ask[0], ask[1], ask[2], ask[3], ask[4], ask[5], ask[6], ask[7]
        order, starts, lengths, own = at64(ask[8]), at64(ask[9]), at64(ask[10]), at64(ask[11])
        groups, heads, kv, d, places, own_places = ask[12], ask[13], ask[14], ask[15], ask[16], ask[17]
        q_row, q_head, k_row, k_head, v_row, v_head = ask[18], ask[19], ask[20], ask[21], ask[22], ask[23]
        window, most, width, scaling = ask[24], ask[25], ask[26], real(ask[27])
        shared = heads // kv
        queries = np.empty((most * shared, d), np.float32)
        weights = np.empty((most * shared, width), np.float32)
        result = np.empty((most * shared, d), np.float32)
        while True:
            taken = next_part(address)
            if taken >= groups * kv:
                break
            group, head = taken // kv, taken % kv
            first, rows, prompt = starts[group], starts[group + 1] - starts[group], lengths[group]
            behind = (prompt + LANES - 1) // LANES * LANES  # where the weights of a row's own tokens begin
            for r in range(rows):
                row = order[first + r]
                k_from, v_from = k + size * (row * k_row + head * k_head), v + size * (row * v_row + head * v_head)
                k_to = own_k + size * ((row * kv + head) * d * own_places + own[row])
                v_to = own_v + size * ((row * kv + head) * own_places + own[row]) * d
                for c in range(d):
                    put(k_to, c * own_places, get(k_from, c))
                    put(v_to, c, get(v_from, c))
                for s in range(shared):
                    q_from = at32(q + 4 * (row * q_row + (head * shared + s) * q_head))
                    for c in range(d):
                        queries[r * shared + s, c] = q_from[c] * scaling
                        result[r * shared + s, c] = 0
            to, seen, into = queries.ctypes.data, weights.ctypes.data, result.ctypes.data
            scores(to, d, prompt_k + size * (group * kv + head) * d * places, places, seen, width, rows * shared, d, prompt)
            for r in range(rows):
                row = order[first + r]
                mine, at = own[row] + 1, r * shared
                keys = own_k + size * (row * kv + head) * d * own_places
                scores(to + 4 * at * d, d, keys, own_places, seen + 4 * (at * width + behind), width, shared, d, mine)
                unseen = max(prompt + mine - window, 0)  # tokens of the prompt, then of the row's own, that lie before the window
                for s in range(shared):
                    line = weights[at + s]
                    line[: min(unseen, prompt)] = _LOWEST
                    line[prompt : behind + max(unseen - prompt, 0)] = _LOWEST
                    highest = _LOWEST
                    for j in range(behind + mine):
                        highest = max(highest, line[j])
                    total = np.float32(0)
                    for j in range(behind + mine):
                        one = exp(line[j] - highest)
                        line[j] = one
                        total += one
                    inverse = np.float32(1) / total
                    for j in range(behind + mine):
                        line[j] *= inverse
            weighted(seen, width, prompt_v + size * (group * kv + head) * places * d, d, into, d, rows * shared, prompt, d)
            for r in range(rows):
                row = order[first + r]
                values, at = own_v + size * (row * kv + head) * own_places * d, r * shared
                weighted(seen + 4 * (at * width + behind), width, values, d, into + 4 * at * d, d, shared, own[row] + 1, d)
                for s in range(shared):
                    line_to = out + size * (row * heads + head * shared + s) * d
                    for c in range(d):
                        put(line_to, c, result[at + s, c])

    return step


_on_halves, _on_floats = _step(True), _step(False)


def _step16(address: int) -> None:
    _on_halves(address)


def _step32(address: int) -> None:
    _on_floats(address)


_STEPS = {torch.bfloat16: Kernel(_step16), torch.float32: Kernel(_step32)}


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether `step` can do it: values in bf16 or fp32 on the CPU, a head's width a multiple of sixteen."""
    return q.device.type == "cpu" and v.dtype in _STEPS and q.shape[-1] % LANES == 0 and q.shape[-1] == v.shape[-1]


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    order: Tensor,
    starts: Tensor,
    lengths: Tensor,
    place: Tensor,
    *,
    most: int,
    longest: tuple[int, int],
    window: int | None,
    scaling: float,
) -> Tensor:
    """[H, B, d] attention of queries [H, B, d], after new keys and values [Hkv, B, d] of the rows have been put into `own`.

    `prompt` holds keys [G, Hkv, d, P] and values [G, Hkv, P, d] of each group, `own` the same of each row, P a multiple of 16. Row b is
    the `place[b]`-th of its response; `order` [B] has the rows group by group, group g from `starts[g]` to `starts[g + 1]`, `lengths` [G]
    tokens each; at most `most` rows in one, prompts and own tokens at most `longest`. All indices are int64.
    """
    q, k = (q if q.dtype == torch.float32 else q.float()), k.to(v.dtype)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    heads, rows, width = q.shape
    out = q.new_empty((rows, heads, width), dtype=v.dtype)
    tensors = (q, k, v, *prompt, *own, out, order, starts, lengths, place)
    strides = [n for x in (q, k, v) for n in (x.stride(1), x.stride(0))]
    rounded = sum(-(-n // LANES) * LANES for n in longest)
    sizes = (len(lengths), heads, len(k), width, prompt[0].shape[3], own[0].shape[3], *strides, window or 2**40, most, rounded)
    _STEPS[v.dtype](*(x.data_ptr() for x in tensors), *sizes, bits(scaling))
    return out.transpose(0, 1)
