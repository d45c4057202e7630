"""How a tensor lies in memory: storage offset, gaps between rows, step between elements; and who allocates it."""

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from hypothesis import strategies as st

POISON_INTEGER = -0x5A5A5A5B
"""Fills integer memory whose contents must not matter: used as an index it leads far outside any tensor."""


@dataclass(frozen=True)
class Layout:
    """Memory layout of a tensor: `offset` elements before it, `row_gap` elements after each row of the last dimension,
    and `step` from one element of a row to the next."""

    offset: int = 0
    row_gap: int = 0
    step: int = 1

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the strides, in elements, of a tensor of this shape."""
        if not shape:
            return ()
        strides = [self.step]
        extent = max(shape[-1], 1) * self.step + self.row_gap
        for size in reversed(shape[:-1]):
            strides.append(extent)
            extent *= max(size, 1)
        return tuple(reversed(strides))

    def extent(self, shape: tuple[int, ...]) -> int:
        """Return how many elements of storage a tensor of this shape takes, its offset not counted."""
        if 0 in shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(shape, self.strides(shape)))


CONTIGUOUS = Layout()


@functools.cache
def layouts(*, max_offset: int = 3, max_row_gap: int = 5, max_step: int = 2) -> st.SearchStrategy[Layout]:
    """Draw a layout; the simplest is contiguous at offset 0.

    An odd offset or gap breaks the 16-byte alignment that vectorised loads need; a step of 2 is a transposed or sliced
    view.
    """
    return st.builds(
        Layout,
        offset=st.integers(0, max_offset),
        row_gap=st.integers(0, max_row_gap),
        step=st.integers(1, max_step),
    )


class Allocate(Protocol):
    """Gives a tensor of `shape` whose elements, and the memory around and between them, are poison."""

    def __call__(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout = CONTIGUOUS
    ) -> torch.Tensor: ...


def poison(dtype: torch.dtype) -> float | int:
    """Return the value that marks memory that must not matter: NaN, or an integer that is no legal index."""
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return max(POISON_INTEGER, torch.iinfo(dtype).min) if dtype.is_signed else torch.iinfo(dtype).max


def plain_allocator(device: torch.device | str) -> Allocate:
    """Return an allocator of unguarded tensors on `device`, for strategies used on their own."""

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout = CONTIGUOUS) -> torch.Tensor:
        del name
        storage = torch.full((layout.offset + layout.extent(shape),), poison(dtype), dtype=dtype, device=device)
        return storage.as_strided(shape, layout.strides(shape), layout.offset)

    return allocate
