"""Statistical rejection sampling: its acceptance law, and the tilted distribution it draws from."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from preftune.selection.rejection import acceptance, statistical_rejection


def test_hand_worked_numbers() -> None:
    """Methods G.4."""
    np.testing.assert_allclose(acceptance(np.array([0.0, 1, 2]), 1.0), [0.135335, 0.367879, 1], atol=1e-6)
    np.testing.assert_allclose(acceptance(np.array([0.0, 1, 2]), 0.5), [0.018316, 0.135335, 1], atol=1e-6)
    assert acceptance(np.array([1e308, -1e308]), 1e-3).tolist() == [1, 0]


def algorithm_1(rewards: list[float], count: int, beta: float) -> dict[tuple[int, ...], float]:
    """The exact law of accepted sequences, by enumerating visiting orders and coin flips of every pass."""
    law: Counter[tuple[int, ...]] = Counter()

    def go(left: tuple[int, ...], done: tuple[int, ...], mass: float) -> None:
        if mass < 1e-7:
            return
        top = max(rewards[i] for i in left)
        orders = list(itertools.permutations(left))
        for order in orders:
            for flips in itertools.product((0, 1), repeat=len(order)):
                p, taken = mass / len(orders), []
                for i, flip in zip(order, flips, strict=True):
                    chance = np.exp((rewards[i] - top) / beta)
                    p *= chance if flip else 1 - chance
                    if flip:
                        taken.append(i)
                if p == 0:
                    continue
                new = (done + tuple(taken))[:count]
                if len(new) == count:
                    law[new] += p
                else:
                    go(tuple(i for i in left if i not in taken), new, p)

    go(tuple(range(len(rewards))), (), 1.0)
    return dict(law)


@pytest.mark.parametrize(("count", "beta"), [(1, 1.0), (2, 0.7), (3, 2.0)])
def test_the_rule_is_algorithm_1_for_few_candidates(count: int, beta: float) -> None:
    rewards = [0.0, 1.0, 1.7]
    law = algorithm_1(rewards, count, beta)
    assert sum(law.values()) == pytest.approx(1, abs=1e-4)
    random = np.random.default_rng(0)
    draws = Counter(tuple(statistical_rejection(rewards, count, beta, random)) for _ in range(20_000))
    names = sorted(law)
    wanted = np.array([law[name] for name in names])
    assert set(draws) <= set(law)
    assert chisquare([draws[name] for name in names], wanted / wanted.sum() * 20_000).pvalue > 1e-3


def test_accepted_responses_follow_the_tilted_policy() -> None:
    """Many candidates of a policy over four responses, one accepted: pi(y) exp(r / beta) / Z. Every response is among the candidates."""
    policy, rewards, beta = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 0.5, 1.0, 1.5]), 0.8
    tilted = policy * np.exp(rewards / beta)
    random = np.random.default_rng(1)
    found = []
    for _ in range(6000):
        candidates = random.choice(4, size=200, p=policy)
        found.append(candidates[statistical_rejection(rewards[candidates], 1, beta, random)[0]])
    assert chisquare(np.bincount(found, minlength=4), tilted / tilted.sum() * 6000).pvalue > 1e-3


def test_edges() -> None:
    random = np.random.default_rng(2)
    rewards = [3.0, 1.0, 2.0, 3.0]
    assert sorted(statistical_rejection(rewards, 3, 0.0, random)) == [0, 2, 3]
    assert sorted(statistical_rejection(rewards, 4, 1e-9, random)) == [0, 1, 2, 3]
    assert Counter(statistical_rejection(rewards, 1, float("inf"), random)[0] for _ in range(4000)).most_common()[-1][1] > 850
    assert statistical_rejection(rewards, 0, 1.0, random) == statistical_rejection([], 0, 1.0, random) == []
    for wrong in ((rewards, 5, 1.0), (rewards, 1, -1.0), ([np.nan], 1, 1.0), (rewards, 1, np.nan)):
        with pytest.raises(ValueError):
            statistical_rejection(*wrong, random)
