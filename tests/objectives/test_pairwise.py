"""Pairwise reward model against the hand-worked numbers of methods C.2, and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives.pairwise import bradley_terry, pair_metrics, reward_pairwise, smoothed

VALUE = st.floats(-6, 6)


def t(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ranked(n: int, groups: int = 1) -> Tensor:
    """Preference of responses that stand best first."""
    return torch.ones(groups, n, n, dtype=torch.float64).triu(1)


def mean_weight(groups: int) -> Tensor:
    return torch.full((groups,), 1 / groups, dtype=torch.float64)


def reward(values, preference: Tensor | None = None, **options) -> Tensor:
    rewards = values if isinstance(values, Tensor) else t(*values)
    preference = ranked(rewards.shape[1], len(rewards)) if preference is None else preference
    return reward_pairwise(rewards, preference, mean_weight(len(rewards)), **options)[0]


def mean(metrics, name: str) -> float:
    above, below = metrics[name]
    return (above / below).item()


# ---------------------------------------------------------------- the reward model, C.2


@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_equal_rewards_lose_ln_2_for_any_k(k: int) -> None:
    assert reward([[1.7] * k]).item() == pytest.approx(math.log(2), abs=1e-12)


def test_three_in_the_right_order() -> None:
    assert reward([[2, 1, 0]]).item() == pytest.approx(0.251150, abs=1e-6)


def test_the_mean_over_records() -> None:
    assert reward([[1, 0], [2, 2.5]]).item() == pytest.approx(0.643669, abs=1e-6)


def test_the_gradient_at_equality_for_four() -> None:
    rewards = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    reward(rewards).backward()
    torch.testing.assert_close(rewards.grad, t([-1 / 4, -1 / 12, 1 / 12, 1 / 4]))


def test_a_prompt_weighs_the_same_however_many_pairs_it_has() -> None:
    """Nine responses (36 pairs) at equality and one pair at equality: the same loss, and half the weight each."""
    preference = torch.zeros(2, 9, 9, dtype=torch.float64)
    preference[0], preference[1, 0, 1] = ranked(9)[0], 1
    rewards = torch.zeros(2, 9, dtype=torch.float64)
    rewards[1, 0] = 1
    assert reward(rewards, preference).item() == pytest.approx((math.log(2) + 0.3132617) / 2, abs=1e-6)


@given(st.lists(VALUE, min_size=2, max_size=5), VALUE)
def test_rewards_are_free_up_to_a_constant(values: list[float], shift: float) -> None:
    assert reward([[v + shift for v in values]]).item() == pytest.approx(reward([values]).item(), abs=1e-9)


@given(st.lists(VALUE, min_size=2, max_size=5), st.data())
def test_against_the_pairs_written_out(values: list[float], data) -> None:
    """Any judgement of each pair: first better, second better, a tie, or a probability."""
    n = len(values)
    preference = torch.zeros(1, n, n, dtype=torch.float64)
    total, count = 0.0, 0.0
    for i, j in itertools.combinations(range(n), 2):
        share = data.draw(st.sampled_from([None, 0.0, 1.0, 0.7]))
        if share is not None:
            preference[0, i, j], preference[0, j, i] = share, 1 - share
            total -= share * math.log(1 / (1 + math.exp(values[j] - values[i])))
            total -= (1 - share) * math.log(1 / (1 + math.exp(values[i] - values[j])))
            count += 1
    expected = total / count if count else 0.0
    assert reward([values], preference).item() == pytest.approx(expected, abs=1e-9)
    rewards = t(values).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: reward(r, preference, centering=0.3), rewards)


def test_a_soft_label_is_least_where_the_odds_are_its_own() -> None:
    """-[p log sigma(D) + (1 - p) log sigma(-D)] at p = 0.7: least at D = ln(0.7 / 0.3), where it is the entropy."""
    soft = torch.zeros(1, 2, 2, dtype=torch.float64)
    soft[0, 0, 1], soft[0, 1, 0] = 0.7, 0.3
    rewards = t([math.log(0.7 / 0.3), 0.0]).requires_grad_()
    loss = reward(rewards, soft)
    loss.backward()
    assert loss.item() == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3), abs=1e-12)
    assert rewards.grad.abs().max() < 1e-12
    assert reward([[0.4, 0.4]], soft).item() == pytest.approx(math.log(2))


def test_centering_adds_the_square_of_the_pairs_sum() -> None:
    """Rewards (2, 1, 0): sums 3, 2, 1, so the mean square is 14 / 3; and it takes the free constant away."""
    plain = reward([[2, 1, 0]]).item()
    assert reward([[2, 1, 0]], centering=0.01).item() == pytest.approx(plain + 0.01 * 14 / 3, abs=1e-12)
    rewards = t([[3.0, 2.0]][0]).requires_grad_()
    reward(rewards, centering=0.5).backward()
    assert rewards.grad.sum().item() == pytest.approx(2 * 0.5 * 2 * 5)


@pytest.mark.parametrize("gap", [89.0, 1e3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regression_37_large_differences_stay_finite(gap: float, dtype: torch.dtype) -> None:
    """log(1 + exp(x)) overflows from x = 88.7 in fp32; softplus is x, with slope 1 over the pairs."""
    rewards = torch.tensor([[0.0, gap]], dtype=dtype, requires_grad=True)
    loss = bradley_terry(rewards, ranked(2).to(dtype)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(gap) and rewards.grad.tolist() == [[-1, 1]]
    right = torch.tensor([[gap, 0.0]], dtype=dtype, requires_grad=True)
    assert bradley_terry(right, ranked(2).to(dtype)).item() == pytest.approx(0, abs=1e-30)


# ---------------------------------------------------------------- margins of graded strength (C.3) and labels that may be wrong


def strengths(*values: float) -> Tensor:
    """[G, 2, 2] strength of the preference of a pair that stands best first."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) * ranked(2, len(values))


@pytest.mark.parametrize(("lead", "margin", "expected"), [(1, 1, math.log(2)), (1, 1 / 3, 0.414370), (2, 3, 1.313262)])
def test_the_reward_must_lead_by_the_margin(lead: float, margin: float, expected: float) -> None:
    assert reward([[lead, 0]], strength=strengths(margin)).item() == pytest.approx(expected, abs=1e-6)


def test_the_mean_over_records_of_different_strength() -> None:
    assert reward([[1, 0], [2, 2.5]], strength=strengths(1, 0)).item() == pytest.approx(0.8336, abs=5e-5)
    assert reward([[1, 0], [2, 2.5]], strength=strengths(0, 0)).item() == pytest.approx(0.643669, abs=1e-6)


@pytest.mark.parametrize("gap", [89.0, 1e3, 1e30])
def test_regression_37_a_margin_is_honoured_and_nothing_overflows(gap: float) -> None:
    """log(1 + exp(x)) overflows from x = 88.7 in fp32, and drops the margin; here the loss is gap + margin with slope 1."""
    rewards = torch.tensor([[0.0, gap]], requires_grad=True)
    loss = reward_pairwise(rewards, ranked(2).float(), torch.ones(1), strength=3 * ranked(2).float())[0]
    loss.backward()
    assert loss.item() == pytest.approx(gap + 3) and rewards.grad.tolist() == [[-1, 1]]
    right = reward_pairwise(torch.tensor([[gap, 0.0]]), ranked(2).float(), torch.ones(1), strength=torch.full((1, 2, 2), 1e32))[0]
    assert right.isfinite() and right > 1e31, "a margin beyond the lead is a loss, however large"


def test_strengths_of_what_is_not_preferred_change_nothing() -> None:
    """Ties, absent responses, and a minority that judged the other way round."""
    preference = torch.zeros(1, 3, 3, dtype=torch.float64)
    preference[0, 0, 1], preference[0, 1, 0] = 0.75, 0.25
    strength = torch.zeros(1, 3, 3, dtype=torch.float64)
    strength[0, 0, 1] = 2.0
    plain = reward([[0.5, -1, 9]], preference, strength=strength).item()
    strength[0, 1, 0], strength[0, 0, 2], strength[0, 2, 1] = 5.0, 7.0, 3.0
    assert reward([[0.5, -1, 9]], preference, strength=strength).item() == plain
    assert plain == pytest.approx(0.75 * math.log1p(math.exp(0.5)) + 0.25 * math.log1p(math.exp(-0.5)))


@given(st.lists(VALUE, min_size=2, max_size=4), st.floats(0, 0.49), st.data())
@settings(deadline=None)
def test_smoothing_margins_and_soft_labels_written_out(values: list[float], wrong: float, data) -> None:
    """-[p' log sigma(D - m) + (1 - p') log sigma(m - D)], p' = (1 - e) p + e (1 - p): under any label the two chances sum to 1."""
    n = len(values)
    preference, strength = (torch.zeros(1, n, n, dtype=torch.float64) for _ in range(2))
    losses = []
    for i, j in itertools.combinations(range(n), 2):
        p, m = data.draw(st.sampled_from([1.0, 0.7, None])), data.draw(st.sampled_from([0.0, 1 / 3, 3.0]))
        if p is not None:
            i, j = data.draw(st.permutations([i, j]))
            preference[0, i, j], preference[0, j, i], strength[0, i, j] = p, 1 - p, m
            chance = 1 / (1 + math.exp(m - values[i] + values[j]))
            p = (1 - wrong) * p + wrong * (1 - p)
            losses.append(-p * math.log(chance) - (1 - p) * math.log(1 - chance))
    found = reward([values], preference, label_smoothing=wrong, strength=strength).item()
    assert found == pytest.approx(sum(losses) / len(losses) if losses else 0.0, rel=1e-6, abs=1e-9)
    check = lambda r: reward(r, preference, centering=0.2, label_smoothing=wrong, strength=strength)
    assert torch.autograd.gradcheck(check, t(values).requires_grad_())


def test_a_smoothed_label_is_least_where_the_lead_is_margin_plus_its_odds() -> None:
    """e = .1, m = 1: least at D = 1 + ln 9; and a soft label of .5 +- nothing stays a tie that teaches nothing."""
    rewards = t([1 + math.log(9), 0.0]).requires_grad_()
    reward(rewards, label_smoothing=0.1, strength=strengths(1)).backward()
    assert rewards.grad.abs().max() < 1e-12
    torch.testing.assert_close(smoothed(ranked(2), 0.1), t([[0.0, 0.9], [0.1, 0.0]]))
    assert smoothed(torch.zeros(1, 2, 2), 0.1).eq(0).all()


def test_metrics_are_of_the_labels_as_given() -> None:
    _, metrics = reward_pairwise(t([1.0, 0.0]), ranked(2), mean_weight(1), label_smoothing=0.3, strength=strengths(9))
    assert mean(metrics, "accuracy") == 1 and mean(metrics, "margin") == 1


def test_no_pair_no_loss_and_no_gradient() -> None:
    rewards = t([3.0, 1.0], [1.0, 2.0]).requires_grad_()
    preference = torch.zeros(2, 2, 2, dtype=torch.float64)
    preference[1, 1, 0] = 1
    assert bradley_terry(rewards, preference).tolist() == [0, pytest.approx(0.3132617)]
    reward(rewards, preference).backward()
    assert rewards.grad[0].tolist() == [0, 0] and (rewards.grad[1] != 0).all()


# ---------------------------------------------------------------- what is reported


def test_a_tie_is_half_right() -> None:
    assert mean(pair_metrics(t([1.0, 0.0], [0.0, 1.0], [2.0, 2.0]), ranked(2, 3)), "accuracy") == 0.5
    assert mean(pair_metrics(t([2.0, 2.0]), ranked(2)), "accuracy") == 0.5


def test_metrics_count_each_pair_once_and_each_prompt_alike() -> None:
    """Prompt 0 ranks three, values (2, 0, 1): pairs right, right, wrong. Prompt 1 prefers its second: wrong. Prompt 2 has no pair."""
    values = t([2.0, 0.0, 1.0], [5.0, 3.0, 0.0], [9.0, 9.0, 9.0])
    preference = torch.zeros(3, 3, 3, dtype=torch.float64)
    preference[0], preference[1, 1, 0] = ranked(3)[0], 1
    metrics = pair_metrics(values.requires_grad_(), preference)
    assert all(below.item() == pytest.approx(2) for _, below in metrics.values())
    assert mean(metrics, "accuracy") == pytest.approx((2 / 3 + 0) / 2)
    assert mean(metrics, "margin") == pytest.approx(((2 + 1 - 1) / 3 + -2) / 2)
    assert mean(metrics, "chosen_reward") == pytest.approx(((2 + 2 + 0) / 3 + 3) / 2)
    assert mean(metrics, "rejected_reward") == pytest.approx(((0 + 1 + 1) / 3 + 5) / 2)
    assert not any(part.requires_grad for ratio in metrics.values() for part in ratio)
