"""Historical bugs, looked for in the code that has them and in the code that has not, by normal campaigns."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.fuzz.verdict import Failure
from kernelfuzz.kernels import registry, releases
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.kernels.registry import Implementation
from kernelfuzz.kernels.regressions import Regression, Side, Symptom, edited
from kernelfuzz.strategies.case import Case, to_json
from kernelfuzz.strategies.errors import KernelfuzzError

BAD_CASES = 2000
"""Cases within which a bug must be found where it is."""

GOOD_TIMES, GOOD_CASES = 10, 1000
"""The code without the bug is run for so many times as many cases, and for so many at least."""

Progress = Callable[[str], None]
"""Called with a line on what is being done."""


@dataclass(frozen=True)
class Find:
    """A failure with which a bug showed: after how many `cases`, and the smallest case found, `shrunk` or not."""

    fingerprint: str
    failure: Failure
    cases: int
    case: Case
    shrunk: bool


@dataclass
class SideResult:
    """What one campaign on one side did.

    - version, notes: what the kernel says of itself; seed: the campaign's
    - cases: launches that looked for failures and were judged; passed: those of them that showed no failure at all
    - found: the symptom that was seen first, or None; others: the other fingerprints and what they say
    - unavailable: why the kernel cannot be loaded here
    - error: why the side, or a case, could not be judged
    """

    side: Side
    device: str
    seed: int
    version: str = ""
    notes: tuple[str, ...] = ()
    cases: int = 0
    passed: int = 0
    found: Find | None = None
    others: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""
    error: str = ""
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the side in JSON types."""
        found = self.found
        return {
            "release": self.side.version,
            "edited": bool(self.side.edits),
            "device": self.device,
            "notes": list(self.notes),
            "seed": self.seed,
            "cases": self.cases,
            "passed": self.passed,
            "found": None
            if found is None
            else {
                "fingerprint": found.fingerprint,
                "kind": found.failure.kind,
                "message": found.failure.message,
                "cases": found.cases,
                "size": found.case.size,
                "shrunk": found.shrunk,
                "case": to_json(found.case),
            },
            "other_failures": self.others,
            "error": self.error or self.unavailable,
        }


@dataclass
class RegressionResult:
    """What came of a regression: a bad side for each seed and the good side, or why it cannot run here (`skipped`), or
    that it was `interrupted`."""

    regression: Regression
    skipped: str = ""
    interrupted: bool = False
    bad: list[SideResult] = field(default_factory=list)
    good: SideResult | None = None

    @property
    def cases_until_found(self) -> list[int]:
        """The number of cases after which the bug was found, for each seed with which it was."""
        return [side.found.cases for side in self.bad if side.found is not None]

    @property
    def problem(self) -> str:
        """Why it did not pass, empty if it did."""
        if self.interrupted:
            return "interrupted"
        if self.skipped:
            return self.skipped
        for side in self.bad:
            if side.error:
                return f"the bad side cannot be judged: {side.error}"
            if side.found is None or side.found.cases > BAD_CASES:
                return f"the bug was not found in {min(side.cases, BAD_CASES):,} cases with seed {side.seed}"
            if not side.found.shrunk:
                return f"the bug was not shrunk with seed {side.seed}"
        if self.good is None:
            return "the good side was not run"
        if self.good.error:
            return f"the good side cannot be judged: {self.good.error}"
        if self.good.found is not None:
            return f"the good side shows the bug after {self.good.found.cases:,} cases"
        if self.good.passed < self.good_cases:
            return f"on the good side {self.good.passed:,} cases passed of {self.good_cases:,} that must"
        return ""

    @property
    def good_cases(self) -> int:
        """How many cases must pass on the good side: what fails otherwise may have had no chance to show the bug."""
        return max(GOOD_CASES, GOOD_TIMES * max(self.cases_until_found, default=0))

    @property
    def outcome(self) -> str:
        """PASS, FAIL or, where it cannot run here, NOT RUN."""
        if self.skipped or self.interrupted:
            return "NOT RUN"
        return "FAIL" if self.problem else "PASS"

    def to_json(self) -> dict[str, Any]:
        """Return the result in JSON types."""
        cases = self.cases_until_found
        return {
            "pull_request": self.regression.pull_request,
            "title": self.regression.title,
            "target": self.regression.target,
            "outcome": self.outcome,
            "problem": self.problem,
            "cases_until_found": {"median": statistics.median(cases), "maximum": max(cases)} if cases else None,
            "bad": [side.to_json() for side in self.bad],
            "good": None if self.good is None else self.good.to_json(),
        }


def missing_releases(regressions: Sequence[Regression], device: torch.device | None) -> list[str]:
    """Return what must be fetched, as NAME==VERSION, for those that the devices here can run."""
    missing: dict[str, None] = {}
    for regression in regressions:
        if isinstance(_places(regression, device), str):
            continue
        needed = [(regression.package, side.version) for side in (regression.bad, regression.good)]
        needed += [(package, releases.PINNED[package]) for package in _implementation(regression).releases[1:]]
        for package, version in needed:
            try:
                releases.locate(package, version)
            except KernelfuzzError:
                missing[f"{package}=={version}"] = None
    return list(missing)


def run_regression(
    regression: Regression, device: torch.device | None, seeds: Sequence[int], progress: Progress
) -> RegressionResult:
    """Look for the bug on its bad side with each of the seeds, then on its good side.

    Cases are drawn as in any campaign; nothing hints at the bug. Ctrl-C ends it, and what was done is returned.
    """
    result = RegressionResult(regression)
    places = _places(regression, device)
    if isinstance(places, str):
        result.skipped = places
        return result
    try:
        for place in places:
            result.bad, result.skipped = [], ""
            _run(result, place, seeds, progress)
            if not result.skipped:
                break
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def _run(result: RegressionResult, device: torch.device, seeds: Sequence[int], progress: Progress) -> None:
    """Run the sides on a device until one of them decides the result."""
    regression = result.regression
    for seed in seeds:
        side = _run_side(regression, regression.bad, device, seed, BAD_CASES, progress)
        if side.unavailable:
            result.skipped = f"{side.side} on {device}: {side.unavailable}"
            return
        result.bad.append(side)
        if side.interrupted or side.found is None:
            result.interrupted = side.interrupted
            return
    result.good = _run_side(regression, regression.good, device, seeds[0], result.good_cases, progress)
    result.interrupted = result.good.interrupted
    if result.good.unavailable:
        result.skipped = f"{result.good.side} on {device}: {result.good.unavailable}"


def _implementation(regression: Regression) -> Implementation:
    implementation = registry.find(regression.target, KernelName(regression.kernel))
    assert implementation is not None
    return implementation


def _places(regression: Regression, device: torch.device | None) -> list[torch.device] | str:
    """Return where a regression can run, the best place first, or why it can run nowhere here."""
    implementation = _implementation(regression)
    kinds = [kind for kind in implementation.devices if kind in (regression.devices or implementation.devices)]
    if device is not None and device.type not in kinds:
        return f"it shows on {' or '.join(kinds)}, not on {device.type}"
    places, reasons = [], []
    for candidate in [torch.device(kind) for kind in kinds] if device is None else [device]:
        reason = registry.missing_device(candidate)
        if reason is None and candidate.type == "cpu":
            reason = implementation.cpu_runtime()
        if reason is None:
            places.append(candidate)
        else:
            reasons.append(reason)
    return places or reasons[-1]


def _run_side(
    regression: Regression, side: Side, device: torch.device, seed: int, cases: int, progress: Progress
) -> SideResult:
    """Run a campaign on one side, until the bug is found and shrunk, or was looked for in so many cases; on the good
    side until so many passed."""
    implementation, target = _implementation(regression), get_target(regression.target)
    result = SideResult(side, str(device), seed)
    with ExitStack() as stack:
        try:
            tree = stack.enter_context(edited(releases.locate(regression.package, side.version), side.edits))
        except KernelfuzzError as error:
            result.error = str(error)
            return result
        out = stack.enter_context(tempfile.TemporaryDirectory(prefix="kernelfuzz-regressions-"))
        job = Job(target, KernelName(regression.kernel, str(tree)), device, implementation)
        what = f"{regression.pull_request}: {side} on {device}"
        watch = _Watch(result, regression, side is regression.bad, cases, what, progress)
        budget = Budget(examples=2 * cases)  # some are rejected or fail otherwise
        run_campaign([job], [], budget, seed, Path(out), events.Bus([watch]), enough=watch.enough)
    return result


@dataclass
class _Watch:
    """Adds up the events of one side's campaign, and says when it is enough."""

    result: SideResult
    regression: Regression
    is_bad: bool
    limit: int
    what: str
    progress: Progress

    def __call__(self, event: events.Event) -> None:
        result = self.result
        match event:
            case events.JobStarted(_, version, _, notes):
                result.version, result.notes = version, notes
            case events.CaseFinished() if not event.shrinking:
                verdict = event.verdict
                if not (verdict.rejected or verdict.error):
                    result.cases += verdict.cases
                    result.passed += 0 if verdict.failures else verdict.cases
                result.error = result.error or verdict.error
                self.progress(f"{self.what}: {result.cases:,} cases")
            case events.FailureFound():
                self._found(event)
            # A CPU has all that was looked for before, so that there the code itself cannot be loaded.
            case events.JobFinished(job, _, error) if error and not result.version and job.device.type != "cpu":
                result.unavailable = error
            case events.JobFinished(_, _, error):
                result.error = error or result.error
            case events.CampaignFinished(interrupted):
                result.interrupted = interrupted

    def _found(self, event: events.FailureFound) -> None:
        result = self.result
        for symptom in event.withdrawn:
            result.others.pop(symptom, None)
        failure = next(filter(self._is_symptom, (event.failure, *event.symptoms)), None)
        if failure is None:
            result.others[event.fingerprint] = event.failure.message
            return
        first = result.found
        if first is None or first.fingerprint in (event.fingerprint, *event.withdrawn):
            cases = result.cases if first is None else first.cases
            result.found = Find(event.fingerprint, failure, cases, event.case, event.shrunk)

    def _is_symptom(self, failure: Failure) -> bool:
        return Symptom(failure.kind, failure.output, failure.clause) in self.regression.symptoms

    def enough(self) -> bool:
        """Whether the bug is found and shrunk, or was looked for in as many cases as were asked for."""
        result = self.result
        if result.found is not None:
            return result.found.shrunk
        return (result.cases if self.is_bad else result.passed) >= self.limit
