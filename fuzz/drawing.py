"""What a job draws its cases from, and the compiled kernels that most of them share."""

import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis.strategies import SearchStrategy

from kernelfuzz.fuzz.executor import LoadedKernel, Request
from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.isolated import Fleet
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.regimes import Regime
from kernelfuzz.fuzz.search import RecordInFlight
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.devices import placements

PALETTE = 32
BATCHES = 6
"""Cases of a palette, and cases of each that are compiled ahead: what batches differ in is compiled for too."""


@dataclass(frozen=True)
class Drawing:
    """What a job draws its cases from.

    - strategy, small: draws all cases, and small ones, if there are any
    - ahead: cases to be compiled before the search; none where nothing is compiled
    """

    strategy: SearchStrategy[Case]
    small: SearchStrategy[Case] | None
    ahead: tuple[Case, ...] = ()

    @classmethod
    def of(cls, job: Job, kernel: LoadedKernel, regime: Regime | None, seed: int) -> "Drawing":
        """Return what a search with `seed` draws of what the kernel offers."""
        arguments = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kernel.dimensions.items()
        }
        kind = job.device.type
        placement = placements(
            kind,
            # Triton's host code launches on the current device, as vLLM knows.
            other_devices=not job.implementation.triton and kind != "cpu" and getattr(torch, kind).device_count() > 1,
            tensor_on_cpu=regime == "robustness",
        )
        if regime == "huge":
            assert job.target.huge_cases is not None
            return cls(job.target.huge_cases(**arguments, placement=placement), None)
        cases = partial(job.target.cases, **arguments, placement=placement)
        if not (job.compiles and job.target.specialised):
            return cls(cases(), cases(**job.target.small))
        palette = _palette(job, kernel, cases(), seed)
        ahead = [case for each in palette for case in draw(cases(palette=(each,)), seed, BATCHES)]
        return cls(cases(palette=palette), cases(**job.target.small), tuple(dict.fromkeys(ahead)))


def _palette(job: Job, kernel: LoadedKernel, strategy: SearchStrategy[Case], seed: int) -> tuple[Case, ...]:
    """Draw a palette of cases that need different kernels: one half is the same for every campaign on the release, so
    that it is compiled once, the other half is the campaign's own. Calls that are refused compile nothing."""
    of_release = zlib.crc32(f"{job.target.name}/{job.kernel.package}/{kernel.version}".encode())
    chosen: dict[tuple[object, ...], Case] = {}
    for half_seed, size in ((of_release, PALETTE // 2), (seed, PALETTE)):
        for case in draw(strategy, half_seed, 4 * PALETTE):
            classes = tuple(getattr(case, name) for name in job.target.specialised)
            is_refused = any(name.startswith("refused") for name in job.target.regimes(case))
            if len(chosen) < size and not is_refused:
                chosen.setdefault(classes, case)
    return tuple(chosen.values())


def compile_ahead(
    job: Job,
    cases: Sequence[Case],
    deadline: float | None,
    record: RecordInFlight,
    enough: Callable[[], bool] = lambda: False,
) -> tuple[int, list[Request]]:
    """Run the cases once on as many workers as there are cores, so that Triton's cache holds what they need, until the
    monotonic clock shows `deadline` or it is `enough`. Return how many were run, and which of them the search must run
    too: they failed.

    Raises KernelfuzzError if the kernel cannot be loaded.
    """
    workers = Fleet(job, min(len(cases), os.cpu_count() or 1), spares=False)
    waiting = [Request.alone(case) for case in cases]
    running: dict[Request, None] = {}
    ran, failed = 0, []
    try:
        workers.loaded()
        while (waiting or running) and (deadline is None or time.monotonic() < deadline) and not enough():
            while waiting and workers.has_room():
                running[waiting[0]] = None
                record(list(running))
                workers.submit(waiting.pop(0))
            for request, verdict in workers.receive(block=False):
                del running[request]
                ran += 1
                failed += [request] if verdict.failures else []
            time.sleep(0.002)
    finally:
        workers.close()
    return ran, failed
