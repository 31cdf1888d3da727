"""Per-annotator normalisation beside hand-worked numbers (methods A.3) and a plain least-squares solve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.feedback.annotators import Rating, additive, calibrator, leniency, ratings_of, shared_items, zscore
from preftune.records import Example, Response

LENIENT = {"x": 0.9, "y": 0.7, "z": 0.8}
BOTH = [Rating(who, item, s - less) for who, less in (("A", 0.0), ("B", 0.3)) for item, s in LENIENT.items()]


def test_two_annotators_who_differ_by_a_constant_have_one_z() -> None:
    """A = (.9, .7, .8), B = A - .3: the same z = (1.224745, -1.224745, 0)."""
    scale = zscore(BOTH, shrinkage=0)
    for who, less in (("A", 0.0), ("B", 0.3)):
        assert [scale(s - less, who) for s in LENIENT.values()] == pytest.approx([1.224745, -1.224745, 0], abs=1e-6)


def test_back_on_the_scores_own_scale() -> None:
    """Mean .65 and deviation sqrt(.0067 + .0225) of all six."""
    plain, back = zscore(BOTH, shrinkage=0), zscore(BOTH, shrinkage=0, back=True)
    mean, deviation = 0.65, (0.02 / 3 + 0.0225) ** 0.5
    assert back(0.9, "A") == pytest.approx(mean + deviation * plain(0.9, "A"))
    assert back(0.9, "A") == pytest.approx(back(0.6, "B"))


def test_few_ratings_move_the_mean_little() -> None:
    """mu_a = (n m_a + k mu) / (n + k): for A (3 * .8 + 5 * .65) / 8 = .70625; and one never seen has mu and sigma of all."""
    scale = zscore(BOTH)
    assert scale.known["A"].offset == pytest.approx(0.70625)
    assert scale.known["A"].spread ** 2 == pytest.approx((3 * 0.02 / 3 + 5 * (0.02 / 3 + 0.0225)) / 8)
    for stranger in ("C", None):
        assert scale(0.65, stranger) == pytest.approx(0) and scale(0.65 + (0.02 / 3 + 0.0225) ** 0.5, stranger) == pytest.approx(1)
    one = zscore([*BOTH, Rating("C", "x", 0.9)])
    assert 0 < one(0.9, "C") < 3, "a single rating is neither 0 nor without bound"


def test_an_annotator_who_always_says_the_same_says_nothing() -> None:
    """sigma_a = 0 gives 0, and three times .1, whose mean rounds, is no spread."""
    same = [Rating("A", i, 0.1) for i in range(3)]
    assert zscore([*same, Rating("B", 0, 5.0), Rating("B", 1, 6.0)], shrinkage=0)(0.1, "A") == 0
    assert zscore(same)(0.1, "A") == 0 and zscore([])(3.0, "A") == 0


def test_two_way_by_hand() -> None:
    """b_A - b_B = .3, summing to 0, and then both say the same of each item."""
    b = leniency(BOTH)
    assert b == pytest.approx({"A": 0.15, "B": -0.15})
    scale = additive(BOTH)
    for s in LENIENT.values():
        assert scale(s, "A") == pytest.approx(scale(s - 0.3, "B"))


def test_two_way_does_not_take_quality_for_leniency() -> None:
    """A scored what is good, B what is bad, and both one item, alike: neither is lenient. A z-score says they are."""
    said = [Rating("A", i, 9.0 + i) for i in range(3)] + [Rating("B", 10 + i, 1.0 + i) for i in range(3)]
    said += [Rating("A", "both", 5.0), Rating("B", "both", 5.0)]
    assert leniency(said) == pytest.approx({"A": 0, "B": 0}, abs=1e-9)
    assert abs(zscore(said, 0)(5.0, "A") - zscore(said, 0)(5.0, "B")) > 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.floats(-9, 9)), min_size=1, max_size=30))
@settings(deadline=None)
def test_two_way_is_the_plain_least_squares_solution(said: list[tuple[int, int, float]]) -> None:
    """Residuals of numpy's own solve over indicator columns; and sums of 0 in every group that shared items join."""
    ratings = [Rating(str(a), i, s) for a, i, s in said]
    b = leniency(ratings)
    design = np.zeros((len(said), 12))
    for row, (a, i, _) in enumerate(said):
        design[row, a] = design[row, 5 + i] = 1
    values = np.array([s for *_, s in said])
    best = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    rest = values - np.array([b[str(a)] for a, *_ in said])
    for item in {i for _, i, _ in said}:
        rows = [k for k, (_, i, _) in enumerate(said) if i == item]
        rest[rows] -= rest[rows].mean()
    np.testing.assert_allclose(rest, best, atol=1e-7)
    assert sum(b.values()) == pytest.approx(0, abs=1e-7)


def test_annotators_whom_nothing_joins_are_left_as_they_are() -> None:
    said = [*BOTH, Rating("C", "w", 4.0), Rating(None, "x", 9.0)]
    assert leniency(said) == pytest.approx({"A": 0.15, "B": -0.15, "C": 0})
    assert additive(said)(4.0, "C") == pytest.approx(4) and additive(said)(4.0, "never seen") == 4 and additive([])(1.5, None) == 1.5
    assert shared_items(said) == 3 and shared_items(said[:3]) == 0


def record(annotator: str | None, *scores, prompt: str = "p") -> Example:
    return Example(prompt, tuple(Response(f"r{n}", score=s) for n, s in enumerate(scores)), annotator=annotator)


def test_records_are_calibrated_attribute_by_attribute() -> None:
    seen = [record("A", {"helpful": 3.0, "honest": 1.0}, None), record("B", {"helpful": 1.0}, 0.5)]
    assert {name: len(ratings) for name, ratings in ratings_of(seen).items()} == {"helpful": 2, "honest": 1, None: 1}
    change = calibrator(seen, additive)
    first, second = change(seen[0]).responses
    assert first.score == pytest.approx({"helpful": 2.0, "honest": 1.0}) and second.score is None
    assert change(record("B", {"helpful": 1.0, "new": 7.0})).responses[0].score == pytest.approx({"helpful": 2.0, "new": 7.0})
    assert change(record("B", 0.25)).responses[0].score == 0.25


def test_what_is_not_among_the_fitted_records_changes_nothing() -> None:
    train = [record("A", 0.9, 0.7, 0.8), record("B", 0.6, 0.4, 0.5)]
    held = record("B", 100.0, -100.0, prompt="held out")
    alone = calibrator(train, zscore)(held)
    assert alone.responses[0].score == pytest.approx(zscore(ratings_of(train)[None])(100.0, "B"))
    assert calibrator(train, zscore)(train[0]).responses[0].score != calibrator([*train, held], zscore)(train[0]).responses[0].score
