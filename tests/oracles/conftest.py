"""What the tests of oracles share."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from kernelfuzz.oracles.expectation import Expectation, ExpectedOutput


def _expectation(oracle: ModuleType, inputs: Any) -> tuple[dict[str, torch.Tensor], Expectation]:
    initial = {
        name: torch.full(spec.shape, 3, dtype=spec.dtype) if spec.initial is None else spec.initial.clone()
        for name, spec in oracle.outputs(inputs).items()
    }
    return initial, oracle.expect(inputs, initial)


def _clauses(expected: ExpectedOutput) -> list[str]:
    names = [clause.name for clause in expected.clauses]
    return [names[index] for index in expected.region.flatten().tolist()]


def _worst_ratio(actual: torch.Tensor, expected: ExpectedOutput) -> float:
    error = (actual.double() - expected.values).abs()[expected.mask("write")]
    assert expected.bound is not None
    bound = expected.bound[expected.mask("write")]
    return float(torch.where(error == 0, 0.0, error / bound).max()) if error.numel() else 0.0


@pytest.fixture(scope="session")
def expectation() -> Callable[..., Any]:
    """The function from oracle and inputs to initial contents (3 where none are given) and what is expected."""
    return _expectation


@pytest.fixture(scope="session")
def clauses() -> Callable[..., list[str]]:
    """The function that names the clause of each element of an expected output, in memory order."""
    return _clauses


@pytest.fixture(scope="session")
def worst_ratio() -> Callable[..., float]:
    """The function that returns the worst err/bound over the elements that must be written."""
    return _worst_ratio
