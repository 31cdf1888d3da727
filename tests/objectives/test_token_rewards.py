"""Rewards of tokens beside the hand-worked numbers of methods D.1, D.8, D.15 and D.16, TRL's own rewards, and identities."""

from __future__ import annotations

import doctest
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives import token_rewards
from preftune.objectives.advantages import gae, group_relative, leave_one_out
from preftune.objectives.token_rewards import missing_end, overlong_penalty, placed, repetition_penalty, segment_end, shaped

NAN = float("nan")


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(token_rewards)
    assert result.failed == 0 and result.attempted


# ---------------------------------------------------------------- form, D.8 and D.15


@pytest.mark.parametrize(
    "mode, scores, weights", [("subtract", [2, 1], [1, 1]), ("replace", [2, -1], [1, 1]), ("mask", [2, 2], [1, 0])], ids=lambda x: str(x)
)
def test_a_missing_end_by_hand(mode: Any, scores: list[float], weights: list[float]) -> None:
    found = missing_end(t([2.0, 2.0]), torch.tensor([[True, False]]), mode)
    assert [one.tolist() for one in found] == [[scores], [weights]]


@pytest.mark.parametrize("mode, wanted", [("subtract", [0.0, -0.5]), ("replace", [0.0, -0.5]), ("mask", [0.0, 0.0])])
def test_regression_20_the_penalty_of_a_missing_end_fires_on_a_score_of_0(mode: Any, wanted: list[float]) -> None:
    assert missing_end(t([0.0, 0.0]), torch.tensor([[True, False]]), mode, 0.5)[0].tolist() == [wanted]


@pytest.mark.parametrize("mode", ["subtract", "replace", "mask"])
def test_finished_responses_are_untouched(mode: Any) -> None:
    given_scores = t([2.0, NAN], [0.0, -1.0])
    scores, weights = missing_end(given_scores, torch.ones(2, 2).bool(), mode, 3.0)
    torch.testing.assert_close(scores, given_scores, equal_nan=True)
    assert (weights == 1).all() and not missing_end(given_scores.requires_grad_(), torch.zeros(2, 2), mode)[0].requires_grad


def test_an_unscorable_response_that_was_cut() -> None:
    """Only `replace` gives it a score."""
    found = {mode: missing_end(t([NAN]), torch.tensor([[False]]), mode)[0].item() for mode in ("subtract", "replace", "mask")}
    assert found["replace"] == -1 and np.isnan([found["subtract"], found["mask"]]).all()
    with pytest.raises(ValueError, match="drop"):
        missing_end(t([1.0]), torch.tensor([[False]]), "drop")  # type: ignore[arg-type]


def test_overlong_by_hand() -> None:
    lengths = torch.tensor([[0, 80, 90], [100, 101, 5000]])
    assert overlong_penalty(lengths, 100, 20).tolist() == [[0, 0, -0.5], [-1, -1, -1]]


@pytest.mark.parametrize("longest, buffer", [(100, 20), (7, 3), (10, 10), (10, 0), (1, 1)])
def test_overlong_is_trl_s(longest: int, buffer: int) -> None:
    rewards = pytest.importorskip("trl.rewards", reason="needs TRL, a development dependency")
    theirs = rewards.get_soft_overlong_punishment(longest, buffer)([[1] * n for n in range(longest + 5)])
    assert overlong_penalty(torch.arange(longest + 5), longest, buffer).tolist() == pytest.approx(theirs, abs=1e-6)


def test_repetition_by_hand() -> None:
    assert repetition_penalty((5, 5, 5, 5, 5), 2, -1.0) == -0.75
    for tokens in [(1, 2, 3, 4), (5,), (), (5, 5)]:
        assert str(repetition_penalty(tokens, 3 if tokens == (5, 5) else 2, -1.0)) == "0.0"


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4), st.floats(-3, 0))
def test_repetition_is_trl_s(tokens: list[int], n: int, penalty: float) -> None:
    rewards = pytest.importorskip("trl.rewards", reason="needs TRL, a development dependency")
    assert repetition_penalty(tokens, n, penalty) == pytest.approx(rewards.get_repetition_penalty_reward(n, penalty)([tokens])[0])


# ---------------------------------------------------------------- where a score lands, D.1


def test_regression_20_the_score_is_on_the_last_token_and_never_on_padding() -> None:
    lengths = torch.tensor([1, 3, 5, 0])
    found = placed(t(2.0, -1.0, 0.5, 9.0), lengths, 5)
    assert found.tolist() == [[2, 0, 0, 0, 0], [0, 0, -1, 0, 0], [0, 0, 0, 0, 0.5], [0, 0, 0, 0, 0]]
    mask = torch.arange(5) < lengths.unsqueeze(1)
    assert (found[~mask] == 0).all() and found.sum(1).tolist() == [2, -1, 0.5, 0]


def test_regression_20_a_score_of_0_is_a_score() -> None:
    """It is placed, and it counts among its group's."""
    assert placed(t(0.0), torch.tensor([2]), 3).tolist() == [[0, 0, 0]]
    assert placed(t(NAN), torch.tensor([2]), 3).isnan().tolist() == [[False, True, False]]  # and what is missing is not 0
    scores = t([0.0, 1.0])
    assert leave_one_out(scores, torch.ones(1, 2)).tolist() == [[-1, 1]] and group_relative(scores, torch.ones(1, 2))[0, 0] < 0


def test_a_response_longer_than_the_grid_is_refused() -> None:
    with pytest.raises(RuntimeError):
        placed(t(1.0), torch.tensor([4]), 3)
    assert placed(t(1.0), torch.tensor([0]), 0).shape == (1, 0)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 2))
def test_shaped_rewards_sum_to_the_score_less_beta_times_the_log_ratio(seed: int, beta: float) -> None:
    """D.1: sum_t r_t = R - beta (logp - logp_ref), whatever stands in the padding."""
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(1, 6, 4))
    mask = torch.arange(6) < lengths.unsqueeze(1)
    old, reference = (torch.where(mask, torch.from_numpy(rng.normal(size=(4, 6))), NAN) for _ in range(2))
    scores = torch.from_numpy(rng.normal(size=4))
    found = shaped(placed(scores, lengths, 6), old, reference, mask, beta)
    torch.testing.assert_close(found.sum(1), scores - beta * (old.nansum(1) - reference.nansum(1)))
    assert (found[~mask] == 0).all()


def test_without_beta_or_at_the_reference_there_is_the_score_alone() -> None:
    rewards, old, mask = placed(t(2.0), torch.tensor([2]), 3), t([-1.0, -2.0, -3.0]), torch.tensor([[True, True, False]])
    assert shaped(rewards, old, old - 1, mask, 0.0).tolist() == shaped(rewards, old, old, mask, 0.3).tolist() == [[0, 2, 0]]


def test_shaped_rewards_by_hand_and_without_a_gradient() -> None:
    """beta .5, log ratios (.1, -.2): likelier than the reference costs."""
    found = shaped(t([0.0, 1.0]), t([-0.9, -1.2]).requires_grad_(), t([-1.0, -1.0]), torch.ones(1, 2).bool(), 0.5)
    assert found[0].tolist() == pytest.approx([-0.05, 1.1]) and not found.requires_grad


# ---------------------------------------------------------------- spans, D.16

TEXT = "Yes. It is 42."
OFFSETS = [(0, 3), (3, 4), (4, 7), (7, 10), (10, 13), (13, 14), (0, 0)]
"""Tokens of the text above, each with the space before it, and the token that ends the turn, which has no characters."""


@pytest.mark.parametrize("end, token", [(4, 1), (14, 5), (13, 4), (12, 4), (11, 4), (10, 3), (1, 0), (0, 0), (99, 5)], ids=lambda x: str(x))
def test_a_span_ends_on_the_last_token_that_starts_before_its_end(end: int, token: int) -> None:
    assert segment_end([end], OFFSETS) == [token]


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.data())
def test_every_character_before_a_span_s_end_is_covered(lengths: list[int], data: st.DataObject) -> None:
    """Of tokens that tile the text: the token holds the span's last character."""
    bounds = np.cumsum([0, *lengths]).tolist()
    offsets = list(itertools.pairwise(bounds))
    ends = data.draw(st.lists(st.integers(1, bounds[-1]), max_size=5))
    for end, token in zip(ends, segment_end(ends, offsets), strict=True):
        assert offsets[token][0] <= end - 1 < offsets[token][1]


def test_tokens_that_share_their_characters_and_tokens_without_any() -> None:
    """Bytes of one character have one range, of which the last counts; a first token without characters is not chosen."""
    assert segment_end([1, 2], [(0, 0), (0, 1), (0, 1), (1, 2)]) == [2, 3]
    assert segment_end([3], [(0, 0)]) == [0] and segment_end([], OFFSETS) == []
    assert segment_end([0, 14], [(0, 0), *OFFSETS]) == [1, 6]
    with pytest.raises(ValueError, match="without tokens"):
        segment_end([3], [])


def test_one_span_over_the_whole_response_is_a_holistic_reward() -> None:
    (at,) = segment_end([len(TEXT)], OFFSETS[:-1])
    assert at == len(OFFSETS) - 2
    torch.testing.assert_close(placed(t(0.7), torch.tensor([at + 1]), 6), placed(t(0.7), torch.tensor([6]), 6))


def test_moving_a_span_s_reward_changes_only_advantages_at_or_before_it() -> None:
    """lam 1; rewards at the tokens 4 and 2: from the fifth on nothing changes."""
    values, mask = t([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), torch.ones(1, 6).bool()
    late, early = (gae(placed(t(1.0), torch.tensor([n]), 6), values, mask, 1.0, 1.0)[0][0] for n in (5, 3))
    changed = (late - early).abs() > 1e-12
    assert changed.tolist() == [False, False, False, True, True, False]
