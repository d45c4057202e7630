"""Guarded buffers: every tensor of a launch lies between redzones, and every byte that it must not change is
watched."""

from dataclasses import dataclass, field

import torch

from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.strategies.contents import hash_bits
from kernelfuzz.strategies.layouts import CONTIGUOUS, Layout, poison

REDZONE = 128
"""Elements before and after each tensor: what a block's worth of stray writes next to it would hit."""

_SENTINEL_BYTES = (0xA5, 0x7B)


def sentinel(count: int, dtype: torch.dtype, seed: int, name: str, device: torch.device | str) -> torch.Tensor:
    """Return `count` sentinel elements, a seeded mixture of two bit patterns.

    A kernel that happens to write one of the patterns still differs wherever the other one stands. In every
    floating-point format the second is large and finite and the first small and finite, so neither is a likely result.
    """
    width = torch.empty((), dtype=dtype).element_size()
    first, second = (torch.full((width,), byte, dtype=torch.uint8).view(dtype).item() for byte in _SENTINEL_BYTES)
    choice = hash_bits(seed, f"sentinel/{name}", count, device) & 1
    pair = torch.tensor([first, second], dtype=dtype, device=device)
    return pair[choice]


@dataclass
class _Guarded:
    """A tensor inside its storage, and what the storage held before the launch."""

    name: str
    storage: torch.Tensor
    tensor: torch.Tensor
    before: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def changed(self) -> torch.Tensor:
        """Return the indices of storage elements whose bits changed."""
        return (bits(self.storage) != bits(self.before)).nonzero().flatten()

    def inside(self) -> torch.Tensor:
        """Return a bool mask over the storage: elements that belong to the tensor."""
        mask = torch.zeros(self.storage.numel(), dtype=torch.bool, device=self.storage.device)
        mask.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).fill_(True)
        return mask


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as integers, so that comparison is bit for bit."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integer)


@dataclass(frozen=True)
class StrayWrite:
    """Elements that were changed outside an output, or anywhere in an input.

    `offsets` are in elements from the first element of the tensor, negative before it, the first few only; `count` is
    of all.
    """

    name: str
    is_input: bool
    inside: bool
    count: int
    offsets: tuple[int, ...]


class Buffers:
    """The guarded tensors of one launch.

    Give `allocate` to a target's make_inputs; call `output` for each output, then `freeze` just before the launch and
    `stray_writes` after it.
    """

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self._device = device
        self._seed = seed
        self._inputs: list[_Guarded] = []
        self._outputs: list[_Guarded] = []

    def allocate(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout = CONTIGUOUS
    ) -> torch.Tensor:
        """Return an input tensor; it, the gaps in it and the redzones around it are poison."""
        total = 2 * REDZONE + layout.offset + layout.extent(shape)
        storage = torch.full((total,), poison(dtype), dtype=dtype, device=self._device)
        return self._guard(self._inputs, name, storage, shape, layout)

    def output(self, name: str, spec: OutputSpec) -> torch.Tensor:
        """Return an output tensor that holds the spec's initial values or sentinels, between sentinel redzones."""
        total = 2 * REDZONE + spec.layout.offset + spec.layout.extent(spec.shape)
        storage = sentinel(total, spec.dtype, self._seed, name, self._device)
        tensor = self._guard(self._outputs, name, storage, spec.shape, spec.layout)
        if spec.initial is not None:
            tensor.copy_(spec.initial)
        return tensor

    def _guard(
        self, group: list[_Guarded], name: str, storage: torch.Tensor, shape: tuple[int, ...], layout: Layout
    ) -> torch.Tensor:
        tensor = storage.as_strided(shape, layout.strides(shape), REDZONE + layout.offset)
        group.append(_Guarded(name, storage, tensor))
        return tensor

    def freeze(self) -> dict[str, torch.Tensor]:
        """Remember every byte, and return copies of the outputs' initial contents by name."""
        for guarded in (*self._inputs, *self._outputs):
            guarded.before = guarded.storage.clone()
        return {
            guarded.name: guarded.before.as_strided(
                guarded.tensor.shape, guarded.tensor.stride(), guarded.tensor.storage_offset()
            )
            for guarded in self._outputs
        }

    def stray_writes(self) -> list[StrayWrite]:
        """Return what changed since `freeze` that no kernel may change: inputs, redzones, and gaps inside outputs."""
        found = []
        watched = [(guarded, False) for guarded in self._outputs] + [(guarded, True) for guarded in self._inputs]
        for guarded, is_input in watched:
            changed = guarded.changed()
            if changed.numel() == 0:
                continue
            inside = guarded.inside()[changed]
            for part, where in ((changed[inside], True), (changed[~inside], False)):
                if part.numel() and (is_input or not where):
                    offsets = (part[:4] - int(guarded.tensor.storage_offset())).tolist()
                    found.append(StrayWrite(guarded.name, is_input, where, part.numel(), tuple(offsets)))
        return found
