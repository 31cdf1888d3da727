"""Pointwise regression on ratings (methods C.1) beside torch's own mean squared error and loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.objectives.pointwise import higher, squared_error

NAN = float("nan")


def t(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_best_constant_is_the_mean_and_loses_the_variance() -> None:
    """Ratings 1, 2, 4, 5: mean 3, population variance 2.5."""
    ratings = t([1.0, 2, 4, 5])
    weight = torch.full((1, 4), 0.25, dtype=torch.float64)
    constant = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss, metrics = squared_error(constant.expand(1, 4), ratings, weight)
    (slope,) = torch.autograd.grad(loss, constant)
    assert loss.item() == 2.5 and slope.item() == 0
    assert (metrics["mse"][0] / metrics["mse"][1]).item() == 2.5
    assert (metrics["accuracy"][0] / metrics["accuracy"][1]).item() == 0.5, "equal rewards are half right"
    assert squared_error(torch.full((1, 4), 3.5, dtype=torch.float64), ratings, weight)[0].item() == 2.75


@given(st.lists(st.lists(st.tuples(st.floats(-9, 9), st.none() | st.floats(-9, 9)), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(deadline=None)
def test_against_torch_over_rated_responses_alone(rows: list[list[tuple[float, float | None]]]) -> None:
    rewards = t(*[[r for r, _ in row] for row in rows]).requires_grad_()
    rated = t(*[[NAN if s is None else s for _, s in row] for row in rows])
    known = ~rated.isnan()
    weight = known.double() / known.sum().clamp(min=1)
    loss, metrics = squared_error(rewards, rated, weight)
    expected = F.mse_loss(rewards[known], rated[known]) if known.any() else 0 * rewards.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    ours, theirs = (torch.autograd.grad(one, rewards)[0] for one in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    assert metrics["mse"][1].item() == known.sum()
    assert torch.autograd.gradcheck(lambda r: squared_error(r, rated, weight)[0], rewards)


@pytest.mark.parametrize("there", [0.0, 1e30, -7.0])
def test_what_stands_where_nothing_is_rated_has_no_effect(there: float) -> None:
    rewards = torch.tensor([[1.0, there]], requires_grad=True)
    loss, metrics = squared_error(rewards, torch.tensor([[3.0, NAN]]), torch.tensor([[1.0, 0.0]]))
    (slope,) = torch.autograd.grad(loss, rewards)
    assert loss.item() == 4 and slope.tolist() == [[-4, 0]]
    assert metrics["mse"][0].item() == 4 and metrics["mse"][1].item() == 1 and metrics["accuracy"][1].item() == 0


def test_pairs_are_of_different_ratings_and_one_response_has_none() -> None:
    assert higher(torch.tensor([[2.0, 1.0, NAN, 2.0]]))[0].nonzero().tolist() == [[0, 1], [3, 1]]
    assert set(squared_error(torch.zeros(2, 1), torch.ones(2, 1), torch.full((2, 1), 0.5))[1]) == {"mse"}
