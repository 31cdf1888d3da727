"""KTO's loss: numbers worked by hand, its baseline, and what it does at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives.unpaired import kto

NAN = float("nan")


def loss_of(ratios: list[float], labels: list[float], baseline: float = 0.0, **knobs: float) -> float:
    loss, _ = kto(*arguments(ratios, labels), baseline, **{"beta": 0.1, **knobs})
    return loss.item()


def arguments(ratios: list[float], labels: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One record whose policy gives `ratios` above a reference of -3 each."""
    reference = torch.full((1, len(ratios)), -3.0, dtype=torch.float64)
    logp = torch.tensor([ratios], dtype=torch.float64) + reference
    return logp, reference, torch.tensor([labels]), torch.full_like(reference, 1 / len(ratios))


def test_half_of_each_where_policy_and_reference_agree() -> None:
    assert loss_of([0.0], [1.0]) == loss_of([0.0], [0.0]) == 0.5
    assert loss_of([0.0, 0.0], [1.0, 0.0], desirable_weight=1.5, undesirable_weight=0.5) == 0.5
    assert loss_of([0.0, 0.0, 0.0], [1.0, 1.0, 0.0], desirable_weight=2.0) == pytest.approx(5 / 6)


def test_the_numbers_of_the_worked_example() -> None:
    """beta .1, z0 .5: h = 2 desirable and h = -1 undesirable lie equally far on their good side; then z0 = .25."""
    assert loss_of([2.0], [1.0], 0.5) == pytest.approx(0.462570, abs=5e-7)
    assert loss_of([-1.0], [0.0], 0.5) == pytest.approx(0.462570, abs=5e-7)
    assert loss_of([1.5, -1.0], [1.0, 0.0], (1.5 - 1.0) / 2) == pytest.approx(0.468791, abs=5e-7)


def test_the_baseline_is_never_negative() -> None:
    for baseline in (-5.0, -1e-9, -math.inf):
        assert loss_of([1.5, -1.0], [1.0, 0.0], baseline) == loss_of([1.5, -1.0], [1.0, 0.0], 0.0)
        assert kto(*arguments([1.0], [1.0]), baseline, 0.1)[1]["kl"][0] == 0


def test_a_baseline_that_is_no_number_is_not_hidden() -> None:
    assert math.isnan(loss_of([1.5, -1.0], [1.0, 0.0], NAN))


@given(st.lists(st.tuples(st.floats(-2e3, 2e3), st.sampled_from([1.0, 0.0, NAN])), min_size=1, max_size=6), st.floats(-50, 50))
@settings(deadline=None, max_examples=100)
def test_it_is_one_minus_the_value_of_the_paper_and_always_finite(rows: list[tuple[float, float]], baseline: float) -> None:
    ratios, labels = [list(column) for column in zip(*rows, strict=True)]
    z0, total = max(0.0, baseline), 0.0
    for ratio, label in rows:
        if not math.isnan(label):
            gain = 0.3 * (ratio - z0 if label else z0 - ratio)
            total += (1.4 if label else 0.6) * (1 - 1 / (1 + math.exp(-gain) if gain > -700 else math.inf))
    logp, reference, said, weight = arguments(ratios, labels)
    logp.requires_grad_()
    loss, metrics = kto(logp, reference, said, weight, baseline, 0.3, 1.4, 0.6)
    assert loss.item() == pytest.approx(total / len(rows), rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.isfinite().all() and all(one.isfinite() for ratio in metrics.values() for one in ratio)
    assert all(gradient[0, n] == 0 for n, label in enumerate(labels) if math.isnan(label))


def test_the_gradient_is_that_of_a_constant_baseline() -> None:
    """d/dh of lambda * sigmoid(beta (z0 - h)) with z0 held fixed, written out."""
    logp, reference, labels, weight = arguments([1.5, -1.0], [1.0, 0.0])
    logp.requires_grad_()
    (found,) = torch.autograd.grad(kto(logp, reference, labels, weight, 0.25, 0.1)[0], logp)
    lost = [torch.sigmoid(torch.tensor(x, dtype=torch.float64)) for x in (-0.125, -0.125)]
    expected = [sign * 0.5 * 0.1 * p * (1 - p) for sign, p in zip((-1, 1), lost, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected)[None])


@pytest.mark.parametrize("label", [1.0, 0.0])
def test_a_batch_of_one_kind_alone_is_legal(label: float) -> None:
    loss, metrics = kto(*arguments([1.0, -2.0], [label, label]), 0.1, 0.1)
    assert loss.isfinite() and {"kl", "chosen_reward" if label else "rejected_reward"} == set(metrics)


def test_metrics_say_what_each_kind_gained_and_which_records_are_in_order() -> None:
    """The first record has both kinds, in order; the second has a desirable response alone, so it has no pair."""
    ratio = torch.tensor([[3.0, 1.0, -2.0], [-1.0, 99.0, 99.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, NAN, NAN]])
    weight = torch.tensor([[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]])
    _, metrics = kto(ratio, torch.zeros_like(ratio), labels, weight, 0.7, 0.5)
    means = {name: (above / below).item() for name, (above, below) in metrics.items()}
    expected = {"kl": 0.7, "chosen_reward": 0.5, "rejected_reward": -0.25, "accuracy": 1.0, "margin": 0.5 * (2.0 + 5.0) / 2}
    assert means == pytest.approx(expected)
