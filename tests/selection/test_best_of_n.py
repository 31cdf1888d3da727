"""Best-of-N from one set of samples, beside hand-worked numbers and every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from preftune.selection.best_of_n import best_of_n_kl, best_of_n_kl_bound, best_of_n_value


def test_hand_worked_numbers() -> None:
    """Methods G.1."""
    assert best_of_n_value([1, 2, 3, 4], [1, 2, 3, 4], 2) == pytest.approx(10 / 3)
    assert best_of_n_value([0.1, 0.9, 0.5, 0.3], [0, 2, 1, 3], 2) == pytest.approx(1.833333, abs=1e-6)
    told = {1: 0, 2: 0.193147, 4: 0.636294, 8: 1.204442, 16: 1.835089, 64: 3.174508, 128: 3.859843, 1000: 5.908755, 60_000: 10.002117}
    assert {n: best_of_n_kl_bound(n) for n in told} == pytest.approx(told, abs=1e-6)
    assert best_of_n_kl([0.5, 0.5], 2) == pytest.approx(0.130812, abs=1e-6)
    assert best_of_n_kl([0.01] * 100, 4) == pytest.approx(0.636219, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_the_estimator_is_the_mean_over_every_subset(n: int) -> None:
    """Ties of the proxy: any of the tied samples is taken, each as often."""
    random = np.random.default_rng(0)
    for _ in range(5):
        proxy, value = random.integers(0, 4, 7), random.normal(size=7)
        means = []
        for subset in itertools.combinations(range(7), n):
            most = max(proxy[i] for i in subset)
            means.append(np.mean([value[i] for i in subset if proxy[i] == most]))
        found = best_of_n_value(proxy.tolist(), value.tolist(), n)
        if n in (1, 7) or len(set(proxy)) == 7:
            assert found == pytest.approx(np.mean(means))
        orders = [np.random.default_rng(s).permutation(7) for s in range(2000)]
        broken = [best_of_n_value((proxy + 1e-6 * o).tolist(), value.tolist(), n) for o in orders]
        assert found == pytest.approx(np.mean(broken), abs=0.05), "tied samples share the mean of their weights"


def test_n_outside_the_samples_is_refused() -> None:
    for n in (0, 3):
        with pytest.raises(ValueError, match="there are 2 samples"):
            best_of_n_value([1, 2], [1, 2], n)
