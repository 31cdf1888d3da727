"""Statistical rejection sampling: draws from pi(y) exp(r(y) / beta) / Z with samples of pi (RSO, arXiv:2309.06657, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def statistical_rejection(rewards: Sequence[float], count: int, beta: float, random: np.random.Generator) -> list[int]:
    """Indices of `count` accepted candidates, in the order of their acceptance.

    Pass after pass, each candidate left is visited in random order and accepted with probability exp((r - max r) / beta), the maximum over
    those left when the pass begins; the exponent is never above 0, so nothing overflows, and every pass accepts its maximum. beta 0 takes
    the `count` highest; an infinite one takes any. Raises ValueError where there are fewer candidates than asked for, or for bad numbers.
    """
    r = np.asarray(rewards, dtype=float)
    if not 0 <= count <= len(r):
        raise ValueError(f"{count} of {len(r)} candidates cannot be accepted")
    if not beta >= 0 or not np.isfinite(r).all():
        raise ValueError("beta must be 0 or more, and rewards finite")
    left, accepted = np.arange(len(r)), list[int]()
    while len(accepted) < count:
        probability = acceptance(r[left], beta)
        taken = []
        for at in random.permutation(len(left)):
            if random.random() < probability[at]:
                taken.append(at)
                accepted.append(int(left[at]))
                if len(accepted) == count:
                    return accepted
        left = np.delete(left, taken)
    return accepted


def acceptance(rewards: np.ndarray, beta: float) -> np.ndarray:
    """[N] exp((r - max r) / beta): the probability with which one pass accepts each candidate."""
    with np.errstate(over="ignore"):  # a gap too wide for a float is never crossed
        gap = rewards - rewards.max(initial=-np.inf)
    return np.exp(gap / beta) if beta > 0 else (gap == 0).astype(float)
