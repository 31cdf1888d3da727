"""Advantages beside the hand-worked numbers of methods D.2, D.11-D.13 and D.17, slow loops over the definitions, and identities."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives import advantages
from preftune.objectives.advantages import gae, group_relative, k_step, leave_one_out, process_relative, reward_to_go
from preftune.objectives.token_rewards import placed, shaped
from preftune.objectives.whitening import whiten

NAN, INF = float("nan"), float("inf")
HAND = ([0.0, 0.0, 1.0], [0.5, 0.4, 0.6])
SEEDS = st.integers(0, 10_000)


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def all_of(values: Tensor) -> Tensor:
    return torch.ones(values.shape, dtype=torch.bool)


def rows(seed: int, holes: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask [R, T] of ragged responses, with NaN and large numbers where they must not matter."""
    rng = np.random.default_rng(seed)
    count, width = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    mask = np.arange(width) < rng.integers(1, width + 1, (count, 1))
    if holes:
        mask &= rng.random((count, width)) < 0.7
    outside = rng.choice([NAN, INF, 1e30, 7.0], (count, width))
    rewards, values = (torch.from_numpy(np.where(mask, rng.normal(size=(count, width)), outside)) for _ in range(2))
    return rewards, values, torch.from_numpy(mask)


def by_definition(rewards: Tensor, values: Tensor, mask: Tensor, sums: Callable[[list[float], list[float], int], float]) -> Tensor:
    """`sums`(rewards, values, t) for each token t of each response's valid tokens, put back where they stood; both lists end in zeros."""
    found = torch.zeros_like(values)
    for row in range(len(mask)):
        at = [i for i, valid in enumerate(mask[row].tolist()) if valid]
        r, v = rewards[row, at].tolist(), values[row, at].tolist()
        for i, place in enumerate(at):
            found[row, place] = sums(r + [0.0] * 20, v + [0.0] * 20, i)
    return found


def gae_sum(gamma: float, lam: float) -> Callable[[list[float], list[float], int], float]:
    def total(r: list[float], v: list[float], start: int) -> float:
        ahead = range(len(r) - start - 1)
        return sum((gamma * lam) ** i * (r[start + i] + gamma * v[start + i + 1] - v[start + i]) for i in ahead)

    return total


def k_step_sum(k: int, gamma: float) -> Callable[[list[float], list[float], int], float]:
    return lambda r, v, i: sum(gamma**j * r[i + j] for j in range(k)) + gamma**k * v[i + k] - v[i]


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(advantages)
    assert result.failed == 0 and result.attempted


# ---------------------------------------------------------------- GAE and k steps, D.2


@pytest.mark.parametrize(
    "lam, wanted", [(0.95, [0.451, 0.58, 0.4]), (1.0, [0.5, 0.6, 0.4]), (0.0, [-0.1, 0.2, 0.4])], ids=["usual", "return - V", "delta"]
)
def test_gae_by_hand(lam: float, wanted: list[float]) -> None:
    rewards, values = t(HAND[0]), t(HAND[1])
    found, returns = gae(rewards, values, all_of(values), 1.0, lam)
    assert found[0].tolist() == pytest.approx(wanted, abs=1e-12)
    torch.testing.assert_close(returns, found + values)
    if lam == 0.95:
        assert returns[0].tolist() == pytest.approx([0.951, 0.98, 1])
        torch.testing.assert_close(gae(rewards, values, all_of(values))[0], found)  # the default


@pytest.mark.parametrize("k, wanted", [(1, [-0.1, 0.2, 0.4]), (2, [0.1, 0.6, 0.4]), (3, [0.5, 0.6, 0.4]), (99, [0.5, 0.6, 0.4])])
def test_k_step_by_hand(k: int, wanted: list[float]) -> None:
    found, returns = k_step(t(HAND[0]), t(HAND[1]), all_of(t(HAND[0])), k)
    assert found[0].tolist() == pytest.approx(wanted, abs=1e-12)
    assert (returns - found)[0].tolist() == pytest.approx(HAND[1])


def test_gae_with_a_discount_by_hand() -> None:
    rewards, values = t([-0.1, 0.2, 0.7]), t(HAND[1])
    assert gae(rewards, values, all_of(values), 0.9, 0.5)[0][0].tolist() == pytest.approx([-0.06675, 0.385, 0.1], abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_is_its_definition(seed: int, gamma: float, lam: float, holes: bool) -> None:
    rewards, values, mask = rows(seed, holes)
    found, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(found, by_definition(rewards, values, mask, gae_sum(gamma, lam)))
    assert (found[~mask] == 0).all() and (returns[~mask] == 0).all()
    torch.testing.assert_close(returns[mask], (found + values)[mask])


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 12), st.floats(0, 1), st.booleans())
def test_k_step_is_its_definition(seed: int, k: int, gamma: float, holes: bool) -> None:
    rewards, values, mask = rows(seed, holes)
    found, returns = k_step(rewards, values, mask, k, gamma)
    torch.testing.assert_close(found, by_definition(rewards, values, mask, k_step_sum(k, gamma)))
    assert (found[~mask] == 0).all() and (returns[~mask] == 0).all()
    torch.testing.assert_close(returns[mask], (found + values)[mask])


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.floats(0.1, 1), st.floats(0, 0.99), st.booleans())
def test_gae_is_the_mixture_of_all_k_steps(seed: int, gamma: float, lam: float, holes: bool) -> None:
    """(1 - lam) sum_k lam^(k-1) A^k, the last k with all that is left."""
    rewards, values, mask = rows(seed, holes)
    width = mask.shape[1]
    shares = [(1 - lam) * lam ** (k - 1) for k in range(1, width)] + [lam ** (width - 1)]
    mixture = sum(share * k_step(rewards, values, mask, k, gamma)[0] for k, share in enumerate(shares, 1))
    torch.testing.assert_close(gae(rewards, values, mask, gamma, lam)[0], mixture)


def test_the_lowest_k_and_the_lowest_lambda_agree_and_so_do_the_highest() -> None:
    rewards, values, mask = rows(3, holes=True)
    torch.testing.assert_close(k_step(rewards, values, mask, 1, 0.9)[0], gae(rewards, values, mask, 0.9, 0.0)[0])
    whole = gae(rewards, values, mask, 0.9, 1.0)
    torch.testing.assert_close(k_step(rewards, values, mask, 50, 0.9), whole)
    torch.testing.assert_close(reward_to_go(rewards, mask, 0.9), whole[1])
    with pytest.raises(ValueError, match="1 or more"):
        k_step(rewards, values, mask, 0)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards, _, mask = rows(5)
    values = reward_to_go(rewards, mask, 0.9)
    for found in (gae(rewards, values, mask, 0.9, 0.7), k_step(rewards, values, mask, 2, 0.9)):
        torch.testing.assert_close(found[0], torch.zeros_like(values))
        torch.testing.assert_close(found[1], values)


@pytest.mark.parametrize("seed", range(8))
def test_regression_21_gae_steps_over_masked_tokens_inside_a_response(seed: int) -> None:
    """A tool's output between two turns: as if its tokens were not there, and 0 on them."""
    rewards, values, mask = rows(seed, holes=True)
    found = [gae(rewards, values, mask, 0.9, 0.8), k_step(rewards, values, mask, 2, 0.9)]
    for row in range(len(mask)):
        if not mask[row].any():
            continue
        r, v = rewards[row, mask[row]].unsqueeze(0), values[row, mask[row]].unsqueeze(0)
        for mine, alone in zip(found, [gae(r, v, all_of(v), 0.9, 0.8), k_step(r, v, all_of(v), 2, 0.9)]):
            torch.testing.assert_close(mine[0][row, mask[row]], alone[0][0])
            torch.testing.assert_close(mine[1][row, mask[row]], alone[1][0])


def test_no_advantage_carries_a_gradient() -> None:
    rewards, values, mask = t([0.0, 1.0]).requires_grad_(), t([0.3, 0.2]).requires_grad_(), torch.ones(1, 2).bool()
    found = [*gae(rewards, values, mask), *k_step(rewards, values, mask, 1), reward_to_go(rewards, mask)]
    found += [group_relative(rewards, mask), leave_one_out(rewards, mask), process_relative(rewards[None], mask[None], mask[None])]
    assert not any(one.requires_grad for one in found)


# ---------------------------------------------------------------- REINFORCE++, D.11


def test_reinforce_plus_plus_by_hand() -> None:
    """R = (1, 0), beta .5, token KL (.1, .2, .3) and (0, .1): returns, and whitened over both responses."""
    mask, divergence = t([1, 1, 1], [1, 1, 0]).bool(), t([0.1, 0.2, 0.3], [0.0, 0.1, NAN])
    returns = reward_to_go(shaped(placed(t(1.0, 0.0), mask.sum(1), 3), divergence, t([0.0] * 3, [0.0] * 3), mask, 0.5), mask)
    assert returns[mask].tolist() == pytest.approx([0.70, 0.75, 0.85, -0.05, -0.05])
    assert returns[mask].mean().item() == pytest.approx(0.44)
    assert whiten(returns, mask)[mask].tolist() == pytest.approx([0.5771, 0.6880, 0.9100, -1.0875, -1.0875], abs=1e-4)


def test_the_discount_is_1_unless_told() -> None:
    rewards = t([1.0, 2.0, 4.0])
    assert reward_to_go(rewards, all_of(rewards)).tolist() == [[7, 6, 4]]
    assert reward_to_go(rewards, all_of(rewards), 0.5).tolist() == [[3, 4, 4]]


def test_regression_09_whitening_counts_valid_tokens_only() -> None:
    """Advantages of ragged responses have the moments of the valid tokens laid end to end, however much padding there is."""
    rewards, values, mask = rows(11)
    found, _ = gae(rewards, values, mask)
    expected = whiten(found[mask])
    torch.testing.assert_close(whiten(found, mask)[mask], expected)
    wider = torch.nn.functional.pad(found, (0, 9), value=1e6), torch.nn.functional.pad(mask, (0, 9))
    torch.testing.assert_close(whiten(*wider)[wider[1]], expected)
    assert expected.mean().item() == pytest.approx(0, abs=1e-12) and expected.std().item() == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------- groups, D.12 and D.13


def test_group_relative_by_hand() -> None:
    scores = t([1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0])
    found = group_relative(scores, all_of(scores))
    assert found[0].tolist() == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875], abs=1e-6)
    assert found[1].tolist() == pytest.approx([1.161805, -0.387268, 0.387268, -1.161805], abs=1e-6)
    assert found[2].tolist() == [0, 0, 0, 0]
    assert found.sum(1).abs().max() < 1e-12


def test_without_a_scale_it_is_dr_grpo() -> None:
    scores = t([1.0, 0.0, 0.0, 1.0])
    assert group_relative(scores, all_of(scores), "none").tolist() == [[0.5, -0.5, -0.5, 0.5]]


def test_the_scale_of_the_batch_is_the_deviation_of_all_raw_scores() -> None:
    scores = t([1.0, 0.0, NAN], [10.0, 14.0, 3.0])
    present = torch.tensor([[True, True, True], [True, True, False]])
    deviation = np.std([1.0, 0.0, 10.0, 14.0], ddof=1)
    wanted = np.array([[0.5, -0.5, 0], [-2, 2, 0]]) / (deviation + 0.5)
    np.testing.assert_allclose(group_relative(scores, present, "batch", 0.5), wanted, atol=1e-12)


def test_a_scale_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="std"):
        group_relative(t([1.0, 2.0]), torch.ones(1, 2).bool(), "std")  # type: ignore[arg-type]


def test_leave_one_out_by_hand() -> None:
    scores = t([1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 0.0])
    found = leave_one_out(scores, all_of(scores))
    assert found[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert found[1].tolist() == pytest.approx([2, -2 / 3, 2 / 3, -2])
    torch.testing.assert_close(found, 4 / 3 * (scores - scores.mean(1, keepdim=True)))


def grid(seed: int) -> tuple[Tensor, Tensor]:
    """Scores, of which some are NaN, and which are there."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 6)))
    scores = np.where(rng.random(shape) < 0.2, NAN, rng.choice([0.0, 1.0, 0.1, -3.5, 1e3], shape))
    return torch.from_numpy(scores), torch.from_numpy(rng.random(shape) < 0.8)


@settings(deadline=None, max_examples=80)
@given(SEEDS, st.sampled_from(["group", "batch", "none"]))
def test_group_relative_is_a_loop_over_groups(seed: int, scale: Any) -> None:
    scores, present = grid(seed)
    found = group_relative(scores, present, scale)
    everything = [x for x in scores[present].tolist() if not math.isnan(x)]
    for group, there, mine in zip(scores.tolist(), present.tolist(), found.tolist()):
        rated = [x for x, is_there in zip(group, there) if is_there and not math.isnan(x)]
        over = {"group": rated, "batch": everything, "none": []}[scale]
        divisor = 1.0 if scale == "none" else (np.std(over, ddof=1) if len(over) > 1 else 0.0) + 1e-4
        wanted = [(x - np.mean(rated)) / divisor if is_there and not math.isnan(x) else 0.0 for x, is_there in zip(group, there)]
        assert mine == pytest.approx(wanted, abs=1e-9)


@settings(deadline=None, max_examples=80)
@given(SEEDS)
def test_leave_one_out_is_a_loop_over_the_others(seed: int) -> None:
    scores, present = grid(seed)
    for group, there, mine in zip(scores.tolist(), present.tolist(), leave_one_out(scores, present).tolist()):
        rated = [i for i, x in enumerate(group) if there[i] and not math.isnan(x)]
        wanted = [0.0] * len(group)
        for i in rated:
            others = [group[j] for j in rated if j != i]
            wanted[i] = group[i] - np.mean(others) if others else 0.0
        assert mine == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 1e6 + 0.1, -7.3])
def test_regression_10_equal_scores_give_exactly_0(score: float, dtype: torch.dtype) -> None:
    """A mean of equal numbers need not be the number: (.1 + .1 + .1) / 3 is not .1."""
    scores = torch.full((1, 3), score, dtype=dtype)
    for present in (all_of(scores), torch.tensor([[True, False, True]]), torch.tensor([[False, True, False]]), ~all_of(scores)):
        found = [group_relative(scores, present, scale) for scale in ("group", "batch", "none")] + [leave_one_out(scores, present)]
        assert all((one == 0).all() for one in found)


@pytest.mark.parametrize("seed", range(5))
def test_regression_10_advantages_are_normalised_once(seed: int) -> None:
    """Of scores far from 0: mean 0 and deviation 1, so of both signs, and normalising again changes nothing."""
    scores = 100 + torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = group_relative(scores, all_of(scores), eps=0.0)
    torch.testing.assert_close(found.mean(1), torch.zeros(3).double())
    torch.testing.assert_close(found.std(1), torch.ones(3).double())
    torch.testing.assert_close(group_relative(found, all_of(found), eps=0.0), found)


@settings(deadline=None, max_examples=60)
@given(SEEDS)
def test_regression_27_no_shuffle_mixes_groups(seed: int) -> None:
    """Prompts and responses in any order, and each prompt alone, give the same advantages."""
    scores, present = grid(seed)
    mix = torch.Generator().manual_seed(seed)
    prompts, within = torch.randperm(len(scores), generator=mix), torch.randperm(scores.shape[1], generator=mix)
    for relative in (group_relative, leave_one_out, lambda s, p: group_relative(s, p, "none")):
        found = relative(scores, present)
        torch.testing.assert_close(relative(scores[prompts][:, within], present[prompts][:, within]), found[prompts][:, within])
        torch.testing.assert_close(torch.cat([relative(s[None], p[None]) for s, p in zip(scores, present)]), found)


@pytest.mark.parametrize("unscorable", [NAN, INF, -INF])
def test_an_unscorable_response_is_in_no_mean_and_gets_0(unscorable: float) -> None:
    three, two = t([1.0, unscorable, 0.0]), t([1.0, 0.0])
    for relative in (group_relative, leave_one_out):
        found, alone = relative(three, all_of(three))[0].tolist(), relative(two, all_of(two))[0].tolist()
        assert found == [alone[0], 0.0, alone[1]]


def test_a_score_of_0_is_a_score() -> None:
    scores = t([0.0, 2.0, 4.0])
    assert group_relative(scores, all_of(scores), "none").tolist() == [[-2, 0, 2]]


# ---------------------------------------------------------------- steps, D.17


def test_process_rewards_by_hand() -> None:
    """Steps worth (1, 0) and (0, 1), each pair over tokens (2, 1): as four scores +-.865875, summed from the end."""
    ends = torch.tensor([[[False, True, True], [False, True, True]]])
    rewards = t([[NAN, 1.0, 0.0], [9.0, 0.0, 1.0]])
    one = 0.865875
    found = process_relative(rewards, ends, torch.ones(1, 2, 3).bool())
    np.testing.assert_allclose(found, [[[0, 0, -one], [0, 0, one]]], atol=1e-6)


def test_one_step_a_response_is_grpo() -> None:
    scores, lengths = t([1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, NAN]), torch.tensor([[3, 1, 4, 2], [1, 4, 2, 3]])
    mask = torch.arange(4) < lengths.unsqueeze(2)
    ends = torch.arange(4) == lengths.unsqueeze(2) - 1
    found = process_relative(torch.where(ends, scores.unsqueeze(2), NAN), ends, mask)
    torch.testing.assert_close(found, group_relative(scores, all_of(scores)).unsqueeze(2) * mask)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_process_rewards_are_a_loop_over_steps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, int(rng.integers(1, 4)), int(rng.integers(1, 7)))
    mask, ends, rewards = rng.random(shape) < 0.8, rng.random(shape) < 0.4, rng.normal(size=shape)
    found = process_relative(torch.from_numpy(rewards), torch.from_numpy(ends), torch.from_numpy(mask), 0.01)
    for g in range(shape[0]):
        steps = [(n, at) for n in range(shape[1]) for at in range(shape[2]) if ends[g, n, at] and mask[g, n, at]]
        worth = [rewards[g, n, at] for n, at in steps]
        deviation = np.std(worth, ddof=1) if len(worth) > 1 else 0.0
        for n in range(shape[1]):
            for at in range(shape[2]):
                later = [(rewards[g, n, end] - np.mean(worth)) / (deviation + 0.01) for m, end in steps if m == n and end >= at]
                assert found[g, n, at].item() == pytest.approx(sum(later) if mask[g, n, at] else 0.0, abs=1e-9)
