"""How the memory around and in tensors is watched: by a copy of it, or, where a copy would be too large, by digests."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kernelfuzz.strategies.contents import hash_bits
from kernelfuzz.strategies.layouts import Layout

ALIGNMENT = 256
"""Bytes. Every tensor's storage starts at a multiple, as one that an allocator gives."""

BLOCK = 8 * (2**19 - 1)
"""Elements. What fills a storage repeats after so many, and large ones are looked at in blocks of so many, 4 to 34 MB.

A multiple of 8, so that a block is a whole number of 64-bit words; and 8 times a prime, so that rows of a tensor do not
repeat together with the fill, and a row copied to another's place shows.
"""

_SHOWN_OFFSETS = 4


@dataclass(frozen=True)
class StrayWrite:
    """Elements that were changed outside an output, or anywhere in an input.

    `offsets` are in elements from the first element of the tensor, negative before it, the first few only; `count` is
    of all. Inside an input that is watched by digests both are of blocks: `offsets` are where the input's elements
    begin in the blocks that changed, and `count` is the number of these blocks.
    """

    name: str
    is_input: bool
    inside: bool
    count: int
    offsets: tuple[int, ...]


@dataclass(eq=False)
class Guarded:
    """A tensor in watched memory.

    The bytes from `begin` to `end` of the memory are looked after with it; its first element is their element `first`.
    """

    name: str
    is_input: bool
    tensor: torch.Tensor
    layout: Layout
    begin: int
    end: int
    first: int

    def view_in(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the elements at the tensor's place in `memory`, the watched memory or a copy of it."""
        start = self.begin // self.tensor.element_size() + self.first
        return memory.view(self.tensor.dtype).as_strided(self.tensor.shape, self.tensor.stride(), start)

    def bits_in(self, memory: torch.Tensor) -> torch.Tensor:
        """Return all that is looked after with the tensor, in `memory`, as 1-D integers of the tensor's width."""
        return bits(memory[self.begin : self.end].view(self.tensor.dtype))

    def inside(self, start: int, stop: int) -> torch.Tensor:
        """Return a bool mask over the elements `start` to `stop` of `bits_in`: those that belong to the tensor."""
        mask = torch.zeros(stop - start, dtype=torch.bool, device=self.tensor.device)
        shape = tuple(self.tensor.shape)
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
        pitch, step = self.layout.strides((rows, columns))
        span = self.layout.extent((1, columns))
        # The rows that lie between start and stop as a whole; at most one before and one behind them is cut.
        whole = range(max(0, -((self.first - start) // pitch)), min(rows, (stop - self.first - span) // pitch + 1))
        if whole and columns:
            origin = self.first + whole.start * pitch - start
            mask.as_strided((len(whole), columns), (pitch, step), origin).fill_(True)
        for row in (whole.start - 1, whole.stop):
            if 0 <= row < rows:
                origin = self.first + row * pitch - start
                mask[origin if origin >= 0 else origin % step : max(0, origin + span) : step] = True
        return mask

    def stray_write(self, count: int, places: list[int], *, inside: bool) -> StrayWrite:
        """Return a report of `count` changes, the first of them at the elements `places` of `bits_in`."""
        return StrayWrite(self.name, self.is_input, inside, count, tuple(place - self.first for place in places))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as integers, so that comparison is bit for bit."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integer)


def blocks(elements: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split 1-D `elements` into blocks of `BLOCK`, the last of which may be shorter."""
    return torch.split(elements, BLOCK)


class Watch(ABC):
    """Watches one piece of memory, uint8 on any device, in which tensors lie one behind the other.

    A kernel may change the outputs in it and nothing else. Only `stray_writes` waits for the device.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._tensors: list[Guarded] = []

    @property
    def used(self) -> int:
        """How many bytes of the memory are taken."""
        return self._tensors[-1].end if self._tensors else 0

    def add(self, guarded: Guarded) -> None:
        """Watch the memory of one more tensor, which begins at `used` and is filled."""
        self._tensors.append(guarded)

    @abstractmethod
    def freeze(self) -> None:
        """Remember what the memory holds."""

    @abstractmethod
    def changed(self) -> torch.Tensor:
        """Return whether anything changed since `freeze` that no kernel may change: a bool without dimensions."""

    @abstractmethod
    def stray_writes(self, guarded: Guarded) -> list[StrayWrite]:
        """Return what of it belongs to one of the tensors, at most one report for inside and one for outside; after
        `changed`."""

    @abstractmethod
    def places(self, guarded: Guarded) -> torch.Tensor:
        """Return where what belongs to one of the tensors was changed, int64 [n], in elements from its first element:
        outside it, and where it is an input also inside; after `changed`. Inside an input that is watched by digests
        it is where the input's elements begin in the blocks that changed."""


class Snapshot(Watch):
    """Watches memory by a copy of it."""

    def freeze(self) -> None:
        # What is left at the end of the memory goes with its last tensor.
        self._tensors[-1].end = self.memory.numel()
        self._before = self.memory.clone()

    def changed(self) -> torch.Tensor:
        for guarded in self._tensors:
            if not guarded.is_input:
                guarded.view_in(self._before).copy_(guarded.tensor)
        if self.memory.numel() % 8:
            return (self.memory != self._before).any()
        return (self.memory.view(torch.int64) != self._before.view(torch.int64)).any()

    def stray_writes(self, guarded: Guarded) -> list[StrayWrite]:
        changed = self._changed_in(guarded)
        if changed.numel() == 0:
            return []
        inside = guarded.inside(0, (guarded.end - guarded.begin) // guarded.tensor.element_size())[changed]
        return [
            guarded.stray_write(part.numel(), part[:_SHOWN_OFFSETS].tolist(), inside=where)
            for part, where in ((changed[inside], True), (changed[~inside], False))
            if part.numel()
        ]

    def places(self, guarded: Guarded) -> torch.Tensor:
        return self._changed_in(guarded) - guarded.first

    def _changed_in(self, guarded: Guarded) -> torch.Tensor:
        return (guarded.bits_in(self.memory) != guarded.bits_in(self._before)).nonzero().flatten()


class Digests(Watch):
    """Watches memory of one tensor that is too large for a copy.

    Outside the tensor lies its fill, which repeats after a `BLOCK`, so what it must hold is known. Of the elements of
    an input a 64-bit digest is kept for each block.
    """

    def add(self, guarded: Guarded) -> None:
        super().add(guarded)
        self._guarded = guarded
        self._blocks = blocks(guarded.bits_in(self.memory))
        self._fill = self._blocks[0].clone()
        if guarded.is_input:
            words = self._fill.view(torch.int64).numel()
            low, high = (hash_bits(0, f"digest/{half}", words, self.memory.device) for half in ("low", "high"))
            self._keys = high.bitwise_left_shift_(32).bitwise_or_(low).bitwise_or_(1)

    def freeze(self) -> None:
        if self._guarded.is_input:
            self._before = self._digests()

    def changed(self) -> torch.Tensor:
        changed = torch.zeros((), dtype=torch.bool, device=self.memory.device)
        for number in range(len(self._blocks)):
            changed |= self._outside(number).any()
        if self._guarded.is_input:
            changed |= (self._digests() != self._before).any()
        return changed

    def stray_writes(self, guarded: Guarded) -> list[StrayWrite]:
        found = []
        if guarded.is_input:
            numbers = self._changed_blocks()
            if numbers:
                places = [self._beginning(number) for number in numbers[:_SHOWN_OFFSETS]]
                found.append(guarded.stray_write(len(numbers), places, inside=True))
        count, places = 0, []
        for number in range(len(self._blocks)):
            changed = self._changed_outside(number)
            count += changed.numel()
            places += changed[: _SHOWN_OFFSETS - len(places)].tolist()
        if count:
            found.append(guarded.stray_write(count, places, inside=False))
        return found

    def places(self, guarded: Guarded) -> torch.Tensor:
        changed = [self._changed_outside(number) for number in range(len(self._blocks))]
        if guarded.is_input:
            inside = [self._beginning(number) for number in self._changed_blocks()]
            changed.append(torch.tensor(inside, dtype=torch.int64, device=self.memory.device))
        return torch.cat(changed) - guarded.first

    def _changed_blocks(self) -> list[int]:
        """Return the blocks in which an element of the input was changed."""
        return (self._digests() != self._before).nonzero().flatten().tolist()

    def _beginning(self, number: int) -> int:
        """Return the first of the tensor's elements in a block."""
        return number * BLOCK + int(self._inside(number).nonzero()[0])

    def _changed_outside(self, number: int) -> torch.Tensor:
        """Return the elements of a block that are outside the tensor and were changed, counted from the first block."""
        return number * BLOCK + self._outside(number).nonzero().flatten()

    def _inside(self, number: int) -> torch.Tensor:
        """Return a bool mask over a block: elements that belong to the tensor."""
        return self._guarded.inside(number * BLOCK, number * BLOCK + self._blocks[number].numel())

    def _outside(self, number: int) -> torch.Tensor:
        """Return a bool mask over a block: elements outside the tensor that are not the fill's."""
        block = self._blocks[number]
        return (block != self._fill[: block.numel()]) & ~self._inside(number)

    def _digests(self) -> torch.Tensor:
        """Return for each block a digest of the tensor's elements in it, int64.

        A wrapping sum of the words, each mixed with an odd key of its place. A product takes a change to the word's
        upper half, the shift from there to its lower half, and the next product to all of it: changes of the same high
        bit in two words do not cancel.
        """
        # Made at once: small results kept between large temporaries would leave holes in the CPU's heap.
        digests = torch.empty(len(self._blocks), dtype=torch.int64, device=self.memory.device)
        for number, block in enumerate(self._blocks):
            words = torch.where(self._inside(number), block, 0).view(torch.int64)
            keys = self._keys[: words.numel()]
            mixed = words * keys
            digests[number] = mixed.bitwise_xor_(mixed >> 32).mul_(keys).sum()
        return digests
