"""The Plackett-Luce likelihood beside hand-worked numbers and brute force over all orders."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.objectives.listwise import plackett_luce, reward_listwise
from preftune.objectives.pairwise import bradley_terry


def better(scores: list[list[float]]) -> torch.Tensor:
    table = torch.tensor(scores)
    return table.unsqueeze(2) > table.unsqueeze(1)


def test_hand_worked_numbers() -> None:
    """Methods A.6, C.4: (2, 1, 0) in its order; ln K! and the gradient by rank at equality."""
    assert plackett_luce(torch.tensor([[2.0, 1, 0]]), better([[3, 2, 1]])).item() == pytest.approx(0.720868, abs=1e-6)
    values = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    loss = plackett_luce(values, better([[4, 3, 2, 1]]))
    assert loss.item() == pytest.approx(math.log(24))
    (slope,) = torch.autograd.grad(loss, values)
    assert slope[0].tolist() == pytest.approx([-3 / 4, -5 / 12, 1 / 12, 13 / 12])


def test_probabilities_of_all_orders_sum_to_1_and_a_shift_changes_nothing() -> None:
    values = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    losses = [plackett_luce(values, better([list(order)])).item() for order in itertools.permutations(range(4))]
    assert np.exp(-np.array(losses)).sum() == pytest.approx(1)
    assert plackett_luce(values + 7, better([[0, 1, 2, 3]])).item() == pytest.approx(losses[0])


def test_two_responses_are_bradley_terry_and_ties_are_not_compared() -> None:
    values = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    assert plackett_luce(values, better([[1, 0]])).item() == pytest.approx(bradley_terry(values, better([[1, 0]]).double()).item())
    assert plackett_luce(values, better([[1, 1]])).item() == 0
    three = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    expected = sum(math.log(math.exp(v) + math.exp(0.5)) - v for v in (1.0, 2.0))
    assert plackett_luce(three, better([[1, 1, 0]])).item() == pytest.approx(expected)


def test_huge_values_and_absent_responses_stay_finite() -> None:
    values = torch.tensor([[1e3, -1e3, 0.0]], requires_grad=True)
    nothing = better([[0, 1, float("nan")]])
    loss = plackett_luce(values, nothing)
    (slope,) = torch.autograd.grad(loss.sum(), values)
    assert loss.isfinite().all() and slope.isfinite().all() and slope[0, 2] == 0 and loss.item() == pytest.approx(2000)


# ---------------------------------------------------------------- the reward model, C.4


def test_the_reward_loss_is_the_sum_or_the_mean_over_stages() -> None:
    """(2, 1, 0) has two stages, a pair one, and a ranking whose last two are tied one; ln 4! over three stages at equality."""
    values = torch.tensor([[2.0, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.float64)
    order = better([[3, 2, 1], [1, 0, float("nan")], [1, 0, 0]])
    each = [0.720868, math.log(2), math.log(math.e + 2) - 1]
    weight = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert reward_listwise(values, order, weight)[0].item() == pytest.approx(sum(each) / 3, abs=1e-6)
    each[0] /= 2
    assert reward_listwise(values, order, weight, mean_over_stages=True)[0].item() == pytest.approx(sum(each) / 3, abs=1e-6)
    equal = torch.zeros(1, 4, dtype=torch.float64)
    found = reward_listwise(equal, better([[4, 3, 2, 1]]), torch.ones(1, dtype=torch.float64), mean_over_stages=True)[0]
    assert found.item() == pytest.approx(math.log(24) / 3)
    nothing = reward_listwise(equal.requires_grad_(), better([[1, 1, 1, 1]]), torch.ones(1, dtype=torch.float64), mean_over_stages=True)[0]
    assert nothing.item() == 0 and not nothing.isnan()


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=2, max_size=5), st.booleans())
@settings(deadline=None)
def test_against_the_stages_written_out(responses: list[tuple[float, int]], mean: bool) -> None:
    values, ranks = [v for v, _ in responses], [r for _, r in responses]
    stages = [
        math.log(math.exp(v) + sum(math.exp(w) for w, s in responses if s < r)) - v for v, r in responses if any(s < r for s in ranks)
    ]
    expected = sum(stages) / (max(len(stages), 1) if mean else 1)
    order, one = better([[float(r) for r in ranks]]), torch.ones(1, dtype=torch.float64)
    rewards = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    assert reward_listwise(rewards, order, one, mean)[0].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert torch.autograd.gradcheck(lambda r: reward_listwise(r, order, one, mean)[0], rewards)


def test_accuracy_counts_the_pairs_of_the_ranking() -> None:
    _, metrics = reward_listwise(torch.tensor([[2.0, 0.0, 1.0]]), better([[3, 2, 1]]), torch.ones(1))
    assert (metrics["accuracy"][0] / metrics["accuracy"][1]).item() == pytest.approx(2 / 3)
