"""What Best-of-N would give for every n, from one set of N samples, and how far it moves from the policy it draws from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import gammaln


def best_of_n_value(proxy: Sequence[float], value: Sequence[float], n: int) -> float:
    """Mean `value` of the response that `proxy` likes best among n, without bias, from N >= n samples of one prompt.

    sum_{i=n}^{N} C(i-1, n-1) / C(N, n) * value_(i), values in ascending order of the proxy (arXiv:2112.09332, appendix I); samples that
    the proxy holds equal share the mean of their weights. Raises ValueError for n outside 1 .. N.
    """
    scores, values = np.asarray(proxy, dtype=float), np.asarray(value, dtype=float)
    count = len(scores)
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}, there are {count} samples")
    order = np.argsort(scores, kind="stable")
    rank = np.arange(1, count + 1, dtype=float)
    inside = rank >= n
    log_choose = lambda a, b: gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)
    weight = np.zeros(count)
    weight[inside] = np.exp(log_choose(rank[inside] - 1, n - 1.0) - log_choose(float(count), float(n)))
    _, tied = np.unique(scores[order], return_inverse=True)
    shared = np.bincount(tied, weight) / np.bincount(tied)
    return float((shared[tied] * values[order]).sum())


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats: KL(Best-of-N || policy) where no two responses score alike, an upper bound elsewhere (arXiv:2401.01879)."""
    return float(np.log(n) - (n - 1) / n)


def best_of_n_kl(probabilities: Sequence[float], n: int) -> float:
    """KL(Best-of-N || policy) in nats over finitely many responses, their probabilities in ascending order of reward, no ties."""
    p = np.asarray(probabilities, dtype=float)
    cumulative = np.concatenate([[0.0], np.cumsum(p / p.sum())])
    q = np.diff(cumulative**n)
    seen = q > 0
    return float((q[seen] * np.log(q[seen] / (p[seen] / p.sum()))).sum())


def best_of_n_curve(scores: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """Mean score of the best of 1, 2, 4, ... N, estimated without bias from N samples of each prompt, and the bound of its KL in nats."""
    count = min(map(len, scores))
    sizes = [2**k for k in range(count.bit_length()) if 2**k < count] + [count]
    mean = lambda n: float(np.mean([best_of_n_value(one, one, n) for one in scores]))
    return [{"n": n, "score": mean(n), "kl_bound": best_of_n_kl_bound(n)} for n in sizes]


def in_words(curve: Sequence[Mapping[str, float]]) -> str:
    """A curve in a line."""
    scores = ", ".join(f"{one['score']:.3f} of {one['n']:.0f}" for one in curve)
    return f"expected best {scores} (KL at most {curve[-1]['kl_bound']:.2f} nats)"
