"""The critic's loss and explained variance beside the hand-worked numbers of methods D.5."""

from __future__ import annotations

import doctest
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives import value
from preftune.objectives.advantages import gae
from preftune.objectives.value import explained_variance, value_loss

NUMBER = st.floats(-3, 3)
NAN = float("nan")


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(value)
    assert result.failed == 0 and result.attempted


@pytest.mark.parametrize(
    "returns, clip, loss, gradient",
    [
        (1, 0.2, 0.32, 0),
        (-1, 0.2, 1.125, 1.5),
        (1, None, 0.125, -0.5),
        (1, math.inf, 0.125, -0.5),
        (-1, None, 1.125, 1.5),
        (1, 0.6, 0.125, -0.5),
    ],
)
def test_value_loss_by_hand(returns: float, clip: float | None, loss: float, gradient: float) -> None:
    """V_old 0, V .5."""
    values = t(0.5).requires_grad_()
    found = value_loss(values, t(0.0), t(float(returns)), clip)
    found.sum().backward()
    assert values.grad is not None
    assert (found.item(), values.grad.item()) == pytest.approx((loss, gradient))


def test_the_clip_is_two_tenths_unless_told() -> None:
    assert value_loss(t(0.5), t(0.0), t(1.0)).item() == pytest.approx(0.32)


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=1, max_size=5), st.floats(0.01, 2))
def test_value_loss_is_its_definition(tokens: list[tuple[float, float, float]], clip: float) -> None:
    values, old, returns = (t(*[token[i] for token in tokens]) for i in range(3))
    wanted = [0.5 * max((v - g) ** 2, (min(max(v, o - clip), o + clip) - g) ** 2) for v, o, g in tokens]
    assert value_loss(values, old, returns, clip).tolist() == pytest.approx(wanted)
    assert value_loss(values, old, returns, None).tolist() == pytest.approx([0.5 * (v - g) ** 2 for v, _, g in tokens])


def test_gradients_by_finite_differences() -> None:
    values, old, returns = t(0.5, -0.3, 0.05, 2.0).requires_grad_(), t(0.0, 0.0, 0.0, 0.0), t(-1.0, 1.0, 0.7, 3.0)
    for clip in (0.2, None):
        assert torch.autograd.gradcheck(lambda v, c=clip: value_loss(v, old, returns, c), values)


def test_old_values_and_returns_are_constants() -> None:
    values, old, returns = t(0.5).requires_grad_(), t(0.0).requires_grad_(), t(1.0).requires_grad_()
    value_loss(values, old, returns).sum().backward()
    assert values.grad is not None and old.grad is None and returns.grad is None


def test_explained_variance_by_hand() -> None:
    returns = t(1.0, 2.0, 3.0)
    assert explained_variance(returns, returns).item() == 1
    assert explained_variance(returns - 5, returns).item() == 1  # a constant error is no variance
    assert explained_variance(t(9.0, 9.0, 9.0), returns).item() == pytest.approx(0)
    assert explained_variance(-returns, returns).item() == pytest.approx(1 - 4)
    assert explained_variance(t(0.0, 1.0, 5.0), returns).shape == ()


def test_explained_variance_reads_the_mask_only() -> None:
    rng = np.random.default_rng(0)
    values, returns, mask = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), rng.random((3, 4)) < 0.6
    wanted = 1 - np.var((returns - values)[mask]) / np.var(returns[mask])
    hidden = [torch.from_numpy(np.where(mask, x, NAN)) for x in (values, returns)]
    assert explained_variance(*hidden, torch.from_numpy(mask)).item() == pytest.approx(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_returns_that_do_not_vary_explain_nothing(dtype: torch.dtype) -> None:
    """Also where rounding alone varies them: advantages + values of equal rewards."""
    values = torch.rand(1, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rewards = torch.zeros_like(values)
    rewards[:, -1] = 0.1
    _, rounded = gae(rewards, values, torch.ones(1, 50).bool(), 1.0, 1.0)
    for returns in (rounded, torch.full_like(values, 0.1), torch.zeros_like(values)):
        assert explained_variance(values, returns).item() == 0
    for few in (torch.zeros(0, dtype=dtype), torch.ones(1, dtype=dtype)):
        assert explained_variance(few, few).item() == 0
    assert explained_variance(values, values + 1).item() == 1  # and these do
