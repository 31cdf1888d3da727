"""Log-probabilities and entropies over a vocabulary, and their gradients, each a single pass over the logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from preftune.kernels.launch import Kernel, bits, given, my_share
from preftune.kernels.pointwise import takes
from preftune.kernels.tiles import at32, at64, exp, highest, highest_half, memory, real

__all__ = ["log_sums", "log_sums_back", "takes"]

_LOWEST = np.float32(-3e38)
_SUMMED = 512
"""Numbers of a row that are summed in fp32; their sums are summed in float64."""


def _log_sums(half: bool) -> Any:
    size, get, _ = memory(half)
    highest_of = highest_half if half else highest

    @njit(inline="always")
    def log_sums(address):
        ask = given(address)
        logits, lse, entropy = ask[0], at32(ask[1]), at32(ask[2])
        rows, width, logits_row, scale = ask[3], ask[4], ask[5], real(ask[6])
        first, last = my_share(address, rows)
        for row in range(first, last):
            line = logits + size * row * logits_row
            top = highest_of(line, width, _LOWEST)
            whole, along = np.float64(0), np.float64(0)
            for start in range(0, width, _SUMMED):
                total, pulled = np.float32(0), np.float32(0)
                for c in range(start, min(start + _SUMMED, width)):
                    z = (get(line, c) - top) * scale
                    weight = exp(z)
                    total += weight
                    pulled += weight * max(z, _LOWEST)  # nothing times minus infinity is nothing
                whole += np.float64(total)
                along += np.float64(pulled)
            lse[row] = np.float32(math.log(whole) + top * scale)
            entropy[row] = np.float32(math.log(whole) - along / whole)

    return log_sums


def _log_sums_back(half: bool) -> Any:
    size, get, put = memory(half)

    @njit(inline="always")
    def log_sums_back(address):
        ask = given(address)
        logits, lse, entropy, targets = ask[0], at32(ask[1]), at32(ask[2]), at64(ask[3])
        pull, pull_entropy = at32(ask[4]), ask[5]
        rows, width, logits_row, scale = ask[6], ask[7], ask[8], real(ask[9])
        first, last = my_share(address, rows)
        for row in range(first, last):
            line, offset, g = logits + size * row * logits_row, lse[row], pull[row]
            chosen = get(line, targets[row]) * scale - offset
            own = g - exp(chosen) * g
            if pull_entropy:
                e, mean = at32(pull_entropy)[row], entropy[row]
                own -= exp(chosen) * e * (chosen + mean)
                for c in range(width):
                    z = get(line, c) * scale - offset
                    put(line, c, -exp(z) * (g + e * (max(z, _LOWEST) + mean)) * scale)
            else:
                for c in range(width):
                    put(line, c, -exp(get(line, c) * scale - offset) * g * scale)
            put(line, targets[row], own * scale)

    return log_sums_back


_log_sums_halves, _log_sums_floats = _log_sums(True), _log_sums(False)
_log_sums_back_halves, _log_sums_back_floats = _log_sums_back(True), _log_sums_back(False)


def _log_sums16(address: int) -> None:
    _log_sums_halves(address)


def _log_sums32(address: int) -> None:
    _log_sums_floats(address)


def _log_sums_back16(address: int) -> None:
    _log_sums_back_halves(address)


def _log_sums_back32(address: int) -> None:
    _log_sums_back_floats(address)


_LOG_SUMS = {torch.bfloat16: Kernel(_log_sums16), torch.float32: Kernel(_log_sums32)}
_LOG_SUMS_BACK = {torch.bfloat16: Kernel(_log_sums_back16), torch.float32: Kernel(_log_sums_back32)}


def log_sums(logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Fp32 log-sum-exp, and entropy in nats, of each row of scale * logits [B, V], scale > 0; [B] each."""
    lse, entropy = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    where = [x.data_ptr() for x in (logits, lse, entropy)]
    _LOG_SUMS[logits.dtype](*where, *logits.shape, logits.stride(0), bits(scale))
    return lse, entropy


def log_sums_back(
    logits: Tensor, lse: Tensor, entropy: Tensor | None, targets: Tensor, pull: Tensor, pull_entropy: Tensor | None, scale: float
) -> Tensor:
    """Gradient of the logits [B, V], in their place, from those of log-probabilities of `targets` and of entropies, fp32 [B] each."""
    where = [0 if x is None else x.data_ptr() for x in (logits, lse, entropy, targets, pull, pull_entropy)]
    _LOG_SUMS_BACK[logits.dtype](*where, *logits.shape, logits.stride(0), bits(scale))
    return logits
