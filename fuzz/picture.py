"""Writemaps as a picture."""

import importlib.util
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernelfuzz.fuzz.files import write_file
from kernelfuzz.fuzz.writemap import Cell, OutputMap
from kernelfuzz.strategies.errors import KernelfuzzError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 800
"""Pixels."""

MOST_PANELS = 6

_DPI = 100
# Inches.
_PAGE = WIDTH / _DPI
_LEFT, _MAP_WIDTH = 0.7, 6.9
_TALLEST_MAP, _TALLEST_PAGE = 5.0, 16.0
_ABOVE_MAP, _BELOW_MAP = 0.32, 0.5
_LARGEST_CELL, _SMALLEST_CELL, _SMALLEST_BLOCK = 0.3, 0.12, 0.06
_ALWAYS_LEGIBLE = 1.7
"""A map of this height has a pixel for each of its rows, the most that there are."""

_OUTLINED_UP_TO = 64
"""Cells across or down, up to which each has an outline."""

# From light to dark as it gets worse, and told apart without red and green.
_LOOKS = {
    Cell.OUTSIDE: ("#ffffff", "outside the tensor"),
    Cell.FREE: ("#f0f0f0", "free: may hold anything"),
    Cell.KEPT: ("#cfcfcf", "kept, as it must be"),
    Cell.INPUT: ("#dcd3e6", "input, unchanged"),
    Cell.RIGHT: ("#9cc7e8", "right"),
    Cell.UNWRITTEN: ("#f5dc3c", "unwritten: the sentinel is still there"),
    Cell.WRONG: ("#f09a4a", "wrong, err/bound up to 10"),
    Cell.WRONG_BY_10: ("#cf4a1c", "wrong, err/bound up to 1000"),
    Cell.WRONG_BY_1000: ("#7d1010", "wrong: further off, NaN, or must be exact"),
    Cell.OVERWRITTEN: ("#6a3fb5", "overwritten: must be kept"),
    Cell.MUTATED: ("#e0559f", "input that was written to"),
    Cell.REDZONE: ("#000000", "written outside the tensor"),
}


def is_available() -> bool:
    """Whether pictures can be drawn here: matplotlib is an optional extra."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(maps: Sequence[OutputMap], title: str, path: Path) -> None:
    """Draw a panel for each map into a PNG of 800 pixels' width. Raises KernelfuzzError without matplotlib."""
    try:
        picture = figure(maps, title)
    except ImportError:
        raise KernelfuzzError(f"{path.name} needs matplotlib: pip install 'kernelfuzz[pictures]'") from None
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", metadata={"Software": None})
    write_file(path, buffer.getvalue())


def figure(maps: Sequence[OutputMap], title: str) -> "Figure":
    """Return the picture that `draw` saves. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    filled = [each for each in maps if each.height]
    shown = filled[:MOST_PANELS]
    lines = textwrap.wrap(title, 96, max_lines=3, placeholder=" …")
    if not shown:
        lines.append("The outputs have no elements.")
    if len(filled) > len(shown):
        lines.append(f"Not shown: {len(filled) - len(shown)} more.")
    present = sorted({Cell[name] for each in shown for name in each.counts})
    head, foot = 0.3 + 0.17 * len(lines), 0.15 + 0.2 * -(-len(present) // 2)
    heights = _map_heights(shown, _TALLEST_PAGE - head - foot)
    page = head + sum(heights) + (_ABOVE_MAP + _BELOW_MAP) * len(shown) + foot

    result = Figure(figsize=(_PAGE, page), dpi=_DPI)
    result.text(0.02, 1 - 0.15 / page, "\n".join(lines), fontsize=9, va="top", family="monospace", parse_math=False)
    top = page - head
    for each, height in zip(shown, heights):
        top -= _ABOVE_MAP + height
        # A small tensor keeps its square cells instead of being stretched over the page.
        _panel(result.add_axes((_LEFT / _PAGE, top / page, _cell(each) * each.width / _PAGE, height / page)), each)
        top -= _BELOW_MAP
    _legend(result, shown, present)
    return result


def _cell(each: OutputMap) -> float:
    """Return the inches of a cell's width."""
    return min(_LARGEST_CELL, _MAP_WIDTH / each.width)


def _map_heights(shown: Sequence[OutputMap], room: float) -> list[float]:
    """Return the inches of each map. Where they do not fit, the tall ones give way as far as they stay legible."""
    wanted = [min(_TALLEST_MAP, max(_SMALLEST_CELL, _cell(each)) * each.height) for each in shown]
    room -= (_ABOVE_MAP + _BELOW_MAP) * len(shown)
    excess = [max(0.0, height - _ALWAYS_LEGIBLE) for height in wanted]
    if sum(wanted) <= room or not sum(excess):
        return wanted
    share = max(0.0, 1 - (sum(wanted) - room) / sum(excess))
    return [height - (1 - share) * over for height, over in zip(wanted, excess)]


def _panel(axes: "Axes", each: OutputMap) -> None:
    """Draw a map; positions are in elements of the tensor."""
    from matplotlib.colors import ListedColormap

    down, across = each.tile
    rows, columns = each.rows * down, each.columns * across
    first, last = -each.above * down, (each.height - each.above) * down
    axes.imshow(
        [list(each.cells[start : start + each.width]) for start in range(0, len(each.cells), each.width)],
        cmap=ListedColormap([_LOOKS[kind][0] for kind in Cell]),
        vmin=-0.5,
        vmax=len(Cell) - 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, each.width * across - 0.5, last - 0.5, first - 0.5),
    )
    name = "input" if each.is_input else "output"
    name = each.name if each.name == name else f"{name} {each.name}"
    reduced = f"; a cell is {down} × {across} elements, the worst of them" if each.tile != (1, 1) else ""
    unseen = f"; {each.unseen:,} written further away" if each.unseen else ""
    axes.set_title(f"{name}{reduced}{unseen}", fontsize=9, loc="left", parse_math=False)
    down_is = f"; down: {each.axes.rows}" if each.axes.rows else ""
    axes.set_xlabel(f"across: {each.axes.columns}{down_is}", fontsize=8, loc="left", parse_math=False)
    axes.tick_params(labelsize=7)
    axes.set_xticks(_ticks(columns, 12))
    axes.set_yticks(_ticks(rows, 8) if each.axes.rows else [])
    if each.height <= _OUTLINED_UP_TO and each.width <= _OUTLINED_UP_TO:
        axes.set_xticks([x * across - 0.5 for x in range(each.width + 1)], minor=True)
        axes.set_yticks([first + y * down - 0.5 for y in range(each.height + 1)], minor=True)
        axes.grid(which="minor", color="#ffffff", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    block = each.axes.block
    if block is not None and block < columns and _cell(each) * block / across >= _SMALLEST_BLOCK:
        edges = [x - 0.5 for x in range(block, columns, block)]
        axes.vlines(edges, -0.5, rows - 0.5, color="#444444", linewidth=0.8)
    if (each.above, each.width, each.height) != (0, each.columns, each.rows):  # where the tensor itself lies
        corners = ((-0.5, -0.5), (columns - 0.5, -0.5), (columns - 0.5, rows - 0.5), (-0.5, rows - 0.5), (-0.5, -0.5))
        axes.plot(*zip(*corners), color="#222222", linewidth=1.2)
    axes.set_xlim(-0.5, each.width * across - 0.5)
    axes.set_ylim(last - 0.5, first - 0.5)


def _ticks(count: int, most: int) -> list[float]:
    """Return up to about `most` round positions among so many elements."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(integer=True, nbins=most, min_n_ticks=1).tick_values(0, max(1, count - 1))
    return [float(tick) for tick in ticks if 0 <= tick < count]


def _legend(picture: "Figure", shown: Sequence[OutputMap], present: Sequence[Cell]) -> None:
    """Explain the colours that occur, with the number of elements of each."""
    from matplotlib.patches import Patch

    patches = []
    for kind in present:
        colour, text = _LOOKS[kind]
        count = sum(each.counts.get(kind.name, 0) for each in shown)
        patches.append(Patch(facecolor=colour, edgecolor="#555555", label=f"{text} ({count:,})"))
    anchor = (_LEFT / _PAGE - 0.01, 0.0)
    picture.legend(handles=patches, loc="lower left", bbox_to_anchor=anchor, ncols=2, fontsize=8, frameon=False)
