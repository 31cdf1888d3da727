"""The order of records: one permutation an epoch, nothing skipped or repeated, and the same rest from every cursor."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.packing.order import Cursor, permutation, steps, steps_per_epoch


@given(st.integers(0, 200), st.integers(0, 2**32), st.integers(0, 50))
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = permutation(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    np.testing.assert_array_equal(order, permutation(count, seed, epoch))


def test_the_order_is_fixed_for_all_time_and_differs_between_epochs_and_seeds() -> None:
    """A changed order would make a run resumed under another version repeat and skip records."""
    assert permutation(8, seed=7, epoch=0).tolist() == [0, 6, 7, 2, 4, 5, 1, 3]
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(st.integers(1, 23), st.integers(1, 30), st.integers(1, 3), st.integers(0, 99))
def test_every_epoch_sees_every_record_once(count: int, prompts: int, epochs: int, seed: int) -> None:
    taken = list(steps(count, prompts, epochs, seed))
    assert len(taken) == epochs * steps_per_epoch(count, prompts)
    sizes = [len(chosen) for chosen, _ in taken]
    assert all(size == prompts for i, size in enumerate(sizes, start=1) if i % steps_per_epoch(count, prompts))
    records = np.concatenate([chosen for chosen, _ in taken]).reshape(epochs, count)
    for epoch in range(epochs):
        np.testing.assert_array_equal(records[epoch], permutation(count, seed, epoch))
    assert taken[-1][1] == Cursor(epochs, 0)


@given(st.integers(1, 23), st.integers(1, 30), st.integers(1, 3), st.integers(0, 99))
def test_regression_30_the_rest_is_the_same_from_every_cursor(count: int, prompts: int, epochs: int, seed: int) -> None:
    whole = list(steps(count, prompts, epochs, seed))
    for done, (_, cursor) in enumerate(whole, start=1):
        rest = steps(count, prompts, epochs, seed, start=cursor)
        for ours, theirs in itertools.zip_longest(rest, whole[done:]):
            np.testing.assert_array_equal(ours[0], theirs[0])
            assert ours[1] == theirs[1]


@pytest.mark.parametrize(("count", "prompts", "sizes"), [(6, 3, [3, 3]), (7, 3, [3, 3, 1]), (2, 5, [2]), (1, 1, [1])])
def test_the_edge_of_an_epoch(count: int, prompts: int, sizes: list[int]) -> None:
    one = list(steps(count, prompts, 2, 0))
    assert [len(chosen) for chosen, _ in one] == sizes * 2
    assert one[len(sizes) - 1][1] == Cursor(1, 0) and steps_per_epoch(count, prompts) == len(sizes)


def test_nothing_is_left_after_the_last_epoch() -> None:
    assert list(steps(5, 2, 2, 0, start=Cursor(2, 0))) == []
