"""A run of a kernel test on a device: Hypothesis draws its cases, workers run them, and what fails is made small and
saved."""

import atexit
import dataclasses
import functools
import inspect
import os
import time
import unittest
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import SkipTest

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.drawing import Drawing
from kernelfuzz.fuzz.executor import Executor, LocalExecutor, Request, WorkerLostError
from kernelfuzz.fuzz.failure_files import FailureFiles
from kernelfuzz.fuzz.failure_folder import SavedFailure
from kernelfuzz.fuzz.failures import CaseFailedError, exception_class, fingerprints
from kernelfuzz.fuzz.generation import EndedError
from kernelfuzz.fuzz.isolated import IsolatedExecutor
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.smallest import RUNS, SHRINK_LAUNCHES, SHRINK_SECONDS, Sighting, confirm, pinned, simplify
from kernelfuzz.fuzz.summary import JobSummary, Summary
from kernelfuzz.fuzz.testing import devices
from kernelfuzz.fuzz.testing.decorator import ASSIGNMENT, KernelTest
from kernelfuzz.fuzz.testing.source import TestSource
from kernelfuzz.fuzz.verdict import KINDS, Verdict
from kernelfuzz.kernels import registry
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.kernels.registry import Implementation
from kernelfuzz.strategies import own
from kernelfuzz.strategies.case import Case, derive_seed
from kernelfuzz.strategies.errors import KernelfuzzError

ROUND = 10_000
"""Most examples of one Hypothesis run, which keeps them all; under a time budget there is one after the other."""

_SETTINGS = vars(hypothesis.settings()(lambda: None)).keys()
"""What `@settings` leaves on a function."""

_UNFIT_CHECKS = (HealthCheck.too_slow, HealthCheck.filter_too_much)
"""Kernels take their time, and may offer few of the cases."""

_NOT_INHERITED = {*_SETTINGS, "hypothesis", "is_hypothesis_test", "kernel_test", "__wrapped__", "__signature__"}


@dataclass(frozen=True)
class Options:
    """What the user asks of all kernel tests.

    - out: folder for failures
    - isolate: run in worker processes; or in this one, for a debugger
    - kernel: one that takes the place of the tests' own, or None
    - examples, seconds: how many, or for how long, for each test; None: as its settings say
    - verbose: say all there is
    - worker: number of this pytest process among several
    """

    out: Path = Path("kernelfuzz-out")
    isolate: bool = True
    kernel: str | None = None
    examples: int | None = None
    seconds: float | None = None
    verbose: bool = False
    worker: int = 0


@dataclass
class Report:
    """What came of a run of a kernel test: the numbers, each failure with its folder, what could not be saved, and the
    saved failure that was run again."""

    numbers: JobSummary
    failures: list[tuple[events.FailureFound, Path]] = field(default_factory=list)
    problem: str = ""
    replayed: Path | None = None


@dataclass(frozen=True)
class Assignment:
    """Where and how a kernel test runs.

    - device: as a user names it; None: the best that the test is for
    - saved: the failure whose case is all that is run; None: cases are drawn
    - reports: takes what comes of it
    """

    options: Options = Options()
    device: str | None = None
    saved: SavedFailure | None = None
    reports: list[Report] = field(default_factory=list, compare=False)


class KernelTestFailedError(AssertionError):
    """A kernel test failed; its text is what a person should read."""


def run_kernel_test(
    test: KernelTest, entry: Callable[..., None], instance: tuple[Any, ...], arguments: Mapping[str, Any]
) -> None:
    """Run a kernel test with its pytest `arguments`.

    Raises KernelTestFailedError if a case fails, KernelfuzzError if that cannot be said, and SkipTest if it cannot run
    here.
    """
    __tracebackhide__ = True
    if instance and isinstance(instance[0], unittest.TestCase):
        raise KernelfuzzError(f"{test.source.name}: a kernel test cannot be in a unittest.TestCase: use a plain class")
    fixtures = dict(arguments)
    assignment = fixtures.pop(ASSIGNMENT, None) or Assignment()
    with _opened(test, assignment, instance, fixtures) as run:
        if assignment.saved is not None:
            run.replay(assignment.saved)
        else:
            run.search(entry)
        report = run.finish()
        assignment.reports.append(report)
    if report.failures:
        from kernelfuzz.fuzz.testing.report import failure_text

        texts = [failure_text(found, folder, run.name, assignment, report.problem) for found, folder in report.failures]
        raise KernelTestFailedError("\n".join(texts))


_kept = ExitStack()
_kept_runs: dict[TestSource, "KernelTestRun"] = {}
atexit.register(_kept.close)


def kept_run(test: KernelTest, instance: tuple[Any, ...], fixtures: Mapping[str, Any]) -> "KernelTestRun":
    """Return a run that stays open as long as this process, for a fuzzer that calls the test's inner function."""
    if test.source not in _kept_runs:
        _kept_runs[test.source] = _kept.enter_context(_opened(test, Assignment(), instance, fixtures))
    return _kept_runs[test.source]


def job_of(test: KernelTest, assignment: Assignment) -> Job:
    """Return what is to be run where. Raises SkipTest, with the reason, where that is not to be had here."""
    name = devices.default_device(test.devices) if assignment.device is None else assignment.device
    if (reason := devices.why_not(name, test.devices)) is not None:
        raise SkipTest(reason)
    device = devices.device_of_worker(name, assignment.options.worker)
    if assignment.options.kernel is None:
        kernel = KernelName(test.source.name)
        implementation = Implementation(test.target.name, kernel.package, "", triton=True, guard_pages=True)
        return Job(test.target, kernel, device, implementation, test.source)
    kernel = KernelName.parse(assignment.options.kernel)
    found = registry.find(test.target.name, kernel)
    if found is None:
        raise SkipTest(f"{kernel} does not implement {test.target.name}")
    if found.releases and kernel.version is None:
        kernel = found.default_name()
    if (reason := found.unavailable(kernel, device)) is not None:
        raise SkipTest(f"{kernel} cannot run on {device}: {reason}")
    is_own = test.target.name == own.Case.target
    return Job(test.target, kernel, device, found, test.source if is_own else None)


@contextmanager
def _opened(
    test: KernelTest, assignment: Assignment, instance: tuple[Any, ...], fixtures: Mapping[str, Any]
) -> Iterator["KernelTestRun"]:
    """Give a run whose kernel is loaded, and close it."""
    job = job_of(test, assignment)
    executor: Executor
    if assignment.options.isolate:
        test.source.require_importable()
        executor = IsolatedExecutor(job)
    else:
        executor = LocalExecutor(job, test.bound_to(*instance))
    try:
        yield KernelTestRun(test, job, executor, assignment, fixtures)
    finally:
        executor.close()


class KernelTestRun:
    """Judges the cases of a kernel test, and remembers what it saw of them.

    A verdict is remembered by case, so that a kernel that fails now and then still shrinks.
    """

    def __init__(
        self, test: KernelTest, job: Job, executor: Executor, assignment: Assignment, fixtures: Mapping[str, Any]
    ) -> None:
        self.name = _name_of_run(test)
        self._test = test
        self._job = job
        self._executor = executor
        self._assignment = assignment
        self._options = assignment.options
        self._fixtures = fixtures if self._is_own_kernel else {}
        self._folder = assignment.options.out / file_name(self.name)
        self._summary = Summary()
        values = {name: repr(value) for name, value in fixtures.items() if isinstance(value, (int, float, str))}
        self._files = FailureFiles(self._folder, None, test={"id": self.name, "parameters": values})
        # A replay has its files already.
        self._bus = events.Bus([self._summary, *([] if assignment.saved is not None else [self._files])])
        self._verdicts: dict[tuple[Case, str], Verdict] = {}
        self._found: dict[str, tuple[Sighting, dict[str, Any]]] = {}
        self._examples = 0
        self._until: float | None = None
        self._launches_left: int | None = None
        self._ends: float | None = None
        self._rejected = ""
        self._bus.emit(events.CampaignStarted((job,), (), None))
        self._loaded = executor.loaded()
        self._bus.emit(events.JobStarted(job, self._loaded.version, notes=self._loaded.notes))

    @property
    def _is_own_kernel(self) -> bool:
        return self._job.kernel.package == self._test.source.name

    def search(self, entry: Callable[..., None]) -> None:
        """Have Hypothesis draw cases, as the settings on `entry` and the options say."""
        __tracebackhide__ = True
        options = self._options
        settings = next(each for each in vars(entry).values() if isinstance(each, hypothesis.settings))
        examples = options.examples or (settings.max_examples if options.seconds is None else ROUND)
        self._ends = None if options.seconds is None else time.monotonic() + options.seconds
        while True:
            before = len(self._verdicts)
            run = self._hypothesis_test(entry, settings, examples)
            try:
                run()
            except EndedError as end:
                if end.error is not None:
                    raise end.error from None
                return
            except (CaseFailedError, hypothesis.errors.Flaky):
                return
            except hypothesis.errors.Unsatisfiable:
                if not self._rejected:
                    raise
                raise SkipTest(f"the kernel offers none of the cases: {self._rejected}") from None
            except Exception as error:
                if not (self._found and hasattr(error, "exceptions")):  # a group: there are several failures
                    raise
                return
            if self._ends is None or len(self._verdicts) == before:
                return

    def _hypothesis_test(
        self, entry: Callable[..., None], settings: hypothesis.settings, examples: int
    ) -> Callable[[], None]:
        """Return a test with all that was put on `entry` from outside, and the settings as they must be here."""

        @functools.wraps(self._test.function)
        def body(case: Any, **extras: Any) -> None:
            try:
                self.check(case, extras)
            except KernelfuzzError as error:
                raise EndedError(error) from None  # which Hypothesis does not take for a failure to shrink

        handle: Any = entry
        for name, value in {**vars(handle.hypothesis.inner_test), **vars(entry)}.items():
            if name not in _NOT_INHERITED:
                setattr(body, name, value)
        kind = inspect.Parameter.KEYWORD_ONLY
        names = ("case", *self._test.extras)
        body.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        drawn = hypothesis.given(case=self._strategy(), **self._test.extras)
        return drawn(
            hypothesis.settings(
                settings,
                max_examples=examples,
                deadline=None,
                # A further launch to explain a failure tells less than the report; see fuzz/generation.py on targets.
                phases=[each for each in settings.phases if each not in (Phase.explain, Phase.target)],
                suppress_health_check=[
                    *settings.suppress_health_check,
                    HealthCheck.too_slow,
                    HealthCheck.filter_too_much,
                ],
                verbosity=settings.verbosity if self._options.verbose else Verbosity.quiet,
                print_blob=settings.print_blob and self._options.verbose,
            )(body)
        )

    def _strategy(self) -> Any:
        """Return what cases are drawn from on this device. Where Triton compiles for classes of cases, those of a test
        are always the same."""
        return Drawing.of(self._job, self._loaded, None, zlib.crc32(self._test.source.name.encode())).strategy

    def replay(self, saved: SavedFailure) -> None:
        """Run a saved case, several times if it did not fail each time."""
        extras = dict(saved.arguments)
        request = dataclasses.replace(Request.alone(saved.case), maps=True)
        for _ in range(1 if saved.is_reliable else RUNS):
            self._examples += 1
            verdict = self._judge(request, extras, shrinking=False)
            _require_judged(verdict, self.name)
            if verdict.rejected:
                raise KernelfuzzError(f"{self.name}: the kernel does not offer this case: {verdict.rejected}")
            for name, failure in fingerprints(self._job, verdict).items():
                self._found[name] = Sighting(failure, saved.case, verdict), extras

    def check(self, case: Any, extras: Mapping[str, Any]) -> None:
        """Run an example. Raises CaseFailedError if it fails, KernelfuzzError if it cannot be judged, EndedError once
        the time is over."""
        __tracebackhide__ = True
        drawn = own.Case.of(case) if self._job.target.case_type is own.Case else case
        if not isinstance(drawn, self._job.target.case_type):
            raise KernelfuzzError(f"{self.name}: {case!r} is no case of {self._job.target.name}")
        verdict = self._verdict(drawn, extras)
        _require_judged(verdict, self.name)
        if verdict.rejected:
            self._rejected = verdict.rejected
            hypothesis.reject()
        for name, failure in list(fingerprints(self._job, verdict).items())[:1]:
            self._found[name] = Sighting(failure, pinned(drawn, verdict), verdict), dict(extras)
            if self._until is None:
                self._until = time.monotonic() + SHRINK_SECONDS
                self._launches_left = SHRINK_LAUNCHES.get(failure.kind)
            raise exception_class(name)(failure.message)

    def _verdict(self, case: Case, extras: Mapping[str, Any]) -> Verdict:
        key = case, repr(sorted(extras.items()))
        if key in self._verdicts:
            return self._verdicts[key]
        now = time.monotonic()
        if self._until is not None:
            if self._launches_left is not None:
                self._launches_left -= 1
            if now >= self._until or (self._launches_left is not None and self._launches_left < 0):
                return Verdict()
        elif self._ends is not None and now >= self._ends:
            raise EndedError
        seeds = tuple(derive_seed(case.seed, index) for index in range(self._job.seeds))
        shrinking = self._until is not None
        self._examples += not shrinking
        self._verdicts[key] = self._judge(Request(case, seeds), extras, shrinking=shrinking)
        return self._verdicts[key]

    def _judge(self, request: Request, extras: Mapping[str, Any], *, shrinking: bool) -> Verdict:
        """Run a request and wait for the verdict."""
        request = dataclasses.replace(request, arguments={**self._fixtures, **extras} if self._is_own_kernel else {})
        with devices.slot(self._job.device):
            try:
                verdict = self._executor.run(request)
            except WorkerLostError as lost:
                if not lost.verdict.failures:
                    raise
                verdict = lost.verdict
        regimes = frozenset(self._job.target.regimes(request.case))
        case = pinned(request.case, verdict)
        self._bus.emit(events.CaseFinished(self._job, case, regimes, verdict, self._examples, shrinking))
        return verdict

    def finish(self) -> Report:
        """Make what was found simple, write its files, and return the report. All that a smallest case shows is one
        bug, which has the name of the first of its failures."""
        known: set[str] = set()
        for name in sorted(self._found, key=lambda name: KINDS.index(self._found[name][0].failure.kind)):
            if name in known:
                continue
            best, extras = self._found[name]
            if self._assignment.saved is None:
                judge = functools.partial(self._judge, extras=extras, shrinking=True)
                best = simplify(self._job, judge, name, best, hurries=True)
                best = confirm(self._job, judge, name, best)
            shown = fingerprints(self._job, best.verdict)
            known |= shown.keys()
            self._bus.emit(
                events.FailureFound(
                    self._job,
                    name,
                    best.failure,
                    best.case,
                    self._examples,
                    shrunk=True,
                    symptoms=tuple(failure for each, failure in shown.items() if each != name),
                    failed_runs=best.failed_runs,
                    runs=best.runs,
                    maps=best.verdict.maps,
                    arguments=extras,
                )
            )
        self._bus.emit(events.JobFinished(self._job, self._examples, replacements=self._executor.replacements))
        self._bus.emit(events.CampaignFinished())
        (numbers,) = self._summary.jobs
        folders = [(found, self._files.folder(found)) for found in numbers.failures.values()]
        saved = self._assignment.saved
        return Report(numbers, folders, self._files.problem, None if saved is None else saved.path)


def _name_of_run(test: KernelTest) -> str:
    """Return pytest's name of the test that runs now; where there is none, the function's."""
    name, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")
    return name or test.source.name


def _require_judged(verdict: Verdict, name: str) -> None:
    if verdict.error:
        raise KernelfuzzError(f"{name}: a case cannot be judged: {verdict.error}")
