"""Verdicts: what the engine says of one case, and the comparison of an output with its expectation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from kernelfuzz.fuzz.buffers import StrayWrite
from kernelfuzz.fuzz.comparison import compare
from kernelfuzz.fuzz.writemap import OutputMap
from kernelfuzz.oracles.expectation import ExpectedOutput

FailureKind = Literal[
    "crash",
    "hang",
    "out_of_bounds",
    "race",
    "uninitialised_read",
    "raised",
    "not_raised",
    "input_mutated",
    "overwritten",
    "unwritten",
    "wrong_value",
]
"""How a kernel can fail, the most severe first."""

KINDS: tuple[FailureKind, ...] = get_args(FailureKind)
SHOWN_ELEMENTS = 6
SHOWN_CHARACTERS = 400

UNUSABLE_AFTERWARDS = "unusable_afterwards"
"""The clause of a crash that is seen only after a case: it may be the harness's own."""


@dataclass(frozen=True)
class Failure:
    """One way in which a case failed.

    - output: the output or input concerned, empty where none is
    - clause: the contract's clause that was broken; for an exception its type and the function that raised it
    - message: one line for a person
    - elements: the first few differing elements, each with its index, what was expected and what was there
    - output_tail: the end of what the worker printed before it died
    """

    kind: FailureKind
    output: str
    clause: str
    message: str
    elements: tuple[dict[str, Any], ...] = ()
    output_tail: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a structure with one or several content seeds: passed, rejected by the kernel, or failed.

    - ratio: the worst |actual - value| / bound over the elements with a bound; 0 where there is none
    - error: why the harness itself could not judge the case; says nothing of the kernel
    - own_error: the error is the harness's for certain, whatever the kernel did before it
    - cases: how many seeds were run, the last of them failed or rejected if any
    - seed: the content seed that failed; None where none did, or none alone
    - seconds: wall time by phase: inputs, oracle, kernel, check
    - maps: what became of the outputs, and of inputs that were written to; where they were asked for
    """

    failures: tuple[Failure, ...] = ()
    ratio: float = 0.0
    rejected: str = ""
    error: str = ""
    own_error: bool = False
    cases: int = 1
    seed: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    maps: tuple[OutputMap, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the verdict in JSON types."""
        return {**asdict(replace(self, maps=())), "maps": [each.to_json() for each in self.maps]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Verdict":
        """Return the verdict that `to_json` wrote."""
        failures = tuple(
            Failure(**{**failure, "elements": tuple(failure["elements"])}) for failure in document["failures"]
        )
        maps = tuple(OutputMap.from_json(each) for each in document["maps"])
        return cls(**{**document, "failures": failures, "maps": maps})


def printable(text: str) -> str:
    """Return text of a kernel's for one line of a terminal or a report: without control characters, and not endless."""
    shown = "".join(character if character.isprintable() or character == "\n" else " " for character in text)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}…"


def by_severity(failures: list[Failure]) -> tuple[Failure, ...]:
    """Return the failures, the most severe kind first."""
    return tuple(sorted(failures, key=lambda failure: KINDS.index(failure.kind)))


def judge_stray_write(write: StrayWrite) -> Failure:
    """Turn a changed byte where none may change into a failure."""
    offsets = ", ".join(map(str, write.offsets))
    where = f"{write.count} element(s) of {write.name} changed, first at element {offsets}"
    if write.is_input and write.inside:
        return Failure("input_mutated", write.name, "inputs_are_not_written", f"{where}: it is an input")
    return Failure("out_of_bounds", write.name, "redzone", f"{where}: outside the tensor")


def judge_output(
    name: str, actual: torch.Tensor, initial: torch.Tensor, expected: ExpectedOutput, *, from_sentinel: bool
) -> tuple[list[Failure], float]:
    """Compare an output with its expectation; return its failures, one per clause and kind, and the worst ratio."""
    found = compare(actual, initial, expected, from_sentinel=from_sentinel)
    worst = float(found.ratios[found.must_write].max()) if bool(found.must_write.any()) else 0.0
    if not bool((found.wrong | found.untouched | found.overwritten).any()):
        return [], worst

    failures = []
    for index, clause in enumerate(expected.clauses):
        here = expected.region == index
        for kind, hit in (
            ("overwritten", found.overwritten & here),
            ("unwritten", found.untouched & here),
            ("wrong_value", found.incorrect(index)),
        ):
            if bool(hit.any()):
                reference = initial if kind == "overwritten" else found.values
                shown = actual if kind != "wrong_value" else found.canonical
                bounded = found.ratios if kind == "wrong_value" and found.has_bound else None
                failures.append(_failure(kind, name, clause.name, hit, shown, reference, bounded))
    return failures, worst


def _failure(
    kind: Any,
    name: str,
    clause: str,
    hit: torch.Tensor,
    actual: torch.Tensor,
    reference: torch.Tensor,
    ratios: torch.Tensor | None,
) -> Failure:
    indices = hit.nonzero()
    elements = []
    for index in indices[:SHOWN_ELEMENTS].tolist():
        at = tuple(index)
        element = {"index": index, "expected": _number(reference[at]), "actual": _number(actual[at])}
        if ratios is not None:
            element["error_over_bound"] = _number(ratios[at])
        elements.append(element)
    what = {"overwritten": "changed but must be kept", "unwritten": "never written", "wrong_value": "wrong"}[kind]
    message = f"{indices.shape[0]} of {hit.numel()} elements of {name} {what} ({clause})"
    return Failure(kind, name, clause, message, tuple(elements))


def _number(element: torch.Tensor) -> float | int | str:
    """Return a number for JSON, which has no NaN or infinity: those as text."""
    value = element.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
