"""Sizes with tails: anywhere in a range, and close to the thresholds at which kernels change their path or block."""

import functools

from hypothesis import strategies as st


@functools.cache
@st.composite
def sizes(draw: st.DrawFn, minimum: int, maximum: int, *, around: tuple[int, ...] = (), reach: int = 3) -> int:
    """Draw a size in [minimum, maximum], half of the time within `reach` of one of `around`.

    What is drawn is a range and then the size itself, so that the shrinker can give up the threshold, keep the size
    and walk down to `minimum`, the simplest size.
    """
    near = [(max(minimum, centre - reach), min(maximum, centre + reach)) for centre in around]
    near = [(low, high) for low, high in near if low <= high]
    low, high = draw(st.sampled_from([(minimum, maximum)] * max(1, len(near)) + near))
    return draw(st.integers(low, high))


@functools.cache
@st.composite
def padded_widths(draw: st.DrawFn, minimum: int, maximum: int, *, padding: int = 9) -> tuple[int, int]:
    """Draw (weight rows, output columns) as a padded vocabulary makes them: equal, fewer rows, or more.

    The simplest draw has both at `minimum`.
    """
    rows = draw(st.integers(minimum, maximum))
    columns = draw(st.integers(max(minimum, rows - padding), rows + padding))
    return rows, columns
