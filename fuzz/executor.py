"""Executors: where the cases of a job run.

A request is a structure and the content seeds to run it with; an executor answers each with a verdict, in order.
"""

import base64
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from kernelfuzz.fuzz import worker
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.testing.decorator import KernelTest
from kernelfuzz.fuzz.verdict import Verdict
from kernelfuzz.kernels.releases import home
from kernelfuzz.strategies.case import Case, to_json
from kernelfuzz.strategies.errors import KernelfuzzError


@dataclass(frozen=True)
class Request:
    """A structure to run with each of `seeds`, which take the place of the case's own; with `maps` with one seed, and
    the verdict says what became of the outputs.

    A kernel test's function may take further `arguments` by name, which do not count when requests are compared.
    """

    case: Case
    seeds: tuple[int, ...]
    maps: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def alone(cls, case: Case) -> "Request":
        """Return the request for one case."""
        return cls(case, (case.seed,))

    @cached_property
    def message(self) -> bytes:
        """The request as a line of JSON. Raises KernelfuzzError for an argument that cannot be sent to a worker."""
        return json.dumps({**self.document, "arguments": self._packed_arguments()}).encode()

    @property
    def document(self) -> dict[str, Any]:
        """The request in JSON types, without the arguments."""
        return {"case": to_json(self.case), "seeds": self.seeds, "maps": self.maps, "rehearsal": False}

    def _packed_arguments(self) -> str:
        """Return the arguments for a worker, which is as trusted as this process."""
        if not self.arguments:
            return ""
        try:
            return base64.b64encode(pickle.dumps(dict(self.arguments))).decode()
        except Exception as error:
            names = ", ".join(self.arguments)
            raise KernelfuzzError(
                f"{names}: cannot be sent to a worker process ({error}): "
                "make it in the test function, or add --fuzz-isolate=no"
            ) from error

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
        "test": None if job.test is None else job.test.message(),
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
    """Runs requests in this process, for a debugger. What ends or hangs a worker ends or hangs this process. The job's
    kernel `test` need not be imported where it is given."""

    def __init__(self, job: Job, test: KernelTest | None = None) -> None:
        self.replacements = Replacements()
        self._job = job
        self._test = test
        self._answers: list[tuple[Request, Verdict]] = []

    def loaded(self) -> LoadedKernel:
        """Load the kernel."""
        os.environ.update(worker_environment(self._job))
        try:
            self._loaded = worker.load(job_message(self._job), self._test)
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
        message = json.loads(json.dumps(request.document))
        return worker.answer(target, worker.with_arguments(kernel, request.arguments), message, conditions)

    def close(self) -> None:
        """Do nothing: what was loaded stays in this process."""
