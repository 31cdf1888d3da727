"""Pairs from N scored samples: which two meet, and who wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

Pair = tuple[int, int]
"""(better, worse) indices."""


def first_round(scores: Sequence[float], random: np.random.Generator) -> list[Pair]:
    """Shuffle, then the first against the second, the third against the fourth: N // 2 meetings. RSO's default (arXiv:2309.06657)."""
    order = random.permutation(len(scores)).tolist()
    return _decided(scores, zip(order[::2], order[1::2], strict=False))


def tournament(scores: Sequence[float], random: np.random.Generator) -> list[Pair]:
    """Rounds of shuffled meetings whose winners go on, to the last: N - 1 meetings. In a tie the first drawn goes on, unpaired."""
    standing, pairs = random.permutation(len(scores)).tolist(), list[Pair]()
    while len(standing) > 1:
        meetings = list(zip(standing[::2], standing[1::2], strict=False))
        pairs += _decided(scores, meetings)
        bye = standing[-1:] if len(standing) % 2 else []
        standing = [b if scores[b] > scores[a] else a for a, b in meetings] + bye
    return pairs


def all_pairs(scores: Sequence[float], random: np.random.Generator) -> list[Pair]:
    """Everyone against everyone: N (N - 1) / 2 meetings."""
    return _decided(scores, combinations(range(len(scores)), 2))


def best_worst(scores: Sequence[float], random: np.random.Generator) -> list[Pair]:
    """The best against the worst, the first of each where several are."""
    values = np.asarray(scores, dtype=float)
    return _decided(scores, [(int(values.argmax()), int(values.argmin()))]) if len(values) > 1 else []


def _decided(scores: Sequence[float], meetings: object) -> list[Pair]:
    """Meetings with a winner; ties teach nothing and are left out."""
    return [(a, b) if scores[a] > scores[b] else (b, a) for a, b in meetings if scores[a] != scores[b]]  # type: ignore[attr-defined]


PAIRINGS: dict[str, Callable[[Sequence[float], np.random.Generator], list[Pair]]] = {
    "first_round": first_round,
    "tournament": tournament,
    "all": all_pairs,
    "best_worst": best_worst,
}
