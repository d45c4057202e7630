"""Tasks: what a lane can be asked to do. They and the events that they emit cross from process to process."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from hypothesis.database import ExampleDatabase

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Conditions, Isolation, saved_examples
from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.nightly.redis_examples import redis_examples
from kernelfuzz.fuzz.regressions import run_regression
from kernelfuzz.fuzz.replay import Trial, run_trials
from kernelfuzz.kernels.regressions import find as find_regression

Emit = Callable[[events.Event], None]


@dataclass(frozen=True)
class Running:
    """The requests that a job's workers have now; `retried` where they have taken a lane along once already."""

    job: Job
    requests: tuple[Request, ...]
    retried: bool = False


@dataclass(frozen=True)
class Surroundings:
    """What a lane gives its tasks.

    - folder: of the lane's own, or of the store: where example databases are; workers: of each job, None for as many as
      pay
    - emit: called with each event; record: with what the workers have now, before they do it
    - is_stopped: whether the task is to end as soon as it can
    """

    folder: Path
    workers: int | None
    emit: Emit
    record: Callable[[Running], None]
    is_stopped: Callable[[], bool]

    @property
    def isolation(self) -> Isolation:
        """Where cases run."""
        return Isolation(workers=self.workers)


class Task(Protocol):
    """Something to be done by a lane of a `kind` of device."""

    @property
    def kind(self) -> str:
        """The kind of device that it needs."""

    def run(self, surroundings: Surroundings) -> None:
        """Do it. Raises KernelfuzzError if that is impossible."""


@dataclass(frozen=True)
class FuzzTask:
    """A slice of a job: look for failures for `seconds` once the kernel is loaded and compiled, and for no longer than
    `at_most` in all. `known` bugs are neither announced nor shrunk; `examples` is the address of a shared example
    database, or empty; `palette` is the seed of what is compiled ahead, the same for all slices of a night, and
    `compiles` whether it still has to be."""

    job: Job
    seed: int
    palette: int
    seconds: float
    at_most: float
    known: tuple[events.FailureFound, ...] = ()
    examples: str = ""
    compiles: bool = True

    @property
    def kind(self) -> str:
        """The job's."""
        return self.job.device.type

    def run(self, surroundings: Surroundings) -> None:
        """Run the slice."""
        last = time.monotonic() + self.at_most
        bus = events.Bus([surroundings.emit])
        conditions = Conditions(
            bus,
            surroundings.isolation,
            lambda job: _database(self.examples, surroundings.folder, job),
            lambda job: _Recorder(job, surroundings.record),
            enough=surroundings.is_stopped,
            known=self.known,
            palette=self.palette,
            compiles=self.compiles,
        )
        conditions.run(self.job, None, lambda: min(last, time.monotonic() + self.seconds), self.seed)


@dataclass(frozen=True)
class RetryTask:
    """One request whose lane was lost while it ran: run it once more, alone. What it shows is shrunk."""

    job: Job
    request: Request
    known: tuple[events.FailureFound, ...] = ()

    @property
    def kind(self) -> str:
        """The job's."""
        return self.job.device.type

    def run(self, surroundings: Surroundings) -> None:
        """Run the request."""
        surroundings.record(Running(self.job, (self.request,), retried=True))
        conditions = Conditions(
            events.Bus([surroundings.emit]),
            Isolation(workers=1),
            lambda job: saved_examples(surroundings.folder, job),
            lambda job: _Recorder(job, surroundings.record, retried=self.request),
            examples=1,
            enough=surroundings.is_stopped,
            known=self.known,
            compiles=False,
        )
        conditions.run(self.job, None, None, 0, [self.request])


@dataclass(frozen=True)
class ReplayTask:
    """Saved failures of one job, by their fingerprints, to be run again."""

    job: Job
    trials: tuple[tuple[str, Trial], ...]

    @property
    def kind(self) -> str:
        """The job's."""
        return self.job.device.type

    def run(self, surroundings: Surroundings) -> None:
        """Run them, until all are done or the lane is to stop."""
        with closing(run_trials([trial for _, trial in self.trials], surroundings.isolation)) as results:
            for index, result in results:
                name, trial = self.trials[index]
                surroundings.emit(
                    events.FailureReplayed(
                        trial.job,
                        name,
                        trial.saved.case,
                        result.version,
                        result.outcome,
                        result.reason,
                        result.failures,
                    )
                )
                if surroundings.is_stopped():
                    break


@dataclass(frozen=True)
class RegressionTask:
    """A historical bug to be looked for by a lane of that `kind`, on the best device that it can be run on there, for
    no longer than `at_most` seconds."""

    pull_request: str
    kind: str
    seed: int
    at_most: float

    def run(self, surroundings: Surroundings) -> None:
        """Run it. One that is cut short is not run."""
        last = time.monotonic() + self.at_most

        def progress(_: str) -> None:
            if surroundings.is_stopped() or time.monotonic() >= last:
                raise KeyboardInterrupt  # as a person would end it

        regression = find_regression(self.pull_request)
        result = run_regression(regression, None, [self.seed], progress)
        problem = "there was no time left for it" if result.interrupted else result.problem
        surroundings.emit(events.RegressionFinished(self.pull_request, regression.title, result.outcome, problem))


def _database(examples: str, folder: Path, job: Job) -> ExampleDatabase:
    """Return the example database of a job: the shared one at the address `examples`, or one in the folder."""
    return redis_examples(examples, job) if examples else saved_examples(folder, job)


@dataclass
class _Recorder:
    """Tells of the requests that a job's workers have now. A request that is `retried` is told of as such until others
    take its place."""

    job: Job
    tell: Callable[[Running], None]
    retried: Request | None = None

    def __enter__(self) -> "_Recorder":
        return self

    def left(self) -> list[Request]:
        """Return nothing: what was lost is run as a task of its own."""
        return []

    def record(self, requests: Sequence[Request]) -> None:
        """Tell of them."""
        self.tell(Running(self.job, tuple(requests), retried=self.retried in requests))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tell(Running(self.job, ()))
