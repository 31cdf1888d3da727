"""Supervised fine-tuning's loss against the numbers of methods B and 0.3."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from preftune.objectives import likelihood, metrics, pairwise
from preftune.objectives.likelihood import negative_log_likelihood
from preftune.objectives.metrics import mean_over


@pytest.mark.parametrize("module", [likelihood, pairwise, metrics], ids=lambda m: m.__name__)
def test_the_examples_in_docstrings_are_true(module) -> None:
    result = doctest.testmod(module)
    assert result.failed == 0
    functions = [f for f in vars(module).values() if callable(f) and ">>>" in (f.__doc__ or "")]
    assert result.attempted >= len(functions) and (functions or module is metrics)


@pytest.mark.parametrize("vocabulary", [2, 320, 49152])
def test_a_uniform_model_loses_ln_v(vocabulary: int) -> None:
    logp = torch.log_softmax(torch.zeros(5, vocabulary, dtype=torch.float64), -1)[:, 0]
    loss, _ = negative_log_likelihood(logp, torch.full((5,), 0.2, dtype=torch.float64))
    assert loss.item() == pytest.approx(math.log(vocabulary), abs=1e-12)


def test_the_token_mean_over_the_step_not_the_mean_of_means() -> None:
    """Oracle of 0.3: sum 6 over 3 tokens and sum 4 over 1 token are 10 / 4 = 2.5, not 3."""
    first, second = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0])
    parts = [negative_log_likelihood(logp, torch.full_like(logp, 1 / 4)) for logp in (first, second)]
    assert sum(loss for loss, _ in parts).item() == 2.5
    above, below = (sum(part[1]["nll"][i] for part in parts).item() for i in (0, 1))
    assert (above, below) == (10, 4)


def test_the_gradient_is_minus_the_weight() -> None:
    logp = torch.tensor([-1.0, -3.0, -0.5], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: negative_log_likelihood(x, weight)[0], logp)
    negative_log_likelihood(logp, weight)[0].backward()
    assert torch.equal(logp.grad, -weight)


def test_metrics_carry_no_gradient() -> None:
    logp = torch.tensor([-1.0], requires_grad=True)
    _, found = negative_log_likelihood(logp, torch.ones(1))
    assert not any(part.requires_grad for ratio in found.values() for part in ratio)


def test_regression_35_a_mean_is_its_parts_added_up() -> None:
    """Micro-batches of unlike sizes: numerators and denominators add to the whole's mean; what the mask hides may be NaN."""
    values = torch.tensor([[1.0, 2.0, float("nan")], [6.0, float("nan"), float("nan")]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    whole = mean_over(values, mask)
    parts = [mean_over(values[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert (whole[0] / whole[1]).item() == 3
    assert [sum(p[i] for p in parts).item() for i in (0, 1)] == [whole[0].item(), whole[1].item()] == [9, 3]
