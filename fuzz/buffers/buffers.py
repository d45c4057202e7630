"""Where the tensors of a launch lie, and what they hold before it."""

from typing import Literal

import torch

from kernelfuzz.fuzz.buffers.guard_pages import PAGE, guarded_memory
from kernelfuzz.fuzz.buffers.watch import ALIGNMENT, Digests, Guarded, Snapshot, StrayWrite, Watch, bits, blocks
from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.strategies.contents import hash_bits
from kernelfuzz.strategies.layouts import CONTIGUOUS, Layout, poison

REDZONE = 128
"""Elements before and after each tensor: what a block's worth of stray writes next to it would hit."""

CHUNK_BYTES = 2**18
"""Tensors share chunks of memory of this size, so that a launch takes few operations to watch; a larger one has its
own."""

DIGEST_BYTES = 2**28
"""Storages larger than this are watched by digests instead of a copy."""

Memory = Literal["shared", "exact", "guarded"]
"""What lies behind a tensor:

- shared: a redzone, and behind that other tensors
- exact: the end of an allocation of its own, for a tool that knows where allocations end
- guarded: a page that cannot be read or written, on CPUs only; the tensor is aligned to its elements and no further
"""

_SENTINEL_BYTES = (0xA5, 0x7B)
_UNUSED_BYTE = 0xFF  # NaN in every floating-point format, -1 as an integer


def sentinel(count: int, dtype: torch.dtype, seed: int, name: str, device: torch.device | str) -> torch.Tensor:
    """Return `count` sentinel elements, a seeded mixture of two bit patterns.

    A kernel that happens to write one of the patterns still differs wherever the other one stands. In every
    floating-point format the second is large and finite and the first small and finite, so neither is a likely result.
    """
    pair = torch.tensor([[byte] * dtype.itemsize for byte in _SENTINEL_BYTES], dtype=torch.uint8).view(dtype)
    first, second = bits(pair).flatten().tolist()
    choice = (hash_bits(seed, f"sentinel/{name}", count, device) & 1).bool()
    return torch.full((count,), first, dtype=bits(pair).dtype, device=device).masked_fill_(choice, second).view(dtype)


class Buffers:
    """The guarded tensors of one launch.

    Give `allocate` to a target's make_inputs; call `output` for each output, then `freeze` just before the launch and
    `stray_writes` after it.

    `memory` says what lies behind a tensor. Raises ValueError for guard pages that are not on a CPU.
    """

    def __init__(self, device: torch.device | str, seed: int, memory: Memory = "shared") -> None:
        if memory == "guarded" and torch.device(device).type != "cpu":
            raise ValueError(f"guard pages are for the CPU's memory, not for {device}")
        self._device = device
        self._seed = seed
        self._memory = memory
        self._watches: list[Watch] = []
        self._guarded: list[tuple[Guarded, Watch]] = []

    def allocate(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout = CONTIGUOUS
    ) -> torch.Tensor:
        """Return an input tensor; it, the gaps in it and the redzones around it are poison."""
        return self._guard(name, shape, dtype, layout, is_input=True)

    def output(self, name: str, spec: OutputSpec) -> torch.Tensor:
        """Return an output tensor that holds the spec's initial values or sentinels, between sentinel redzones.

        In a large storage the sentinels repeat after a block of `watch.BLOCK` elements.
        """
        tensor = self._guard(name, spec.shape, spec.dtype, spec.layout, is_input=False)
        if spec.initial is not None:
            tensor.copy_(spec.initial)
        return tensor

    def freeze(self) -> dict[str, torch.Tensor]:
        """Remember what no kernel may change, and return contiguous copies of the outputs' initial contents by name."""
        for watch in self._watches:
            watch.freeze()
        return {
            guarded.name: guarded.tensor.clone(memory_format=torch.contiguous_format)
            for guarded, _ in self._guarded
            if not guarded.is_input
        }

    def stray_writes(self) -> list[StrayWrite]:
        """Return what changed since `freeze` that no kernel may change: inputs, redzones, and gaps inside outputs.

        Where nothing did, this waits for the device once.
        """
        if not self._watches or not bool(torch.stack([watch.changed() for watch in self._watches]).any()):
            return []
        return [write for guarded, watch in self._outputs_first() for write in watch.stray_writes(guarded)]

    def changed_places(self) -> list[tuple[Guarded, torch.Tensor]]:
        """Return every tensor, and where memory was changed that belongs to it and that no kernel may change, as
        `Watch.places` does; after `stray_writes`."""
        return [(guarded, watch.places(guarded)) for guarded, watch in self._outputs_first()]

    def _outputs_first(self) -> list[tuple[Guarded, Watch]]:
        return sorted(self._guarded, key=lambda entry: entry[0].is_input)

    def _guard(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout, *, is_input: bool
    ) -> torch.Tensor:
        before, extent = REDZONE + layout.offset, layout.extent(shape)
        size = (before + extent) * dtype.itemsize
        taken = size
        if self._memory == "guarded":
            size = taken = _round_up(size, PAGE)
            before = size // dtype.itemsize - extent
        elif self._memory == "shared" or size > DIGEST_BYTES:  # digests take whole words
            size += REDZONE * dtype.itemsize
            taken = _round_up(size, ALIGNMENT)
        watch = self._watch_with_room(taken)
        begin, end = watch.used, watch.used + taken
        self._fill(watch.memory[begin:end].view(dtype), name, is_input=is_input)
        # A storage of its own, as a tensor that was allocated alone has it; it keeps the memory alive.
        storage = watch.memory.untyped_storage()[begin : begin + size]
        tensor = torch.empty(0, dtype=dtype, device=self._device).set_(storage, before, shape, layout.strides(shape))
        guarded = Guarded(name, is_input, tensor, layout, begin, end, before)
        watch.add(guarded)
        self._guarded.append((guarded, watch))
        return tensor

    def _watch_with_room(self, size: int) -> Watch:
        """Return a watch whose memory has `size` bytes left, a new one if there is none."""
        for watch in self._watches:
            if watch.memory.numel() - watch.used >= size:
                return watch
        if self._memory == "guarded":
            memory = guarded_memory(size)
        else:
            shared = self._memory == "shared" and size <= min(CHUNK_BYTES, DIGEST_BYTES)
            memory = torch.empty(CHUNK_BYTES if shared else size, dtype=torch.uint8, device=self._device)
            memory[size:].fill_(_UNUSED_BYTE)
        self._watches.append(Digests(memory) if size > DIGEST_BYTES else Snapshot(memory))
        return self._watches[-1]

    def _fill(self, memory: torch.Tensor, name: str, *, is_input: bool) -> None:
        """Fill an input's memory with poison, an output's with sentinels."""
        if is_input:
            memory.fill_(poison(memory.dtype))
            return
        first, *others = blocks(memory)
        first.copy_(sentinel(first.numel(), memory.dtype, self._seed, name, self._device))
        for block in others:
            block.copy_(first[: block.numel()])


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
