"""DPO's family against the hand-worked numbers of methods E.1 to E.6, identities of the papers, and optima found by descent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from preftune.errors import UserError
from preftune.methods import METHODS, Outputs, find
from preftune.objectives.dpo import divergence, hinge, log_odds, preference_loss, sigmoid, smoothed, squared, unbiased, with_margin
from preftune.objectives.metrics import Metrics
from preftune.packing.batch import collate
from tests import tiny

VALUE = st.floats(-6, 6)
GAP = st.floats(-40, 40)
EPSILON = st.floats(0.01, 0.49)
LN_2 = math.log(2)


def t(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ranked(n: int, groups: int = 1) -> Tensor:
    """Preference of responses that stand best first."""
    return torch.ones(groups, n, n, dtype=torch.float64).triu(1)


def dpo(logp: Tensor, reference: Tensor, beta: float = 0.1, pair_loss=sigmoid, preference: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Of responses that stand best first, one prompt a row."""
    preference = ranked(logp.shape[1], len(logp)) if preference is None else preference
    return preference_loss(beta * (logp - reference), logp, preference, torch.full((len(logp),), 1 / len(logp)).double(), pair_loss)


def row(name: str, logps: list[list[float]], reference: list[float] | None = None, **knobs: Any) -> tuple[Tensor, Metrics, Tensor]:
    """Loss, metrics and the gradient of each token of one record, its responses best first, under a method of the table."""
    method, tokens = find(name), torch.tensor([x for one in logps for x in one], dtype=torch.float64, requires_grad=True)
    batch = collate([tiny.tree(2, tuple(len(one) for one in logps))], reduction=method.reduction)
    out = Outputs(token_logp=tokens, reference_logp=None if reference is None else t(reference))
    loss, metrics = method.loss(out, batch, method.knobs(**knobs))
    return loss, metrics, torch.autograd.grad(loss, tokens)[0]


def descend(leaf: Tensor, loss: Callable[[], Tensor]) -> None:
    """Make `loss` least over `leaf`."""
    optimizer = torch.optim.LBFGS([leaf], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        now = loss()
        now.backward()
        return now

    optimizer.step(closure)


def mean(metrics: Metrics, name: str) -> float:
    above, below = metrics[name]
    return (above / below).item()


# ---------------------------------------------------------------- DPO, E.1


def test_dpo_starts_at_ln_2_with_no_preference_of_its_own() -> None:
    loss, metrics = dpo(t([-3.0, -7.0]), t([-3.0, -7.0]))
    assert loss.item() == pytest.approx(LN_2, abs=1e-12)
    assert mean(metrics, "accuracy") == 0.5 and mean(metrics, "margin") == 0


def test_dpo_at_a_margin_of_one() -> None:
    """beta D = 1: loss .313262, and the gradient weighs beta * sigma(-1) = .268941 beta."""
    logp = t([-3.0, -8.0]).requires_grad_()
    loss, _ = dpo(logp, t([-5.0, -5.0]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    torch.testing.assert_close(logp.grad, 0.2 * t([-0.268941, 0.268941]), atol=1e-6, rtol=0)


def test_dpo_by_hand() -> None:
    """logps (-3, -5), reference (-4, -4.5), beta .1: beta D = .15, gradients -+.0462570."""
    logp, reference = t([-3.0, -5.0]).requires_grad_(), t([-4.0, -4.5])
    loss, metrics = dpo(logp, reference)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.15)), abs=1e-12)
    torch.testing.assert_close(logp.grad, t([-0.0462570, 0.0462570]), atol=1e-7, rtol=0)
    wanted = {"accuracy": 1, "margin": 0.15, "chosen_reward": 0.1, "rejected_reward": -0.05, "logp_chosen": -3, "logp_rejected": -5}
    assert {name: mean(metrics, name) for name in metrics} == pytest.approx(wanted)


@settings(deadline=None)
@given(VALUE, VALUE, VALUE, VALUE, st.floats(0.01, 2))
def test_dpo_swapped(a: float, b: float, ra: float, rb: float, beta: float) -> None:
    """L(-D) = L(D) + beta D."""
    margin = beta * ((a - ra) - (b - rb))
    swapped = dpo(t([b, a]), t([rb, ra]), beta)[0].item()
    assert swapped == pytest.approx(dpo(t([a, b]), t([ra, rb]), beta)[0].item() + margin, abs=1e-9)


LOSSES = {"sigmoid": sigmoid, "ipo": squared(0.4), "cdpo": smoothed(0.2), "robust": unbiased(0.2), "simpo": with_margin(0.7)}


@pytest.mark.parametrize("pair_loss", LOSSES.values(), ids=LOSSES)
@settings(deadline=None)
@given(st.lists(st.tuples(VALUE, VALUE), min_size=2, max_size=4), st.floats(0.05, 2))
def test_gradients_by_finite_differences(pair_loss, values: list[tuple[float, float]], beta: float) -> None:
    logp, reference = t([a for a, _ in values]).requires_grad_(), t([b for _, b in values])
    assert torch.autograd.gradcheck(lambda x: dpo(x, reference, beta, pair_loss)[0], logp)


@pytest.mark.parametrize("pair_loss", [*LOSSES.values(), hinge], ids=[*LOSSES, "hinge"])
@settings(deadline=None)
@given(st.lists(VALUE, min_size=3, max_size=4), st.data())
def test_a_prompts_pairs_share_its_weight_and_soft_pairs_count_both_ways(pair_loss, values: list[float], data) -> None:
    """Against the pairs written out: strict, soft or tied, over two prompts of which one may have none at all."""
    n = len(values)
    preference = torch.zeros(2, n, n, dtype=torch.float64)
    expected, lose = [], lambda gap: pair_loss(t(gap)).item()
    for g in range(2):
        total, count = 0.0, 0
        for i in range(n):
            for j in range(i):
                share = data.draw(st.sampled_from([None, 1.0, 0.0, 0.7]))
                if share is not None:
                    preference[g, i, j], preference[g, j, i] = share, 1 - share
                    gap = 0.3 * (values[i] - values[j])
                    total, count = total + share * lose(gap) + (1 - share) * lose(-gap), count + 1
        expected.append(total / count if count else 0.0)
    logp = t(values, values)
    assert dpo(logp, torch.zeros_like(logp), 0.3, pair_loss, preference)[0].item() == pytest.approx(np.mean(expected), abs=1e-9)


def test_the_chosen_logp_is_that_of_responses_nobody_beats() -> None:
    """Best first among (-1, -2, -3); by soft labels the second of (-4, -5); a tie and an absent response count for nothing."""
    logp = t([-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0], [-6.0, -7.0, 0.0])
    preference = torch.zeros(3, 3, 3, dtype=torch.float64)
    preference[0], preference[1, 0, 1], preference[1, 1, 0] = ranked(3)[0], 0.3, 0.7
    _, metrics = dpo(logp, logp, preference=preference)
    assert [part.item() for part in metrics["logp_chosen"]] == [-6, 2]
    assert [part.item() for part in metrics["logp_rejected"]] == [-7, 2]


# ---------------------------------------------------------------- variants, E.2

THREE_AND_TWO = ([[-0.5, -1.0, -0.25], [-2.0, -1.5]], [-3.25, -2.5])
"""Three chosen tokens with log-ratio +1.5, two rejected with -1.0: D = 2.5, D of means = 1."""


@pytest.mark.parametrize(
    ("name", "knobs", "loss"),
    [
        ("dpo", {"beta": 1.0}, 0.078890),
        ("dpo_hinge", {"beta": 0.2}, 0.5),
        ("ipo", {"beta": 0.5}, 0.0),
        ("ipo_sum", {"beta": 0.5}, 2.25),
        ("dpo_len", {"beta": 1.0}, 0.313262),
        ("dpo_robust", {"beta": 1.0, "epsilon": 0.1}, -0.233610),
        ("cdpo", {"beta": 0.4, "epsilon": 0.1}, 0.413262),
        ("rso_sigmoid_norm", {"gamma": 1.0}, 0.078890),
        ("rso_hinge_norm", {"gamma": 0.2}, 0.5),
        ("dpo_hinge", {"beta": 0.4}, 0.0),
        ("dpo_hinge", {"beta": 3.0}, 0.0),
    ],
)
def test_the_table_of_variants(name: str, knobs: dict[str, float], loss: float) -> None:
    assert row(name, *THREE_AND_TWO, **knobs)[0].item() == pytest.approx(loss, abs=1e-6)


COMPARED = [name for name, method in METHODS.items() if "reference_free" in method.knobs.model_fields]


@pytest.mark.parametrize("name", COMPARED)
def test_regression_08_the_loss_of_a_policy_that_is_its_reference_is_known(name: str) -> None:
    """ln 2 for the logistic ones, 1 for the hinge, 1 / (4 beta^2) for IPO: 25 at its default."""
    logps = [[-0.5, -1.0, -0.25], [-2.0, -1.5]]
    method = find(name)
    expected = method.first_loss([], method.knobs())
    assert expected is not None and row(name, logps, [-1.75, -3.5])[0].item() == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(1.0 if "hinge" in name else 25.0 if "ipo" in name else LN_2)
    assert method.first_loss([], method.knobs(sft_weight=0.1)) is None
    assert method.first_loss([], method.knobs(reference_free=True)) is None


def test_the_rso_losses_are_those_of_dpo_with_a_slope_of_their_own() -> None:
    assert find("rso_sigmoid_norm").knobs().gamma == find("rso_hinge_norm").knobs().gamma == 0.05
    for ours, theirs in (("rso_sigmoid_norm", "dpo"), ("rso_hinge_norm", "dpo_hinge")):
        assert row(ours, *THREE_AND_TWO)[0] == row(theirs, *THREE_AND_TWO, beta=0.05)[0]


@settings(deadline=None)
@given(EPSILON)
def test_cdpo_is_least_at_the_odds_of_its_labels(epsilon: float) -> None:
    """At beta D = ln((1 - e) / e) the gradient is 0 and the loss the entropy of a label; e = .1: 2.197225 and .325083."""
    gap = t(math.log((1 - epsilon) / epsilon)).requires_grad_()
    loss = smoothed(epsilon)(gap)
    loss.backward()
    assert abs(gap.grad.item()) < 1e-12
    assert loss.item() == pytest.approx(-(1 - epsilon) * math.log(1 - epsilon) - epsilon * math.log(epsilon), abs=1e-12)
    assert all(smoothed(epsilon)(gap + d).item() > loss.item() for d in (-0.5, 0.5))
    assert smoothed(0.1)(t(2.197225)).item() == pytest.approx(0.325083, abs=1e-6)


@settings(deadline=None)
@given(GAP, EPSILON)
def test_robust_dpo_is_unbiased_under_flips(gap: float, epsilon: float) -> None:
    """(1 - e) R(D) + e R(-D) = L(D), for the loss and so for its gradient."""
    robust = unbiased(epsilon)
    seen = (1 - epsilon) * robust(t(gap)) + epsilon * robust(t(-gap))
    assert seen.item() == pytest.approx(sigmoid(t(gap)).item(), abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_ipo_is_least_at_its_target(share: float) -> None:
    """D = 1 / (2 beta), found by descent; a soft label p leads it to (2 p - 1) / (2 beta)."""
    preference = t([[0.0, share], [1 - share, 0.0]])
    logp, reference = t([-3.0, -4.0]).requires_grad_(), t([-3.5, -2.0])
    descend(logp, lambda: dpo(logp, reference, 0.25, squared(0.25), preference)[0])
    lead = (logp - reference).detach()[0]
    assert (lead[0] - lead[1]).item() == pytest.approx((2 * share - 1) / 0.5, abs=1e-6)


@pytest.mark.parametrize("name", ["ipo", "dpo_len", "simpo", "orpo"])
def test_a_loss_of_means_does_not_know_the_length(name: str) -> None:
    """Every token twice, and twice the reference: the same loss; the log-probability of whole responses is not."""
    logps, reference = THREE_AND_TWO
    twice = [one + one for one in logps]
    given_reference = (reference, [2 * r for r in reference]) if name in COMPARED else (None, None)
    assert row(name, twice, given_reference[1])[0].item() == pytest.approx(row(name, logps, given_reference[0])[0].item(), abs=1e-12)


# ---------------------------------------------------------------- without a reference, E.3


@pytest.mark.parametrize("name", COMPARED)
def test_reference_free_is_a_reference_that_holds_both_alike(name: str) -> None:
    """Of equal lengths, so that losses of means see both alike too."""
    logps = [[-0.5, -1.0, -0.25], [-2.0, -1.5, -0.5]]
    ours, theirs = row(name, logps, reference_free=True), row(name, logps, [-7.0, -7.0])
    assert ours[0].item() == pytest.approx(theirs[0].item(), abs=1e-9)
    torch.testing.assert_close(ours[2], theirs[2])


def test_without_its_reference_a_row_needs_none_and_a_config_that_names_one_is_refused() -> None:
    from preftune.training.config import run_config

    for name, method in METHODS.items():
        assert method.compares(method.knobs()) == method.reference
        if name in COMPARED:
            assert not method.compares(method.knobs(reference_free=True))
    method = find("dpo")
    kind, shared = run_config(method.knobs, method.defaults, compares=method.compares), {"model": "m", "data": "d", "output": "o"}
    kind(**shared, reference="other", method={"reference_free": False})
    for word in ({"reference": "other"}, {"cache_reference": True}):
        with pytest.raises(ValidationError, match="has no effect: with these knobs the method compares with no other model"):
            kind(**shared, **word, method={"reference_free": True})


# ---------------------------------------------------------------- other divergences


@settings(deadline=None)
@given(st.floats(-8, 8), st.floats(0.05, 0.95))
def test_divergences_against_the_derivatives_of_their_f(u: float, alpha: float) -> None:
    """f'(x) at x = exp(u), up to the constant that a gap takes away: reverse log x, forward -1/x, JS log(2x / (1 + x)), alpha -x^-a / a."""
    x = math.exp(u)
    assert divergence(t(u), "reverse_kl").item() == u
    assert divergence(t(u), "forward_kl").item() == pytest.approx(1 - 1 / x, rel=1e-9, abs=1e-9)
    assert divergence(t(u), "js").item() == pytest.approx(math.log(2 * x / (1 + x)), rel=1e-9, abs=1e-9)
    assert divergence(t(u), "alpha", alpha).item() == pytest.approx((1 - x**-alpha) / alpha, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(VALUE)
def test_alpha_lies_between_reverse_and_forward(u: float) -> None:
    assert divergence(t(u), "alpha", 1e-9).item() == pytest.approx(u, abs=1e-6)
    assert divergence(t(u), "alpha", 1 - 1e-9).item() == pytest.approx(divergence(t(u), "forward_kl").item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regression_37_divergences_stay_finite_and_go_on_rising(kind: str, dtype: torch.dtype) -> None:
    """exp(-u) overflows fp32 from u = -89; here its tangent goes on, and the norm of a gradient, a sum of squares, fits too."""
    u = torch.tensor([-1e4, -900.0, -90.0, -31.0, -29.0, 0.0, 40.0, 1e4], dtype=dtype, requires_grad=True)
    values = divergence(u, kind, 0.5 if kind == "alpha" else None)
    slope = torch.autograd.grad(values.sum(), u)[0]
    assert values.isfinite().all() and (values.diff() >= 0).all() and (values[:-2].diff() > 0).all()
    assert slope.isfinite().all() and (slope >= 0).all() and slope.float().square().sum().isfinite()
    loss, _ = dpo(t([-900.0, 0.0]).requires_grad_(), t([0.0, -900.0]))
    assert loss.isfinite()


# ---------------------------------------------------------------- ORPO, SimPO, CPO, SLiC


def test_orpo_by_hand() -> None:
    """Means (-.5, -1): log odds ratio .974077, -log sigma .320300, a tenth of it .032030, beside the chosen one's NLL of .5."""
    loss, metrics, _ = row("orpo", [[-0.5, -0.5], [-1.0, -1.0, -1.0]])
    odds = log_odds(t(-0.5, -1.0))
    assert (odds[0] - odds[1]).item() == pytest.approx(0.974077, abs=1e-6)
    assert loss.item() == pytest.approx(0.5 + 0.032030, abs=1e-6)
    assert row("orpo", [[-0.5, -0.5], [-1.0]], weight=1.0)[0].item() == pytest.approx(0.5 + 0.320300, abs=1e-6)
    assert mean(metrics, "nll") == pytest.approx(0.5) and mean(metrics, "margin") == pytest.approx(0.974077, abs=1e-6)
    assert row("orpo", [[-0.7], [-0.7, -0.7]])[0].item() == pytest.approx(0.7 + 0.1 * LN_2, abs=1e-9)


@settings(deadline=None)
@given(st.floats(-700, -1e-6))
def test_log_odds_against_their_definition(value: float) -> None:
    """log(P / (1 - P)) with 1 - P = -expm1(value), and its gradient 1 / (1 - P)."""
    x = t(value).requires_grad_()
    odds = log_odds(x)
    odds.backward()
    assert odds.item() == pytest.approx(value - math.log(-math.expm1(value)), rel=1e-9)
    assert x.grad.item() == pytest.approx(-1 / math.expm1(value), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, -1e-300, -1e-12, -1e-8, -1e-5, -1e3, -1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_certain_and_of_impossible_responses_are_finite(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor(value, dtype=dtype, requires_grad=True)
    odds = log_odds(x)
    odds.backward()
    assert odds.isfinite() and x.grad.isfinite() and x.grad >= 0
    loss, _, slope = row("orpo", [[value], [value, -0.5]])
    assert loss.isfinite() and slope.isfinite().all()


def test_simpo_by_hand() -> None:
    """Means (-.5, -1), beta 2: with gamma 1 ln 2, with gamma 1.1 .744397; the lead of 1 is right whatever the margin."""
    logps = [[-0.5, -0.5], [-1.5, -0.5, -1.0]]
    loss, metrics, _ = row("simpo", logps)
    assert loss.item() == pytest.approx(LN_2, abs=1e-9)
    assert row("simpo", logps, gamma_ratio=0.55)[0].item() == pytest.approx(0.744397, abs=1e-6)
    assert mean(metrics, "margin") == pytest.approx(1) and mean(metrics, "accuracy") == 1
    assert "nll" not in metrics, "the paper has no such term, unlike TRL's default"
    assert row("simpo", logps, sft_weight=2.0)[0].item() == pytest.approx(LN_2 + 2 * 0.5, abs=1e-9)


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo", "slic", "dpo", "dpo_len", "ipo"])
def test_regression_13_one_token_and_none_beside_it_give_numbers(name: str) -> None:
    """A response of one token, and the empty place of a prompt with fewer responses, where a mean would be 0 / 0."""
    method = find(name)
    trees = [tiny.tree(2, (1, 1), seed=1), tiny.tree(2, (1, 2, 3), seed=2)]
    batch = collate(trees, reduction=method.reduction)
    tokens = torch.full((8,), -0.5, requires_grad=True)
    loss, metrics = method.loss(Outputs(token_logp=tokens, reference_logp=torch.zeros(2, 3)), batch, method.knobs())
    loss.backward()
    assert loss.isfinite() and tokens.grad.isfinite().all() and all(x.isfinite() for pair in metrics.values() for x in pair)


def test_cpo_is_dpo_without_a_reference_plus_imitation_and_slic_its_hinge() -> None:
    logps = THREE_AND_TWO[0]
    nll = 1.75 / 3
    for ours, theirs in (("cpo", "dpo"), ("slic", "dpo_hinge")):
        pairs = row(theirs, logps, reference_free=True, beta=0.2)[0].item()
        assert row(ours, logps, beta=0.2, sft_weight=0.0)[0].item() == pytest.approx(pairs, abs=1e-12)
        assert row(ours, logps, beta=0.2, sft_weight=0.7)[0].item() == pytest.approx(pairs + 0.7 * nll, abs=1e-9)
    assert row("slic", logps, beta=0.2, sft_weight=0.0)[0].item() == pytest.approx(1 - 0.2 * (-1.75 + 3.5))


@pytest.mark.parametrize("name", COMPARED)
def test_the_imitation_term_is_the_mean_over_the_best_responses_tokens(name: str) -> None:
    alone, with_it = row(name, *THREE_AND_TWO), row(name, *THREE_AND_TWO, sft_weight=0.4)
    assert (with_it[0] - alone[0]).item() == pytest.approx(0.4 * 1.75 / 3, abs=1e-9)
    torch.testing.assert_close(with_it[2] - alone[2], t(*[-0.4 / 3] * 3, 0, 0))
    assert mean(with_it[1], "nll") == pytest.approx(1.75 / 3) and "nll" not in alone[1]


# ---------------------------------------------------------------- numbers at their limits


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "cdpo", "robust", "simpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regression_37_large_gaps_stay_finite(name: str, dtype: torch.dtype) -> None:
    """log(1 + exp(x)) overflows fp32 from x = 88.7; these go on as lines, and SimPO's margin counts out there too."""
    pair_loss = {**LOSSES, "hinge": hinge}[name]
    gap = torch.tensor([-1e30, -1e3, -89.0, 89.0, 1e3, 1e30], dtype=dtype, requires_grad=True)
    loss = pair_loss(gap)
    slope = torch.autograd.grad(loss.sum(), gap)[0]
    assert loss.isfinite().all() and slope.isfinite().all()
    assert with_margin(7.0)(t(-1000.0)).item() == pytest.approx(1007)


def test_regression_29_differences_of_long_responses_survive_single_precision() -> None:
    """Four thousand tokens of -2.5 in fp32 beside a reference of almost the same sum: the margin is right to 1e-9."""
    method, n = find("dpo"), 4000
    batch = collate([tiny.tree(2, (n, n))], reduction=method.reduction)
    tokens = torch.full((2 * n,), -2.5)
    tokens[0] = -2.375
    exact = np.array([tokens[:n].double().sum().item() - 1e-3, tokens[n:].double().sum().item()])
    _, metrics = method.loss(Outputs(token_logp=tokens, reference_logp=torch.from_numpy(exact)[None]), batch, method.knobs(beta=1.0))
    assert mean(metrics, "margin") == pytest.approx(1e-3, abs=1e-9)


# ---------------------------------------------------------------- what the losses are for


def test_many_pairs_lead_dpo_to_the_optimum_that_rewards_and_reference_fix() -> None:
    """Six responses, pairs drawn by Bradley-Terry of known rewards: the policy becomes ref * exp(r / beta) / Z (2305.18290, eq. 4)."""
    random, beta = np.random.default_rng(0), 0.5
    reward, reference = random.normal(0, 0.6, 6), torch.from_numpy(random.dirichlet(np.full(6, 3.0))).log()
    first, second = random.integers(0, 6, 200_000), random.integers(0, 6, 200_000)
    won = random.random(200_000) < 1 / (1 + np.exp(reward[second] - reward[first]))
    wins = np.zeros((6, 6))
    np.add.at(wins, (np.where(won, first, second), np.where(won, second, first)), 1)
    np.fill_diagonal(wins, 0)
    told, logits = torch.from_numpy(wins / wins.sum())[None], torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    descend(logits, lambda: dpo(logits.log_softmax(1), reference[None], beta, preference=told)[0])
    optimum = (reference + torch.from_numpy(reward) / beta).softmax(0)
    distance = lambda p: 0.5 * (p - optimum).abs().sum().item()
    assert distance(reference.exp()) > 0.1
    assert distance(logits.softmax(1)[0].detach()) < 0.01


# ---------------------------------------------------------------- knobs and names


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("dpo", {"alpha": 0.3}, "`alpha` has no effect without `f_divergence: alpha`"),
        ("cdpo", {"alpha": 0.5}, "`alpha` has no effect without `f_divergence: alpha`"),
        ("dpo_hinge", {"f_divergence": "js", "reference_free": True}, "measures a distance from the reference"),
    ],
)
def test_knobs_that_would_do_nothing_are_refused(name: str, knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        find(name).knobs(**knobs)


def test_a_knob_is_where_its_loss_reads_it() -> None:
    has = lambda knob: {name for name, method in METHODS.items() if name in FAMILY and knob in method.knobs.model_fields}
    assert has("epsilon") == {"cdpo", "dpo_robust"}
    assert has("f_divergence") == has("alpha") == {"dpo", "dpo_hinge", "cdpo", "dpo_robust"}
    assert has("label_smoothing") == set()
    assert has("gamma") == {"rso_sigmoid_norm", "rso_hinge_norm"}
    assert has("sft_weight") == FAMILY - {"orpo"}


FAMILY = {*COMPARED, "slic", "cpo", "simpo", "orpo"}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("sigmoid", r"Did you mean dpo \(Direct preference optimisation\)\?"),
        ("hinge", r"Did you mean dpo_hinge \("),
        ("robust", r"Did you mean dpo_robust \("),
        ("hinge-noref", r"Did you mean slic \("),
        ("SimPO", r"Did you mean simpo \("),
        ("sigmoid_norm", r"Did you mean dpo_len \(.*sigmoid_norm\) or rso_sigmoid_norm \(.*RSO.*\)\?"),
    ],
)
def test_names_that_others_use_lead_to_ours(asked: str, told: str) -> None:
    with pytest.raises(UserError, match=f"there is no method '{asked}'. {told}"):
        find(asked)


def test_no_name_of_others_is_one_of_ours() -> None:
    assert not {known for method in METHODS.values() for known in method.also_known_as} & set(METHODS)
