"""KL estimators against enumeration of a small vocabulary (methods 0.5), and the two coefficients (methods D.6)."""

from __future__ import annotations

import doctest
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives import kl
from preftune.objectives.kl import Estimator, kl_estimate, reference_coefficient, trust_region_coefficient
from preftune.objectives.policy_gradient import reinforce
from preftune.objectives.token_rewards import shaped

KINDS = get_args(Estimator)
LOGIT = st.floats(-3, 3)
WORDS = st.integers(2, 5).flatmap(lambda n: st.tuples(*[st.lists(LOGIT, min_size=n, max_size=n)] * 3))
"""Logits of a policy, of its reference and of the policy that drew the tokens."""


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_softmax(logits: list[float]) -> Tensor:
    return torch.log_softmax(t(*logits), 0)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities."""
    return (p.exp() * (p - q)).sum()


def slope(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def expected(kind: Any, logits: Tensor, reference: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean value and mean gradient of an estimator, over every token as often as `drawn` (or the policy itself) draws it."""
    logp = logits.log_softmax(0)
    often = (logp if drawn is None else drawn).detach().exp()
    value = (often * kl_estimate(logp, reference, kind, drawn)).sum()
    return value.detach(), slope(value, logits)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(kl)
    assert result.failed == 0 and result.attempted


# ---------------------------------------------------------------- estimators, 0.5

POLICY, REFERENCE = t(0.5, 0.5).log(), t(0.8, 0.2).log()


@pytest.mark.parametrize(
    "kind, values, mean, gradient",
    [
        ("k1", [-0.470004, 0.916291], 0.223144, [0.0, 0.0]),
        ("k2", [0.110452, 0.419794], 0.265123, [-0.3466, 0.3466]),
        ("k3", [0.129996, 0.316291], 0.223144, [-0.3, 0.3]),
        ("k3_is", [0.129996, 0.316291], 0.223144, [-0.3466, 0.3466]),
    ],
)
def test_regression_12_estimators_by_hand(kind: str, values: list[float], mean: float, gradient: list[float]) -> None:
    found = kl_estimate(POLICY, REFERENCE, kind)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx(values, abs=1e-6) and found.mean().item() == pytest.approx(mean, abs=1e-6)
    assert expected(kind, POLICY.clone().requires_grad_(), REFERENCE)[1].tolist() == pytest.approx(gradient, abs=1e-4)


def test_the_gradient_of_a_token_by_hand() -> None:
    """1 - exp(-r) = -.6 under k3, and r = -.470004 where k3 is weighed by the ratio or r by the log-probability."""
    for kind, wanted in [("k3", -0.6), ("k3_is", -0.470004), ("k1_weighted", -0.470004), ("k2", -0.470004), ("k1", 1.0)]:
        logp = POLICY.clone().requires_grad_()
        kl_estimate(logp, REFERENCE, kind)[0].backward()  # type: ignore[arg-type]
        assert logp.grad is not None and logp.grad.tolist() == pytest.approx([wanted, 0], abs=1e-6)


@settings(deadline=None)
@given(WORDS)
def test_regression_12_mean_values_by_enumeration(words: tuple[list[float], ...]) -> None:
    """k1 and k3 are unbiased on the policy's own tokens, k2 and k3 nowhere negative, k3_is unbiased on any policy's tokens."""
    policy, reference, drawn = map(log_softmax, words)
    logits, true = t(*words[0]).requires_grad_(), divergence(policy, reference)
    for kind in ("k1", "k3", "k3_is"):
        close(expected(kind, logits, reference)[0], true)
    close(expected("k3_is", logits, reference, drawn)[0], true)
    assert (kl_estimate(policy, reference, "k2") >= 0).all() and (kl_estimate(policy, reference, "k3") >= 0).all()
    close(kl_estimate(policy, reference, "k3_is"), kl_estimate(policy, reference, "k3"))


@settings(deadline=None)
@given(WORDS)
def test_regression_12_mean_gradients_by_enumeration(words: tuple[list[float], ...]) -> None:
    logits, reference, drawn = t(*words[0]).requires_grad_(), log_softmax(words[1]), log_softmax(words[2])
    reverse = slope(divergence(logits.log_softmax(0), reference), logits)
    forward = slope(divergence(reference, logits.log_softmax(0)), logits)
    close(expected("k1", logits, reference)[1], torch.zeros_like(reverse))
    for kind in ("k2", "k1_weighted", "k3_is"):
        close(expected(kind, logits, reference)[1], reverse)
    close(expected("k3", logits, reference)[1], forward)
    close(expected("k3_is", logits, reference, drawn)[1], reverse)


@settings(deadline=None)
@given(WORDS, st.sampled_from(["k2", "k3", "k3_is", "k1_weighted"]))
def test_regression_11_the_penalty_moves_the_policy_towards_its_reference(words: tuple[list[float], ...], kind: str) -> None:
    """A small step down the mean gradient brings the policy nearer, by finite differences of the exact divergence."""
    logits, reference = t(*words[0]).requires_grad_(), log_softmax(words[1])
    down = -expected(kind, logits, reference)[1]
    if down.norm() < 1e-3:
        return
    step = 1e-5 / down.norm()
    after, before = (divergence((logits + side * step * down).detach().log_softmax(0), reference) for side in (1, -1))
    assert after < before


@settings(deadline=None)
@given(WORDS, st.floats(0.01, 2))
def test_regression_11_the_penalty_in_the_reward_has_the_same_sign(words: tuple[list[float], ...], beta: float) -> None:
    """REINFORCE on - beta k1 alone has the mean gradient beta grad KL(pi || ref), by enumeration."""
    logits, reference = t(*words[0]).requires_grad_(), log_softmax(words[1])
    logp = logits.log_softmax(0)
    old = logp.detach()
    rewards = shaped(torch.zeros(len(old), 1).double(), old[:, None], reference[:, None], torch.ones(len(old), 1).bool(), beta)[:, 0]
    close(slope((old.exp() * reinforce(logp, rewards)).sum(), logits), beta * slope(divergence(logp, reference), logits))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_policy_has_a_gradient(kind: Any) -> None:
    logp, reference, old = POLICY.clone().requires_grad_(), REFERENCE.clone().requires_grad_(), t(0.4, 0.6).log().requires_grad_()
    kl_estimate(logp, reference, kind, old).sum().backward()
    assert logp.grad is not None and reference.grad is None and old.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_reference_numbers_stay_finite(kind: Any, dtype: torch.dtype) -> None:
    logp = torch.tensor([-1e4, 0.0, -500.0, -1.0], dtype=dtype, requires_grad=True)
    found = kl_estimate(logp, torch.tensor([0.0, -1e4, -1.0, -1.0], dtype=dtype), kind, torch.tensor([0.0, -1e4, -1.0, -1.0], dtype=dtype))
    found.sum().backward()
    assert found.isfinite().all() and logp.grad is not None and logp.grad.isfinite().all()
    if kind.startswith("k3"):
        assert kl_estimate(t(-30.0), t(0.0), kind).item() == pytest.approx(torch.exp(t(20.0)).item() - 21)


def test_k3_of_a_small_difference_keeps_its_digits() -> None:
    """In fp32 exp(-r) - 1 + r written out is 1e-7 of rounding where r^2 / 2 is 5e-9."""
    found = kl_estimate(torch.tensor([1e-4]), torch.zeros(1), "k3").item()
    assert found == pytest.approx(5e-9, rel=1e-2)


def test_an_estimator_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(POLICY, REFERENCE, "k4")  # type: ignore[arg-type]


# ---------------------------------------------------------------- coefficients, D.6


@pytest.mark.parametrize(
    "kl, wanted", [(12, 1.00512), (6, 1.0), (0, 1 - 0.2 * 0.0256), (6.6, 1 + 0.1 * 0.0256), (5.4, 1 - 0.1 * 0.0256), (1e9, 1.00512)]
)
def test_the_reference_coefficient_by_hand(kl: float, wanted: float) -> None:
    """Target 6, 256 episodes, horizon 10,000; the error is held within +-.2."""
    assert reference_coefficient(0.05, kl, 6.0, 256, 10_000) == pytest.approx(0.05 * wanted, rel=1e-12)


@pytest.mark.parametrize("kl, wanted", [(0.01, 1), (0, 0.5), (0.0066, 0.5), (0.0067, 1), (0.0149, 1), (0.0151, 2), (1, 2)])
def test_the_trust_region_coefficient_by_hand(kl: float, wanted: float) -> None:
    """Target .01: half below .00667, twice above .015."""
    assert trust_region_coefficient(0.3, kl, 0.01) == pytest.approx(0.3 * wanted)
