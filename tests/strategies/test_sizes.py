"""Sizes and ranks: whole shrinking, both sides of thresholds, padded vocabularies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.strategies.adapters import ranks
from kernelfuzz.strategies.sizes import padded_widths, sizes


def test_minimal(minimal):
    assert minimal(ranks()) == 1
    assert minimal(sizes(5, 600, around=(64, 128))) == 5
    assert minimal(padded_widths(1, 150)) == (1, 1)


@pytest.mark.parametrize("limit", [16, 17, 63, 64, 70, 127, 128, 130])
def test_minimal_above_a_limit_is_the_next_size(minimal, limit):
    assert minimal(ranks(), lambda rank: rank > limit) == limit + 1


@pytest.mark.parametrize("others", range(6))
def test_sizes_shrink_below_a_threshold_beside_other_draws(minimal, others):
    together = st.tuples(*[st.booleans()] * others, ranks(), sizes(1, 288, around=(64, 128, 256)))
    simplest = minimal(together, lambda values: values[-2] > 70 and values[-1] > 150)
    assert simplest == (False,) * others + (71, 151)


def test_minimal_padding(minimal):
    assert minimal(padded_widths(1, 150), lambda widths: widths[0] > widths[1]) == (2, 1)
    assert minimal(padded_widths(1, 150), lambda widths: widths[0] < widths[1]) == (1, 2)


@given(ranks(maximum=20), sizes(7, 30, around=(16, 64), reach=1), padded_widths(4, 8, padding=2))
def test_narrowed(rank, size, widths):
    assert 1 <= rank <= 20
    assert 7 <= size <= 30
    assert 4 <= widths[0] <= 8
    assert 4 <= widths[1] <= 10
    assert abs(widths[0] - widths[1]) <= 2


def test_both_sides_of_a_threshold_are_drawn(drawn):
    found = drawn(sizes(1, 10_000, around=(5000,), reach=3), 200)
    assert set(range(4997, 5004)) <= set(found)
    assert sum(abs(size - 5000) > 3 for size in found) > len(found) / 4
