"""Estimates with honest intervals: how sure can one be of a held-out figure? numpy, scipy and statsmodels only.

Responses to one prompt resemble each other, so an interval that takes each comparison for an independent one is far too narrow.
Hand over what ties values together (the prompt, the rater) as `clusters` wherever there is such a thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import norm, t
from statsmodels.stats.proportion import proportion_confint

Floats = NDArray[np.float64]

BOOTSTRAP_CELLS = 4_000_000  # numbers held at once while resampling: 32 MB


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval; `low` and `high` are NaN where the data cannot give one, and `method` says why.

    `n` counts the values, `clusters` the independent groups among them (`n` when the values are independent).
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    level: float
    method: str


def proportion_ci(successes: float, n: int, level: float = 0.95) -> Estimate:
    """Wilson's score interval for a share of `n` independent trials; half successes (ties) are allowed.

    No trial gives NaN throughout. Raises ValueError unless 0 <= successes <= n and 0 < level < 1.
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, n]: {successes} of {n}")
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, 0, level, "no values")
    low, high = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    return Estimate(successes / n, float(low), float(high), n, n, level, "Wilson")


def clustered_mean_ci(
    values: ArrayLike, clusters: Sequence[Any] | NDArray[Any] | None = None, level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `values` (a flat list) with a bootstrap interval that resamples whole clusters.

    `clusters` names the cluster of each value (any hashable type that sorts); None makes each value its own. The mean weighs
    values alike, so a larger cluster weighs more. The percentiles are Hesterberg's expanded ones (arXiv:1411.5279): the normal
    quantile is stretched by sqrt(C / (C - 1)) and Student's t with C - 1 degrees of freedom, as a plain percentile interval is too narrow.

    Small samples: under about 15 clusters read the interval as a rough one; with skewed values it still covers too seldom, for a
    bootstrap knows only the clusters it saw. For that reason clusters that all have the same mean give an interval of width zero
    (for shares, `accuracy_ci` does better), and one cluster gives no interval at all.

    Raises ValueError for values that are not finite, lists of unequal length, a level outside (0, 1) or no rounds.
    """
    _check_level(level)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1: {rounds}")
    x = _finite(values, "values")
    names = np.arange(x.size) if clusters is None else np.asarray(clusters)
    if names.shape != x.shape:
        raise ValueError(f"one cluster per value: {x.size} values, {names.size} clusters")
    if x.size == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, 0, level, "no values")
    _, index = np.unique(names, return_inverse=True)
    sizes: Floats = np.bincount(index).astype(np.float64)
    count = sizes.size
    mean = float(x[0] + (x - x[0]).mean())  # exact when all values are equal
    if count == 1:
        return Estimate(mean, np.nan, np.nan, x.size, 1, level, "no interval: all values come from one cluster")
    sums = np.bincount(index, weights=x - mean).astype(np.float64)
    means = mean + _resampled_means(sums, sizes, rounds, np.random.default_rng(seed))
    tail = norm.cdf(-np.sqrt(count / (count - 1)) * t.ppf(0.5 + level / 2, count - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), x.size, count, level, f"bootstrap over {count} clusters")


def clustered_ci(
    statistic: Callable[[NDArray[np.int64]], float],
    size: int,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    level: float = 0.95,
    rounds: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Any statistic of `size` values with the interval of `clustered_mean_ci`: whole clusters are resampled and it is computed anew.

    `statistic` takes indices of values, some of them several times, and gives a number. Resamples in which it is not finite (a
    correlation where nothing varies) are left out, and `method` says how many; where that is half of them or more there is no interval.
    Raises ValueError for lists of unequal length, a level outside (0, 1) or no rounds.
    """
    _check_level(level)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1: {rounds}")
    names = np.arange(size) if clusters is None else np.asarray(clusters)
    if names.shape != (size,):
        raise ValueError(f"one cluster per value: {size} values, {names.size} clusters")
    if size == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, 0, level, "no values")
    value = float(statistic(np.arange(size)))
    _, index = np.unique(names, return_inverse=True)
    count = int(index.max()) + 1
    if count == 1 or not np.isfinite(value):
        why = "all values come from one cluster" if count == 1 else "the figure is not defined for these values"
        return Estimate(value, np.nan, np.nan, size, count, level, f"no interval: {why}")
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(np.repeat(np.arange(size), taken[index])) for taken in _draws(rng, count, rounds)], dtype=np.float64)
    finite = drawn[np.isfinite(drawn)]
    if 2 * finite.size <= rounds:
        return Estimate(value, np.nan, np.nan, size, count, level, "no interval: too few resamples define the figure")
    tail = norm.cdf(-np.sqrt(count / (count - 1)) * t.ppf(0.5 + level / 2, count - 1))
    low, high = np.quantile(finite, [tail, 1 - tail])
    note = f", {rounds - finite.size} of {rounds} resamples left out" if finite.size < rounds else ""
    return Estimate(value, float(low), float(high), size, count, level, f"bootstrap over {count} clusters{note}")


def _draws(rng: np.random.Generator, count: int, rounds: int) -> Iterator[NDArray[np.int64]]:
    """How often each of `count` clusters is taken, once a round."""
    share = np.full(count, 1 / count)
    return (rng.multinomial(count, share) for _ in range(rounds))


def paired_difference_ci(
    after: ArrayLike,
    before: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    level: float = 0.95,
    rounds: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of `after - before`, value by value (the same prompts both times), with the interval of `clustered_mean_ci`."""
    a, b = _finite(after, "after"), _finite(before, "before")
    if a.shape != b.shape:
        raise ValueError(f"pairs need equally many values: {a.size} after, {b.size} before")
    return clustered_mean_ci(a - b, clusters, level, rounds, seed)


def correctness(margins: ArrayLike) -> Floats:
    """1 where a margin (chosen minus rejected) is above 0, 0 where it is below, and one half for a tie."""
    return 0.5 + 0.5 * np.sign(_finite(margins, "margins"))


def accuracy(margins: ArrayLike) -> float:
    """The share of pairs ordered as people ordered them, a tie counting one half; NaN without pairs."""
    right = correctness(margins)
    return float(right.mean()) if right.size else float("nan")


def accuracy_ci(
    margins: ArrayLike, clusters: Sequence[Any] | NDArray[Any] | None = None, level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> Estimate:
    """Accuracy with its interval: Wilson's for independent pairs, the cluster bootstrap when `clusters` says what belongs together.

    When every cluster has the same accuracy (for instance all pairs right) a bootstrap would claim certainty; then Wilson's interval
    for as many trials as there are clusters is given, which takes the pairs of one cluster for one observation.
    """
    right = correctness(margins)
    if clusters is None:
        return proportion_ci(float(right.sum()), right.size, level)
    estimate = clustered_mean_ci(right, clusters, level, rounds, seed)
    if estimate.clusters < 2 or estimate.high - estimate.low > 1e-9:
        return estimate
    wilson = proportion_ci(estimate.value * estimate.clusters, estimate.clusters, level)
    method = f"Wilson over {estimate.clusters} clusters, as all agree"
    return Estimate(estimate.value, wilson.low, wilson.high, estimate.n, estimate.clusters, level, method)


def confidence(margins: ArrayLike) -> Floats:
    """The reward model's confidence in the response it prefers: sigma(|margin|), between one half and 1 (Bradley-Terry)."""
    return expit(np.abs(_finite(margins, "margins")))


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Sum over equal bins on [0.5, 1] of the bin's share times |accuracy - mean confidence|; NaN without values.

    `confidences` are the probabilities given to the preferred response (see `confidence`), `correct` is 1, 0, or one half for a tie.
    A confidence on an edge belongs to the bin above it, and 1 to the last. Raises ValueError outside [0.5, 1].
    """
    p, right = _finite(confidences, "confidences"), _finite(correct, "correct")
    if p.shape != right.shape:
        raise ValueError(f"one correctness per confidence: {p.size} confidences, {right.size} correctnesses")
    if p.size == 0:
        return float("nan")
    if bins < 1:
        raise ValueError(f"bins must be at least 1: {bins}")
    if p.min() < 0.5 or p.max() > 1:
        raise ValueError("confidences must lie in [0.5, 1]: give max(p, 1 - p)")
    index = np.minimum(((p - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(index, weights=right - p, minlength=bins)).sum() / p.size)


def _resampled_means(sums: Floats, sizes: Floats, rounds: int, rng: np.random.Generator) -> Floats:
    """Means of `rounds` resamples of whole clusters, each drawn as how often every cluster is taken."""
    count = sizes.size
    means = []
    block = max(1, BOOTSTRAP_CELLS // count)
    for start in range(0, rounds, block):
        taken = rng.multinomial(count, np.full(count, 1 / count), size=min(block, rounds - start))
        means.append((taken @ sums) / (taken @ sizes))
    return np.concatenate(means)


def _finite(values: ArrayLike, name: str) -> Floats:
    flat = np.asarray(values, dtype=np.float64)
    if flat.ndim != 1:
        raise ValueError(f"{name} must be a flat list, not of shape {flat.shape}")
    if not np.isfinite(flat).all():
        raise ValueError(f"{name} hold {int((~np.isfinite(flat)).sum())} numbers that are not finite; drop and count them first")
    return flat


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1: {level}")
