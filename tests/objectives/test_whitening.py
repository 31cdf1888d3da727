"""Whitening against hand-worked numbers and its own laws."""

from __future__ import annotations

import math

import pytest
import torch

from preftune.objectives.whitening import moments, whiten

VALUES = torch.tensor([0.451, 0.58, 0.4], dtype=torch.float64)
UNBIASED = [-0.280251, 1.110225, -0.829974]


def test_hand_worked_numbers_are_those_of_the_unbiased_variance() -> None:
    assert whiten(VALUES).tolist() == pytest.approx(UNBIASED, abs=2e-6)
    population = (VALUES - VALUES.mean()) / VALUES.var(unbiased=False).add(1e-8).sqrt()
    assert population.tolist() == pytest.approx([-0.343236, 1.359742, -1.016506], abs=2e-6)  # what we do not do


def test_padding_does_not_matter_and_stays_0() -> None:
    padded = torch.tensor([[0.451, 99.0, 0.58], [float("nan"), 0.4, -1e30]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    found = whiten(padded, mask)
    assert found[mask.bool()].tolist() == pytest.approx(UNBIASED, abs=2e-6) and (found[~mask.bool()] == 0).all()


def test_whitening_twice_is_whitening_once() -> None:
    once = whiten(torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 7 + 3)
    torch.testing.assert_close(whiten(once), once, atol=1e-6, rtol=0)
    assert once.mean().item() == pytest.approx(0, abs=1e-12) and once.var().item() == pytest.approx(1, abs=1e-8)


def test_without_the_shift_the_mean_stays() -> None:
    assert whiten(VALUES, shift_mean=False).mean().item() == pytest.approx(VALUES.mean().item(), abs=1e-9)
    torch.testing.assert_close(whiten(VALUES, shift_mean=False) - VALUES.mean(), whiten(VALUES))


@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0, 2.0], []])
def test_one_value_equal_values_and_none_give_0(values: list[float]) -> None:
    found = whiten(torch.tensor(values))
    assert found.tolist() == [0.0] * len(values)
    mean, deviation = moments(torch.tensor(values))
    assert deviation.item() == pytest.approx(1.0 if len(values) < 2 else math.sqrt(1e-8)) and mean.isfinite()
