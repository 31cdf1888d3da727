"""Who beats whom among the responses of a record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import combinations

from preftune.records import Example, Response


def strict_pairs(example: Example) -> list[tuple[int, int]]:
    """All (better, worse) pairs of response indices; ties and what was never compared give none.

    The first that the record has decides: comparisons (averaged over annotators), ranks, scores (of a mapping: `overall`), labels.
    A K-wise ranking without ties gives K(K-1)/2 pairs.
    """
    if example.comparisons:
        return _compared(example)
    for value in (_by_rank, _by_score, _by_label):
        values = [value(response) for response in example.responses]
        if sum(one is not None for one in values) >= 2:
            known = [(index, one) for index, one in enumerate(values) if one is not None]
            return [(i, j) if a > b else (j, i) for (i, a), (j, b) in combinations(known, 2) if a != b]
    return []


def _compared(example: Example) -> list[tuple[int, int]]:
    outcomes: dict[tuple[int, int], list[float]] = defaultdict(list)
    for one in example.comparisons:
        first, second = sorted((one.first, one.second))
        outcomes[first, second].append(one.outcome if one.first == first else 1 - one.outcome)
    means = {pair: sum(values) / len(values) for pair, values in outcomes.items()}
    return [(i, j) if mean > 0.5 else (j, i) for (i, j), mean in means.items() if mean != 0.5]


_Value = Callable[[Response], float | None]
_by_rank: _Value = lambda response: None if response.rank is None else -response.rank
_by_label: _Value = lambda response: None if response.label is None else float(response.label)


def _by_score(response: Response) -> float | None:
    return response.score.get("overall") if isinstance(response.score, Mapping) else response.score
