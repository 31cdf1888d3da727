"""Intervals against simulation with a known truth, statsmodels, scipy and numbers worked by hand."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import expit
from scipy.stats import binomtest

from preftune.evaluation.statistics import (
    accuracy,
    accuracy_ci,
    clustered_mean_ci,
    confidence,
    correctness,
    expected_calibration_error,
    paired_difference_ci,
    proportion_ci,
)


def test_wilson_equals_its_formula_by_hand():
    # 8 of 10, z = 1.959964: centre (0.8 + z²/20) / (1 + z²/10), half width z / (1 + z²/10) * sqrt(0.016 + z²/400).
    estimate = proportion_ci(8, 10)
    assert estimate.value == 0.8
    assert estimate.low == pytest.approx(0.4901625, abs=1e-6)
    assert estimate.high == pytest.approx(0.9433178, abs=1e-6)


@pytest.mark.parametrize(("successes", "n", "level"), [(0, 7, 0.95), (7, 7, 0.9), (33, 60, 0.99)])
def test_wilson_equals_scipy(successes, n, level):
    theirs = binomtest(successes, n).proportion_ci(level, method="wilson")
    ours = proportion_ci(successes, n, level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert (ours.n, ours.clusters) == (n, n)


def test_wilson_takes_half_successes_between_the_whole_ones():
    assert proportion_ci(6, 12).low < proportion_ci(6.5, 12).low < proportion_ci(7, 12).low


def test_no_trials_give_no_number():
    estimate = proportion_ci(0, 0)
    assert math.isnan(estimate.value) and math.isnan(estimate.low) and estimate.method == "no values"


def test_wilson_covers_a_small_rare_share():
    truth, n = 0.1, 30
    draws = np.random.default_rng(3).binomial(n, truth, size=400)
    covered = [proportion_ci(int(k), n).low <= truth <= proportion_ci(int(k), n).high for k in draws]
    assert 0.92 <= np.mean(covered) <= 0.99


def _votes(rng, raters, votes, spread):
    """Votes of raters who differ (logit sd `spread`), as in a real campaign: values and the rater of each."""
    leaning = expit(0.3 + spread * rng.standard_normal(raters))
    return (rng.random((raters, votes)) < leaning[:, None]).astype(float).ravel(), np.repeat(np.arange(raters), votes)


def test_clusters_restore_the_coverage_that_independence_loses():
    """20 raters with 50 votes each and a spread of 0.8 logit: the true share comes from Gauss-Hermite quadrature."""
    nodes, weights = hermegauss(60)
    truth = float((weights * expit(0.3 + 0.8 * nodes)).sum() / weights.sum())
    rng = np.random.default_rng(11)
    clustered, independent, widths = [], [], []
    for seed in range(300):
        values, raters = _votes(rng, 20, 50, 0.8)
        ours = clustered_mean_ci(values, raters, rounds=600, seed=seed)
        naive = proportion_ci(values.sum(), values.size)
        clustered.append(ours.low <= truth <= ours.high)
        independent.append(naive.low <= truth <= naive.high)
        widths.append((ours.high - ours.low) / (naive.high - naive.low))
    assert 0.92 <= np.mean(clustered) <= 0.985
    assert np.mean(independent) < 0.65
    assert np.mean(widths) > 2


@pytest.mark.parametrize("count", [5, 8, 15])
def test_few_clusters_of_unequal_size_still_cover(count):
    rng = np.random.default_rng(count)
    covered = []
    for seed in range(400):
        sizes = rng.integers(1, 6, size=count)
        names = np.repeat(np.arange(count), sizes)
        values = rng.standard_normal(count)[names] + 0.5 * rng.standard_normal(names.size)
        estimate = clustered_mean_ci(values, names, rounds=600, seed=seed)
        covered.append(estimate.low <= 0 <= estimate.high)
    assert 0.89 <= np.mean(covered) <= 0.985


def test_many_clusters_agree_with_statsmodels_cluster_robust_errors():
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(200), rng.integers(1, 7, size=200))
    values = rng.standard_normal(200)[names] + rng.standard_normal(names.size)
    theirs = sm.OLS(values, np.ones(values.size)).fit(cov_type="cluster", cov_kwds={"groups": names}, use_t=True).conf_int()[0]
    ours = clustered_mean_ci(values, names, rounds=8000)
    assert ours.value == pytest.approx(values.mean(), abs=1e-12)
    assert ours.high - ours.low == pytest.approx(theirs[1] - theirs[0], rel=0.05)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.02)


def test_two_equal_clusters_by_enumeration():
    """Clusters with means 0 and 1 resample to 0, 1/2 or 1: the stretched 95 % tail is below 1e-30, so the ends are 0 and 1."""
    estimate = clustered_mean_ci([0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"])
    assert (estimate.value, estimate.low, estimate.high, estimate.clusters) == (0.5, 0.0, 1.0, 2)


def test_the_mean_weighs_values_not_clusters():
    assert clustered_mean_ci([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).value == 0.75


def test_one_cluster_says_that_it_has_no_interval():
    estimate = clustered_mean_ci([1.0, 2.0], ["p", "p"])
    assert estimate.value == 1.5 and math.isnan(estimate.low) and math.isnan(estimate.high)
    assert "one cluster" in estimate.method


def test_equal_values_have_no_width():
    estimate = clustered_mean_ci([0.1] * 7)
    assert estimate.low == estimate.value == estimate.high


def test_resampling_in_blocks_changes_nothing_but_memory(monkeypatch):
    values, names = _votes(np.random.default_rng(1), 30, 3, 0.5)
    whole = clustered_mean_ci(values, names)
    monkeypatch.setattr("preftune.evaluation.statistics.BOOTSTRAP_CELLS", 100)
    assert clustered_mean_ci(values, names) == whole


def test_the_seed_alone_decides_the_interval():
    values, names = np.random.default_rng(1).standard_normal(48), np.repeat(np.arange(12), 4)
    assert clustered_mean_ci(values, names, seed=1) == clustered_mean_ci(values, names, seed=1)
    assert clustered_mean_ci(values, names, seed=1) != clustered_mean_ci(values, names, seed=2)


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(2)
    prompt = 10 * rng.standard_normal(80)
    before, after = prompt + rng.standard_normal(80), prompt + 0.5 + rng.standard_normal(80)
    estimate = paired_difference_ci(after, before)
    assert estimate.value == pytest.approx(after.mean() - before.mean())
    paired = sm.stats.DescrStatsW(after - before).tconfint_mean()
    assert (estimate.low, estimate.high) == pytest.approx(paired, abs=0.04)


def test_a_tie_counts_one_half():
    assert correctness([2.0, 0.0, -1.0, -0.0]).tolist() == [1.0, 0.5, 0.0, 0.5]
    assert accuracy([2.0, 0.0, -1.0, 3.0]) == 0.625
    assert math.isnan(accuracy([]))


def test_accuracy_interval_with_and_without_clusters():
    margins = [1.0, 2.0, -1.0, 0.0, 1.0, 3.0]
    assert accuracy_ci(margins) == proportion_ci(4.5, 6)
    names = [0, 0, 1, 1, 2, 2]
    assert accuracy_ci(margins, names) == clustered_mean_ci(correctness(margins), names)


@pytest.mark.parametrize("group", [[1.0], [1.0, 1.0, -1.0]])
def test_clusters_that_all_agree_are_not_certainty(group):
    estimate = accuracy_ci(group * 10, np.repeat(np.arange(10), len(group)))
    wilson = proportion_ci(10 * accuracy(group), 10)
    assert (estimate.low, estimate.high) == pytest.approx((wilson.low, wilson.high))


def test_all_right_is_not_certainty():
    estimate = accuracy_ci([1.0] * 40, np.repeat(np.arange(10), 4))
    wilson = proportion_ci(10, 10)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, wilson.low, wilson.high)
    assert (estimate.n, estimate.clusters) == (40, 10)


@pytest.mark.parametrize(
    ("confidences", "correct", "bins", "error"),
    [
        ([0.75] * 4, [1, 1, 1, 0], 10, 0.0),
        ([1.0, 1.0], [1, 0], 10, 0.5),
        ([0.55, 0.65, 0.75, 0.95], [1, 0, 1, 1], 5, 0.35),
    ],
)
def test_calibration_error_oracles(confidences, correct, bins, error):
    """The worked numbers of methods.md C.8."""
    assert expected_calibration_error(confidences, correct, bins) == pytest.approx(error, abs=1e-12)


def test_calibration_error_equals_a_plain_loop_over_bins():
    rng = np.random.default_rng(5)
    margins = rng.standard_normal(500) * 2
    p, right = confidence(margins), correctness(rng.standard_normal(500))
    total = 0.0
    for b in range(10):
        inside = [i for i in range(500) if 0.5 + 0.05 * b <= p[i] < 0.5 + 0.05 * (b + 1)]
        if inside:
            total += len(inside) / 500 * abs(np.mean([right[i] for i in inside]) - np.mean([p[i] for i in inside]))
    assert expected_calibration_error(p, right) == pytest.approx(total, abs=1e-12)


def test_confidence_is_the_sigmoid_of_the_absolute_margin():
    assert confidence([math.log(3), -math.log(3), 0.0, 900.0, -900.0]).tolist() == pytest.approx([0.75, 0.75, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: proportion_ci(3, 2),
        lambda: proportion_ci(1, 2, level=1.0),
        lambda: clustered_mean_ci([1.0, math.nan]),
        lambda: clustered_mean_ci([1.0, 2.0], ["a"]),
        lambda: clustered_mean_ci([1.0, 2.0], rounds=0),
        lambda: clustered_mean_ci(np.ones((2, 2))),
        lambda: paired_difference_ci([1.0, 2.0], [1.0]),
        lambda: expected_calibration_error([0.4], [1]),
        lambda: expected_calibration_error([0.6], [1, 0]),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError):
        call()
