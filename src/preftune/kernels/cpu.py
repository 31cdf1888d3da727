"""What the CPU can do that kernels are compiled for."""

from __future__ import annotations

import functools

from llvmlite import binding
from numba import config


@functools.cache
def has(feature: str) -> bool:
    """Whether the CPU that numba compiles for has it, by LLVM's name."""
    if config.CPU_FEATURES is not None:
        return f"+{feature}" in config.CPU_FEATURES.split(",")
    return bool(binding.get_host_cpu_features().get(feature))


def has_pairs() -> bool:
    """Whether this CPU multiplies bf16 by pairs (AVX512-BF16)."""
    return has("avx512bf16")
