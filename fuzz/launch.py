"""Cases on one kernel in this process: inputs, oracle, guarded launch, verdict."""

import dataclasses
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kernelfuzz.fuzz.buffers import Buffers, Memory
from kernelfuzz.fuzz.comparison import compare
from kernelfuzz.fuzz.targets import Target
from kernelfuzz.fuzz.verdict import Failure, Verdict, by_severity, judge_output, judge_stray_write, printable
from kernelfuzz.fuzz.writemap import OutputMap, input_map, output_map
from kernelfuzz.kernels.base import Kernel, Outputs, UnsupportedCaseError, WrongResultError
from kernelfuzz.kernels.interpreter import OutOfBoundsError
from kernelfuzz.oracles.expectation import Expectation, ExpectedError, OutputSpecs
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.devices import Placement, with_tensor_on_cpu
from kernelfuzz.strategies.errors import KernelfuzzError

_NOT_UNDER_TEST = ("torch", "triton", "kernelfuzz")


@dataclass(frozen=True)
class Conditions:
    """What the cases of a job are run under.

    - memory: what lies behind a tensor. Guard pages in every second case only, those with even seeds: there tensors are
      aligned to their elements and no further, and some kernels take another path then
    - fills_scratch: memory that the kernel's host code allocates starts as NaN or the largest integer
    """

    device: torch.device
    memory: Memory = "shared"
    fills_scratch: bool = True

    def buffers(self, case: Case) -> Buffers:
        """Return the buffers for a case."""
        unguarded = self.memory == "guarded" and case.seed % 2 == 1
        return Buffers(self.device, case.seed, "shared" if unguarded else self.memory)


class Stopwatch:
    """Wall seconds by phase; on a GPU what a phase launched is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap towards `phase`."""
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def judge(target: Target, kernel: Kernel, case: Case, seeds: Sequence[int], conditions: Conditions) -> Verdict:
    """Run a structure with each of the content seeds and return one verdict: the first failing seed's, or passed.

    Targets that can are run with all seeds at once; what fails there is run again seed by seed.
    """
    together = None
    if len(seeds) > 1 and target.stackable:
        together = _judge(target, kernel, case, seeds, conditions)
        if not together.failures or any(failure.kind == "crash" for failure in together.failures):
            return together
    worst, spent = 0.0, Counter[str]()
    for number, seed in enumerate(seeds, start=1):
        verdict = judge_alone(target, kernel, dataclasses.replace(case, seed=seed), conditions)
        worst = max(worst, verdict.ratio)
        spent.update(verdict.seconds)
        if verdict.failures or verdict.rejected:
            return dataclasses.replace(verdict, seed=seed, cases=number, seconds=dict(spent))
    if together is None:
        return Verdict(ratio=worst, cases=len(seeds), seconds=dict(spent))
    # What fails among other seeds and not alone is a failure still: now and then, or after the launches before it.
    note = "; only when launched together with other seeds"
    failures = tuple(dataclasses.replace(each, message=each.message + note) for each in together.failures)
    places = [each.elements[0]["index"][0] for each in failures if each.elements]
    return dataclasses.replace(together, failures=failures, seed=seeds[places[0]] if places else None)


def judge_alone(
    target: Target, kernel: Kernel | None, case: Case, conditions: Conditions, *, maps: bool = False
) -> Verdict:
    """Run one case on a kernel and return the verdict. What the kernel raises becomes part of the verdict; with `maps`
    also what became of the outputs, unless their memory cannot be read any more.

    Without a kernel everything but the launch is done, so that what goes wrong then is not a kernel's fault.
    """
    return _judge(target, kernel, case, None, conditions, maps=maps)


def _judge(
    target: Target,
    kernel: Kernel | None,
    case: Case,
    seeds: Sequence[int] | None,
    conditions: Conditions,
    *,
    maps: bool = False,
) -> Verdict:
    device = conditions.device
    watch = Stopwatch(device)
    buffers = conditions.buffers(case)
    inputs = target.make_inputs(case, device, buffers.allocate, *([] if seeds is None else [seeds]))
    specs = target.outputs(inputs)
    outputs = Outputs({name: buffers.output(name, spec) for name, spec in specs.items()})
    initial = buffers.freeze()
    watch.lap("inputs")
    expectation = target.expect(inputs, initial)
    watch.lap("oracle")
    launches = [(inputs, outputs)]
    if seeds is not None:
        items = [Outputs({name: each[i] for name, each in outputs.items()}) for i in range(len(seeds))]
        launches = [(inputs.item(i), item) for i, item in enumerate(items)]
    forgotten = case.placement.tensor_on_cpu
    if forgotten is not None:
        launches = [(with_tensor_on_cpu(given, forgotten), written) for given, written in launches]
    refused, failures = False, list[Failure]()
    try:
        if kernel is not None:
            with _placed(case.placement, device) as devices:
                refused, failures = _launch(
                    kernel, launches, expectation.error, conditions, devices, lenient=forgotten is not None
                )
    except UnsupportedCaseError as error:
        return Verdict(rejected=str(error), seconds=watch.seconds)
    if any(failure.kind == "crash" for failure in failures):  # the device's memory cannot be read any more
        failures = _as_of(case.placement, failures)
        return Verdict(tuple(failures), cases=len(launches), seconds=watch.seconds)
    watch.lap("kernel")
    finished = not (refused or failures)
    stray = [judge_stray_write(write) for write in buffers.stray_writes()]
    if any(failure.kind == "out_of_bounds" for failure in stray):
        # A write that ran out of an output may have reached an input behind it; that is the same mistake.
        stray = [failure for failure in stray if failure.kind == "out_of_bounds"]
    failures += stray
    worst = 0.0
    if finished and not any(failure.kind == "out_of_bounds" for failure in stray):
        for name, expected in expectation.outputs.items():
            found, ratio = judge_output(
                name, outputs[name], initial[name], expected, from_sentinel=specs[name].initial is None
            )
            failures += found
            worst = max(worst, ratio)
    drawn = tuple(_maps(buffers, specs, expectation, initial)) if maps else ()
    watch.lap("check")
    failures = _as_of(case.placement, failures)
    return Verdict(by_severity(failures), worst, cases=len(launches), seconds=watch.seconds, maps=drawn)


def _maps(
    buffers: Buffers, specs: OutputSpecs, expectation: Expectation, initial: Mapping[str, torch.Tensor]
) -> Iterator[OutputMap]:
    """Look at every output with an expectation, and at every input that something was written in or around."""
    for guarded, touched in buffers.changed_places():
        name = guarded.name
        if guarded.is_input:
            if touched.numel():
                yield input_map(guarded, touched)
        elif name in expectation.outputs:
            spec, expected = specs[name], expectation.outputs[name]
            compared = compare(guarded.tensor, initial[name], expected, from_sentinel=spec.initial is None)
            yield output_map(guarded, spec.axes, compared, touched)


def _as_of(placement: Placement, failures: list[Failure]) -> list[Failure]:
    """Return the failures under the clause that was broken: with a tensor on the CPU they are all the same mistake."""
    if placement.tensor_on_cpu is None:
        return failures
    return [dataclasses.replace(failure, output="", clause="tensor_on_cpu") for failure in failures]


def _launch(
    kernel: Kernel,
    launches: Sequence[tuple[Any, Outputs]],
    wanted: ExpectedError | None,
    conditions: Conditions,
    devices: Sequence[torch.device],
    *,
    lenient: bool,
) -> tuple[bool, list[Failure]]:
    """Launch one after the other and wait for the device. Return whether the calls were refused, as `wanted` says or
    as they may where one is `lenient`, and what failed."""
    refused = False
    with filled_scratch() if conditions.fills_scratch else nullcontext():
        for inputs, outputs in launches:
            try:
                kernel.launch(inputs, outputs)
            except (UnsupportedCaseError, KernelfuzzError, torch.OutOfMemoryError):  # none is the kernel's fault
                raise
            except WrongResultError as error:
                return False, [Failure("wrong_value", error.output, error.clause, str(error))]
            except OutOfBoundsError as error:
                clause = f"access_in_{error.kernel}"  # a lost mask shows in loads and in stores
                return False, [Failure("out_of_bounds", error.argument or "", clause, str(error))]
            except Exception as error:
                if unusable(*devices) is not None:
                    return False, [_crash(error)]
                if not lenient and not (wanted is not None and wanted.text in _text(error)):
                    return False, [_raised(error)]
                refused = True
            else:
                if wanted is not None:
                    message = f"accepted what must be refused with {wanted.text!r}"
                    return False, [Failure("not_raised", "", wanted.clause, message)]
    return refused, _settle(devices)


def _raised(error: Exception) -> Failure:
    message = printable(f"{type(error).__name__}: {_first_line(error)}".rstrip(": "))
    return Failure("raised", "", f"{type(error).__name__}_in_{_raising_function(error)}", message)


@contextmanager
def _placed(placement: Placement, device: torch.device) -> Iterator[tuple[torch.device, ...]]:
    """Make current what the placement says, and give the devices that a call may launch on. The tensors are made: the
    device has nothing left to do."""
    if device.type == "cpu":
        yield (device,)
        return
    backend = getattr(torch, device.type)
    current = device
    if placement.other_device_current:
        if backend.device_count() < 2:
            raise UnsupportedCaseError(f"there is no other {device.type} device here")
        current = torch.device(device.type, (device.index + 1) % backend.device_count())
    with ExitStack() as stack:
        if placement.side_stream:
            stack.enter_context(backend.stream(backend.Stream(device)))
        stack.enter_context(backend.device(current))
        yield (device,) if current == device else (device, current)


def _settle(devices: Sequence[torch.device]) -> list[Failure]:
    """Wait for the launches; return what the devices say of them: an error that ended a context, or one that the host
    code left pending for whoever launches next."""
    try:
        for device in devices:
            synchronize(device)
            _probe(device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if unusable(*devices) is not None:
            return [_crash(error)]
        return [Failure("raised", "", f"{_error_name(error)}_left_pending", f"left pending: {_first_line(error)}")]
    return []


def _crash(error: Exception) -> Failure:
    return Failure("crash", "", _error_name(error), f"the device is unusable: {_first_line(error)}")


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception as another:
        return f"(no text: {type(another).__name__})"


def _first_line(error: Exception) -> str:
    return _text(error).strip().partition("\n")[0]


def _error_name(error: Exception) -> str:
    """Return what the runtime calls the error, by whomever it is passed on: "CUDA error: an illegal memory access was
    encountered" and "Triton Error [CUDA]: an illegal memory access was encountered" as illegal_memory_access."""
    text = re.split(r"\berror(?: \[\w+\])?: ", _first_line(error).lower())[-1]
    text = re.sub(r"^an? | was encountered$|[^a-z0-9 ]", "", text)
    return "_".join(text.split()[:8]) or type(error).__name__


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was launched. Raises RuntimeError for what went wrong there."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _probe(device: torch.device) -> None:
    """Run a small operation. Raises RuntimeError for an error that an earlier launch left, and takes it away."""
    if device.type != "cpu" and int(torch.ones(1, device=device) + 1) != 2:
        raise RuntimeError("one and one is not two")


def unusable(*devices: torch.device) -> str | None:
    """Return why one of the devices cannot be used any more, or None: an illegal access leaves a context in which every
    later call fails. One whose memory is used up is usable."""
    for device in devices:
        for is_last in (False, True):  # the first may meet an error that was left pending
            try:
                _probe(device)
                break
            except torch.OutOfMemoryError:
                break
            except RuntimeError as error:
                if is_last:
                    return _first_line(error)
    return None


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
