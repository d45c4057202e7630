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

SMALL = {"max_segments": 2, "max_length": 2}
"""Arguments with which a target's `cases` draws small cases."""


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
    end = None if budget.seconds is None else time.monotonic() + budget.seconds
    interrupted = False
    try:
        for index, job in enumerate(jobs):
            # The next worker loads its kernel on the other core while this job runs.
            executors += [Executor(later) for later in jobs[len(executors) : index + 2]]
            share = None if end is None else _Share(end, len(jobs) - index)
            with executors[index] as executor:
                _run_job(job, executor, budget.examples, share, derive_seed(seed, index), database, bus)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for executor in executors:
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


def _run_job(
    job: Job,
    executor: Executor,
    examples: int | None,
    share: _Share | None,
    seed: int,
    database: Path,
    bus: events.Bus,
) -> None:
    error = ""
    search = None
    try:
        kernel = executor.loaded()
        bus.emit(events.JobStarted(job, kernel.version))
        dimensions = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kernel.dimensions.items()
        }
        strategy, small = job.target.cases(**dimensions), job.target.cases(**{**dimensions, **SMALL})
        search = Search(job, executor.run, bus, examples, None if share is None else share.deadline())
        folder = database / job.target.name / file_name(str(job.kernel))
        search.run(strategy, seed, DirectoryBasedExampleDatabase(folder), small)
    except KernelfuzzError as problem:
        error = str(problem)
    finally:
        bus.emit(events.JobFinished(job, 0 if search is None else search.examples, error))
