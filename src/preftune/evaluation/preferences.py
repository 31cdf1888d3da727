"""Figures on held-out preferences, each with its interval: accuracy, margins, calibration, length, by source, attribute and strength.

Numbers in, figures out: no model here. Intervals resample whole prompts, because responses to one prompt resemble each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import rankdata

from preftune.evaluation.statistics import (
    Estimate,
    accuracy_ci,
    clustered_ci,
    clustered_mean_ci,
    confidence,
    correctness,
    expected_calibration_error,
)
from preftune.models.values import Values
from preftune.packing.chat import Tree

Floats = NDArray[np.float64]
TEMPERATURES = (1e-3, 1e3)
"""Where the temperature is looked for; one that lies at an end is unbounded."""
MOST_STRENGTHS = 5
"""More different strengths than this are put into four equal groups."""


@dataclass(frozen=True)
class Figure:
    """A number with its interval and what it means; `unit` is that of `report.words.quantity`, `about` one short sentence."""

    key: str
    name: str
    estimate: Estimate
    about: str
    unit: str = ""


@dataclass(frozen=True)
class Pairs:
    """Every strict pair of some records: `[P]` indices of its record, its preferred and its other response."""

    record: NDArray[np.int64]
    better: NDArray[np.int64]
    worse: NDArray[np.int64]

    def gaps(self, values: Values) -> Floats:
        """[P] value of the preferred response minus value of the other."""
        return np.array([values[r][i] - values[r][j] for r, i, j in zip(self.record, self.better, self.worse)], dtype=np.float64)

    def of(self, names: Sequence[str]) -> NDArray[np.str_]:
        """[P] the name of each pair's record."""
        return np.asarray(names)[self.record]


def pairs_of(trees: Sequence[Tree]) -> Pairs:
    """The pairs of which people prefer one response; ties and what was never compared are in none."""
    return _pairs(tree.preference > tree.preference.T for tree in trees)


def _pairs(grids: Iterator[NDArray[np.bool_]]) -> Pairs:
    found = [(r, i, j) for r, grid in enumerate(grids) for i, j in zip(*np.nonzero(grid))]
    columns = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return Pairs(*columns)


def lengths_of(trees: Sequence[Tree]) -> Values:
    """Tokens of each response, the token that ends a turn among them: an [N] array a tree."""
    return [np.array([len(r) for r in tree.responses], dtype=np.float64) for tree in trees]


# --- figures of a reward model -------------------------------------------------------------------------------------------------


def reward_figures(rewards: Values, trees: Sequence[Tree], prompts: Sequence[str], level: float = 0.95) -> list[Figure]:
    """What a reward model's scores say of held-out pairs; `prompts` names each tree's prompt."""
    pairs = pairs_of(trees)
    margins, clusters = pairs.gaps(rewards), pairs.of(prompts)
    return [
        Figure("accuracy", "Pair accuracy", accuracy_ci(margins, clusters, level), "the preferred response scores higher", "accuracy"),
        length_baseline(pairs, trees, clusters, level),
        *margin_figures(margins, clusters, level),
        *calibration_figures(margins, clusters, level),
        *length_figures(rewards, trees, prompts, level, "score"),
        *by_source(margins, pairs, trees, clusters, level),
        *by_attribute(rewards, trees, prompts, level),
        *by_strength(margins, pairs, trees, clusters, level),
    ]


def length_baseline(pairs: Pairs, trees: Sequence[Tree], clusters: NDArray[np.str_], level: float) -> Figure:
    """What a judge that always takes the longer response would reach."""
    estimate = accuracy_ci(pairs.gaps(lengths_of(trees)), clusters, level)
    return Figure(
        "length_accuracy", "Always the longer one", estimate, "the accuracy of counting tokens alone: a model should beat it", "accuracy"
    )


def margin_figures(margins: Floats, clusters: NDArray[np.str_], level: float, unit: str = "") -> list[Figure]:
    """Mean and median of how far the preferred response is ahead."""
    median = clustered_ci(lambda i: float(np.median(margins[i])), margins.size, clusters, level)
    return [
        Figure("margin_mean", "Mean margin", clustered_mean_ci(margins, clusters, level), "how far the preferred one is ahead", unit),
        Figure("margin_median", "Median margin", median, "half of the pairs have a smaller margin", unit),
    ]


def calibration_figures(margins: Floats, clusters: NDArray[np.str_], level: float) -> list[Figure]:
    """Whether sigma(margin) means what it says (Bradley-Terry): NLL, Brier score, ECE, and the temperature that mends it."""
    ece = lambda i: calibration_error(margins[i])
    temperature = clustered_ci(lambda i: fitted_temperature(margins[i]), margins.size, clusters, level)
    mended = margins / temperature.value if np.isfinite(temperature.value) else margins
    mean = lambda values: clustered_mean_ci(values, clusters, level)
    fitted = "at the fitted temperature, on the very pairs that it was fitted on: a little too good"
    return [
        Figure("nll", "NLL", mean(negative_log_likelihood(margins)), "surprise at people's choices, in nats; guessing is 0.693"),
        Figure("brier", "Brier score", mean(brier(margins)), "squared error of the probability; guessing is 0.25"),
        Figure(
            "ece",
            "Calibration error (ECE)",
            clustered_ci(ece, margins.size, clusters, level),
            "how far confidence is from accuracy on average; with few pairs it is above 0 even for a calibrated model",
            "proportion",
        ),
        Figure("temperature", "Fitted temperature", temperature, "divide scores by it for the best NLL; above 1 is overconfident"),
        Figure("nll_scaled", "NLL, mended", mean(negative_log_likelihood(mended)), fitted),
        Figure(
            "ece_scaled",
            "ECE, mended",
            clustered_ci(lambda i: calibration_error(mended[i]), margins.size, clusters, level),
            fitted,
            "proportion",
        ),
    ]


def negative_log_likelihood(margins: Floats) -> Floats:
    """[P] -log sigma(margin) in nats."""
    return np.logaddexp(0.0, -margins)


def brier(margins: Floats) -> Floats:
    """[P] (1 - sigma(margin))^2: the labelled winner's outcome is 1."""
    return expit(-margins) ** 2


def calibration_error(margins: Floats) -> float:
    """ECE over ten equal bins of the confidence on [0.5, 1] (methods.md C.8: p = sigma(margin), confidence max(p, 1 - p))."""
    return expected_calibration_error(confidence(margins), correctness(margins))


def fitted_temperature(margins: Floats) -> float:
    """The T > 0 that minimises the mean of -log sigma(margin / T) (temperature scaling, 1706.04599).

    NaN where no T in `TEMPERATURES` does: all pairs right (T falls to 0) or no more right than wrong (T grows without end).
    """

    def slope(log_inverse: float) -> float:  # the derivative by 1 / T rises with 1 / T: one root at most
        return -float((margins * expit(-margins * np.exp(log_inverse))).mean())

    low, high = -np.log(TEMPERATURES[1]), -np.log(TEMPERATURES[0])
    if not slope(low) < 0 < slope(high):
        return float("nan")
    return float(np.exp(-brentq(slope, low, high, xtol=1e-10)))


# --- length --------------------------------------------------------------------------------------------------------------------


def length_figures(values: Values, trees: Sequence[Tree], prompts: Sequence[str], level: float, what: str) -> list[Figure]:
    """How a response's value goes with its length in tokens: over all responses, and among the responses to one prompt."""
    clusters = np.repeat(np.asarray(prompts), [len(v) for v in values])
    value, length = np.concatenate(values), np.concatenate(lengths_of(trees))
    inside = [np.concatenate([v - v.mean() for v in side]) for side in (values, lengths_of(trees))]
    ranked = [np.concatenate([rankdata(v) - (len(v) + 1) / 2 for v in side]) for side in (values, lengths_of(trees))]
    among = "among the responses to one prompt; 0 is no relation, 1 the longer the better"

    def figure(key: str, name: str, relation: Callable[[Floats, Floats], float], sides: Sequence[Floats], about: str) -> Figure:
        estimate = clustered_ci(lambda i: relation(sides[0][i], sides[1][i]), value.size, clusters, level)
        return Figure(key, name, estimate, about)

    return [
        figure("length_pearson", f"Length and {what}, Pearson", pearson, (value, length), "over all responses, whatever the prompt"),
        figure("length_spearman", f"Length and {what}, Spearman", spearman, (value, length), "the same of their ranks"),
        figure("length_pearson_within", "... within a prompt, Pearson", pearson, inside, among),
        figure("length_spearman_within", "... within a prompt, Spearman", pearson, ranked, "the same of ranks within the prompt"),
    ]


def pearson(x: Floats, y: Floats) -> float:
    """Pearson's correlation; NaN where either side does not vary."""
    a, b = x - x.mean(), y - y.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's correlation: Pearson's of the ranks, ties sharing theirs."""
    return pearson(rankdata(x), rankdata(y))


# --- groups --------------------------------------------------------------------------------------------------------------------


def by_source(margins: Floats, pairs: Pairs, trees: Sequence[Tree], clusters: NDArray[np.str_], level: float) -> list[Figure]:
    """Accuracy for each source of records, where any is named."""
    sources = pairs.of([tree.source for tree in trees])
    groups = {name: sources == name for name in sorted(set(sources.tolist()))}
    return _accuracies("source", groups, margins, clusters, level) if set(groups) - {""} else []


def by_strength(margins: Floats, pairs: Pairs, trees: Sequence[Tree], clusters: NDArray[np.str_], level: float) -> list[Figure]:
    """Accuracy for each strength that people gave to a preference, weakest first; many strengths are put into four equal groups."""
    strength = np.array(
        [np.nan if (m := trees[r].margin) is None or m[i, j] == 0 else m[i, j] for r, i, j in zip(pairs.record, pairs.better, pairs.worse)]
    )
    given = np.unique(strength[~np.isnan(strength)])
    if given.size < 2:
        return []
    edges = given if given.size <= MOST_STRENGTHS else np.unique(np.nanquantile(strength, (0, 0.25, 0.5, 0.75)))
    group = np.searchsorted(edges, strength, side="right") - 1
    name = lambda k: f"{edges[k]:g}" if given.size <= MOST_STRENGTHS else f"from {edges[k]:g}"
    groups = {name(k): (group == k) & ~np.isnan(strength) for k in range(edges.size)}
    return _accuracies("strength", groups, margins, clusters, level)


def by_attribute(rewards: Values, trees: Sequence[Tree], prompts: Sequence[str], level: float) -> list[Figure]:
    """Accuracy against each rated attribute, where responses have several: the one rated higher scores higher."""
    names = sorted({name for tree in trees for name in tree.ratings})
    if len(names) < 2:
        return []
    found = []
    for name in names:
        none = np.array([np.nan])
        pairs = _pairs((rated := tree.ratings.get(name, none))[:, None] > rated[None, :] for tree in trees)
        clusters = pairs.of(prompts)
        found += _accuracies("attribute", {name: np.ones(pairs.record.size, dtype=bool)}, pairs.gaps(rewards), clusters, level)
    return found


_GROUPS = {
    "source": "pair accuracy on records of this source",
    "strength": "pair accuracy where people gave this strength",
    "attribute": "the response rated higher on it scores higher",
}


def _accuracies(kind: str, groups: dict[str, NDArray[np.bool_]], margins: Floats, clusters: NDArray[np.str_], level: float) -> list[Figure]:
    return [
        Figure(
            f"accuracy/{kind}/{name or 'none'}",
            f"Accuracy, {kind} {name or 'not named'}",
            accuracy_ci(margins[chosen], clusters[chosen], level),
            _GROUPS[kind],
            "accuracy",
        )
        for name, chosen in groups.items()
        if chosen.any()
    ]


# --- figures of a policy -------------------------------------------------------------------------------------------------------


def policy_figures(
    logps: Values, reference: Values | None, trees: Sequence[Tree], prompts: Sequence[str], level: float = 0.95
) -> list[Figure]:
    """What a policy's summed log-probabilities say of held-out records, with those of a reference where there is one."""
    pairs = pairs_of(trees)
    clusters, lengths = pairs.of(prompts), lengths_of(trees)
    means = [logp / length for logp, length in zip(logps, lengths)]
    found: list[Figure] = []
    share = lambda key, name, values, about: Figure(key, name, accuracy_ci(pairs.gaps(values), clusters, level), about, "accuracy")
    if pairs.record.size:
        if reference is not None:
            ratios = [p - q for p, q in zip(logps, reference)]
            found.append(share("accuracy", "Implicit-reward accuracy", ratios, "the preferred response gained more over the reference"))
        found += [
            share(
                "logp_accuracy", "Log-probability accuracy, sums", logps, "the preferred response is likelier; short ones have it easier"
            ),
            share("mean_logp_accuracy", "Log-probability accuracy, means", means, "the preferred response is likelier per token"),
            length_baseline(pairs, trees, clusters, level),
        ]
        if reference is not None:
            margins = pairs.gaps(ratios)
            found += margin_figures(margins, clusters, level, "nats")
            found += length_figures(ratios, trees, prompts, level, "log-ratio")
            found += by_source(margins, pairs, trees, clusters, level) + by_strength(margins, pairs, trees, clusters, level)
    best = [int(np.nanargmax(tree.scores)) if not np.isnan(tree.scores).all() else 0 for tree in trees]
    pick = lambda values: np.array([v[i] for v, i in zip(values, best)])
    found.append(perplexity(-pick(logps), pick(lengths), prompts, level))
    if reference is not None:
        one = perplexity(-pick(reference), pick(lengths), prompts, level)
        found.append(replace(one, key="reference_perplexity", name="Perplexity, reference"))
    mean = clustered_mean_ci(pick(lengths), prompts, level)
    return [*found, Figure("best_length", "Length of best responses", mean, "of the records, not of what the model writes", "tokens")]


def perplexity(nll: Floats, tokens: Floats, prompts: Sequence[str], level: float = 0.95) -> Figure:
    """exp of the mean negative log-likelihood over all tokens of [R] responses, from their sums in nats and their tokens."""
    estimate = clustered_ci(lambda i: float(np.exp(nll[i].sum() / tokens[i].sum())), nll.size, prompts, level)
    return Figure("perplexity", "Perplexity of best responses", estimate, "how surprised the model is, per token: lower is better")
