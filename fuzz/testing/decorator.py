"""`kernel_test`: makes a Hypothesis test of a function that calls a kernel."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

from kernelfuzz.fuzz.targets import Target, get_target
from kernelfuzz.fuzz.testing import own
from kernelfuzz.fuzz.testing.source import TestSource
from kernelfuzz.kernels.base import Kernel, UnsupportedCaseError
from kernelfuzz.kernels.registry import DEVICE_KINDS
from kernelfuzz.oracles.expectation import OutputSpecs
from kernelfuzz.strategies.errors import KernelfuzzError

ASSIGNMENT = "kernelfuzz_assignment"
"""The argument through which the pytest plugin tells a kernel test where to run. Without the plugin it is left out."""

_KERNEL_ARGUMENTS = ("inputs", "outputs")


@dataclass(frozen=True)
class KernelTest:
    """What `kernel_test` was told of a function, and the function.

    - extras: strategies for further arguments of the function
    - devices: the kinds of devices that it is for
    - fixtures: arguments that pytest provides
    """

    function: Callable[..., None]
    target: Target
    extras: Mapping[str, st.SearchStrategy[Any]]
    devices: tuple[str, ...]
    fixtures: tuple[str, ...]
    source: TestSource

    @classmethod
    def load(cls, source: TestSource) -> "KernelTest":
        """Import the kernel test that is defined there. Raises KernelfuzzError if there is none."""
        found = getattr(source.find(), "kernel_test", None)
        if not isinstance(found, cls):
            raise KernelfuzzError(f"{source.file}: {source.name} is no kernel test")
        return found

    @property
    def is_method(self) -> bool:
        """Whether the function takes an instance of its class first."""
        return next(iter(inspect.signature(self.function).parameters)) == "self"

    def bound_to(self, *instance: object) -> "KernelTest":
        """Return the test of a method of that instance; without one, the test itself."""
        return replace(self, function=MethodType(self.function, instance[0])) if instance else self

    def kernel(self) -> Kernel:
        """Return the function as a kernel; that of a method with a new instance of its class."""
        function = self.function
        if self.is_method:
            function = MethodType(function, self.source.owner())

        def launch(*arguments: Any, **named: Any) -> None:
            try:
                function(*arguments, **named)
            except UnsatisfiedAssumption as error:
                raise UnsupportedCaseError("assume(False)") from error
            except BaseException as error:
                outcome = type(error).__name__  # pytest's are no Exceptions
                if outcome in ("Skipped", "XFailed"):
                    raise UnsupportedCaseError(str(error)) from error
                if outcome == "Failed":
                    raise AssertionError(str(error)).with_traceback(error.__traceback__) from error
                raise

        return Kernel(launch, "")


def kernel_test(
    *,
    target: str | None = None,
    cases: st.SearchStrategy[Any] | None = None,
    oracle: Callable[..., Any] | None = None,
    outputs: Callable[[Any], OutputSpecs] | None = None,
    devices: tuple[str, ...] = DEVICE_KINDS,
    **extras: st.SearchStrategy[Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a Hypothesis test of a function `(inputs, outputs, …)` that launches a kernel, once for each drawn case.

    The function reads the tensors of `inputs` and writes those of `outputs`, both by name as attributes. Its further
    arguments are pytest fixtures, but not function-scoped ones, as Hypothesis has it; or what the strategies in
    `extras` draw, by name as `@given` takes them. It runs in a worker process, and so must be at the top of a file or
    in a class there. The worker makes an instance of the class for itself: what `setup_method` sets is not there.

    - target: a contract that kernelfuzz knows (`kernelfuzz list`): strategy, oracle and outputs come with it
    - cases: a strategy; with a target a narrower one of that target's cases. Otherwise it draws mappings, or
      dataclasses, of `TensorSpec` and plain values, which become the attributes of `inputs`
    - oracle: without a target, a pure-torch function of the inputs that returns for each output by name an
      `Approximation`, an `Expected`, or a tensor of integers; for a single one, which is called "output", that alone
    - outputs: where a kernel adds to what an output holds, or an output is strided: a function of the inputs that
      returns an `OutputSpec` for each by name. The oracle is then called with the initial contents by name, too
    - devices: kinds of devices that the kernel is written for

    `@settings`, `@example(case=…)` and `@seed` go above it. What they say holds, but for the deadline: a case takes as
    long as its kernel does.

    Raises KernelfuzzError, where the function is defined, for arguments that do not go together.
    """
    chosen = _target(target, cases, oracle, outputs)
    if unknown := [kind for kind in devices if kind not in DEVICE_KINDS]:
        raise KernelfuzzError(f"kernel_test: unknown device {unknown[0]!r}: expected {', '.join(DEVICE_KINDS)}")

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        name = getattr(function, "__qualname__", repr(function))
        if getattr(function, "is_hypothesis_test", False):
            raise KernelfuzzError(f"{name}: give the strategies of @given to kernel_test, as x=st.integers()")
        if any(isinstance(each, settings) for each in vars(function).values()):
            raise KernelfuzzError(f"{name}: @settings goes above @kernel_test")
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise KernelfuzzError(f"{name}: a kernel test is a plain function, not async and without yield")
        parameters = inspect.signature(function).parameters
        if missing := [each for each in (*_KERNEL_ARGUMENTS, *extras) if each not in parameters]:
            raise KernelfuzzError(f"{name} has no argument {missing[0]!r}: kernel_test calls it with one")
        fixtures = tuple(
            each.name
            for each in parameters.values()
            if each.name not in ("self", *_KERNEL_ARGUMENTS, *extras) and each.default is each.empty
        )
        test = KernelTest(function, chosen, extras, devices, fixtures, TestSource.of(function))
        return _hypothesis_test(test)

    return decorate


def _target(
    name: str | None,
    cases: st.SearchStrategy[Any] | None,
    oracle: Callable[..., Any] | None,
    outputs: Callable[[Any], OutputSpecs] | None,
) -> Target:
    if cases is not None and not isinstance(cases, st.SearchStrategy):
        raise KernelfuzzError(f"kernel_test: cases must be a strategy, not {cases!r}: call it, as in cases=my_cases()")
    if name is None:
        if cases is None or oracle is None:
            raise KernelfuzzError("kernel_test needs a target, or cases and an oracle")
        return own.target(cases, oracle, outputs)
    if oracle is not None or outputs is not None:
        raise KernelfuzzError(f"kernel_test: {name} has its own oracle and outputs: leave yours out, or the target")
    known = get_target(name)
    if cases is None:
        return known
    return replace(known, cases=lambda **_: cases, specialised=())


def _hypothesis_test(test: KernelTest) -> Callable[..., None]:
    """Return the test as pytest and Hypothesis see it.

    What it is called with by name are the assignment and fixtures. Settings are those that hold when it is called: a
    plain `@given` test would have those of its definition, and a deadline.
    """

    @functools.wraps(test.function)
    def draws(*instance: Any, case: Any, **arguments: Any) -> None:
        run_alone(test, instance, arguments).check(case, {name: arguments[name] for name in test.extras})

    from_pytest = [ASSIGNMENT, *test.fixtures]
    draws.__signature__ = _signature(test, [*from_pytest, "case", *test.extras])  # type: ignore[attr-defined]
    drawn = given(case=test.target.cases(), **test.extras)(draws)

    @functools.wraps(drawn)
    def entry(*instance: Any, **arguments: Any) -> None:
        __tracebackhide__ = True
        # Later: workers, which run.py starts, import this module.
        from kernelfuzz.fuzz.testing.run import run_kernel_test

        run_kernel_test(test, entry, instance, arguments)

    entry.__signature__ = _signature(test, from_pytest)  # type: ignore[attr-defined]
    entry.kernel_test = test  # type: ignore[attr-defined]
    entry.__wrapped__ = test.function  # where pytest says that the test is
    return entry


def run_alone(test: KernelTest, instance: tuple[Any, ...], arguments: Mapping[str, Any]) -> Any:
    """Return what runs single cases for a fuzzer that calls the test's inner function itself, as HypoFuzz does."""
    from kernelfuzz.fuzz.testing.run import kept_run

    return kept_run(test, instance, {name: arguments[name] for name in test.fixtures if name in arguments})


def _signature(test: KernelTest, names: list[str]) -> inspect.Signature:
    kind = inspect.Parameter.KEYWORD_ONLY
    first = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)] if test.is_method else []
    return inspect.Signature([*first, *(inspect.Parameter(name, kind) for name in names)])
