"""What the targets' huge cases share: tensors whose flattened offsets cross 2^31 elements, few of which are touched.

Kernels that multiply ids by strides in 32 bits wrap there. Sizes follow from the number of elements to cross, so that
cases of the same form can be drawn around a small one.
"""

import math

from hypothesis import strategies as st

from kernelfuzz.strategies.batches import Batch, Segment

BEYOND = 2**31
"""Elements of which an offset is one more than a signed 32-bit integer holds."""

MOST_BYTES = 10 * 10**9
"""Device memory that no huge case needs more of."""

MOST_ADAPTERS = 128
MOST_EXPERTS = 512
"""Adapters that a server keeps on its device and experts of a layer, at most, where a target has both."""

_TOUCHED_BYTES = 64  # an int64 and several float64 temporaries for each element of a gathered weight
_OVERHEAD_BYTES = 500_000_000  # blocks in which digests are taken, small tensors


@st.composite
def widths(draw: st.DrawFn, lowest: int, highest: int) -> int:
    """Draw the wide dimension of a weight: a multiple of 16, as real ones are, or any size in the range."""
    unit = draw(st.sampled_from((16, 1)))
    return unit * draw(st.integers(-(-lowest // unit), highest // unit))


@st.composite
def stacks(draw: st.DrawFn, matrix: int, beyond: int, least_adapters: int) -> tuple[int, int]:
    """Draw how many adapters and experts have a weight of `matrix` elements each, about `beyond` elements together.

    The offset of the last adapter crosses `beyond`; or only its sum with that of the last expert does, or an element of
    the last weight; or, with one adapter, that of the last expert; or none does, barely.
    """
    fitting = beyond // matrix
    crossing = draw(st.sampled_from(("adapter", "sum", "none", *(["expert"] if least_adapters == 1 else []))))
    if crossing == "expert":
        return 1, fitting + 2
    fewest = max(least_adapters, -(-fitting // MOST_EXPERTS))
    adapters = draw(st.integers(fewest, max(fewest, min(MOST_ADAPTERS, fitting))))
    experts = fitting // adapters
    if crossing == "none":
        # One more expert and fewer adapters come closer where the division leaves much.
        several = max(1, -(-fitting // adapters))
        options = [(adapters, max(1, experts)), (fitting // several, several)]
        return max((each for each in options if each[0] >= least_adapters), key=math.prod)
    return (adapters + 1 if crossing == "adapter" else adapters), experts + 1


@st.composite
def row_gaps(draw: st.DrawFn, rows: int, extent: int, beyond: int) -> int:
    """Draw the gap after each of at least two rows of `extent` elements.

    The last row starts `beyond` elements after the first, or so little before or behind that it lies around or next to
    it.
    """
    return max(0, -(-beyond // (rows - 1)) + draw(st.integers(-extent, extent)) - extent)


def last_adapters(batch: Batch, num_adapters: int, of: int) -> Batch:
    """Return a batch for `num_adapters` adapters as one for the last ones `of` so many, with two more tokens of the
    last."""
    renumbered = [Segment(renumber(each.adapter, num_adapters, of), each.length) for each in batch.segments]
    return Batch((*renumbered, Segment(of - 1, 2)))


def renumber(adapter: int, num_adapters: int, of: int) -> int:
    """Return the id, among `of` adapters, of one of `num_adapters` that are the last of them; the base model keeps its
    own."""
    return adapter if adapter < 0 else adapter + of - num_adapters


def device_bytes(tensors: int, touched: int) -> int:
    """Return the memory that a case takes, rounded up, whose tensors take so many bytes; `touched` elements of weights
    are made, gathered by the oracle and multiplied in float64."""
    return tensors + _TOUCHED_BYTES * touched + _OVERHEAD_BYTES


def side(beyond: int) -> int:
    """Return the side of a square of that many elements: 46,340 for 2^31, about what the largest layers have."""
    return math.isqrt(beyond)
