"""Saved failures, run again: which of them still fail, and which are fixed."""

import dataclasses
import shlex
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from kernelfuzz.fuzz.campaign import Isolation, default_workers
from kernelfuzz.fuzz.executor import Executor, Request, WorkerLostError
from kernelfuzz.fuzz.failure_folder import SavedFailure, find_failures, read_failure
from kernelfuzz.fuzz.failures import fingerprints
from kernelfuzz.fuzz.job import Job, default_jobs, named_jobs
from kernelfuzz.fuzz.sanitizer import Tool
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.kernels.registry import parse_device
from kernelfuzz.strategies import own
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.errors import KernelfuzzError

Outcome = Literal["FIXED", "FAILED", "ERROR"]

UNRELIABLE_RUNS = 10
"""How often a failure that does not show in every run is looked for."""


@dataclass(frozen=True)
class Trial:
    """A saved failure to run on a job, watched by the sanitizer's `tool`."""

    saved: SavedFailure
    job: Job
    tool: Tool | None

    @property
    def path(self) -> Path:
        """The failure's folder, or the case file."""
        return self.saved.path

    @property
    def runs(self) -> int:
        """How often it is run."""
        return 1 if self.saved.is_reliable else UNRELIABLE_RUNS


@dataclass(frozen=True)
class Result:
    """What became of a saved failure.

    - path: its folder, or the case file
    - outcome: FAILED if any run failed in any way, FIXED if none did, ERROR if that cannot be said
    - reason: of an ERROR; otherwise what is to be known besides, or empty
    - case: None if it could not be read
    - kernel, device: as one writes them on the command line; empty where there was nothing to choose
    - version: the kernel's, as it says itself; empty where it could not be loaded
    - failures: by their fingerprints
    """

    path: Path
    outcome: Outcome
    reason: str
    case: Case | None = None
    kernel: str = ""
    device: str = ""
    version: str = ""
    runs: int = 0
    failed_runs: int = 0
    failures: Mapping[str, Failure] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the result in JSON types, without the case."""
        return {
            "path": str(self.path),
            "outcome": self.outcome,
            "kernel": self.kernel,
            "version": self.version,
            "device": self.device,
            "runs": self.runs,
            "failed_runs": self.failed_runs,
            "failures": [{"fingerprint": name, **dataclasses.asdict(each)} for name, each in self.failures.items()],
            "reason": self.reason,
        }


def plan(
    paths: Sequence[Path], kernels: list[str], device: torch.device | None, tool: Tool | None
) -> list[Trial | Result]:
    """Return what there is to run below `paths`, and an ERROR for each that cannot be read or run here.

    `kernels`, `device` and `tool` take the place of what a failure was found with. A case alone is run on the newest
    releases unless told otherwise.
    """
    planned: list[Trial | Result] = []
    for path in paths:
        found = find_failures(path)
        if not found:
            planned.append(Result(path, "ERROR", "no failure in this folder: none below it has a failure.json"))
        for each in found:
            try:
                saved = read_failure(each)
            except KernelfuzzError as error:
                planned.append(Result(each, "ERROR", _one_line(error)))
                continue
            for kernel in kernels or [saved.kernel]:
                try:
                    jobs = _jobs(saved, kernel, device)
                except KernelfuzzError as error:
                    where = saved.device if device is None else str(device)
                    planned.append(Result(each, "ERROR", _one_line(error), saved.case, kernel, where))
                    continue
                planned += [Trial(saved, job, tool or _recorded_tool(saved, job)) for job in jobs]
    return planned


def _one_line(text: object) -> str:
    return " ".join(str(text).splitlines())


def _jobs(saved: SavedFailure, kernel: str, device: torch.device | None) -> list[Job]:
    """Return the jobs to run a failure on, that of `kernel` if it is given. Raises KernelfuzzError if it cannot run
    here, or nothing can."""
    if device is None and saved.device:
        try:
            device = parse_device(saved.device)
        except KernelfuzzError as error:
            raise KernelfuzzError(f"{error}; name another one with --device") from error
    target = saved.case.target
    if saved.test and (target == own.Case.target or kernel == saved.kernel):
        command = shlex.join(["pytest", saved.test, f"--fuzz-replay={saved.path}"])
        raise KernelfuzzError(f"a kernel test has found it: {command}")
    if kernel:
        return named_jobs([target], [kernel], device)
    jobs, skipped = default_jobs([target], device)
    if not jobs:
        reasons = "; ".join(f"{item.kernel}: {item.reason}" for item in skipped)
        raise KernelfuzzError(f"no kernel for {target} can run here: {reasons}")
    return jobs


def _recorded_tool(saved: SavedFailure, job: Job) -> Tool | None:
    return cast(Tool | None, saved.sanitizer) if job.device.type == "cuda" else None


def run_trials(planned: Sequence[Trial | Result], isolation: Isolation) -> Generator[tuple[int, Result], None, None]:
    """Run the trials and yield each result with its index in `planned`, as soon as it is known.

    The trials of one job share its workers, which end with the generator. Where `isolation` names no number of workers,
    a job has no more of them than it has cases.
    """
    groups: dict[tuple[str, Tool | None], dict[int, Trial]] = {}
    for index, each in enumerate(planned):
        if isinstance(each, Result):
            yield index, each
        else:
            groups.setdefault((str(each.job), each.tool), {})[index] = each
    queue = list(groups.values())
    executors: list[Executor | KernelfuzzError] = []
    try:
        for number, group in enumerate(queue):
            # The next job's workers load their kernel while this one runs.
            executors += [_executor(later, isolation) for later in queue[len(executors) : number + 2]]
            yield from _run(group, executors[number])
            _close(executors[number])
    finally:
        for executor in executors:
            _close(executor)


def _executor(group: Mapping[int, Trial], isolation: Isolation) -> Executor | KernelfuzzError:
    """Return what runs a group of trials of one job, or why there is nothing that can."""
    first = next(iter(group.values()))
    cases = sum(trial.runs for trial in group.values())
    workers = min(cases, isolation.workers or default_workers(first.job))
    try:
        return replace(isolation, workers=workers, tool=first.tool).executor(first.job)
    except KernelfuzzError as error:
        return error


def _close(executor: Executor | KernelfuzzError) -> None:
    if not isinstance(executor, KernelfuzzError):
        executor.close()


def _run(group: Mapping[int, Trial], executor: Executor | KernelfuzzError) -> Iterator[tuple[int, Result]]:
    """Run the trials of one job and yield their results by index; where the executor fails, of the rest too."""
    version = ""
    verdicts: dict[int, list[Verdict]] = {index: [] for index in group}
    waiting = deque((index, Request.alone(t.saved.case)) for index, t in group.items() for _ in range(t.runs))
    awaited: deque[tuple[int, Request]] = deque()
    try:
        if isinstance(executor, KernelfuzzError):
            raise executor
        version = executor.loaded().version
        while waiting or awaited:
            while waiting and executor.has_room():
                awaited.append(waiting.popleft())
                executor.submit(awaited[-1][1])
            for _, verdict in executor.receive(block=True):
                index, _ = awaited.popleft()
                verdicts[index].append(verdict)
                if len(verdicts[index]) == group[index].runs:
                    yield index, _result(group[index], version, verdicts.pop(index))
    except KernelfuzzError as error:
        if isinstance(error, WorkerLostError):  # what it says of its own request was asked for
            index = next(index for index, request in awaited if request is error.request)
            verdicts[index].append(error.verdict)
        for index, some in verdicts.items():
            yield index, _result(group[index], version, some, str(error))


def _result(trial: Trial, version: str, verdicts: Sequence[Verdict], problem: str = "") -> Result:
    """Return what `verdicts` say of a trial; `problem` is why there are not as many as were asked for."""
    failed = [verdict for verdict in verdicts if verdict.failures]
    failures = {name: each for verdict in failed for name, each in fingerprints(trial.job, verdict).items()}
    outcome: Outcome
    if failed:
        outcome, remarks = "FAILED", []
        if trial.runs > 1:
            remarks.append(f"failed in {len(failed)} of {len(verdicts)} runs")
        if not any(map(trial.saved.shown_by, failed)):
            remarks.append(f"with another failure: {', '.join(failures)}")
        reason = "; ".join(remarks)
    elif reason := problem or _unjudged(verdicts):
        outcome = "ERROR"
    else:
        outcome, reason = "FIXED", f"passed in {trial.runs} runs" if trial.runs > 1 else ""
    return Result(
        trial.path,
        outcome,
        _one_line(reason),
        trial.saved.case,
        str(trial.job.kernel),
        str(trial.job.device),
        version=version,
        runs=len(verdicts),
        failed_runs=len(failed),
        failures=failures,
    )


def _unjudged(verdicts: Sequence[Verdict]) -> str:
    """Return why a case that did not fail has not passed either, or nothing."""
    for verdict in verdicts:
        if verdict.error:
            return f"the case cannot be judged: {verdict.error}"
        if verdict.rejected:
            return f"the kernel does not offer this case: {verdict.rejected}"
    return ""
