"""Numbers in words."""

import math

import pytest

from preftune.report.words import duration, fixed, number, quantity, size, title_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1, "1"), (0.69314718, "0.6931"), (-0.5, "−0.5"), (12.3456, "12.35"), (1234.5, "1\u202f234"),
        (1_000_000, "1\u202f000\u202f000"),
        (5e-6, "5e−6"), (4.25e-5, "4.25e−5"), (0.0001, "0.0001"), (None, "–"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (8.24, "8.2 s"), (42.4, "42 s"), (59.9, "60 s"), (250, "4 min 10 s"), (3599.7, "1 h 00 min"), (11_100, "3 h 05 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_size():
    assert (size(5.26e9), size(4.2e8), size(None)) == ("5.3 GB", "420 MB", "–")


def test_quantity_scales_what_has_a_known_unit():
    assert quantity(0.664, "accuracy") == quantity(0.664, "proportion") == "66.4%"
    assert quantity(1.83, "nats") == "1.83 nats"
    assert quantity(250, "seconds") == "4 min 10 s"
    assert quantity(None, "nats") == quantity(math.nan, "accuracy") == "–"


def test_fixed_and_titles():
    assert fixed(-0.726) == "−0.73"
    assert title_of("response_length") == "Response length"
