"""What a kernel is to kernelfuzz, and how it is named."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kernelfuzz.strategies.errors import KernelfuzzError

Launch = Callable[[Any, Mapping[str, torch.Tensor]], None]
"""A kernel's entry: takes a target's inputs and the output tensors by name, and writes the outputs in place."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that is loaded in this process.

    `dimensions` narrows the target's strategy to what this kernel offers: keyword arguments of the target's `cases`, in
    JSON types.
    """

    launch: Launch
    version: str
    dimensions: Mapping[str, Any] = field(default_factory=dict)


class UnsupportedCaseError(Exception):
    """Raised by a kernel's launch for a case that it does not offer; the case is counted as rejected."""


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
