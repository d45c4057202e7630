"""Executors: where the cases of a job run.

A request is a structure and the content seeds to run it with; an executor answers each with a verdict, in order.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from kernelfuzz.fuzz import worker
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.verdict import Verdict
from kernelfuzz.kernels.releases import home
from kernelfuzz.strategies.case import Case, to_json
from kernelfuzz.strategies.errors import KernelfuzzError


@dataclass(frozen=True)
class Request:
    """A structure to run with each of `seeds`, which take the place of the case's own; with `maps` with one seed, and
    the verdict says what became of the outputs."""

    case: Case
    seeds: tuple[int, ...]
    maps: bool = False

    @classmethod
    def alone(cls, case: Case) -> "Request":
        """Return the request for one case."""
        return cls(case, (case.seed,))

    @cached_property
    def message(self) -> bytes:
        """The request as a line of JSON."""
        document = {"case": to_json(self.case), "seeds": self.seeds, "maps": self.maps, "rehearsal": False}
        return json.dumps(document).encode()

    @property
    def rehearsal(self) -> bytes:
        """The same, to do everything but launch the kernel."""
        return json.dumps({**json.loads(self.message), "rehearsal": True}).encode()


@dataclass(frozen=True)
class LoadedKernel:
    """What a worker says of its kernel: its version, what narrows the target's strategy, and what a reader of the
    results must know."""

    version: str
    dimensions: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class WorkerLostError(KernelfuzzError):
    """A worker was lost over a request and none can take its place. `verdict` is what can be said of the request."""

    def __init__(self, reason: str, request: Request, verdict: Verdict) -> None:
        super().__init__(reason)
        self.request = request
        self.verdict = verdict


@dataclass
class Replacements:
    """How often a worker was replaced, and how often no spare one was ready then, so that the job had to wait."""

    workers: int = 0
    waits: int = 0


class Executor(Protocol):
    """Runs requests. Any method may raise KernelfuzzError where the kernel cannot be loaded, and WorkerLostError where
    it cannot be loaded again."""

    @property
    def replacements(self) -> Replacements:
        """What was replaced until now."""

    def loaded(self) -> LoadedKernel:
        """Wait until the kernel is loaded."""

    def has_room(self) -> bool:
        """Whether another request can be submitted without waiting."""

    def submit(self, request: Request) -> None:
        """Take a request, to be answered by `receive`."""

    def receive(self, *, block: bool) -> list[tuple[Request, Verdict]]:
        """Return what is answered, in the order of submission; with `block` at least one unless none is awaited."""

    def run(self, request: Request) -> Verdict:
        """Run one request while no other is awaited."""

    def close(self) -> None:
        """End what runs."""


def job_message(job: Job, sanitizer: str | None = None) -> dict[str, Any]:
    """Return a worker's first message; `sanitizer` is the tool that watches it."""
    return {
        "target": job.target.name,
        "kernel": str(job.kernel),
        "device": str(job.device),
        "sanitizer": sanitizer,
    }


def worker_environment(job: Job) -> dict[str, str]:
    """Return the environment that a job's kernel is loaded in."""
    environment = dict(os.environ)
    if job.device.type == "cpu" and job.implementation.triton:
        environment["TRITON_INTERPRET"] = "1"
    # Kept from one campaign to the next; a specialisation takes a second to compile.
    environment.setdefault("TRITON_CACHE_DIR", str(home() / "triton"))
    return environment


class LocalExecutor:
    """Runs requests in this process, for a debugger. What ends or hangs a worker ends or hangs this process."""

    def __init__(self, job: Job) -> None:
        self.replacements = Replacements()
        self._job = job
        self._answers: list[tuple[Request, Verdict]] = []

    def loaded(self) -> LoadedKernel:
        """Load the kernel."""
        os.environ.update(worker_environment(self._job))
        try:
            self._loaded = worker.load(job_message(self._job))
        except KernelfuzzError as error:
            raise KernelfuzzError(f"{self._job}: {error}") from error
        kernel = self._loaded[1]
        return LoadedKernel(kernel.version, json.loads(json.dumps(dict(kernel.dimensions))), kernel.notes)

    def has_room(self) -> bool:
        """Whether another request can be submitted."""
        return not self._answers

    def submit(self, request: Request) -> None:
        """Run a request at once."""
        self._answers.append((request, self.run(request)))

    def receive(self, *, block: bool) -> list[tuple[Request, Verdict]]:
        """Return what was run since the last call."""
        del block
        answers, self._answers = self._answers, []
        return answers

    def run(self, request: Request) -> Verdict:
        """Run one request."""
        target, kernel, conditions = self._loaded
        return worker.answer(target, kernel, json.loads(request.message), conditions)

    def close(self) -> None:
        """Do nothing: what was loaded stays in this process."""
