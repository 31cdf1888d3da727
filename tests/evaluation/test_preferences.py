"""Figures on held-out preferences against loops, scipy, numbers worked by hand and laws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from preftune.evaluation.measure import pair_margins
from preftune.evaluation.preferences import (
    brier,
    by_attribute,
    by_source,
    by_strength,
    calibration_error,
    fitted_temperature,
    length_figures,
    margin_figures,
    negative_log_likelihood,
    pairs_of,
    pearson,
    perplexity,
    policy_figures,
    reward_figures,
    spearman,
)
from preftune.evaluation.statistics import clustered_ci, clustered_mean_ci, expected_calibration_error
from tests import tiny

MARGINS = np.random.default_rng(5).normal(0.4, 1.5, 400)


def figures_of(found):
    assert len({f.key for f in found}) == len(found)
    return {f.key: f.estimate for f in found}


def many(count=40, width=3, seed=0, **changes):
    """Records with `width` responses of several lengths each, ranked, two records a prompt; and rewards that lean the right way."""
    rng = np.random.default_rng(seed)
    trees = [replace(tiny.tree(5, tuple(rng.integers(1, 30, width)), seed=i), **changes) for i in range(count)]
    rewards = [tree.scores + rng.normal(0, 1, width) + 0.02 * np.array([len(r) for r in tree.responses]) for tree in trees]
    return trees, rewards, [f"p{i // 2}" for i in range(count)]


# --- calibration ----------------------------------------------------------------------------------------------------------------


def loop_ece(margins, bins=10):
    """methods.md C.8 by a loop over pairs and bins."""
    p = [1 / (1 + math.exp(-m)) for m in margins]
    total = 0.0
    for b in range(bins):
        low, high = 0.5 + b / bins / 2, 0.5 + (b + 1) / bins / 2
        members = [q for q in p if low <= max(q, 1 - q) < high or (b == bins - 1 and max(q, 1 - q) >= high)]
        if members:
            right = sum(1.0 if q > 0.5 else 0.5 if q == 0.5 else 0.0 for q in members) / len(members)
            total += len(members) / len(p) * abs(right - sum(max(q, 1 - q) for q in members) / len(members))
    return total


def test_ece_by_hand_and_by_a_loop():
    three = math.log(3)  # sigma is 3/4
    assert calibration_error(np.array([three, three, three, -three])) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(np.array([50.0, -50.0])) == pytest.approx(0.5)
    assert expected_calibration_error([0.55, 0.65, 0.75, 0.95], [1, 0, 1, 1], bins=5) == pytest.approx(0.35)
    assert calibration_error(MARGINS) == pytest.approx(loop_ece(MARGINS), abs=1e-12)
    assert calibration_error(np.round(MARGINS)) == pytest.approx(loop_ece(np.round(MARGINS)), abs=1e-12)  # with ties


def test_nll_and_brier_by_a_loop_and_without_overflow():
    for m, nll, square in zip(MARGINS, negative_log_likelihood(MARGINS), brier(MARGINS)):
        p = 1 / (1 + math.exp(-m))
        assert nll == pytest.approx(-math.log(p)) and square == pytest.approx((1 - p) ** 2)
    ends = np.array([-1e4, 0.0, 1e4])
    assert negative_log_likelihood(ends).tolist() == pytest.approx([1e4, math.log(2), 0.0])
    assert brier(ends).tolist() == pytest.approx([1.0, 0.25, 0.0])


def test_the_fitted_temperature_by_hand_and_by_a_grid():
    """3 of 4 right at margins of 2 ln 3: sigma is .75 at half the margin, so T = 2."""
    m = 2 * math.log(3)
    assert fitted_temperature(np.array([m, m, m, -m])) == pytest.approx(2.0, rel=1e-6)
    grid = np.exp(np.linspace(-3, 3, 20001))
    best = grid[np.argmin([np.logaddexp(0, -MARGINS / t).mean() for t in grid])]
    assert fitted_temperature(MARGINS) == pytest.approx(best, rel=1e-3)
    assert fitted_temperature(7 * MARGINS) == pytest.approx(7 * fitted_temperature(MARGINS), rel=1e-6)


def test_there_is_no_temperature_where_all_is_right_or_nothing_is_known():
    assert math.isnan(fitted_temperature(np.array([1.0, 2.0])))  # T falls to 0
    assert math.isnan(fitted_temperature(np.array([1.0, -1.0])))  # T grows without end
    assert math.isnan(fitted_temperature(np.zeros(3)))


# --- intervals ------------------------------------------------------------------------------------------------------------------


def test_a_statistic_s_interval_is_that_of_the_mean_where_it_is_the_mean():
    names = np.repeat(np.arange(50), 8)
    ours = clustered_ci(lambda i: float(MARGINS[i].mean()), MARGINS.size, names, rounds=4000)
    mean = clustered_mean_ci(MARGINS, names, rounds=4000)
    assert (ours.value, ours.n, ours.clusters) == (pytest.approx(mean.value), 400, 50)
    assert (ours.low, ours.high) == pytest.approx((mean.low, mean.high), abs=0.02)


def test_the_interval_of_a_correlation_covers_the_truth_although_prompts_differ():
    """x and y share nothing but 25 prompts' own levels of each: pairs of a prompt are no independent evidence."""
    rng, inside, naive = np.random.default_rng(2), 0, 0
    for seed in range(100):
        x, y = (np.repeat(rng.standard_normal(25), 6) + 0.3 * rng.standard_normal(150) for _ in range(2))
        relation = lambda i, x=x, y=y: pearson(x[i], y[i])
        ours = clustered_ci(relation, 150, np.repeat(np.arange(25), 6), rounds=150, seed=seed)
        alone = clustered_ci(relation, 150, None, rounds=150, seed=seed)
        inside += ours.low <= 0 <= ours.high
        naive += alone.low <= 0 <= alone.high
    assert 0.87 <= inside / 100 <= 0.99 and naive / 100 < 0.75


def test_an_interval_that_cannot_be_made_says_why():
    one = clustered_ci(lambda i: 1.0, 3, ["a"] * 3)
    assert math.isnan(one.low) and "one cluster" in one.method
    undefined = clustered_ci(lambda i: math.nan, 3)
    assert math.isnan(undefined.value) and math.isnan(undefined.low) and "not defined" in undefined.method
    assert clustered_ci(lambda i: 1.0, 0).method == "no values"
    sometimes = clustered_ci(lambda i: math.nan if 0 in i else 1.0 if 1 in i else 0.5, 4, ["a", "b", "c", "d"])
    assert math.isnan(sometimes.value)
    some = clustered_ci(lambda i: float(i.mean()) if 3 in i else math.nan, 4, ["a", "b", "c", "d"])
    assert "left out" in some.method and some.low < some.value < some.high


@pytest.mark.parametrize("wrong", [{"level": 1.5}, {"rounds": 0}, {"clusters": ["a"]}])
def test_wrong_words_are_refused(wrong):
    with pytest.raises(ValueError):
        clustered_ci(lambda i: 1.0, 2, **wrong)


# --- length ---------------------------------------------------------------------------------------------------------------------


def test_correlations_equal_scipy_s():
    x, y = MARGINS[:60], np.round(MARGINS[60:120] + 0.5 * MARGINS[:60])
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(pearson(x, np.ones(60)))


def test_length_within_a_prompt_does_not_see_differences_between_prompts():
    """Within each prompt the longer response scores less; across prompts long prompts' responses score more."""
    trees = [tiny.tree(4, (10 * k, 10 * k + 5), seed=k) for k in range(1, 9)]
    rewards = [np.array([10.0 * k, 10.0 * k - 1]) for k in range(1, 9)]
    found = figures_of(length_figures(rewards, trees, [t.id for t in trees], 0.95, "score"))
    lengths, flat = np.array([len(r) for t in trees for r in t.responses]), np.concatenate(rewards)
    assert found["length_pearson"].value == pytest.approx(np.corrcoef(lengths, flat)[0, 1]) and found["length_pearson"].value > 0.9
    assert found["length_pearson_within"].value == pytest.approx(-1) == found["length_spearman_within"].value


def test_prompts_with_more_responses_do_not_tilt_the_relation_within_a_prompt():
    """Two responses to one prompt, five to another, each in the order of their lengths: the relation is perfect in ranks."""
    trees = [tiny.tree(4, (3, 9), seed=1), tiny.tree(4, (20, 12, 30, 5, 8), seed=2), tiny.tree(4, (7,), seed=3)]
    lengths = [np.array([len(r) for r in t.responses], dtype=float) for t in trees]
    falling = figures_of(length_figures([-(v**3) for v in lengths], trees, [t.id for t in trees], 0.95, "score"))
    assert falling["length_spearman_within"].value == pytest.approx(-1) == falling["length_spearman"].value
    mixed = [np.array([1.0, 2.0]), np.array([3.0, 1.0, 2.0, 4.0, 5.0]), np.array([9.0])]
    ranks = [stats.rankdata(v) - (len(v) + 1) / 2 for v in mixed], [stats.rankdata(v) - (len(v) + 1) / 2 for v in lengths]
    expected = np.corrcoef(*(np.concatenate(side) for side in ranks))[0, 1]
    found = figures_of(length_figures(mixed, trees, [t.id for t in trees], 0.95, "score"))
    assert found["length_spearman_within"].value == pytest.approx(expected)


# --- pairs and groups -----------------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_measure_and_ties_count_one_half():
    trees, rewards, prompts = many()
    assert pairs_of(trees).gaps(rewards).tolist() == pair_margins(rewards, trees)[0].tolist()
    rewards = [np.zeros(3) for _ in rewards]
    found = figures_of(reward_figures(rewards, trees, prompts))
    assert found["accuracy"].value == 0.5 and found["nll"].value == pytest.approx(math.log(2)) and found["brier"].value == 0.25


def test_accuracy_against_a_loop_over_pairs_with_clusters_by_prompt():
    trees, rewards, prompts = many()
    right = [float(r[i] > r[j]) for r in rewards for i in range(3) for j in range(i + 1, 3)]
    found = figures_of(reward_figures(rewards, trees, prompts))
    assert found["accuracy"].value == pytest.approx(sum(right) / len(right))
    assert (found["accuracy"].n, found["accuracy"].clusters) == (120, 20)
    assert found["margin_median"].value == pytest.approx(
        np.median([r[i] - r[j] for r in rewards for i in range(3) for j in range(i + 1, 3)])
    )
    longer = [
        (len(t.responses[i]) > len(t.responses[j])) + 0.5 * (len(t.responses[i]) == len(t.responses[j]))
        for t in trees
        for i in range(3)
        for j in range(i + 1, 3)
    ]
    assert found["length_accuracy"].value == pytest.approx(np.mean(longer))


def test_a_constant_for_each_prompt_and_the_order_of_responses_change_nothing():
    trees, rewards, prompts = many()
    before = figures_of(reward_figures(rewards, trees, prompts))
    shifted = figures_of(reward_figures([r + 7.0 * i for i, r in enumerate(rewards)], trees, prompts))
    turned = [t.keep([2, 0, 1]) for t in trees]
    again = figures_of(reward_figures([r[[2, 0, 1]] for r in rewards], turned, prompts))
    for key, one in before.items():
        if key not in ("length_pearson", "length_spearman"):
            assert shifted[key].value == pytest.approx(one.value, abs=1e-9), key
        assert again[key].value == pytest.approx(one.value, abs=1e-9), key


def test_by_source_and_by_strength():
    trees, _, prompts = many(8, 2)
    trees = [replace(t, source="ab"[i % 2], margin=np.array([[0.0, 1.0 + i // 4], [0.0, 0.0]])) for i, t in enumerate(trees)]
    margins = np.array([1.0, -1, 1, -1, 1, 1, -1, 1])
    pairs = pairs_of(trees)
    sources = figures_of(by_source(margins, pairs, trees, pairs.of(prompts), 0.95))
    assert {k: (e.value, e.n) for k, e in sources.items()} == {"accuracy/source/a": (0.75, 4), "accuracy/source/b": (0.5, 4)}
    strengths = figures_of(by_strength(margins, pairs, trees, pairs.of(prompts), 0.95))
    assert {k: (e.value, e.n) for k, e in strengths.items()} == {"accuracy/strength/1": (0.5, 4), "accuracy/strength/2": (0.75, 4)}


def test_many_strengths_are_put_into_four_equal_groups_weakest_first():
    trees, _, prompts = many(40, 2)
    trees = [replace(t, margin=np.array([[0.0, 1.0 + i], [0.0, 0.0]])) for i, t in enumerate(trees)]
    pairs = pairs_of(trees)
    found = by_strength(np.arange(40.0) - 9.5, pairs, trees, pairs.of(prompts), 0.95)
    assert [f.estimate.n for f in found] == [10, 10, 10, 10] and [f.estimate.value for f in found] == [0.0, 1.0, 1.0, 1.0]


def test_without_sources_strengths_or_several_attributes_there_are_no_groups():
    trees, rewards, prompts = many(8, 2)
    assert not [f.key for f in reward_figures(rewards, trees, prompts) if "/" in f.key]


def test_by_attribute_each_attribute_orders_its_own_pairs():
    nan = math.nan
    ratings = {"helpful": np.array([3.0, 1, 2]), "brief": np.array([1.0, 1, nan])}
    trees = [replace(t, ratings=ratings) for t in many(6)[0]]
    rewards = [np.array([3.0, 2.0, 1.0])] * 6
    found = figures_of(by_attribute(rewards, trees, [t.id for t in trees], 0.95))
    assert {k: (pytest.approx(e.value), e.n) for k, e in found.items()} == {"accuracy/attribute/helpful": (2 / 3, 18)}  # `brief` is a tie


# --- a policy -------------------------------------------------------------------------------------------------------------------


def test_policy_figures_by_hand():
    trees = [tiny.tree(4, (10, 5), seed=1), tiny.tree(4, (4, 8), seed=2)]
    logps, reference = [np.array([-10.0, -8.0]), np.array([-4.0, -12.0])], [np.array([-12.0, -8.0]), np.array([-4.0, -13.0])]
    found = figures_of(policy_figures(logps, reference, trees, ["a", "b"]))
    assert found["accuracy"].value == 0.5  # +2 against 0, 0 against +1
    assert found["margin_mean"].value == pytest.approx((2 - 1) / 2)
    assert found["logp_accuracy"].value == 0.5  # -10 < -8, -4 > -12
    assert found["mean_logp_accuracy"].value == 1.0  # -1 > -1.6, -1 > -1.5
    assert found["length_accuracy"].value == 0.5
    assert found["perplexity"].value == pytest.approx(math.exp(14 / 14)) and found["reference_perplexity"].value == pytest.approx(
        math.exp(16 / 14)
    )
    assert found["best_length"].value == 7.0
    assert "accuracy" not in figures_of(policy_figures(logps, None, trees, ["a", "b"]))


def test_perplexity_weighs_tokens_and_demonstrations_need_no_pair():
    figure = perplexity(np.array([2.0, 30.0]), np.array([2.0, 10.0]), ["a", "b"])
    assert figure.estimate.value == pytest.approx(math.exp(32 / 12))
    alone = [tiny.tree(4, (3,), seed=1), tiny.tree(4, (6,), seed=2)]
    found = figures_of(policy_figures([np.array([-3.0]), np.array([-6.0])], None, alone, ["a", "b"]))
    assert set(found) == {"perplexity", "best_length"} and found["perplexity"].value == pytest.approx(math.e)


def test_margins_of_one_prompt_have_no_interval():
    mean, median = margin_figures(np.array([1.0, 3.0]), np.array(["a", "a"]), 0.95)
    assert (mean.estimate.value, median.estimate.value) == (2.0, 2.0) and math.isnan(mean.estimate.low) and math.isnan(median.estimate.low)
