"""A target made of a user's own strategy and oracle."""

import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from kernelfuzz.fuzz.targets import Target
from kernelfuzz.oracles import own as oracles
from kernelfuzz.oracles.expectation import Expectation, OutputSpecs
from kernelfuzz.strategies import own as strategies
from kernelfuzz.strategies.devices import USUAL, Placement
from kernelfuzz.strategies.errors import KernelfuzzError

_NOT_THE_USERS = ("kernelfuzz", "torch")


def target(
    cases: st.SearchStrategy[Any], oracle: Callable[..., Any], outputs: Callable[[Any], OutputSpecs] | None
) -> Target:
    """Return a target of that strategy and that oracle. With `outputs` the oracle also takes the initial contents."""

    def draw_cases(*, placement: st.SearchStrategy[Placement] = USUAL) -> st.SearchStrategy[strategies.Case]:
        return strategies.cases(cases, placement)

    def ask(inputs: SimpleNamespace, *arguments: Any) -> dict[str, oracles.Expected]:
        return oracles.by_output(_called(oracle, _copied(inputs), *arguments))

    def specs(inputs: SimpleNamespace) -> OutputSpecs:
        if outputs is not None:
            return dict(_called(outputs, inputs))
        # What the oracle says is kept: it is what the outputs are made for.
        inputs.case_expected = ask(inputs)
        return oracles.output_specs(inputs.case_expected)

    def expect(inputs: SimpleNamespace, initial: dict[str, Any]) -> Expectation:
        if outputs is None:
            returned = vars(inputs).pop("case_expected")
            return oracles.expectation(returned, oracles.output_specs(returned))
        return oracles.expectation(ask(inputs, initial), specs(inputs))

    return Target(
        name=strategies.Case.target,
        case_type=strategies.Case,
        cases=draw_cases,
        make_inputs=strategies.make_inputs,
        regimes=strategies.regimes,
        outputs=specs,
        expect=expect,
        small={},
    )


def _copied(inputs: SimpleNamespace) -> SimpleNamespace:
    """Return inputs that an oracle may change, or return views of."""

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [each.clone() for each in value]
        return value.clone() if isinstance(value, torch.Tensor) else value

    return SimpleNamespace(**{name: copy(value) for name, value in vars(inputs).items()})


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function. Raises KernelfuzzError that says, in one line, where what it raised comes from."""
    try:
        return function(*arguments)
    except KernelfuzzError:
        raise
    except Exception as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        own = [
            each for each in frames if str(each[0].f_globals.get("__name__")).partition(".")[0] not in _NOT_THE_USERS
        ]
        frame, line = (own or frames)[-1]
        name = getattr(function, "__name__", "the oracle")
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise KernelfuzzError(f"{name} raised {text} ({Path(frame.f_code.co_filename).name}:{line})") from error
