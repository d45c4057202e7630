"""What of a target's cases was tried: each dimension of a case by itself, and every two of them together."""

import dataclasses
import typing
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from kernelfuzz.strategies.batches import BASE, Batch
from kernelfuzz.strategies.case import Case

_LEFT_OUT = ("seed", "reduced")
"""Fields that say nothing of a case's structure."""

OTHER = "other"
MOST_VALUES = 24
"""Values of one dimension that are told apart; what comes after so many counts as OTHER."""


def dimensions(case: Case) -> dict[str, str]:
    """Return the values of a case by dimension, as labels.

    A dimension is a field, a nested one with a dot. Numbers fall into ranges that end at powers of two, tuples count
    by their length, a batch by its tokens, its segments and what is in it.
    """
    return dict(_flat(case, ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Batch):
        yield f"{name}.tokens", _range(value.num_tokens)
        yield f"{name}.segments", _range(len(value.segments))
        yield f"{name}.mix", _mix(value)
    elif dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            if each.name not in _LEFT_OUT:
                yield from _flat(getattr(value, each.name), f"{name}.{each.name}" if name else each.name)
    else:
        yield name, _label(value)


def _label(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, tuple)):
        return "none" if value is None else str(value)
    return _range(len(value) if isinstance(value, tuple) else value)


def _range(number: int) -> str:
    """Return 0, 1, 2, 3-4, 5-8, … or below 0."""
    if number < 0:
        return "below 0"
    if number <= 2:
        return str(number)
    upper = 1 << (number - 1).bit_length()
    return f"{upper // 2 + 1}-{upper}"


def _mix(batch: Batch) -> str:
    active = set(batch.active())
    if not active:
        return "empty"
    if active == {BASE}:
        return "base only"
    return "base and LoRA" if BASE in active else "LoRA only"


def possible(case_type: type) -> dict[str, list[str]]:
    """Return, for the dimensions whose type lists its values (bool, Literal), what these are."""
    return dict(_possible(case_type, ""))


def _possible(cls: type, prefix: str) -> Iterator[tuple[str, list[str]]]:
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        kind, name = hints[each.name], prefix + each.name
        if each.name in _LEFT_OUT:
            continue
        if kind is Batch:
            yield f"{name}.mix", ["empty", "base only", "LoRA only", "base and LoRA"]
        elif kind is bool:
            yield name, ["False", "True"]
        elif typing.get_origin(kind) is typing.Literal:
            yield name, [_label(value) for value in typing.get_args(kind)]
        elif dataclasses.is_dataclass(kind):
            yield from _possible(typing.cast(type, kind), f"{name}.")


class Coverage:
    """Counts the values of cases of one target."""

    def __init__(self, case_type: type) -> None:
        self._possible = possible(case_type)
        self._values: dict[str, dict[str, None]] = {
            name: dict.fromkeys(values) for name, values in self._possible.items()
        }
        self._counts: dict[str, Counter[str]] = {}
        self._pairs: dict[tuple[str, str], Counter[tuple[str, str]]] = {}

    def add(self, case: Case) -> None:
        """Count a case."""
        found = {name: self._known(name, value) for name, value in dimensions(case).items()}
        for name, value in found.items():
            self._counts.setdefault(name, Counter())[value] += 1
        for (first, one), (second, other) in combinations(found.items(), 2):
            self._pairs.setdefault((first, second), Counter())[one, other] += 1

    def _known(self, name: str, value: str) -> str:
        values = self._values.setdefault(name, {})
        if value not in values and len(values) >= MOST_VALUES:
            value = OTHER
        values[value] = None
        return value

    def to_json(self) -> dict[str, Any]:
        """Return the counts in JSON types.

        - dimensions: {name, values, counts, closed}, where values that the type lists are there even with count 0, and
          `closed` says that it lists them all
        - pairs: [i, j, matrix] for the dimensions i < j, the matrix with a row for each value of i, a column for each
          of j
        """
        names = list(self._counts)
        values = {name: sorted(self._values[name], key=self._order(name)) for name in names}
        return {
            "dimensions": [
                {
                    "name": name,
                    "values": values[name],
                    "counts": [self._counts[name][value] for value in values[name]],
                    "closed": name in self._possible,
                }
                for name in names
            ],
            "pairs": [
                [names.index(first), names.index(second), [[n[a, b] for b in values[second]] for a in values[first]]]
                for (first, second), n in self._pairs.items()
            ],
        }

    def _order(self, name: str) -> Any:
        """Return the sort key of a dimension's values: as the type lists them, else numbers by size."""
        listed = {value: index for index, value in enumerate(self._possible.get(name, []))}

        def key(value: str) -> tuple[float, str]:
            start = value.partition("-")[0]
            number = float(start) if start.isdigit() else -1.0 if value == "below 0" else float("inf")
            return listed.get(value, number), value

        return key
