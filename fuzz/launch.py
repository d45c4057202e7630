"""One case on one kernel in this process: inputs, oracle, guarded launch, verdict."""

import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kernelfuzz.fuzz.buffers import Buffers
from kernelfuzz.fuzz.targets import Target
from kernelfuzz.fuzz.verdict import Failure, Verdict, by_severity, judge_output, judge_stray_write
from kernelfuzz.kernels.base import Kernel, UnsupportedCaseError
from kernelfuzz.kernels.interpreter import OutOfBoundsError
from kernelfuzz.oracles.expectation import Expectation
from kernelfuzz.strategies.case import Case

_NOT_UNDER_TEST = ("torch", "triton", "kernelfuzz")


class Stopwatch:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap towards `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def judge(target: Target, kernel: Kernel, case: Case, device: torch.device) -> Verdict:
    """Run one case on a kernel and return the verdict. What the kernel raises becomes part of the verdict."""
    watch = Stopwatch()
    buffers = Buffers(device, case.seed)
    inputs = target.make_inputs(case, device, buffers.allocate)
    specs = target.outputs(inputs)
    outputs = {name: buffers.output(name, spec) for name, spec in specs.items()}
    initial = buffers.freeze()
    watch.lap("inputs")
    expectation = target.expect(inputs, initial)
    watch.lap("oracle")
    try:
        failures = _launch(kernel, inputs, outputs, expectation, device)
    except UnsupportedCaseError as error:
        return Verdict(rejected=str(error), seconds=watch.seconds)
    watch.lap("kernel")
    if device.type != "cpu" and any(failure.kind == "raised" for failure in failures):
        # After a device error the memory cannot be read any more.
        return Verdict(tuple(failures), seconds=watch.seconds)
    stray = [judge_stray_write(write) for write in buffers.stray_writes()]
    if any(failure.kind == "out_of_bounds" for failure in stray):
        # A write that ran out of an output may have reached an input behind it; that is the same mistake.
        stray = [failure for failure in stray if failure.kind == "out_of_bounds"]
    failures += stray
    worst = 0.0
    if not any(failure.kind in ("raised", "not_raised", "out_of_bounds") for failure in failures):
        for name, expected in expectation.outputs.items():
            found, ratio = judge_output(
                name, outputs[name], initial[name], expected, from_sentinel=specs[name].initial is None
            )
            failures += found
            worst = max(worst, ratio)
    watch.lap("check")
    return Verdict(by_severity(failures), worst, seconds=watch.seconds)


def _launch(
    kernel: Kernel, inputs: Any, outputs: dict[str, torch.Tensor], expectation: Expectation, device: torch.device
) -> list[Failure]:
    """Launch and synchronise; return a failure if it raised, or did not where it must."""
    wanted = expectation.error
    try:
        with filled_scratch():
            kernel.launch(inputs, outputs)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    except UnsupportedCaseError:
        raise
    except OutOfBoundsError as error:
        return [Failure("out_of_bounds", error.argument or "", f"{error.access}_in_{error.kernel}", str(error))]
    except Exception as error:
        if wanted is not None and wanted.text in str(error):
            return []
        message = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        return [Failure("raised", "", f"{type(error).__name__}_in_{_raising_function(error)}", message)]
    if wanted is not None:
        return [Failure("not_raised", "", wanted.clause, f"accepted what must be refused with {wanted.text!r}")]
    return []


@contextmanager
def filled_scratch() -> Iterator[None]:
    """Have torch fill the memory that the kernel's host code allocates with NaN or the largest integer.

    That is what `torch.empty` does under deterministic algorithms, see torch.utils.deterministic.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*determinis.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _raising_function(error: BaseException) -> str:
    """Return the innermost function of the code under test: the same from release to release."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    own = [frame for frame, package in zip(frames, packages) if package not in _NOT_UNDER_TEST]
    return (own or frames)[-1].f_code.co_name
