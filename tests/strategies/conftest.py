"""What the tests of strategies share."""

from collections.abc import Callable
from typing import TypeVar

import hypothesis
import pytest
from hypothesis import strategies as st

Value = TypeVar("Value")


def _minimal(strategy: st.SearchStrategy[Value], condition: Callable[[Value], bool] = lambda _: True) -> Value:
    settings = hypothesis.settings(
        max_examples=2000,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        derandomize=True,
        database=None,
        deadline=None,
    )
    return hypothesis.find(strategy, condition, settings=settings)


def _drawn(strategy: st.SearchStrategy[Value], count: int, seed: int = 0) -> list[Value]:
    examples: list[Value] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(value: Value) -> None:
        examples.append(value)

    collect()
    return examples


@pytest.fixture(scope="session")
def minimal() -> Callable[..., Value]:
    """The function that returns the simplest example of a strategy, or the simplest that meets a condition."""
    return _minimal


@pytest.fixture(scope="session")
def drawn() -> Callable[..., list[Value]]:
    """The function that returns so many random examples of a strategy."""
    return _drawn
