"""Writemaps: what a launch did to each element of a tensor, in a form that can be sent, saved and drawn."""

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import torch

from kernelfuzz.fuzz.buffers import Guarded
from kernelfuzz.fuzz.comparison import Comparison
from kernelfuzz.oracles.expectation import Axes

MOST_ROWS, MOST_COLUMNS = 160, 240
"""A larger tensor is reduced to so many cells, each the worst of what it stands for: one wrong element shows."""

MARGIN = 3
"""At most so many rows before and after a tensor are shown where something was written there."""


class Cell(IntEnum):
    """What became of an element; the larger, the worse. Wrong elements are told apart by err/bound; an element that
    must be exact, and a NaN, is as far off as can be."""

    OUTSIDE = 0
    FREE = 1
    KEPT = 2
    INPUT = 3
    RIGHT = 4
    UNWRITTEN = 5
    WRONG = 6
    WRONG_BY_10 = 7
    WRONG_BY_1000 = 8
    OVERWRITTEN = 9
    MUTATED = 10
    REDZONE = 11


@dataclass(frozen=True)
class OutputMap:
    """What became of one tensor, as rows of its memory. Elements of an order-free group are shown sorted.

    - name; is_input
    - axes: what rows and columns are
    - rows, columns: cells of the tensor
    - above: rows before them; what follows the tensor's are rows after them
    - width: columns of all rows; the gap between two rows of memory lies behind `columns`
    - tile: how many rows and columns of memory a cell stands for, the worst of which it shows
    - counts: elements by what became of them, those that are not shown included
    - unseen: elements written outside the tensor, further away than the map shows
    - cells: `Cell` values, uint8, row by row
    """

    name: str
    is_input: bool
    axes: Axes
    rows: int
    columns: int
    above: int
    width: int
    tile: tuple[int, int]
    counts: Mapping[str, int]
    unseen: int
    cells: bytes

    @property
    def height(self) -> int:
        """Rows of cells, those before and after the tensor included."""
        return len(self.cells) // self.width

    def to_json(self) -> dict[str, Any]:
        """Return the map in JSON types."""
        packed = base64.b64encode(zlib.compress(self.cells)).decode()
        return {**asdict(self), "cells": packed}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "OutputMap":
        """Return the map that `to_json` wrote."""
        values = {
            "axes": Axes(**document["axes"]),
            "tile": tuple(document["tile"]),
            "cells": zlib.decompress(base64.b64decode(document["cells"])),
        }
        return cls(**{**document, **values})


def output_map(guarded: Guarded, axes: Axes, compared: Comparison, touched: torch.Tensor) -> OutputMap:
    """Return the map of an output.

    `touched` are the places of what was written outside it, int64 [n] in elements from the tensor's first.
    """
    cells = torch.full(compared.wrong.shape, Cell.FREE, dtype=torch.uint8, device=compared.wrong.device)
    cells.masked_fill_(compared.must_keep, Cell.KEPT).masked_fill_(compared.must_write, Cell.RIGHT)
    for clause in range(len(compared.expected.clauses)):
        incorrect = compared.incorrect(clause)
        cells.masked_fill_(incorrect, Cell.WRONG if compared.has_bound else Cell.WRONG_BY_1000)
        if compared.has_bound:
            cells.masked_fill_(incorrect & ~(compared.ratios <= 10), Cell.WRONG_BY_10)
            cells.masked_fill_(incorrect & ~(compared.ratios <= 1000), Cell.WRONG_BY_1000)
    cells.masked_fill_(compared.untouched, Cell.UNWRITTEN).masked_fill_(compared.overwritten, Cell.OVERWRITTEN)
    return _map(guarded, axes, cells, touched)


def input_map(guarded: Guarded, touched: torch.Tensor) -> OutputMap:
    """Return the map of an input that something was written in or around, at the places `touched` as in
    `output_map`."""
    cells = torch.full((), Cell.INPUT, dtype=torch.uint8, device=touched.device).expand(guarded.tensor.shape)
    step = guarded.layout.step
    return _map(guarded, Axes("row", "column" if step == 1 else f"column · {step}"), cells, touched)


def _map(guarded: Guarded, axes: Axes, cells: torch.Tensor, touched: torch.Tensor) -> OutputMap:
    """Return the map of a tensor whose elements are `cells`."""
    columns = max(1, axes.width or (cells.shape[-1] if cells.ndim else 1))
    cells = cells.reshape(-1, columns)
    rows = cells.shape[0]
    pitch, step = guarded.layout.strides((rows, columns))
    span = columns * step
    if rows <= 1 or guarded.tensor.ndim == 1:  # what follows the only row is no gap
        pitch = span
    row, column = touched // pitch, touched % pitch
    inside = (row >= 0) & (row < rows) & (column < span) & (column % step == 0)
    gap = pitch - span if bool((column >= span).any()) else 0

    # A cell stands for whole steps, or an element of a stepped row for every step-th cell.
    down, across = max(1, math.ceil(rows / MOST_ROWS)), math.ceil((span + gap) / MOST_COLUMNS)
    across = math.ceil(across / step) * step if across > 1 else across
    above = math.ceil(min(MARGIN, _farthest(-row)) / down)
    below = math.ceil(min(MARGIN, _farthest(row - rows + 1)) / down)
    body_rows, body_columns = math.ceil(rows / down), math.ceil(span / across)
    width = body_columns + math.ceil(gap / across)
    grid = torch.full((above + body_rows + below, width), Cell.OUTSIDE, dtype=torch.uint8, device=cells.device)
    if rows:
        body = grid[above : above + body_rows, : body_columns : max(1, step // across)]
        body.copy_(_worst(cells, down, max(1, across // step)))

    # Rows and columns behind the tensor begin a tile of their own.
    at_row = above + torch.where(row < rows, row // down, body_rows + (row - rows) // down)
    at_column = torch.where(column < span, column // across, body_columns + (column - span) // across)
    shown = (at_row >= 0) & (at_row < grid.shape[0]) & (at_column < width)
    for which, cell in ((inside, Cell.MUTATED), (~inside & shown, Cell.REDZONE)):
        grid[at_row[which], at_column[which]] = cell

    strips = torch.split(cells, down)
    counts = torch.stack([torch.bincount(strip.flatten(), minlength=len(Cell)) for strip in strips]).sum(0)
    counts[Cell.MUTATED] = inside.sum()
    counts[Cell.INPUT] -= counts[Cell.MUTATED]
    counts[Cell.REDZONE] = (~inside).sum()
    return OutputMap(
        guarded.name,
        guarded.is_input,
        axes,
        rows=body_rows,
        columns=body_columns,
        above=above,
        width=width,
        tile=(down, across),
        counts={cell.name: count for cell, count in zip(Cell, counts.tolist()) if count},
        unseen=int((~inside & ~shown).sum()),
        cells=bytes(grid.flatten().tolist()),
    )


def _farthest(distances: torch.Tensor) -> int:
    """Return the largest of the distances, or 0."""
    return max(0, int(distances.max())) if distances.numel() else 0


def _worst(cells: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """Return the worst cell of each tile; strip by strip, so that a large tensor is not copied."""
    rows = torch.stack([strip.amax(0) for strip in torch.split(cells, down)])
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % across))
    return padded.reshape(len(padded), -1, across).amax(2)
