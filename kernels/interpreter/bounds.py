"""Which memory an interpreted launch may touch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

Program = tuple[int, int, int]


@dataclass(eq=False)
class OutOfBoundsError(Exception):
    """An interpreted kernel was about to touch memory that no tensor of its launch covers.

    It is raised before the access happens, so nothing has been written by it.

    Attributes:
        access: "load", "store" or "atomic".
        kernel: name of the kernel's function.
        program: index of the program in the grid.
        bad_lanes: how many of the access's active lanes lie outside.
        lanes: how many lanes are active.
        argument: the kernel's parameter that holds the nearest tensor, ``name[i]`` inside a tuple; None for a tensor
            that was made ``reachable``, and when the launch has no tensor at all.
        shape: shape of the nearest tensor.
        offset: where the lowest bad lane begins, in bytes from the start of the nearest tensor.
        extent: how many bytes the nearest tensor spans.
    """

    access: str
    kernel: str
    program: Program
    bad_lanes: int
    lanes: int
    argument: str | None
    shape: tuple[int, ...]
    offset: int
    extent: int

    def __str__(self) -> str:
        nearest = self.argument or "a reachable tensor"
        return (
            f"{self.kernel}, program {self.program}: {self.bad_lanes} of {self.lanes} lanes of a {self.access} are out "
            f"of bounds; nearest is {nearest} of shape {self.shape}: offset {self.offset} of {self.extent} bytes"
        )


@dataclass(frozen=True)
class Extent:
    """The bytes [start, end) that a tensor spans, from its first element to the end of its last one.

    The gaps between the rows of a strided view count as part of it.
    """

    argument: str | None
    shape: tuple[int, ...]
    start: int
    end: int

    @classmethod
    def of(cls, tensor: torch.Tensor, argument: str | None = None) -> Extent:
        """The extent of ``tensor``; one without elements is empty."""
        shape = tuple(tensor.shape)
        last = sum((size - 1) * stride for size, stride in zip(shape, tensor.stride(), strict=True))
        span = (last + 1) * tensor.element_size() if tensor.numel() else 0
        return cls(argument, shape, tensor.data_ptr(), tensor.data_ptr() + span)

    def distance(self, address: int) -> int:
        """Bytes between ``address`` and the extent, 0 inside it."""
        return max(self.start - address, address - self.end + 1, 0)


_reachable: tuple[Extent, ...] = ()


@contextmanager
def reachable(*tensors: torch.Tensor) -> Iterator[None]:
    """While active, interpreted kernels may also touch ``tensors``.

    For what a launch reaches without its being an argument, such as weights behind a table of pointers. May be nested.
    """
    global _reachable
    before = _reachable
    _reachable = before + tuple(Extent.of(tensor) for tensor in tensors)
    try:
        yield
    finally:
        _reachable = before


class Memory:
    """What one launch may touch: the tensors among its arguments and those that are ``reachable``.

    Args:
        kernel: name of the kernel's function.
        arguments: what the kernel sees, by parameter.
    """

    def __init__(self, kernel: str, arguments: Mapping[str, Any]) -> None:
        self._kernel = kernel
        self._extents = [extent for name, value in arguments.items() for extent in _extents(name, value)]
        self._extents.extend(_reachable)
        # Overlapping extents are joined, so that the one that begins last before an address decides about it.
        self._starts: list[int] = []
        self._ends: list[int] = []
        for extent in sorted(self._extents, key=lambda extent: extent.start):
            if extent.start == extent.end:
                continue
            if self._ends and extent.start < self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], extent.end)
            else:
                self._starts.append(extent.start)
                self._ends.append(extent.end)

    def check(self, access: str, addresses: Any, mask: Any, itemsize: int, program: Program) -> None:
        """Raise OutOfBoundsError unless every active lane is legal.

        Args:
            access: "load", "store" or "atomic".
            addresses: uint64 array, one address per lane.
            mask: bool array that broadcasts to ``addresses``, True where a lane is active; None if all are.
            itemsize: bytes that each lane touches.
            program: index of the program in the grid.
        """
        # Most blocks lie within one tensor with all their lanes: the mask need not be looked at.
        if self._within_one(addresses, itemsize):
            return
        active = addresses if mask is None else addresses[np.broadcast_to(mask, addresses.shape)]
        if active.size == 0 or self._within_one(active, itemsize):
            return
        bad = active[~self._legal(active, itemsize)]
        if bad.size:
            self._refuse(access, bad, active.size, program)

    def _within_one(self, addresses: Any, itemsize: int) -> bool:
        lowest = int(addresses.min())
        index = bisect_right(self._starts, lowest) - 1
        return index >= 0 and int(addresses.max()) + itemsize <= self._ends[index]

    def _legal(self, addresses: Any, itemsize: int) -> Any:
        if not self._starts:
            return np.zeros(addresses.shape, np.bool_)
        index = np.searchsorted(np.array(self._starts, np.uint64), addresses, side="right") - 1
        # Python integers, because an address near 2**64 plus the size would wrap around.
        last = np.array([end - itemsize for end in self._ends], np.uint64)
        return (index >= 0) & (addresses <= last[index])

    def _refuse(self, access: str, bad: Any, lanes: int, program: Program) -> NoReturn:
        lowest = int(bad.min())
        nowhere = Extent(None, (0,), 0, 0)
        nearest = min(self._extents, key=lambda extent: extent.distance(lowest), default=nowhere)
        raise OutOfBoundsError(
            access=access,
            kernel=self._kernel,
            program=program,
            bad_lanes=bad.size,
            lanes=lanes,
            argument=nearest.argument,
            shape=nearest.shape,
            offset=lowest - nearest.start,
            extent=nearest.end - nearest.start,
        )


def _extents(name: str, value: Any) -> Iterator[Extent]:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _extents(f"{name}[{index}]", item)
    elif isinstance(value, torch.Tensor):
        yield Extent.of(value, name)
    elif isinstance(base := getattr(value, "base", None), torch.Tensor):
        # Triton's tensor descriptors and reinterpreted tensors.
        yield Extent.of(base, name)
