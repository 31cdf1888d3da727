"""Which responses SFT learns, and how much each counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from preftune.errors import UserError
from preftune.methods import find
from preftune.packing.batch import Totals, collate
from preftune.packing.chat import SCORE, Tree
from tests import tiny

METHOD = find("sft")


def rated(*scores: float, name: str = "ratings.jsonl:7") -> Tree:
    """Responses of 2, 3, ... tokens with these scores."""
    values = np.array(scores)
    tree = tiny.tree(3, tuple(range(2, 2 + len(scores))))
    return dataclasses.replace(tree, where=name, scores=values, ratings={SCORE: values})


def kept(*scores: float, **knobs: object) -> Tree:
    told = METHOD.keep(rated(*scores), METHOD.knobs(**knobs))
    assert isinstance(told, Tree)
    return told


def test_best_or_all_responses_with_the_weights_of_their_scores() -> None:
    assert [len(r) for r in kept(0.5, 2.0).responses] == [3] and kept(0.5, 2.0).weights is None
    assert [len(r) for r in kept(0.5, 2.0, responses="all").responses] == [2, 3]
    np.testing.assert_array_equal(kept(0.5, 2.0, weights="score").weights, [2.0])
    np.testing.assert_array_equal(kept(0.5, 2.0, weights="score", responses="all").weights, [0.5, 2.0])
    np.testing.assert_allclose(kept(-1, 2, weights="exp_score", responses="all").weights, np.exp([-1, 2]))
    np.testing.assert_allclose(kept(-1, 2, weights="exp_score", responses="all", temperature=0.5).weights, np.exp([-2, 4]))


def test_a_weight_counts_tokens_as_if_the_response_stood_there_as_often() -> None:
    twice = kept(1.0, 2.0, responses="all", weights="score")
    written = twice.keep([0, 1, 1])
    written = dataclasses.replace(written, weights=None)
    assert Totals.of([twice]).tokens == Totals.of([written]).tokens == 2 + 2 * 3
    by_hand = [1 / 8] * 2 + [2 / 8] * 3
    assert collate([twice], reduction=METHOD.reduction).token_weight.tolist() == by_hand


def test_a_score_of_0_counts_for_nothing_and_is_left_out_by_name() -> None:
    assert [len(r) for r in kept(0.0, 1.0, 0.0, responses="all", weights="score").responses] == [3]
    assert METHOD.keep(rated(0.0, 0.0), METHOD.knobs(weights="score")) == "no_weight"


@pytest.mark.parametrize(
    ("scores", "knobs", "what"),
    [
        ((1.0, -0.5), {"weights": "score"}, "a response's score is -0.5, and a weight cannot be negative. Set method.weights to exp_score"),
        ((1.0, np.nan), {"weights": "score"}, "a response has no score to weigh it by"),
        ((np.inf, 1.0), {"weights": "exp_score"}, "a response has no score to weigh it by"),
        ((1.0, 30.0), {"weights": "exp_score"}, "score / temperature is 30, and beyond 20"),
        ((1.0, -3.0), {"weights": "exp_score", "temperature": 0.1}, "score / temperature is -30, and beyond 20"),
    ],
)
def test_a_score_that_can_be_no_weight_is_refused_with_its_place(scores: tuple[float, ...], knobs: dict[str, object], what: str) -> None:
    with pytest.raises(UserError) as caught:
        METHOD.keep(rated(*scores), METHOD.knobs(responses="all", **knobs))
    assert str(caught.value).startswith(f"ratings.jsonl:7: {what}") and "\n" not in str(caught.value)
    unscored = dataclasses.replace(rated(1.0, 2.0), ratings={})
    with pytest.raises(UserError, match=r"ratings\.jsonl:7: a response has no score"):
        METHOD.keep(unscored, METHOD.knobs(**knobs))


@pytest.mark.parametrize(
    ("knobs", "what"),
    [
        ({"temperature": 2.0}, "`temperature` has no effect without `weights: exp_score`"),
        ({"temperature": 2.0, "weights": "score"}, "`temperature` has no effect without `weights: exp_score`"),
        ({"turns": "all", "weights": "score"}, "`weights` cannot stand beside `turns: all`"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(knobs: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        METHOD.knobs(**knobs)
