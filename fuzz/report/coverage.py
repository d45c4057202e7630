"""What was tried of a job's cases and what was not, as the page shows it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A value of a dimension: in how many examples it was, and that as a part of the most frequent one's."""

    value: str
    count: int
    part: float


@dataclass(frozen=True)
class Dimension:
    """A dimension with its values; `untried` are those that the type lists and no example had."""

    name: str
    bars: list[Bar]
    untried: list[str]


@dataclass(frozen=True)
class Cell:
    """Two dimensions: which part of the pairs of their values was tried, and which ones were not, in words. `index` is
    the place of their counts in Coverage.pairs."""

    first: str
    second: str
    part: float
    untried: str
    index: int


@dataclass(frozen=True)
class JobCoverage:
    """The coverage of one job.

    - rows: for each dimension but the last the cells with those after it, None for two that no example had both
    - pairs: for the page's script: [first dimension, second, counts with a row for each value of the first]
    - untried: how many pairs of values were not tried, of `possible`
    """

    dimensions: list[Dimension]
    rows: list[tuple[str, list[Cell | None]]]
    pairs: list[Any]
    untried: int
    possible: int


def job_coverage(document: dict[str, Any], most_named: int) -> JobCoverage:
    """Return what Coverage.to_json counted, for the page; a cell names so many pairs at most, and says how many more
    there are."""
    found = document["dimensions"]
    names = [each["name"] for each in found]
    values = [each["values"] for each in found]
    cells: dict[tuple[int, int], Cell] = {}
    pairs: list[Any] = []
    untried = possible = 0
    for one, other, table in document["pairs"]:
        i, j, counts = (one, other, table) if one < other else (other, one, [list(column) for column in zip(*table)])
        missing = [(a, b) for a, row in zip(values[i], counts) for b, n in zip(values[j], row) if not n]
        size = len(values[i]) * len(values[j])
        named = ", ".join(f"{a} with {b}" for a, b in missing[:most_named])
        more = f" and {len(missing) - most_named} more" if len(missing) > most_named else ""
        cells[i, j] = Cell(names[i], names[j], 1 - len(missing) / size, named + more, len(pairs))
        pairs.append([i, j, counts])
        untried, possible = untried + len(missing), possible + size
    rows = [(name, [cells.get((i, j)) for j in range(i + 1, len(names))]) for i, name in enumerate(names)]
    return JobCoverage([_dimension(each) for each in found], rows[:-1], pairs, untried, possible)


def _dimension(document: dict[str, Any]) -> Dimension:
    most = max(document["counts"], default=0) or 1
    bars = [Bar(value, n, n / most) for value, n in zip(document["values"], document["counts"])]
    return Dimension(document["name"], bars, [bar.value for bar in bars if not bar.count])
