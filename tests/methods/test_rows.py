"""What a row keeps of a record, and how a row is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from preftune.errors import UserError
from preftune.methods import METHODS, find
from preftune.methods.base import PairKnobs, chosen_pairs, keep_best, keep_preferred
from tests import tiny

NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "kept"),
    [([0, 2, 1], [1]), ([1, 1, 0], [0]), ([NAN, 0, 1], [2]), ([NAN, NAN, -5], [2]), ([NAN, NAN, NAN], [0, 1, 2])],
    ids=["best", "first of two best", "partly ordered", "one known", "unordered"],
)
def test_the_best_response_is_kept_or_all_where_nothing_orders_them(scores: list[float], kept: list[int]) -> None:
    tree = dataclasses.replace(tiny.tree(3, (2, 4, 5)), scores=np.array(scores, dtype=float))
    told = keep_best(tree, None)
    assert [r.tolist() for r in told.responses] == [tree.responses[i].tolist() for i in kept]


def test_a_preference_keeps_every_response() -> None:
    tree = tiny.tree(3, (2, 4, 5))
    assert keep_preferred(tree, None) is tree
    assert keep_preferred(dataclasses.replace(tree, preference=np.zeros((3, 3))), None) == "no_preference"


def test_a_slip_in_a_methods_name_is_answered_with_the_nearest() -> None:
    assert find("dpo") is METHODS["dpo"]
    with pytest.raises(UserError, match=r"there is no method 'rewards'\. Did you mean reward"):
        find("rewards")
    with pytest.raises(UserError, match="The methods are sft, reward, reward_pointwise, "):
        find("xyzzy")


@pytest.mark.parametrize(
    ("pairs", "kept"),
    [
        ("all", "01 02 03 12 13 23"),
        ("adjacent", "01 02 13 23"),
        ("best_vs_rest", "01 02 03"),
        ("best_vs_worst", "03"),
    ],
)
def test_the_pairs_of_a_ranking_that_are_compared(pairs: str, kept: str) -> None:
    """A ranking whose second and third are tied: K(K-1)/2 less the tie, neighbours, best with each, best with worst."""
    tree = tiny.tree(3, (1, 1, 1, 1))
    scores = np.array([3.0, 1.0, 1.0, 0.0])
    tree = dataclasses.replace(tree, scores=scores, preference=(scores[:, None] > scores[None, :]).astype(float))
    told = keep_preferred(tree, PairKnobs(pairs=pairs))
    expected = np.zeros((4, 4))
    for pair in kept.replace("12", "").split():
        expected[int(pair[0]), int(pair[1])] = 1
    np.testing.assert_array_equal(told.preference, expected)


def test_a_response_that_nothing_orders_is_in_no_chosen_pair() -> None:
    scores = np.array([np.nan, 2.0, 1.0])
    for pairs in ("adjacent", "best_vs_rest", "best_vs_worst"):
        mask = chosen_pairs(scores, pairs)
        assert mask[1, 2] and not mask[0].any() and not mask[:, 0].any()
    assert chosen_pairs(scores, "all").all()
