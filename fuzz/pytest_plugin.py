"""The pytest plugin: options, devices, replays and reports of kernel tests.

It is loaded in every pytest session of an environment that has kernelfuzz, so that it imports the engine, and with it
torch, only once there is a kernel test.
"""

import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kernelfuzz.fuzz import profiles
from kernelfuzz.strategies.errors import KernelfuzzError

if TYPE_CHECKING:
    from kernelfuzz.fuzz.failure_folder import SavedFailure
    from kernelfuzz.fuzz.testing.run import Assignment, Options, Report

_ASSIGNMENT = "kernelfuzz_assignment"  # decorator.ASSIGNMENT, whose module imports torch
_PROPERTY = "kernelfuzz"
_REPLAYED = "replayed"
_OPTIONS = {
    "kernel-device": "device for kernel tests: cpu, cuda, cuda:1, xpu, or all; may be repeated",
    "kernel": "kernel instead of kernel tests' own: NAME, NAME@VERSION, NAME@PATH or MODULE:FUNCTION",
    "fuzz-time": "time for each kernel test, like 90s, 10m, 2h",
    "fuzz-examples": "examples for each kernel test, whatever its settings say",
    "fuzz-isolate": "yes (default): kernel tests run in worker processes; no: in pytest's, for a debugger",
    "fuzz-out": "folder for the failures of kernel tests (default: kernelfuzz-out)",
    "fuzz-replay": "run only the cases that were saved in this folder, each as a test of its own",
}
_REPEATABLE = "kernel-device"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, each also as an ini option."""
    group = parser.getgroup("kernelfuzz", "kernel tests")
    for name, about in _OPTIONS.items():
        repeats = name == _REPEATABLE
        group.addoption(f"--{name}", action="append" if repeats else "store", default=None, help=about)
        if repeats:
            parser.addini(name.replace("-", "_"), about, type="args", default=[])
        else:
            parser.addini(name.replace("-", "_"), about, type="string", default="")


def _option(config: pytest.Config, name: str) -> Any:
    """Return what the command line says, or else the ini file; None or empty for neither."""
    return config.getoption(f"--{name}") or config.getini(name.replace("-", "_"))


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin's state, and load the profile that the environment names."""
    profile = os.environ.get(profiles.ENVIRONMENT)
    if profile in profiles.PROFILES and not config.getoption("--hypothesis-profile", None):
        from hypothesis import settings

        settings.load_profile(profile)
    session = _Session(config)
    if any(_option(config, name) for name in _OPTIONS):
        session.plan()
    config.pluginmanager.register(session, "kernelfuzz-session")


class _Session:
    """The kernel tests of one pytest process."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._reports: list[Report] = []
        self._assignments: list[Assignment] | None = None
        self._saved: list[SavedFailure] = []
        self._unreadable: dict[Path, str] = {}
        self._replayed: set[Path] = set()
        self._shown: dict[str, dict[str, Any]] = {}

    # Collection.

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make of a kernel test one item for each device, or for each saved case."""
        test = getattr(metafunc.function, "kernel_test", None)
        if test is None or _ASSIGNMENT not in metafunc.fixturenames:
            return
        from kernelfuzz.fuzz.testing.devices import why_not

        values, names = [], []
        for assignment, name in self._assignments_of(metafunc.definition.nodeid, test.devices):
            reason = None if assignment.device is None else why_not(assignment.device, test.devices)
            marks = [] if reason is None else [pytest.mark.skip(reason=f"{assignment.device}: {reason}")]
            values.append(pytest.param(assignment, marks=marks))
            names.append(name)
        metafunc.parametrize(_ASSIGNMENT, values, ids=names)

    def _assignments_of(self, nodeid: str, devices: tuple[str, ...]) -> "Iterator[tuple[Assignment, str]]":
        from dataclasses import replace

        from kernelfuzz.fuzz.testing.devices import default_device

        for planned in self.plan():
            assignment = replace(planned, device=planned.device or default_device(devices), reports=self._reports)
            if not _option(self._config, "fuzz-replay"):
                yield assignment, str(assignment.device)
                continue
            saved = [each for each in self._saved if _is_same_test(each.test, nodeid)]
            for each in saved:
                device = planned.device or each.device
                name = each.path.name if planned.device is None else f"{each.path.name}-{device}"
                yield replace(assignment, saved=each, device=device), name
            if not saved:
                yield assignment, _NOTHING_SAVED

    def plan(self) -> "list[Assignment]":
        """Return what every kernel test is run on, without the device where each has the best there is.

        Raises pytest.UsageError, in one line, for options that ask for what is not to be had.
        """
        if self._assignments is None:
            self._require_isolation()
            self._assignments = self._planned()
        return self._assignments

    def _require_isolation(self) -> None:
        """Without worker processes, prepare for Triton's interpreter in this one, before anything imports Triton."""
        isolate = _option(self._config, "fuzz-isolate") or "yes"
        if isolate not in ("yes", "no"):
            raise pytest.UsageError(f"--fuzz-isolate {isolate!r}: expected yes or no")
        if isolate == "no":
            for name in _option(self._config, "kernel-device") or []:
                if name != "cpu":
                    raise pytest.UsageError(
                        f"--fuzz-isolate no: a kernel could leave {name} unusable for all that follows: "
                        "add --kernel-device cpu"
                    )
            os.environ["TRITON_INTERPRET"] = "1"

    def _planned(self) -> "list[Assignment]":
        from kernelfuzz.fuzz.testing.devices import expanded
        from kernelfuzz.fuzz.testing.run import Assignment

        try:
            options = _options(self._config)
            self._read_saved()
            names = expanded(list(_option(self._config, "kernel-device") or []))
        except KernelfuzzError as error:
            raise pytest.UsageError(str(error)) from error
        if not options.isolate:
            names = ["cpu"]
        return [Assignment(options, name) for name in names] or [Assignment(options)]

    def _read_saved(self) -> None:
        from kernelfuzz.fuzz.failure_folder import find_failures, read_failure

        folder = _option(self._config, "fuzz-replay")
        if not folder:
            return
        if not Path(folder).is_dir():
            raise KernelfuzzError(f"--fuzz-replay {folder}: no such folder")
        for path in find_failures(Path(folder)):
            try:
                self._saved.append(read_failure(path))
            except KernelfuzzError as error:
                self._unreadable[path] = " ".join(str(error).splitlines())
        if not (self._saved or self._unreadable):
            raise KernelfuzzError(f"--fuzz-replay {folder}: no failure was saved there")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """With --fuzz-replay leave out everything but saved cases, and let those that cannot be read fail."""
        if not _option(config, "fuzz-replay"):
            return
        kept = [item for item in items if self._is_replay(item)]
        left_out = [item for item in items if item not in kept]
        unreadable = [
            _Unreadable.from_parent(session, name=str(path), reason=reason) for path, reason in self._unreadable.items()
        ]
        items[:] = [*kept, *unreadable]
        if left_out:
            config.hook.pytest_deselected(items=left_out)

    def _is_replay(self, item: pytest.Item) -> bool:
        """Whether an item runs a saved case with the parameters that it was found with."""
        parameters = dict(getattr(getattr(item, "callspec", None), "params", {}))
        assignment = parameters.get(_ASSIGNMENT)
        saved = getattr(assignment, "saved", None)
        if saved is None:
            return False
        fits = all(repr(parameters[name]) == value for name, value in saved.parameters.items() if name in parameters)
        if fits:
            self._replayed.add(saved.path)
        return fits

    # Running.

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Take what a kernel test has to report into its properties, which reach JUnit files and xdist's controller."""
        self._reports.clear()
        try:
            return (yield)
        finally:
            for report in self._reports:
                item.user_properties += _properties(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Have a failure show what the engine says of it instead of a traceback through Hypothesis."""
        report = yield
        error = call.excinfo.value if call.excinfo is not None else None
        if getattr(item.function if isinstance(item, pytest.Function) else None, "kernel_test", None) is None:
            return report
        if type(error).__name__ == "KernelTestFailedError" or isinstance(error, KernelfuzzError):
            is_verbose = self._config.get_verbosity() >= 2
            text = str(error) if type(error).__name__ == "KernelTestFailedError" else f"error: {error}"
            report.longrepr = f"{text}\n\n{report.longreprtext}" if is_verbose else text
            if not is_verbose:
                report.sections = [each for each in report.sections if each[0] != "Hypothesis"]
        return report

    # The end.

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the numbers of a kernel test for the summary."""
        if report.when == "call":
            for name, value in report.user_properties:
                if name == _PROPERTY:
                    self._shown[report.nodeid] = json.loads(str(value))
                elif name == _REPLAYED:  # the controller of several processes has collected nothing itself
                    self._replayed.add(Path(str(value)))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show for each kernel test how much was tried, and how close it came."""
        write = terminalreporter.write_line
        if self._shown:
            terminalreporter.section("kernel tests")
            width = max(map(len, self._shown))
            write(f"{'':{width}}  examples  cases  err/bound  regimes reached")
            for nodeid, numbers in self._shown.items():
                ratio = f"{numbers['worst_ratio']:.3f}" if numbers["worst_ratio"] else ""
                row = f"{nodeid:{width}}  {numbers['examples']:8,}  {numbers['cases']:5,}  {ratio:>9}  "
                write((row + _regimes(numbers["regimes"], self._config.get_verbosity() >= 1)).rstrip())
        missing = [each for each in self._saved if each.path not in self._replayed]
        if missing and not hasattr(self._config, "workerinput"):
            terminalreporter.section("not replayed")
            for each in missing:
                command = f"no test has found it: kernelfuzz replay {each.path}"
                write(f"{each.path}: {f'{each.test} was not collected' if each.test else command}")


_NOTHING_SAVED = "nothing-saved"


class _Unreadable(pytest.Item):
    """A saved failure that cannot be read."""

    def __init__(self, *, reason: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._reason = reason

    def runtest(self) -> None:
        """Fail."""
        raise KernelfuzzError(self._reason)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Return the reason alone."""
        del style
        return f"error: {excinfo.value}"

    def reportinfo(self) -> tuple[str, None, str]:
        """Return the item's place: the folder."""
        return self.name, None, self.name


def _is_same_test(first: str, second: str) -> bool:
    """Whether two node ids are the same test's: pytest may take another folder for its root than it did before."""
    return bool(first) and (f"/{first}".endswith(f"/{second}") or f"/{second}".endswith(f"/{first}"))


def _options(config: pytest.Config) -> "Options":
    """Return the session's options. Raises KernelfuzzError for a value that is none."""
    from kernelfuzz.fuzz.budget import parse_seconds
    from kernelfuzz.fuzz.testing.run import Options
    from kernelfuzz.kernels.base import KernelName
    from kernelfuzz.kernels.registry import IMPLEMENTATIONS

    kernel, examples, seconds = (_option(config, name) for name in ("kernel", "fuzz-examples", "fuzz-time"))
    isolate = _option(config, "fuzz-isolate") or "yes"
    if examples and seconds:
        raise KernelfuzzError("give --fuzz-examples or --fuzz-time, not both")
    if examples and not (examples.isdecimal() and int(examples) > 0):
        raise KernelfuzzError(f"--fuzz-examples {examples!r}: expected a number of 1 or more")
    if kernel and (name := KernelName.parse(kernel)) and ":" not in name.package:
        known = sorted({each.package for each in IMPLEMENTATIONS})
        if name.package not in known:
            raise KernelfuzzError(f"--kernel {kernel}: expected one of {', '.join(known)}, or MODULE:FUNCTION")
    worker = getattr(config, "workerinput", {"workerid": "gw0"})["workerid"]
    return Options(
        out=Path(_option(config, "fuzz-out") or "kernelfuzz-out"),
        isolate=isolate == "yes",
        kernel=kernel or None,
        examples=int(examples) if examples else None,
        seconds=parse_seconds("--fuzz-time", seconds) if seconds else None,
        verbose=config.get_verbosity() >= 2,
        worker=int(worker.removeprefix("gw")),
    )


def _properties(report: "Report") -> Iterator[tuple[str, object]]:
    """Yield what a JUnit file says of a kernel test: the numbers, and of each failure fingerprint and files."""
    numbers = report.numbers.to_json()
    shown = {name: numbers[name] for name in ("examples", "cases", "rejected", "worst_ratio", "regimes", "device")}
    yield _PROPERTY, json.dumps(shown)
    if report.replayed is not None:
        yield _REPLAYED, str(report.replayed)
    for found, folder in report.failures:
        yield "fingerprint", found.fingerprint
        yield "failure", str(folder)
        for what, file in (("reproducer", "repro.py"), ("writemap", "writemap.png")):
            if (folder / file).exists():
                yield what, str(folder / file)


def _regimes(counts: dict[str, int], is_verbose: bool) -> str:
    """Return the regimes, the most frequent first; not all of them unless `is_verbose`."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    shown = names if is_verbose else names[:6]
    return ", ".join(shown) + (f", and {len(names) - len(shown)} more" if len(shown) < len(names) else "")
