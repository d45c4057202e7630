"""Campaigns: jobs under a budget, one after the other."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.strategies import SearchStrategy

from kernelfuzz.fuzz import events, sanitizer
from kernelfuzz.fuzz.executor import Executor, LoadedKernel, LocalExecutor, Replacements, Request
from kernelfuzz.fuzz.files import InFlightFile
from kernelfuzz.fuzz.isolated import Fleet
from kernelfuzz.fuzz.job import Job, Skipped
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.regimes import Regime
from kernelfuzz.fuzz.search import Search, draw
from kernelfuzz.strategies.case import Case, derive_seed
from kernelfuzz.strategies.devices import placements
from kernelfuzz.strategies.errors import KernelfuzzError

SMALL = {"max_segments": 2, "max_length": 2}
"""Arguments with which a target's `cases` draws small cases."""

PALETTE = 32
COMPILED_AHEAD = 160
"""Cases whose compiled kernels a campaign is built on, so that a new one is not compiled for each example; and cases
drawn from them that are compiled before it starts, since batches differ in what they need."""

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
    """Return how many workers pay: on a CPU one for each core but the one that draws. A GPU runs one process at a time,
    but two keep it busy while each makes tensors; a stack of cases does that by itself."""
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
) -> None:
    """Run the jobs one after the other and emit what happens. Example databases and the cases that run now are kept in
    the folder `out`. With a `regime` its cases are drawn instead of the usual ones.

    Ctrl-C ends the campaign after the running case; what was found until then has been emitted.
    """
    bus.emit(events.CampaignStarted(tuple(jobs), tuple(skipped), seed))
    executors: list[Executor] = []
    end = None if budget.seconds is None else time.monotonic() + budget.seconds
    interrupted = False
    try:
        for index, job in enumerate(jobs):
            # The next job's workers load their kernel while this one runs.
            executors += [isolation.executor(later) for later in jobs[len(executors) : index + 2]]
            share = None if end is None else _Share(end, len(jobs) - index)
            # One at a time under a sanitizer, so that a report is of one case, and where a case takes all memory.
            seeds = 1 if isolation.tool is not None or regime == "huge" else job.seeds
            _run_job(job, executors[index], budget.examples, share, derive_seed(seed, index), seeds, out, bus, regime)
            executors[index].close()
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
    seeds: int,
    out: Path,
    bus: events.Bus,
    regime: Regime | None,
) -> None:
    error = ""
    search = None
    try:
        kernel = executor.loaded()
        with InFlightFile(out, job) as in_flight:
            left = in_flight.left()
            deadline = None if share is None else share.deadline()
            bus.emit(events.JobStarted(job, kernel.version, len(left)))
            cases, small = _strategies(job, kernel, regime)
            strategy, first = cases(), left
            if job.compiles and job.target.specialised and regime != "huge":
                strategy = cases(palette=tuple(draw(strategy, seed, PALETTE)))
                ahead = draw(strategy, derive_seed(seed, 1), COMPILED_AHEAD)
                _compile(job, ahead, deadline, bus)
                first = [*left, *map(Request.alone, ahead)]
            search = Search(job, executor, bus, examples, deadline, seeds, in_flight.record)
            folder = out / "examples" / job.target.name / file_name(str(job.kernel))
            search.run(strategy, seed, DirectoryBasedExampleDatabase(folder), small, first)
    except KernelfuzzError as problem:
        error = str(problem)
    finally:
        replacements = Replacements() if search is None else executor.replacements
        bus.emit(events.JobFinished(job, 0 if search is None else search.examples, error, replacements))


def _strategies(
    job: Job, kernel: LoadedKernel, regime: Regime | None
) -> tuple[Callable[..., SearchStrategy[Case]], SearchStrategy[Case] | None]:
    """Return what draws cases that the kernel offers, to be called with further arguments, and a strategy of small ones
    if there are any."""
    dimensions = {name: tuple(value) if isinstance(value, list) else value for name, value in kernel.dimensions.items()}
    kind = job.device.type
    placement = placements(
        kind,
        # Triton's host code launches on the current device, as vLLM knows.
        other_devices=not job.implementation.triton and kind != "cpu" and getattr(torch, kind).device_count() > 1,
        tensor_on_cpu=regime == "robustness",
    )
    if regime == "huge":
        assert job.target.huge_cases is not None
        return partial(job.target.huge_cases, **dimensions, placement=placement), None
    cases = partial(job.target.cases, **dimensions, placement=placement)
    return cases, cases(**SMALL)


def _compile(job: Job, palette: list[Case], deadline: float | None, bus: events.Bus) -> None:
    """Run the cases once on as many workers as there are cores, so that Triton's cache holds what they need.

    Verdicts are not looked at: the search runs the palette again, which takes no time any more.
    """
    started = time.monotonic()
    workers = Fleet(job, min(len(palette), os.cpu_count() or 1))
    ran = 0
    try:
        for case in palette:
            while not workers.has_room():
                workers.receive(block=True)
            if deadline is not None and time.monotonic() >= deadline:
                break
            workers.submit(Request.alone(case))
            ran += 1
        while workers.receive(block=True):
            pass
    finally:
        workers.close()
    bus.emit(events.KernelsCompiled(job, ran, time.monotonic() - started))
