"""Campaigns: jobs under a budget, one after the other."""

import time
from dataclasses import dataclass
from pathlib import Path

from hypothesis.database import DirectoryBasedExampleDatabase

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.executor import Executor
from kernelfuzz.fuzz.job import Job, Skipped
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.search import Search
from kernelfuzz.strategies.case import derive_seed
from kernelfuzz.strategies.errors import KernelfuzzError


@dataclass(frozen=True)
class Budget:
    """How long to look for failures: a number of examples for each job, or seconds shared out among all jobs."""

    examples: int | None = None
    seconds: float | None = None


def run_campaign(
    jobs: list[Job], skipped: list[Skipped], budget: Budget, seed: int, database: Path, bus: events.Bus
) -> None:
    """Run the jobs one after the other and emit what happens. `database` is the folder of the example databases.

    Ctrl-C ends the campaign after the running case; what was found until then has been emitted.
    """
    bus.emit(events.CampaignStarted(tuple(jobs), tuple(skipped), seed))
    executors: list[Executor] = []
    started = time.monotonic()
    interrupted = False
    try:
        for index, job in enumerate(jobs):
            # The next worker loads its kernel on the other core while this job runs.
            executors += [Executor(later) for later in jobs[len(executors) : index + 2]]
            left = None
            if budget.seconds is not None:
                left = max(0.0, started + budget.seconds - time.monotonic()) / (len(jobs) - index)
            with executors[index] as executor:
                share = Budget(budget.examples, left)
                _run_job(job, executor, share, derive_seed(seed, index), database, bus)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for executor in executors:
            executor.close()
    bus.emit(events.CampaignFinished(interrupted))


def _run_job(job: Job, executor: Executor, budget: Budget, seed: int, database: Path, bus: events.Bus) -> None:
    deadline = None if budget.seconds is None else time.monotonic() + budget.seconds
    error = ""
    try:
        kernel = executor.loaded()
        bus.emit(events.JobStarted(job, kernel.version))
        strategy = job.target.cases(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in kernel.dimensions.items()}
        )
        folder = database / job.target.name / file_name(str(job.kernel))
        search = Search(job, executor.run, bus, budget.examples, deadline)
        search.run(strategy, seed, DirectoryBasedExampleDatabase(folder))
    except KernelfuzzError as problem:
        error = str(problem)
    finally:
        bus.emit(events.JobFinished(job, error))
