"""What lies between the products of a decoder layer, each a single pass over its numbers: norm, rotary embedding, gated activation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from preftune.kernels.launch import Kernel, bits, given, my_share
from preftune.kernels.tiles import at32, exp, highest, highest_half, memory, real

_ONE, _ZERO, _LOWEST = np.float32(1), np.float32(0), np.float32(-3e38)
_TOGETHER = 64
"""Rows whose gradients of a weight are summed in fp32, in order."""


def _norm(half: bool) -> Any:
    size, get, put = memory(half)

    @njit(inline="always")
    def norm(address):
        ask = given(address)
        states, added, weight, out = ask[0], ask[1], at32(ask[2]), ask[3]
        rows, width, added_row, eps = ask[4], ask[5], ask[6], real(ask[7])
        first, last = my_share(address, rows)
        for row in range(first, last):
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

    @njit(inline="always")
    def turn(address):
        ask = given(address)
        both, cos, sin, q, k = ask[0], ask[1], ask[2], ask[3], ask[4]
        rows, heads, kv, width, both_row = ask[5], ask[6], ask[7], ask[8], ask[9]
        half_width = width // 2
        first, last = my_share(address, rows)
        for row in range(first, last):
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


def _rotary(half: bool, back: bool) -> Any:
    size, get, put = memory(half)

    @njit(inline="always")
    def rotary(address):
        ask = given(address)
        source, cos, sin, out = ask[0], ask[1], ask[2], ask[3]
        tokens, heads, width, token_step, head_step = ask[4], ask[5], ask[6], ask[7], ask[8]
        half_width = width // 2
        first, last = my_share(address, tokens)
        for token in range(first, last):
            c, s = at32(cos + 4 * token * width), at32(sin + 4 * token * width)
            for head in range(heads):
                low, to = source + size * (token * token_step + head * head_step), out + size * (token * heads + head) * width
                high = low + size * half_width
                for i in range(half_width):
                    a, b, j = get(low, i), get(high, i), half_width + i
                    if back:
                        put(to, i, a * c[i] + b * s[j])
                        put(to, j, b * c[j] - a * s[i])
                    else:
                        put(to, i, a * c[i] - b * s[i])
                        put(to, j, b * c[j] + a * s[j])

    return rotary


def _gated(half: bool) -> Any:
    size, get, put = memory(half)

    @njit(inline="always")
    def gated(address):
        ask = given(address)
        gate, up, out = ask[0], ask[1], ask[2]
        rows, width, gate_row, up_row = ask[3], ask[4], ask[5], ask[6]
        first, last = my_share(address, rows)
        for row in range(first, last):
            g, u, to = gate + size * row * gate_row, up + size * row * up_row, out + size * row * width
            for c in range(width):
                x = get(g, c)
                put(to, c, x * (_ONE / (_ONE + exp(-x))) * get(u, c))

    return gated


def _gated_back(half: bool) -> Any:
    size, get, put = memory(half)

    @njit(inline="always")
    def gated_back(address):
        ask = given(address)
        gate, up, pull, inner, d_both = ask[0], ask[1], ask[2], ask[3], ask[4]
        rows, width, gate_row, up_row, pull_row = ask[5], ask[6], ask[7], ask[8], ask[9]
        first, last = my_share(address, rows)
        for row in range(first, last):
            g, u, p = gate + size * row * gate_row, up + size * row * up_row, pull + size * row * pull_row
            to, d_gate = inner + size * row * width, d_both + size * row * 2 * width
            d_up = d_gate + size * width
            for c in range(width):
                x, other, slope = get(g, c), get(u, c), get(p, c)
                share = _ONE / (_ONE + exp(-x))
                active = x * share
                put(to, c, active * other)
                put(d_up, c, slope * active)
                put(d_gate, c, slope * other * share * (_ONE + x - active))

    return gated_back


def _tree_softmax(half: bool) -> Any:
    size, get, put = memory(half)

    @njit(inline="always")
    def tree_softmax(address):
        ask = given(address)
        scores, mask, rows, width = ask[0], ask[1], ask[2], ask[3]
        line = np.empty(width, np.float32)
        first, last = my_share(address, rows)
        for row in range(first, last):
            at, hidden = scores + size * row * width, mask + size * (row % width) * width
            seen = row % width + 1  # a token comes after all that it sees
            highest = _LOWEST
            for c in range(seen):
                line[c] = get(at, c) + get(hidden, c)
                highest = max(highest, line[c])
            total = np.float32(0)
            for c in range(seen):
                line[c] = exp(line[c] - highest)
                total += line[c]
            inverse = _ONE / total
            for c in range(seen):
                put(at, c, line[c] * inverse)
            for c in range(seen, width):
                put(at, c, _ZERO)

    return tree_softmax


def _exp_sums(half: bool) -> Any:
    size, get, _ = memory(half)
    highest_of = highest_half if half else highest

    @njit(inline="always")
    def exp_sums(address):
        ask = given(address)
        logits, top, sums = ask[0], at32(ask[1]), ask[2]
        rows, width, block, logits_row = ask[3], ask[4], ask[5], ask[6]
        blocks = (width + block - 1) // block
        first, last = my_share(address, rows)
        for row in range(first, last):
            line, to = logits + size * row * logits_row, at32(sums + 4 * row * blocks)
            largest = highest_of(line, width, _LOWEST)
            top[row] = largest
            for b in range(blocks):
                total = np.float32(0)
                for c in range(b * block, min(b * block + block, width)):
                    total += exp(get(line, c) - largest)
                to[b] = total

    return exp_sums


@njit(inline="always")
def _norm_back(address):
    """Of fp32 rows. The weight's gradient is left as sums over `_TOGETHER` rows each, the same for any number of threads."""
    ask = given(address)
    states, pull, weight, out, sums = ask[0], ask[1], at32(ask[2]), ask[3], ask[4]
    rows, width, eps = ask[5], ask[6], real(ask[7])
    first, last = my_share(address, (rows + _TOGETHER - 1) // _TOGETHER)
    for block in range(first, last):
        summed = at32(sums + 4 * block * width)
        for c in range(width):
            summed[c] = _ZERO
        for row in range(block * _TOGETHER, min((block + 1) * _TOGETHER, rows)):
            x, g, to = at32(states + 4 * row * width), at32(pull + 4 * row * width), at32(out + 4 * row * width)
            total, along = np.float32(0), np.float32(0)
            for c in range(width):
                total += x[c] * x[c]
                along += g[c] * weight[c] * x[c]
            scale = _ONE / np.sqrt(total / np.float32(width) + eps)
            back = -along * scale * scale * scale / np.float32(width)
            for c in range(width):
                summed[c] += g[c] * x[c] * scale
                to[c] = g[c] * weight[c] * scale + x[c] * back


norm_halves, norm_floats = _norm(True), _norm(False)
_turn_halves, _turn_floats = _turn(True), _turn(False)
_rotary_halves, _rotary_floats = _rotary(True, False), _rotary(False, False)
_rotary_back_halves, _rotary_back_floats = _rotary(True, True), _rotary(False, True)
gated_halves, gated_floats = _gated(True), _gated(False)
_gated_back_halves, _gated_back_floats = _gated_back(True), _gated_back(False)
_exp_sums_halves, _exp_sums_floats = _exp_sums(True), _exp_sums(False)
_tree_softmax_halves, _tree_softmax_floats = _tree_softmax(True), _tree_softmax(False)


def _norm16(address: int) -> None:
    norm_halves(address)


def _norm32(address: int) -> None:
    norm_floats(address)


def _turn16(address: int) -> None:
    _turn_halves(address)


def _turn32(address: int) -> None:
    _turn_floats(address)


def _rotary16(address: int) -> None:
    _rotary_halves(address)


def _rotary32(address: int) -> None:
    _rotary_floats(address)


def _rotary_back16(address: int) -> None:
    _rotary_back_halves(address)


def _rotary_back32(address: int) -> None:
    _rotary_back_floats(address)


def _gated16(address: int) -> None:
    gated_halves(address)


def _gated32(address: int) -> None:
    gated_floats(address)


def _gated_back16(address: int) -> None:
    _gated_back_halves(address)


def _gated_back32(address: int) -> None:
    _gated_back_floats(address)


def _exp_sums16(address: int) -> None:
    _exp_sums_halves(address)


def _exp_sums32(address: int) -> None:
    _exp_sums_floats(address)


def _tree_softmax16(address: int) -> None:
    _tree_softmax_halves(address)


def _tree_softmax32(address: int) -> None:
    _tree_softmax_floats(address)


def _norm_back32(address: int) -> None:
    _norm_back(address)


_NORMS = {torch.bfloat16: Kernel(_norm16), torch.float32: Kernel(_norm32)}
_TURNS = {torch.bfloat16: Kernel(_turn16), torch.float32: Kernel(_turn32)}
_ROTARY = {torch.bfloat16: Kernel(_rotary16), torch.float32: Kernel(_rotary32)}
_ROTARY_BACK = {torch.bfloat16: Kernel(_rotary_back16), torch.float32: Kernel(_rotary_back32)}
_GATES = {torch.bfloat16: Kernel(_gated16), torch.float32: Kernel(_gated32)}
_GATES_BACK = {torch.bfloat16: Kernel(_gated_back16), torch.float32: Kernel(_gated_back32)}
_SUMS = {torch.bfloat16: Kernel(_exp_sums16), torch.float32: Kernel(_exp_sums32)}
_NORM_BACK = Kernel(_norm_back32)
_SOFTMAXES = {torch.bfloat16: Kernel(_tree_softmax16), torch.float32: Kernel(_tree_softmax32)}


def takes(x: Tensor) -> bool:
    """Whether the kernels can read it: bf16 or fp32 on the CPU, the numbers of a row side by side."""
    return x.device.type == "cpu" and x.dtype in _NORMS and x.stride(-1) == 1


def add_norm(states: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm, in `dtype`, of fp32 states [T, D] to which `added` [T, D], of that type, is added in place; arXiv 1910.07467, eq. 4."""
    rows, width = states.shape
    out = states.new_empty((rows, width), dtype=dtype)
    more = (0, 0) if added is None else (added.data_ptr(), added.stride(0))
    _NORMS[dtype](states.data_ptr(), more[0], weight.data_ptr(), out.data_ptr(), rows, width, more[1], bits(eps))
    return out


def turn(both: Tensor, heads: int, kv: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, d] queries in fp32 and [T, Hkv, d] keys of `both` [T, (H + Hkv) d], turned by fp32 [T, d] angles; arXiv 2104.09864."""
    rows, width = cos.shape
    q, k = both.new_empty((rows, heads, width), dtype=torch.float32), both.new_empty((rows, kv, width))
    where = [x.data_ptr() for x in (both, cos, sin, q, k)]
    _TURNS[both.dtype](*where, rows, heads, kv, width, both.stride(0))
    return q, k


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[H, T, d] heads turned by fp32 angles [T, d], in their own type; arXiv 2104.09864, eq. 34."""
    return _rotated(_ROTARY, x, cos, sin)


def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[H, T, d] gradient of what `rotate` turned, from that of its result."""
    return _rotated(_ROTARY_BACK, grad if grad.stride(-1) == 1 else grad.contiguous(), cos, sin)


def _rotated(kernels: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, tokens, width = x.shape
    out = x.new_empty((tokens, heads, width))
    kernels[x.dtype](*(t.data_ptr() for t in (x, cos, sin, out)), tokens, heads, width, x.stride(1), x.stride(0))
    return out.transpose(0, 1)


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of [T, F] each, rounded once."""
    rows, width = gate.shape
    out = gate.new_empty((rows, width))
    where = [x.data_ptr() for x in (gate, up, out)]
    _GATES[gate.dtype](*where, rows, width, gate.stride(0), up.stride(0))
    return out


def silu_gated_back(gate: Tensor, up: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of [T, F] each, and [T, 2 F]: the gradients of gate and of up side by side, from that of the product, `pull`."""
    rows, width = gate.shape
    inner, d_both = gate.new_empty((rows, width)), gate.new_empty((rows, 2 * width))
    where = [x.data_ptr() for x in (gate, up, pull, inner, d_both)]
    _GATES_BACK[gate.dtype](*where, rows, width, gate.stride(0), up.stride(0), pull.stride(0))
    return inner, d_both


def tree_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax, in place, of contiguous scores [H, n L, L] to which the additive mask [L, L] is added; no token sees one behind it."""
    _SOFTMAXES[scores.dtype](scores.data_ptr(), mask.data_ptr(), scores.numel() // len(mask), len(mask))
    return scores


def exp_sums(logits: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Fp32 [B] maximum of each row of logits [B, V], and [B, blocks] sums of exp(logit - maximum) over `block` neighbours at a time."""
    rows, width = logits.shape
    top, sums = (logits.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (rows, -(-width // block))))
    _SUMS[logits.dtype](*(x.data_ptr() for x in (logits, top, sums)), rows, width, block, logits.stride(0))
    return top, sums


def norm_back(states: Tensor, pull: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of fp32 states [T, D] and of the weight [D] of their RMSNorm, from that of the result, `pull` [T, D]."""
    rows, width = states.shape
    out, sums = torch.empty_like(states), states.new_empty((-(-rows // _TOGETHER), width))
    _NORM_BACK(*(x.data_ptr() for x in (states, pull, weight, out, sums)), rows, width, bits(eps))
    return out, sums.sum(0)
