"""Cases of a kernel of the user's own: a strategy of theirs draws descriptions of tensors, and other arguments."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Union, get_args

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies.case import Case as BaseCase
from kernelfuzz.strategies.contents import STYLES, Style, hash_bits, seeds, styles, values
from kernelfuzz.strategies.devices import USUAL, Placement
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.layouts import CONTIGUOUS, Allocate, Layout, plain_allocator

TensorDtype = Literal["float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"]
"""Names of the dtypes that a tensor can have."""

USUALLY = Placement()

CONTIGUOUS_ONLY = st.just(CONTIGUOUS)
"""Draws no layout but the usual one."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be made: no element of it is drawn.

    - contents: of a floating-point tensor, see `kernelfuzz.strategies.contents.Style`
    - low, high: of an integer tensor, whose elements are uniform in [low, high)
    - layout: its offset and strides
    """

    shape: tuple[int, ...]
    dtype: TensorDtype = "float32"
    contents: Style = "signed"
    low: int = 0
    high: int = 2
    layout: Layout = CONTIGUOUS

    def __post_init__(self) -> None:
        """Refuse what no tensor can be."""
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype not in get_args(TensorDtype):
            raise KernelfuzzError(
                f"TensorSpec: dtype {self.dtype!r}: expected one of {', '.join(get_args(TensorDtype))}"
            )
        if not all(isinstance(size, int) and size >= 0 for size in self.shape):
            raise KernelfuzzError(f"TensorSpec: shape {self.shape}: expected sizes of 0 or more")
        if self.high <= self.low:
            raise KernelfuzzError(f"TensorSpec: integers in [{self.low}, {self.high}): there is none")

    def __str__(self) -> str:
        """Return the tensor in a few words."""
        layout = "" if self.layout == CONTIGUOUS else f", {self.layout}"
        return f"{self.dtype}{list(self.shape)} {self._about()}{layout}"

    def _about(self) -> str:
        return self.contents if self.torch_dtype.is_floating_point else f"in [{self.low}, {self.high})"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def make(self, name: str, seed: int, device: torch.device | str, allocate: Allocate) -> torch.Tensor:
        """Return the tensor, filled from `seed` and `name`."""
        tensor = allocate(name, self.shape, self.torch_dtype, self.layout)
        if tensor.numel() == 0:
            return tensor
        if self.torch_dtype.is_floating_point:
            return tensor.copy_(values(self.shape, self.torch_dtype, self.contents, seed, name, device))
        bits = hash_bits(seed, name, math.prod(self.shape), device)
        return tensor.copy_((bits % (self.high - self.low) + self.low).view(self.shape))


def tensors(
    shape: tuple[int, ...],
    dtype: TensorDtype = "float32",
    *,
    style: tuple[Style, ...] = STYLES,
    low: int = 0,
    high: int = 2,
    layout: st.SearchStrategy[Layout] = CONTIGUOUS_ONLY,
) -> st.SearchStrategy[TensorSpec]:
    """Draw a tensor of that shape and dtype: its contents out of `style`, the simplest of which is all ones, and its
    `layout` (`kernelfuzz.strategies.layouts.layouts()` draws strides and offsets)."""
    if not getattr(torch, dtype).is_floating_point:
        return st.builds(
            TensorSpec, st.just(shape), st.just(dtype), low=st.just(low), high=st.just(high), layout=layout
        )
    return st.builds(TensorSpec, st.just(shape), st.just(dtype), styles(*style), layout=layout)


Scalar = Union[bool, int, float, str]  # noqa: UP007  # `_decode` of a case file takes unions as types
Value = Union[TensorSpec, tuple[TensorSpec, ...], Scalar, None]  # noqa: UP007


@dataclass(frozen=True)
class Argument:
    """One of a case's inputs by name: a tensor, several, or a plain value."""

    name: str
    value: Value


@dataclass(frozen=True)
class Case(BaseCase):
    """One call of a kernel of the user's own."""

    target: ClassVar[str] = "own"

    arguments: tuple[Argument, ...]

    @classmethod
    def of(cls, drawn: Any, seed: int = 0, placement: Placement = USUALLY) -> "Case":
        """Return the case of what the user's strategy has drawn: a mapping, or a dataclass, of tensors
        (`TensorSpec`, or tuples of them) and plain values by name. A case is returned as it is.

        Raises KernelfuzzError for anything else.
        """
        if isinstance(drawn, Case):
            return drawn
        if is_dataclass(drawn) and not isinstance(drawn, type):
            drawn = vars(drawn)
        if not isinstance(drawn, Mapping):
            raise KernelfuzzError(
                f"a case must be a mapping or a dataclass of TensorSpec and plain values, not {drawn!r}"
            )
        return cls(
            seed, tuple(Argument(name, _value(name, value)) for name, value in drawn.items()), placement=placement
        )

    @property
    def size(self) -> int:
        """Number of elements of all tensors."""
        tensors = [each for argument in self.arguments for each in _tensors(argument.value)]
        return sum(math.prod(each.shape) for each in tensors)

    def shown(self) -> dict[str, Any]:
        """Return the arguments by name."""
        about = super().shown()
        del about["arguments"]
        return {**{each.name: each.value for each in self.arguments}, **about}


def _tensors(value: Value) -> tuple[TensorSpec, ...]:
    return (value,) if isinstance(value, TensorSpec) else value if isinstance(value, tuple) else ()


def _value(name: str, value: Any) -> Value:
    if name == "case" or not name.isidentifier():
        raise KernelfuzzError(f"a case's input cannot be called {name!r}: name it otherwise")
    if isinstance(value, (list, tuple)) and all(isinstance(each, TensorSpec) for each in value):
        return tuple(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise KernelfuzzError(f"a case's {name} cannot be {value}: it has no JSON form")
    if value is None or isinstance(value, (TensorSpec, bool, int, float, str)):
        return value
    remedy = "describe tensors by TensorSpec" if isinstance(value, torch.Tensor) else "draw a number or a text instead"
    raise KernelfuzzError(f"a case's {name} cannot be a {type(value).__name__}: {remedy}")


def cases(drawn: st.SearchStrategy[Any], placement: st.SearchStrategy[Placement] = USUAL) -> st.SearchStrategy[Case]:
    """Draw cases from a strategy of the user's, each with a content seed."""
    return st.builds(Case.of, drawn, seeds(), placement)


def make_inputs(case: Case, device: torch.device | str, allocate: Allocate | None = None) -> SimpleNamespace:
    """Make the tensors of a case on `device`, with `allocate` or in plain memory: a namespace of its arguments and
    `case`."""
    allocate = allocate or plain_allocator(device)
    made: dict[str, Any] = {}
    for argument in case.arguments:
        name, value = argument.name, argument.value
        if isinstance(value, TensorSpec):
            made[name] = value.make(name, case.seed, device, allocate)
        elif isinstance(value, tuple):
            made[name] = [each.make(f"{name}[{i}]", case.seed, device, allocate) for i, each in enumerate(value)]
        else:
            made[name] = value
    return SimpleNamespace(case=case, **made)


def regimes(case: Case) -> set[str]:
    """Return what sets a case apart: dtypes, contents, empty and strided tensors, odd and long rows."""
    found: set[str] = set()
    for argument in case.arguments:
        for each in _tensors(argument.value):
            found.add(each.dtype)
            if each.torch_dtype.is_floating_point:
                found.add(each.contents)
            if 0 in each.shape:
                found.add("empty")
            if each.layout != CONTIGUOUS:
                found.add("strided")
            if each.shape and each.shape[-1] & (each.shape[-1] - 1):
                found.add("row_not_power_of_two")
    return found
