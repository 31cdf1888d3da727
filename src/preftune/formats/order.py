"""Who beats whom among the responses of a record: the one place where ranks, scores, labels and comparisons become an order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import combinations

from preftune.records import Example, Response


def ordering(example: Example) -> list[float | None]:
    """One number a response, higher is better, None where nothing orders it.

    The first that the record has decides: comparisons (a response's mean share of wins over those it met, after Copeland), ranks
    (negated), scores (of a mapping: `overall`), labels. One that only a single response among several carries orders nothing.
    """
    if example.comparisons:
        won: dict[int, list[float]] = defaultdict(list)
        for (i, j), share in preferences(example).items():
            won[i].append(share)
            won[j].append(1 - share)
        return [sum(won[i]) / len(won[i]) if i in won else None for i in range(len(example.responses))]
    for value in (_by_rank, _by_score, _by_label):
        values = [value(response) for response in example.responses]
        if sum(one is not None for one in values) >= min(2, len(values)):
            return values
    return [None] * len(example.responses)


def preferences(example: Example) -> dict[tuple[int, int], float]:
    """Each pair (i, j), i < j, on which something is known: the share of judgements by which response i beats j; 0.5 is a tie.

    Comparisons are averaged over annotators; without any, each pair that `ordering` gives a number to is 1, 0.5 or 0.
    """
    if example.comparisons:
        outcomes: dict[tuple[int, int], list[float]] = defaultdict(list)
        for one in example.comparisons:
            first, second = sorted((one.first, one.second))
            outcomes[first, second].append(one.outcome if one.first == first else 1 - one.outcome)
        return {pair: sum(values) / len(values) for pair, values in outcomes.items()}
    known = [(index, value) for index, value in enumerate(ordering(example)) if value is not None]
    return {(i, j): 0.5 if a == b else float(a > b) for (i, a), (j, b) in combinations(known, 2)}


def strict_pairs(example: Example) -> list[tuple[int, int]]:
    """All (better, worse) pairs of response indices; ties and what was never compared give none.

    A K-wise ranking without ties gives K(K-1)/2 pairs.
    """
    return [(i, j) if share > 0.5 else (j, i) for (i, j), share in preferences(example).items() if share != 0.5]


_Value = Callable[[Response], float | None]
_by_rank: _Value = lambda response: None if response.rank is None else -response.rank
_by_label: _Value = lambda response: None if response.label is None else float(response.label)


def _by_score(response: Response) -> float | None:
    return response.score.get("overall") if isinstance(response.score, Mapping) else response.score
