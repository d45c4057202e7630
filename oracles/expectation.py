"""What an oracle says of a case: values, error bounds, and which elements must be written, must be kept, or are
free."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from kernelfuzz.strategies.layouts import CONTIGUOUS, Layout

Rule = Literal["write", "keep", "free"]
"""write: the element must hold the expected value; keep: it must hold its initial bits; free: it may hold anything."""


@dataclass(frozen=True)
class Clause:
    """One clause of a contract, by the name it has in reports and fingerprints, and the rule for its elements."""

    name: str
    rule: Rule


@dataclass(frozen=True)
class Axes:
    """How an output is drawn: what its rows and columns are in the contract's terms; one row has no name.

    - width: columns of a row, where memory is flat and the contract is not; None: the last dimension
    - block: how many columns belong together, or None
    """

    rows: str
    columns: str
    width: int | None = None
    block: int | None = None


@dataclass(frozen=True)
class OutputSpec:
    """An output that the engine must allocate: shape, dtype, layout, what it holds before the launch, and its axes.

    `initial` is a tensor of that shape for outputs the contract reads before it writes; without one the output is
    filled with a sentinel.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = CONTIGUOUS
    initial: torch.Tensor | None = None
    axes: Axes = Axes("row", "column")


OutputSpecs = Mapping[str, OutputSpec]


@dataclass(frozen=True)
class ExpectedOutput:
    """The expectation for one output; all tensors have the output's shape and device.

    - clauses, region: `region`, uint8, holds for each element the index of its clause in `clauses`
    - values: float64 for floating-point outputs, int64 for integers; meaningful where the rule is write
    - bound: float64, the largest allowed |actual - value|; None means exact
    - groups: int64, or None; elements of one group may stand in any order, so they are compared as a multiset
    """

    clauses: tuple[Clause, ...]
    region: torch.Tensor
    values: torch.Tensor
    bound: torch.Tensor | None = None
    groups: torch.Tensor | None = None

    def mask(self, rule: Rule) -> torch.Tensor:
        """Return a bool tensor of the elements that fall under `rule`."""
        # Bit i says whether clause i has the rule: a number costs no copy to the device, as a table would.
        table = sum(1 << index for index, clause in enumerate(self.clauses) if clause.rule == rule)
        return (table >> self.region.int()) & 1 == 1


@dataclass(frozen=True)
class ExpectedError:
    """The call must raise, with `text` in the message; `clause` is the contract's clause that asks for it."""

    clause: str
    text: str


@dataclass(frozen=True)
class Expectation:
    """The expectation for a case: per output, or an error. With an error the outputs are free."""

    outputs: Mapping[str, ExpectedOutput] = field(default_factory=dict)
    error: ExpectedError | None = None
