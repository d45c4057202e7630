"""Campaigns: jobs under a budget, one after the other."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from kernelfuzz.fuzz import events, sanitizer
from kernelfuzz.fuzz.drawing import Drawing, compile_ahead
from kernelfuzz.fuzz.executor import Executor, LocalExecutor, Replacements, Request
from kernelfuzz.fuzz.files import InFlight, InFlightFile
from kernelfuzz.fuzz.isolated import Fleet
from kernelfuzz.fuzz.job import Job, Skipped
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.regimes import Regime
from kernelfuzz.fuzz.search import Search
from kernelfuzz.strategies.case import derive_seed
from kernelfuzz.strategies.errors import KernelfuzzError

MOST_WORKERS = 8


@dataclass(frozen=True)
class Budget:
    """How long to look for failures: a number of examples for each job, or seconds shared out among all jobs."""

    examples: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Isolation:
    """Where cases run: in `workers` processes for each job (None: as many as pay), watched by the sanitizer's `tool`;
    or, without `processes`, in this one."""

    processes: bool = True
    workers: int | None = None
    tool: sanitizer.Tool | None = None

    def executor(self, job: Job) -> Executor:
        """Return the executor of a job, which starts to load its kernel."""
        if not self.processes:
            return LocalExecutor(job)
        return Fleet(job, 1 if self.tool else self.workers or default_workers(job), self.tool)


def default_workers(job: Job) -> int:
    """Return how many workers should pay: on a CPU one for each core but the one that draws. A GPU runs one process at
    a time, but two should keep it busy while each makes tensors, as a stack of cases does by itself; not measured yet.
    """
    if job.device.type == "cpu":
        return max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 1))
    return 1 if job.target.stackable else 2


def run_campaign(
    jobs: list[Job],
    skipped: list[Skipped],
    budget: Budget,
    seed: int,
    out: Path,
    bus: events.Bus,
    isolation: Isolation = Isolation(),
    regime: Regime | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Run the jobs one after the other and emit what happens. Example databases and the cases that run now are kept in
    the folder `out`. With a `regime` its cases are drawn instead of the usual ones. A job ends early once `enough`
    says so, which is asked between examples.

    Ctrl-C ends the campaign after the running case; what was found until then has been emitted.
    """
    bus.emit(events.CampaignStarted(tuple(jobs), tuple(skipped), seed))
    conditions = Conditions(
        bus, isolation, partial(saved_examples, out), partial(InFlightFile, out), budget.examples, regime, enough
    )
    executors: list[Executor | None] = []
    end = None if budget.seconds is None else time.monotonic() + budget.seconds
    interrupted = False
    try:
        for index, job in enumerate(jobs):
            # The next job's workers load their kernel while this one runs.
            executors += [conditions.prepare(later) for later in jobs[len(executors) : index + 2]]
            share = None if end is None else _Share(end, len(jobs) - index)
            conditions.run(job, executors[index], None if share is None else share.deadline, derive_seed(seed, index))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for executor in executors:
            if executor is not None:
                executor.close()
    bus.emit(events.CampaignFinished(interrupted))


@dataclass(frozen=True)
class _Share:
    """An equal part, for each of `jobs` jobs, of the time that is left until the monotonic clock shows `end`."""

    end: float
    jobs: int

    def deadline(self) -> float:
        """Return when the first of the jobs must be over if it starts now."""
        now = time.monotonic()
        return now + max(0.0, self.end - now) / self.jobs


@dataclass(frozen=True)
class Conditions:
    """What the jobs of a campaign have in common.

    - database: where a job's failing examples are kept; in_flight: where the requests that its workers have now
    - examples: how many each job looks for failures with, None where time decides
    - enough: ends a job early, asked between examples
    - known: bugs that are found already: they are counted, and neither announced nor shrunk
    - palette: the seed of what is compiled ahead, for campaigns that are to share it; None: each job's own
    - compiles: whether that is to be compiled, unless an earlier campaign has done so
    """

    bus: events.Bus
    isolation: Isolation
    database: Callable[[Job], ExampleDatabase]
    in_flight: Callable[[Job], InFlight]
    examples: int | None = None
    regime: Regime | None = None
    enough: Callable[[], bool] = lambda: False
    known: tuple[events.FailureFound, ...] = ()
    palette: int | None = None
    compiles: bool = True

    def prepare(self, job: Job) -> Executor | None:
        """Return an executor that loads the job's kernel in the background; None if that cannot even begin, which will
        be said when it is the job's turn."""
        try:
            return self.isolation.executor(job)
        except KernelfuzzError:
            return None

    def run(
        self,
        job: Job,
        prepared: Executor | None,
        deadline: Callable[[], float] | None,
        seed: int,
        first: Sequence[Request] = (),
    ) -> None:
        """Run a job, the requests of `first` before all others, and close its executor. The `deadline`, on the
        monotonic clock, is asked for once the kernel is loaded, and again once what it needs is compiled: many
        processes that load a kernel and compile can take longer than the job was to."""
        error = ""
        executor, search = prepared, None
        try:
            executor = executor or self.isolation.executor(job)
            kernel = executor.loaded()
            with self.in_flight(job) as in_flight:
                left = in_flight.left()
                until = None if deadline is None else deadline()
                self.bus.emit(events.JobStarted(job, kernel.version, len(left), kernel.notes))
                drawing = Drawing.of(job, kernel, self.regime, seed if self.palette is None else self.palette)
                failed: list[Request] = []
                if drawing.ahead and self.compiles:
                    started = time.monotonic()
                    # What is not compiled after half of the time is compiled when its turn comes.
                    half = None if until is None else (started + until) / 2
                    compiled, failed = compile_ahead(job, drawing.ahead, half, in_flight.record, self.enough)
                    took, complete = time.monotonic() - started, compiled == len(drawing.ahead)
                    self.bus.emit(events.KernelsCompiled(job, compiled, took, complete))
                    until = None if deadline is None else deadline()
                search = Search(
                    job,
                    executor,
                    self.bus,
                    self.examples,
                    until,
                    self._seeds(job),
                    in_flight.record,
                    self.enough,
                    self.known,
                )
                search.run(drawing.strategy, seed, self.database(job), drawing.small, [*left, *first, *failed])
        except KernelfuzzError as problem:
            error = str(problem)
        finally:
            replacements = Replacements() if executor is None else executor.replacements
            self.bus.emit(events.JobFinished(job, 0 if search is None else search.examples, error, replacements))
            if executor is not None:
                executor.close()

    def _seeds(self, job: Job) -> int:
        """Return how many seeds an example has: one under a sanitizer, so that a report is of one case, and where a
        case takes all memory."""
        return 1 if self.isolation.tool is not None or self.regime == "huge" else job.seeds


def saved_examples(folder: Path, job: Job) -> ExampleDatabase:
    """Return the example database of a job below `folder`."""
    return DirectoryBasedExampleDatabase(folder / "examples" / job.target.name / file_name(str(job.kernel)))
