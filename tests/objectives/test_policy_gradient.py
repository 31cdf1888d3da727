"""Policy gradient losses beside the hand-worked numbers of methods D.3, D.4, D.6, D.12 and D.13, finite differences and enumeration."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives import policy_gradient
from preftune.objectives.advantages import group_relative, leave_one_out
from preftune.objectives.policy_gradient import (
    approximate_kl,
    cispo,
    clipped,
    penalised,
    reinforce,
    sequence_log_ratio,
    truncated_importance,
)
from preftune.objectives.whitening import whiten

Losses = Callable[[Tensor, Tensor], Tensor]
"""Log ratios and advantages to losses; log pi is the log ratio where both are asked for."""

LOSSES: dict[str, Losses] = {
    "clipped": lambda r, a: clipped(r, a)[0],
    "clipped higher": lambda r, a: clipped(r, a, 0.2, 0.28)[0],
    "dual clip": lambda r, a: clipped(r, a, dual=3.0)[0],
    "penalised": lambda r, a: penalised(r, a, 0.7),
    "cispo": lambda r, a: cispo(r, r, a, 1.0, 4.0)[0],
    "reinforce": reinforce,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one(loss: Losses, ratio: float, advantage: float) -> tuple[float, float]:
    """Loss and gradient of one token of a given ratio."""
    log_ratio = t(ratio).log().requires_grad_()
    value = loss(log_ratio, t(advantage))
    value.sum().backward()
    assert log_ratio.grad is not None
    return value.item(), log_ratio.grad.item()


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(policy_gradient)
    assert result.failed == 0 and result.attempted


# ---------------------------------------------------------------- the clip, D.4


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient, was",
    [
        (1.3, 1, -1.2, 0, True),
        (1.3, -1, 1.3, 1.3, False),
        (0.7, 1, -0.7, -0.7, False),
        (0.7, -1, 0.8, 0, True),
        (1.0, 2.5, -2.5, -2.5, False),
        (1.1, -2, 2.2, 2.2, False),
        (5.0, 0, 0, 0, False),
    ],
)
def test_clipped_by_hand(ratio: float, advantage: float, loss: float, gradient: float, was: bool) -> None:
    assert one(LOSSES["clipped"], ratio, advantage) == pytest.approx((loss, gradient))
    assert clipped(t(ratio).log(), t(advantage))[1].tolist() == [was]


def test_the_upper_bound_may_lie_higher() -> None:
    """DAPO's .28: 1.25 passes, 1.3 is held at 1.28; the lower bound stays at .8."""
    log_ratio, advantage = t(1.25, 1.3, 0.7).log(), t(1.0, 1.0, -1.0)
    losses, was = clipped(log_ratio, advantage, 0.2, 0.28)
    assert losses.tolist() == pytest.approx([-1.25, -1.28, 0.8]) and was.tolist() == [False, True, True]
    assert clipped(log_ratio, advantage, 0.4)[0].tolist() == pytest.approx([-1.25, -1.3, 0.7])  # one number is both


@pytest.mark.parametrize("ratio, loss, gradient, was", [(2.9, 2.9, 2.9, False), (5, 3, 0, True), (0.5, 0.8, 0, True), (1, 1, 1, False)])
def test_the_dual_clip_by_hand(ratio: float, loss: float, gradient: float, was: bool) -> None:
    """c = 3 and A = -1: the loss is at most 3; with A > 0 nothing changes."""
    assert one(LOSSES["dual clip"], ratio, -1) == pytest.approx((loss, gradient))
    assert clipped(t(ratio).log(), t(-1.0), dual=3.0)[1].tolist() == [was]
    assert one(LOSSES["dual clip"], ratio, 1) == one(LOSSES["clipped"], ratio, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.3, 6), st.floats(-2, 2)), min_size=1, max_size=6), st.floats(0.01, 0.9), st.floats(0.01, 2))
def test_clipped_is_its_definition(tokens: list[tuple[float, float]], low: float, high: float) -> None:
    ratio, advantage = t(*[r for r, _ in tokens]), t(*[a for _, a in tokens])
    losses, was = clipped(ratio.log(), advantage, low, high)
    for r, a, loss, is_clipped in zip(ratio.tolist(), advantage.tolist(), losses.tolist(), was.tolist()):
        assert loss == pytest.approx(-min(r * a, min(max(r, 1 - low), 1 + high) * a))
        if min(abs(r - 1 - high), abs(r - 1 + low), abs(a)) > 1e-9:
            assert is_clipped == (r > 1 + high if a > 0 else r < 1 - low)


def test_the_first_update_has_loss_0_and_a_gradient() -> None:
    """D.3: at ratio 1 whitened advantages sum to 0, and each token's gradient is - A."""
    advantage = whiten(t(0.451, 0.58, 0.4))
    log_ratio = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    losses, was = clipped(log_ratio, advantage)
    losses.sum().backward()
    assert losses.sum().item() == pytest.approx(0, abs=1e-12) and not was.any()
    torch.testing.assert_close(log_ratio.grad, -advantage)


@pytest.mark.parametrize("reduction, wanted", [("grpo", 0.5), ("dapo", 0.25), ("dr_grpo", 0.125)])
def test_three_ways_to_weigh_tokens_by_hand(reduction: str, wanted: float) -> None:
    """D.12: a response of one token with loss 1 and one of three tokens with loss 0; L_max is 4."""
    losses, _ = clipped(torch.zeros(4, dtype=torch.float64), t(-1.0, 0.0, 0.0, 0.0))
    weights = {"grpo": t(1 / 2, 1 / 6, 1 / 6, 1 / 6), "dapo": t(*[1 / 4] * 4), "dr_grpo": t(*[1 / 8] * 4)}[reduction]
    assert (losses * weights).sum().item() == wanted


# ---------------------------------------------------------------- gradients and guards of all


@every_loss
@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1.5, 1.5), st.floats(-2, 2)), min_size=1, max_size=4))
def test_gradients_by_finite_differences(loss: Losses, tokens: list[tuple[float, float]]) -> None:
    edges = [math.log(x) for x in (0.8, 1.2, 1.28, 3.0)]
    log_ratio = t(*[x if all(abs(x - edge) > 1e-3 for edge in edges) else x + 5e-3 for x, _ in tokens]).requires_grad_()
    advantage = t(*[a for _, a in tokens])
    if loss is LOSSES["cispo"]:  # its ratio is a constant: differentiate what is left
        constant = log_ratio.detach().exp().clamp(0, 5) * advantage
        assert torch.autograd.gradcheck(lambda x: -constant * x, log_ratio)
        torch.testing.assert_close(torch.autograd.grad(loss(log_ratio, advantage).sum(), log_ratio)[0], -constant)
    else:
        assert torch.autograd.gradcheck(lambda x: loss(x, advantage), log_ratio)


@every_loss
def test_at_ratio_1_the_gradient_is_that_of_reinforce(loss: Losses) -> None:
    log_ratio, advantage = torch.zeros(5, dtype=torch.float64, requires_grad=True), t(1.0, -2.0, 0.0, 0.3, -0.1)
    torch.testing.assert_close(torch.autograd.grad(loss(log_ratio, advantage).sum(), log_ratio)[0], -advantage)


@every_loss
def test_the_advantage_is_a_constant(loss: Losses) -> None:
    log_ratio, advantage = t(0.1, -0.1).requires_grad_(), t(1.0, -2.0).requires_grad_()
    loss(log_ratio, advantage).sum().backward()
    assert advantage.grad is None


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_old_policy_numbers_stay_finite(loss: Losses, dtype: torch.dtype) -> None:
    log_ratio = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 100.0], dtype=dtype, requires_grad=True)
    found = loss(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0], dtype=dtype))
    found.sum().backward()
    assert found.isfinite().all() and log_ratio.grad is not None and log_ratio.grad.isfinite().all()
    assert clipped(t(30.0), t(-1.0))[0].item() == pytest.approx(math.exp(20))


# ---------------------------------------------------------------- penalty, D.6


def test_penalised_by_hand() -> None:
    """rho 2, A 1, coefficient .5: -2 + .5 (2 - 1 - ln 2), gradient -2 + .5 (2 - 1)."""
    assert one(lambda r, a: penalised(r, a, 0.5), 2.0, 1.0) == pytest.approx((-2 + 0.5 * (1 - math.log(2)), -1.5))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=2, max_size=5))
def test_the_penalty_is_the_divergence_of_the_old_policy_by_enumeration(words: list[tuple[float, float]]) -> None:
    """Mean over the old policy's tokens: value and gradient of KL(old || new), and `approximate_kl` is that value."""
    logits, old = t(*[a for a, _ in words]).requires_grad_(), torch.log_softmax(t(*[b for _, b in words]), 0)
    log_ratio = logits.log_softmax(0) - old
    found = (old.exp() * penalised(log_ratio, torch.zeros(len(old)).double(), 1.0)).sum()
    true = (old.exp() * -log_ratio).sum()
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, true)))
    logged = approximate_kl(log_ratio)
    torch.testing.assert_close((old.exp() * logged).sum(), true.detach())
    assert not logged.requires_grad and (logged >= 0).all()


# ---------------------------------------------------------------- CISPO and REINFORCE


def test_cispo_by_hand() -> None:
    """Bounds 0 and 5 (low 1, high 4): a ratio of 8 weighs 5 and the token still has its gradient; .01 is not lifted."""
    log_ratio, logp = t(8.0, 0.01, 1.0, 8.0).log().requires_grad_(), t(-2.0, -3.0, -1.0, -2.0).requires_grad_()
    losses, was = cispo(log_ratio, logp, t(1.0, 1.0, -1.0, -0.5), 1.0, 4.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([10, 0.03, -1, -5]) and was.tolist() == [True, False, False, True]
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-5, -0.01, 1, 2.5])
    assert log_ratio.grad is None  # the ratio is a constant


def test_cispo_with_a_lower_bound() -> None:
    losses, was = cispo(t(0.5, 0.9).log(), t(-1.0, -1.0), t(1.0, 1.0), 0.2, 0.2)
    assert losses.tolist() == pytest.approx([0.8, 0.9]) and was.tolist() == [True, False]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=2, max_size=5))
def test_reinforce_has_the_gradient_of_the_expected_reward_by_enumeration(words: list[tuple[float, float]]) -> None:
    logits, worth = t(*[a for a, _ in words]).requires_grad_(), t(*[b for _, b in words])
    logp = logits.log_softmax(0)
    ours = torch.autograd.grad((logp.detach().exp() * reinforce(logp, worth)).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(-(logp.exp() * worth).sum(), logits)[0])


# ---------------------------------------------------------------- whole responses, D.13


def test_a_sequence_s_ratio_lies_on_each_of_its_tokens() -> None:
    """In any order of the tokens; responses 1 and 3 have none."""
    log_ratio, response = t(0.1, 0.5, 0.3, -0.2), torch.tensor([0, 2, 0, 2])
    assert sequence_log_ratio(log_ratio, response, 4, mean=False).tolist() == pytest.approx([0.4, 0.3, 0.4, 0.3])
    assert sequence_log_ratio(log_ratio, response, 4, mean=True).tolist() == pytest.approx([0.2, 0.15, 0.2, 0.15])


@pytest.mark.parametrize("mean", [False, True])
def test_the_gradient_of_a_sequence_s_ratio(mean: bool) -> None:
    log_ratio, response = t(0.1, 0.5, 0.3, -0.2).requires_grad_(), torch.tensor([0, 1, 0, 0])
    assert torch.autograd.gradcheck(lambda x: sequence_log_ratio(x, response, 2, mean), log_ratio)


def test_a_long_response_s_ratio_is_summed_in_double_precision() -> None:
    log_ratio = torch.full((100_000,), 1e-3) + torch.tensor([100.0] + [0.0] * 99_999)
    found = sequence_log_ratio(log_ratio, torch.zeros(100_000, dtype=torch.long), 1, mean=False)[0]
    assert found.dtype == torch.float32 and found.item() == pytest.approx(log_ratio.double().sum().item(), rel=1e-7)


def test_rloo_pushes_each_token_by_its_response_s_advantage_over_the_batch() -> None:
    """D.13: L = - mean_i A_i logp(y_i), so the gradient of each token of response i is - A_i / B, as log-probability or as ratio."""
    scores, response = t([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    advantage = leave_one_out(scores, torch.ones(1, 4).bool())[0][response]
    weight = (1 / 4 / response.bincount()[response]).double()
    wanted = -advantage / 4
    assert wanted.tolist() == pytest.approx([-1 / 6, -1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, -1 / 6])
    for loss in (lambda x: clipped(x, advantage)[0], lambda x: reinforce(x, advantage)):
        log_ratio = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        (loss(sequence_log_ratio(log_ratio, response, 4, mean=False)) * weight).sum().backward()
        torch.testing.assert_close(log_ratio.grad, wanted)


def test_gspo_pushes_each_token_by_its_share_of_the_response() -> None:
    """The ratio's length-normalised: - A_i / (B |y_i|) at ratio 1, and one clip for all of a response's tokens."""
    response = torch.tensor([0, 0, 1])
    advantage = group_relative(t([1.0, 0.0]), torch.ones(1, 2).bool())[0][response]
    log_ratio = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    weight = t(1 / 4, 1 / 4, 1 / 2)
    (clipped(sequence_log_ratio(log_ratio, response, 2, mean=True), advantage)[0] * weight).sum().backward()
    torch.testing.assert_close(log_ratio.grad, -advantage * weight)
    ratio = sequence_log_ratio(t(0.001, -0.0004, 0.0), response, 2, mean=True)
    assert clipped(ratio, advantage, 3e-4, 4e-4)[1].tolist() == [False, False, False]
    assert clipped(ratio, advantage, 2e-4, 2e-4)[1].tolist() == [True, True, False]


# ---------------------------------------------------------------- tokens drawn under other numbers


def test_truncated_importance_by_hand() -> None:
    old, drawn = t(0.5, 0.4, 0.1).log().requires_grad_(), t(0.25, 0.5, 0.01).log()
    found = truncated_importance(old, drawn, 2.5)
    assert found.tolist() == pytest.approx([2, 0.8, 2.5]) and not found.requires_grad
    assert truncated_importance(t(0.0), t(-1e4), 1e12).isfinite().all()


def test_approximate_kl_by_hand() -> None:
    assert approximate_kl(t(2.0, 1.0, 0.5).log()).tolist() == pytest.approx([1 - math.log(2), 0, math.log(2) - 0.5])
    assert approximate_kl(torch.tensor([1e-4])).item() == pytest.approx(5e-9, rel=1e-2)
