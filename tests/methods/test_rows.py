"""What a row keeps of a record, and how a row is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from preftune.errors import UserError
from preftune.methods import METHODS, find, keep_best, keep_preferred
from tests import tiny

NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "kept"),
    [([0, 2, 1], [1]), ([1, 1, 0], [0]), ([NAN, 0, 1], [2]), ([NAN, NAN, -5], [2]), ([NAN, NAN, NAN], [0, 1, 2])],
    ids=["best", "first of two best", "partly ordered", "one known", "unordered"],
)
def test_the_best_response_is_kept_or_all_where_nothing_orders_them(scores: list[float], kept: list[int]) -> None:
    tree = dataclasses.replace(tiny.tree(3, (2, 4, 5)), scores=np.array(scores, dtype=float))
    told = keep_best(tree)
    assert [r.tolist() for r in told.responses] == [tree.responses[i].tolist() for i in kept]


def test_a_preference_keeps_every_response() -> None:
    tree = tiny.tree(3, (2, 4, 5))
    assert keep_preferred(tree) is tree
    assert keep_preferred(dataclasses.replace(tree, preference=np.zeros((3, 3)))) == "no_preference"


def test_a_slip_in_a_methods_name_is_answered_with_the_nearest() -> None:
    assert find("dpo") is METHODS["dpo"]
    with pytest.raises(UserError, match=r"there is no method 'rewards'\. Did you mean reward"):
        find("rewards")
    with pytest.raises(UserError, match="The methods are sft, reward, dpo"):
        find("xyzzy")
