"""What a kernel is to kernelfuzz, and how it is named."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kernelfuzz.strategies.errors import KernelfuzzError

Launch = Callable[[Any, Mapping[str, torch.Tensor]], None]
"""A kernel's entry: takes a target's inputs and the output tensors by name, and writes the outputs in place."""


class Outputs(dict[str, torch.Tensor]):
    """The output tensors of a launch by name, as items and as attributes."""

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}: expected one of {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not self.get(name):  # which `outputs.x += y` assigns
            raise AttributeError(f"an output is written in place: outputs.{name}.copy_(…)")


@dataclass(frozen=True)
class Kernel:
    """A kernel that is loaded in this process.

    - dimensions: narrows the target's strategy to what this kernel offers: keyword arguments of the target's `cases`,
      in JSON types
    - notes: what a reader of the results must know of what ran and what was left out, a line each
    """

    launch: Launch
    version: str
    dimensions: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class UnsupportedCaseError(Exception):
    """Raised by a kernel's launch for a case that it does not offer; the case is counted as rejected."""


class WrongResultError(Exception):
    """Raised by a kernel's launch for a result that is not even of the form that the contract asks for, so that it
    cannot be put into `output` to be compared. `clause` is the contract's."""

    def __init__(self, output: str, clause: str, message: str) -> None:
        super().__init__(message)
        self.output = output
        self.clause = clause


def deliver(name: str, result: Any, output: torch.Tensor) -> None:
    """Copy what a kernel returned into the output of that name, unless it lies there already.

    Raises WrongResultError unless it is a contiguous tensor of the output's shape, dtype and device. Float8 is put into
    an output of bytes.
    """
    if isinstance(result, torch.Tensor) and output.dtype == torch.uint8 and result.dtype != torch.uint8:
        output = output.view(torch.float8_e4m3fn)
    found, wanted = _form(result), _form(output)
    if found != wanted:
        raise WrongResultError(name, "form_of_result", f"{name} is {found} and must be {wanted}")
    if result.data_ptr() != output.data_ptr():
        output.copy_(result)


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{'' if value.is_contiguous() else 'non-contiguous '}{dtype} {list(value.shape)} on {value.device}"


@dataclass(frozen=True)
class KernelName:
    """A kernel as a user names it: `package@version`, `package@path`, `package`, or `module:function`."""

    package: str
    version: str | None = None

    def __str__(self) -> str:
        return f"{self.package}@{self.version}" if self.version else self.package

    @classmethod
    def parse(cls, text: str) -> "KernelName":
        """Parse a name. Raises KernelfuzzError for one that is malformed."""
        package, at, version = text.partition("@")
        if not re.fullmatch(r"[\w.-]+(:[\w.]+)?", package) or (at and not version) or (":" in package and at):
            forms = "NAME, NAME@VERSION, NAME@PATH or MODULE:FUNCTION"
            raise KernelfuzzError(f"malformed kernel name {text!r}: expected {forms}")
        return cls(package, version or None)
