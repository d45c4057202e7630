"""Where a call runs: how it names its device, what is current around it, and a tensor that was forgotten elsewhere."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from hypothesis import strategies as st

Spelling = Literal["kind", "indexed", "kind_object", "indexed_object"]
"""A device as "cuda", as "cuda:0", or as torch.device of either."""

Platform = Literal["cpu", "cuda", "rocm", "xpu"]
"""What host code distinguishes. "cpu" is a machine whose torch knows no GPU."""

PLATFORMS: tuple[Platform, ...] = get_args(Platform)

AnyInputs = TypeVar("AnyInputs")


@dataclass(frozen=True)
class Placement:
    """How a call names its device and what is current around it; without arguments what most callers do.

    - spelling: how host code is told the device
    - side_stream: the call is made on a stream that is not the default one
    - other_device_current: another device of the kind is current
    - tensor_on_cpu: the number of the tensor, modulo how many there are, that lies on the CPU by mistake; None if none
      does. The contract is silent there: an error is right, a crash or a wrong result is not.

    On a CPU there is nothing but the spelling.
    """

    spelling: Spelling = "kind"
    side_stream: bool = False
    other_device_current: bool = False
    tensor_on_cpu: int | None = None

    def spelled(self, device: torch.device) -> str | torch.device:
        """Return `device` as the call spells it. The kind alone stands for the current device, so that another one is
        spelt with its index."""
        index = device.index or 0
        kind_will_do = index == 0 and not self.other_device_current
        name = device.type if kind_will_do and self.spelling.startswith("kind") else f"{device.type}:{index}"
        return torch.device(name) if self.spelling.endswith("object") else name


USUAL = st.just(Placement())
"""Draws what most callers do."""


@st.composite
def placements(draw: st.DrawFn, kind: str, *, other_devices: bool = False, tensor_on_cpu: bool = False) -> Placement:
    """Draw a placement on a device of `kind`, "cpu" or a GPU's; the simplest is the usual one.

    `other_devices` allows that another device is current, `tensor_on_cpu` has one tensor in every case forgotten there.
    """
    spelling = draw(st.sampled_from(get_args(Spelling)))
    if kind == "cpu":
        return Placement(spelling)
    return Placement(
        spelling,
        side_stream=draw(st.booleans()),
        other_device_current=other_devices and draw(st.booleans()),
        tensor_on_cpu=draw(st.integers(0, 15)) if tensor_on_cpu else None,
    )


def with_tensor_on_cpu(inputs: AnyInputs, number: int) -> AnyInputs:
    """Return inputs (a dataclass of tensors and lists of tensors) with a CPU copy of one of those that are elsewhere:
    `number`, modulo how many there are. With none elsewhere the inputs are returned."""
    places: list[tuple[str, int | None]] = []
    values: dict[str, Any] = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}  # type: ignore[arg-type]
    for name, value in values.items():
        tensors = value if isinstance(value, list) else [value]
        for index, tensor in enumerate(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
                places.append((name, index if isinstance(value, list) else None))
    if not places:
        return inputs
    name, place = places[number % len(places)]
    if place is None:
        return dataclasses.replace(inputs, **{name: values[name].cpu()})  # type: ignore[type-var]
    listed = [*values[name]]
    listed[place] = listed[place].cpu()
    return dataclasses.replace(inputs, **{name: listed})  # type: ignore[type-var]
