"""Cases and differing elements as lines for a person."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from kernelfuzz.strategies.case import Case


def element_lines(elements: tuple[dict[str, Any], ...]) -> Iterator[Text]:
    """Return differing elements as readable lines."""
    for element in elements:
        index = ", ".join(map(str, element["index"]))
        text = f"    [{index}] expected {element['expected']}, got {element['actual']}"
        if "error_over_bound" in element:
            text += f"  (err/bound {element['error_over_bound']:.3g})" if _finite(element) else "  (err/bound inf)"
        yield Text(text, style="dim")


def _finite(element: dict[str, Any]) -> bool:
    return not isinstance(element["error_over_bound"], str)


def case_lines(case: Case) -> Iterator[Text]:
    """Return a case as readable lines, several fields to a line; a field that has its usual value is left out."""
    line = "   "
    for name, value in case.shown().items():
        text = f" {name}={_short(value)}"
        if len(line) + len(text) > 76:
            yield Text(line)
            line = "   "
        line += text
    yield Text(line)


def _short(value: Any) -> str:
    """Return a value of a case without the names of its types: segments as adapter×length."""
    if hasattr(value, "segments"):
        return "[" + " ".join(f"{segment.adapter}×{segment.length}" for segment in value.segments) + "]"
    if dataclasses.is_dataclass(value) and type(value).__str__ is object.__str__:
        return "(" + " ".join(f"{name}={_short(inner)}" for name, inner in vars(value).items()) + ")"
    return str(value)
