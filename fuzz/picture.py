"""Writemaps as a picture."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernelfuzz.fuzz.files import write_file
from kernelfuzz.fuzz.writemap import Cell, OutputMap
from kernelfuzz.strategies.errors import KernelfuzzError

WIDTH = 800
"""Pixels."""

_DPI = 100
_MOST_PANELS = 8
_GRID_UP_TO = 64
"""Cells across or down, up to which each has an outline."""

_LOOKS = {
    Cell.OUTSIDE: ("#ffffff", "outside the tensor"),
    Cell.FREE: ("#eeeeee", "free: may hold anything"),
    Cell.KEPT: ("#c9d3dd", "kept, as it must be"),
    Cell.INPUT: ("#dfe7ef", "input, unchanged"),
    Cell.RIGHT: ("#8fc7a4", "right"),
    Cell.UNWRITTEN: ("#f2d024", "unwritten: the sentinel is still there"),
    Cell.WRONG: ("#f4a582", "wrong, err/bound up to 10"),
    Cell.WRONG_BY_10: ("#e0603c", "wrong, err/bound up to 1000"),
    Cell.WRONG_BY_1000: ("#a01c1c", "wrong: further off, NaN, or must be exact"),
    Cell.OVERWRITTEN: ("#5b3a9e", "overwritten: must be kept"),
    Cell.MUTATED: ("#1f4fbf", "input that was written to"),
    Cell.REDZONE: ("#000000", "written outside the tensor"),
}


def draw(maps: Sequence[OutputMap], title: str, path: Path) -> None:
    """Draw a panel for each map into a PNG of 800 pixels' width. Raises KernelfuzzError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise KernelfuzzError(f"{path.name} needs matplotlib: pip install 'kernelfuzz[pictures]'") from None
    shown = [each for each in maps if each.height][:_MOST_PANELS]
    heights = [_panel_height(each) for each in shown]
    present = sorted({Cell[name] for each in shown for name in each.counts} - {Cell.OUTSIDE})
    head, foot = 0.75, 0.25 + 0.24 * -(-len(present) // 2)
    height = head + sum(heights) + foot
    figure = Figure(figsize=(WIDTH / _DPI, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.18 / height, _wrapped(title), fontsize=9, va="top", family="monospace")
    top = height - head
    for each, panel in zip(shown, heights):
        _panel(figure, each, top / height, panel / height, height)
        top -= panel
    _legend(figure, shown, present)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_file(path, buffer.getvalue())


def _wrapped(title: str) -> str:
    return "\n".join(textwrap.wrap(title, 96)[:3])


def _panel_height(each: OutputMap) -> float:
    """Return the inches of a panel, its title and axis included."""
    return 0.95 + min(5.0, max(0.12, _cell(each)) * each.height)


def _cell(each: OutputMap) -> float:
    """Return the inches of a cell's width."""
    return min(0.3, 6.2 / each.width)


def _panel(figure: Any, each: OutputMap, top: float, height: float, inches: float) -> None:
    """Draw a map below `top`, in shares of the figure's height."""
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    above, below = 0.3 / inches, 0.65 / inches
    # A small tensor keeps its square cells instead of being stretched over the page.
    wide = _cell(each) * each.width * _DPI / WIDTH
    axes = figure.add_axes((0.12, top - height + below, wide, height - above - below))
    rows = [each.cells[start : start + each.width] for start in range(0, len(each.cells), each.width)]
    down, across = each.tile
    left, right, first, last = -0.5, each.width - 0.5, -each.above - 0.5, each.height - each.above - 0.5
    colours = ListedColormap([_LOOKS[kind][0] for kind in Cell])
    axes.imshow(
        [list(row) for row in rows],
        cmap=colours,
        vmin=-0.5,
        vmax=len(Cell) - 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=(left * across, right * across, last * down, first * down),
    )
    kind = "input" if each.is_input else "output"
    reduced = f"; a cell is {down} × {across} elements, the worst of them" if (down, across) != (1, 1) else ""
    name = each.name if each.name == kind else f"{kind} {each.name}"
    axes.set_title(f"{name}{reduced}", fontsize=9, loc="left")
    axes.set_xlabel(each.axes.columns, fontsize=8, loc="left")
    axes.set_ylabel(each.axes.rows, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    if each.height <= _GRID_UP_TO and each.width <= _GRID_UP_TO:
        axes.set_xticks([x + 0.5 for x in range(-1, each.width)], minor=True)
        axes.set_yticks([y + 0.5 for y in range(-each.above - 1, each.height - each.above)], minor=True)
        axes.grid(which="minor", color="#ffffff", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    if each.axes.block is not None and 1 < each.axes.block // across <= each.columns:
        for x in range(0, each.columns * across + 1, each.axes.block):
            axes.axvline(x - 0.5, color="#555555", linewidth=0.8)
    # Where the tensor itself begins and ends.
    frame = ((left * across, each.columns * across - 0.5 * across), (-0.5 * down, last * down))
    axes.plot(frame[0], (frame[1][0],) * 2, color="#333333", linewidth=1.0)
    axes.plot((frame[0][1],) * 2, (first * down, last * down), color="#333333", linewidth=1.0)
    axes.set_xlim(left * across, right * across)
    axes.set_ylim(last * down, first * down)


def _legend(figure: Any, shown: Sequence[OutputMap], present: Sequence[Cell]) -> None:
    """Explain the colours that occur, with the number of elements of each."""
    from matplotlib.patches import Patch

    patches = []
    for kind in present:
        colour, text = _LOOKS[kind]
        count = sum(each.counts.get(kind.name, 0) for each in shown)
        patches.append(Patch(facecolor=colour, edgecolor="#555555", label=f"{text} ({count:,})"))
    figure.legend(handles=patches, loc="lower left", bbox_to_anchor=(0.1, 0.0), ncols=2, fontsize=8, frameon=False)
