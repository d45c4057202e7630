"""Sizes with tails: anywhere in a range, and close to the thresholds at which kernels change their path or block."""

from hypothesis import strategies as st


@st.composite
def sizes(draw: st.DrawFn, minimum: int, maximum: int, *, around: tuple[int, ...] = (), reach: int = 3) -> int:
    """Draw a size in [minimum, maximum], half of the time within `reach` of one of `around`.

    The threshold is drawn first and the distance second, so that the shrinker can give up the threshold and then walk
    down to `minimum`, the simplest size.
    """
    thresholds = tuple(threshold for threshold in around if minimum <= threshold <= maximum)
    centre = draw(st.sampled_from((None,) * max(1, len(thresholds)) + thresholds))
    if centre is None:
        return draw(st.integers(minimum, maximum))
    return min(maximum, max(minimum, centre + draw(st.integers(-reach, reach))))


def multiples(unit: int, maximum: int) -> st.SearchStrategy[int]:
    """Draw a positive multiple of `unit` up to `maximum`; the simplest is `unit` itself."""
    return st.integers(1, maximum // unit).map(lambda factor: factor * unit)


@st.composite
def padded_widths(draw: st.DrawFn, minimum: int, maximum: int, *, padding: int = 9) -> tuple[int, int]:
    """Draw (weight rows, output columns) as a padded vocabulary makes them: equal, fewer rows, or more.

    The simplest draw has both at `minimum`.
    """
    rows = draw(st.integers(minimum, maximum))
    columns = draw(st.integers(max(minimum, rows - padding), rows + padding))
    return rows, columns
