"""Executors whose cases run in worker processes, which may die or hang."""

import dataclasses
import signal
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

from kernelfuzz.fuzz import sanitizer
from kernelfuzz.fuzz.executor import LoadedKernel, Replacements, Request, WorkerLostError
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.verdict import UNUSABLE_AFTERWARDS, Failure, Verdict, by_severity
from kernelfuzz.fuzz.worker_process import LOOK_SECONDS, Worker
from kernelfuzz.strategies.errors import KernelfuzzError

FIRST_SECONDS = 15.0
COMPILING_SECONDS = 60.0
LEAST_SECONDS = 5.0
SLOWEST_TIMES = 20.0
"""How long a worker may be silent: FIRST_SECONDS while little was seen of a kernel, or COMPILING_SECONDS where it has
to be compiled; then SLOWEST_TIMES what its slowest case took, but LEAST_SECONDS at least."""

CONFIRMING_TIMES = 2.0
"""How much longer a case whose worker fell silent is given when it is run again, to tell a hang from a busy machine."""

QUEUE = 4
"""Requests that a worker has at a time, so that it never waits for the next one."""

MOST_SPARES = 4


class WorkerPool:
    """Makes the workers of one job, and keeps spare ones ready for those that are lost.

    On a GPU, where a new worker takes seconds, one spare is started ahead; elsewhere the first after the first loss.
    There are more when none was ready in time. Without `spares` there are none.
    """

    def __init__(self, job: Job, tool: sanitizer.Tool | None = None, *, spares: bool = True) -> None:
        self.replacements = Replacements()
        self.tool = tool
        self._job = job
        self._most = MOST_SPARES if spares else 0
        self._wanted = min(0 if job.device.type == "cpu" else 1, self._most)
        self._spares: list[Worker] = []
        self._lost: list[Worker] = []

    def start(self) -> Worker:
        """Return a new worker, which loads its kernel in the background."""
        return Worker(self._job, self.tool)

    def refill(self) -> None:
        """Start the spares that are wanted."""
        while len(self._spares) < self._wanted:
            self._spares.append(self.start())

    def replace(self, worker: Worker) -> Worker:
        """End a worker and return another one with its kernel loaded. Raises KernelfuzzError where none can be had."""
        worker.kill()  # what its device needs to let go of it is not waited for
        self._lost.append(worker)
        self.replacements.workers += 1
        ready = [spare for spare in self._spares if spare.is_loaded()]
        self.replacements.waits += bool(self._wanted and not ready)
        self._wanted = min(self._wanted + (not ready), self._most)
        for spare in ready or self._spares[:1]:
            self._spares.remove(spare)
            with suppress(KernelfuzzError):  # one spare too many for the device's memory, say
                spare.loaded()
                self.refill()
                return spare
            spare.close()
        another = self.start()
        try:
            another.loaded()
        except KernelfuzzError:
            another.close()
            raise
        self.refill()
        self._lost = [each for each in self._lost if not each.has_ended()]
        return another

    def close(self) -> None:
        """End the spares, and wait for those that were lost."""
        for worker in (*self._spares, *self._lost):
            worker.close()
        self._spares.clear()
        self._lost.clear()


class IsolatedExecutor:
    """Runs requests in a worker process of its own; use it as a context manager.

    The process starts at once and loads its kernel in the background. A worker that dies or falls silent fails its
    request; another one takes over and goes on with the rest.
    """

    def __init__(self, job: Job, tool: sanitizer.Tool | None = None, pool: WorkerPool | None = None) -> None:
        self._pool = WorkerPool(job, tool) if pool is None else pool
        self._compiles = job.compiles
        self._awaited: deque[Request] = deque()
        self._since = 0.0
        self._slowest = 0.0
        self._answered = 0
        self._has_hung = False
        self._worker = self._pool.start()

    def __enter__(self) -> "IsolatedExecutor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def replacements(self) -> Replacements:
        """What was replaced until now."""
        return self._pool.replacements

    def loaded(self) -> LoadedKernel:
        """Wait until the kernel is loaded. Raises KernelfuzzError if it cannot be, with the worker's reason."""
        kernel = self._worker.loaded()
        self._pool.refill()
        return kernel

    @property
    def connection(self) -> Any:
        """What to wait for: readable when the worker has answered or died."""
        return self._worker.process.connection

    @property
    def awaited(self) -> int:
        """How many requests are not answered yet."""
        return len(self._awaited)

    @property
    def seconds_left(self) -> float:
        """How long the worker may still be silent before its request counts as hanging."""
        return max(0.0, self._since + self._patience() - time.monotonic())

    def has_room(self) -> bool:
        """Whether the kernel is loaded and the worker's queue has room. Under a sanitizer it has one place, so that
        reports are the request's own."""
        if not self._worker.is_loaded():
            return False
        self.loaded()
        return len(self._awaited) < (QUEUE if self._pool.tool is None else 1)

    def submit(self, request: Request) -> None:
        """Send a request to the worker."""
        if not self._awaited:
            self._since = time.monotonic()
        self._awaited.append(request)
        self._worker.send(request.message)

    def receive(self, *, block: bool) -> list[tuple[Request, Verdict]]:
        """Return what is answered."""
        answers: list[tuple[Request, Verdict]] = []
        while self._awaited:
            waits = block and not answers
            verdict = self._next(self.seconds_left if waits else 0.0)
            if verdict is not None:
                answers.append((self._awaited.popleft(), verdict))
                self._since = time.monotonic()
            elif not waits:
                break
        return answers

    def run(self, request: Request) -> Verdict:
        """Run one request. A worker that dies or hangs is a failure of kind crash or hang."""
        assert not self._awaited
        self.submit(request)
        ((_, verdict),) = self.receive(block=True)
        return verdict

    def close(self) -> None:
        """End the worker and the spares."""
        self._worker.close()
        self._pool.close()

    def _next(self, seconds: float) -> Verdict | None:
        """Return the verdict on the first awaited request, or None if there is none after so many seconds."""
        try:
            answer = self._worker.receive(seconds)
        except TimeoutError:
            if self.seconds_left > 0:
                return None
            return self._lose(_silence(self._patience()))
        except (EOFError, ConnectionError):
            return self._lose(self._worker.death())
        self._answered += 1
        verdict = self._with_reports(Verdict.from_json(answer["verdict"]))
        self._slowest = max(self._slowest, sum(verdict.seconds.values()))
        if verdict.error and not verdict.own_error:
            return self._go_on((_breaks_its_process(verdict),), None)
        if answer["usable"]:
            return verdict
        is_of_one_seed = len(self._awaited[0].seeds) == 1 or verdict.seed is not None
        is_known = is_of_one_seed and verdict.failures[0].clause != UNUSABLE_AFTERWARDS
        return self._go_on(verdict.failures, verdict if is_known else None)

    def _lose(self, how: Failure) -> Verdict:
        """Return the verdict on the first awaited request, whose worker ended so."""
        return self._go_on((how, *self._worker.reports()), None)

    def _go_on(self, ended: tuple[Failure, ...], verdict: Verdict | None) -> Verdict:
        """Replace the worker, find the verdict on the first awaited request where it is not known, and send the new
        worker the rest."""
        request = self._awaited[0]
        try:
            self._worker = self._pool.replace(self._worker)
            verdict = verdict or self._examine(request, ended)
        except KernelfuzzError as error:
            known = verdict or Verdict(by_severity(list(ended)), cases=len(request.seeds))
            raise WorkerLostError(str(error), request, known) from error
        for waiting in list(self._awaited)[1:]:
            self._worker.send(waiting.message)
        return verdict

    def _with_reports(self, verdict: Verdict) -> Verdict:
        """Add what the sanitizer reported since the last request."""
        failures = self._worker.reports()
        if not failures:
            return verdict
        return dataclasses.replace(verdict, failures=by_severity([*failures, *verdict.failures]))

    @property
    def _first_seconds(self) -> float:
        return COMPILING_SECONDS if self._compiles else FIRST_SECONDS

    def _patience(self) -> float:
        if self._answered < 3:
            return self._first_seconds
        return min(self._first_seconds, max(LEAST_SECONDS, SLOWEST_TIMES * self._slowest))

    def _ask(self, request: Request, seconds: float, *, rehearsal: bool = False) -> Verdict | tuple[Failure, ...]:
        """Run a request on the worker and wait; return the verdict, or how the worker ended, which is replaced then."""
        self._worker.send(request.rehearsal if rehearsal else request.message)
        try:
            answer = self._worker.receive(seconds)
        except TimeoutError:
            how = _silence(seconds)
        except (EOFError, ConnectionError):
            how = self._worker.death()
        else:
            verdict = self._with_reports(Verdict.from_json(answer["verdict"]))
            if verdict.error or not answer["usable"]:
                self._worker = self._pool.replace(self._worker)
            is_ours = rehearsal or verdict.own_error
            return (_breaks_its_process(verdict),) if verdict.error and not is_ours else verdict
        reports = self._worker.reports()
        self._worker = self._pool.replace(self._worker)
        return (how, *reports)

    def _examine(self, request: Request, ended: tuple[Failure, ...], *, is_second: bool = False) -> Verdict:
        """Return the verdict on a request after which the worker `ended` so, the second time if `is_second`.

        Of several seeds the first one that fails alone decides. Silence may be a busy machine's, SIGKILL whoever sent
        it, and what the harness stumbles over an earlier case's doing: only what happens twice is this kernel's and
        this case's. And what a rehearsal without the kernel does not survive is the harness's own fault.
        """
        is_doubtful = ended[0].clause in _DOUBTFUL and not (ended[0].kind == "hang" and self._has_hung)
        if len(request.seeds) > 1:
            for number, seed in enumerate(request.seeds, start=1):
                single = Request(request.case, (seed,))
                alone = self._ask(single, self._patience())
                verdict = alone if isinstance(alone, Verdict) else self._examine(single, alone, is_second=is_doubtful)
                if verdict.failures or verdict.error:
                    return dataclasses.replace(verdict, cases=number, seed=seed)
            return Verdict(() if is_doubtful else by_severity(list(ended)), cases=len(request.seeds))
        if is_doubtful and not is_second:
            again = self._ask(request, CONFIRMING_TIMES * self._patience())
            if isinstance(again, Verdict):
                if ended[0].kind == "hang":  # slow, then
                    self._slowest = max(self._slowest, self._patience() / SLOWEST_TIMES)
                return again
            ended = again
        rehearsed = self._ask(request, self._first_seconds, rehearsal=True)
        if isinstance(rehearsed, tuple):
            return Verdict(error=f"without launching the kernel: {rehearsed[0].message}")
        if rehearsed.error:
            return rehearsed
        self._has_hung |= ended[0].kind == "hang"
        return Verdict(by_severity(list(ended)), seed=request.seeds[0])


_NO_ANSWER, _BREAKS_ITS_PROCESS = "no_answer", "breaks_its_process"
_DOUBTFUL = (_NO_ANSWER, _BREAKS_ITS_PROCESS, signal.SIGKILL.name)
"""Clauses under which a worker may end without this case's kernel having done it."""


def _breaks_its_process(verdict: Verdict) -> Failure:
    """Return what it is if the harness fails, but not without the kernel."""
    return Failure("crash", "", _BREAKS_ITS_PROCESS, f"after the launch the harness fails: {verdict.error}")


def _silence(seconds: float) -> Failure:
    return Failure("hang", "", _NO_ANSWER, f"no answer within {seconds:.3g} s")


class Fleet:
    """Several workers of one job: requests go to whichever has least to do, answers come in the order of submission."""

    def __init__(self, job: Job, workers: int, tool: sanitizer.Tool | None = None, *, spares: bool = True) -> None:
        self._pool = WorkerPool(job, tool, spares=spares)
        self._executors = [IsolatedExecutor(job, tool, self._pool) for _ in range(workers)]
        self._tickets: list[deque[int]] = [deque() for _ in self._executors]
        self._answers: dict[int, tuple[Request, Verdict]] = {}
        self._submitted = self._returned = 0

    @property
    def replacements(self) -> Replacements:
        """What was replaced until now."""
        return self._pool.replacements

    def loaded(self) -> LoadedKernel:
        """Wait until the first worker has loaded the kernel."""
        return self._executors[0].loaded()

    def has_room(self) -> bool:
        """Whether any worker has."""
        return any(executor.has_room() for executor in self._executors)

    def submit(self, request: Request) -> None:
        """Send a request to the worker that has least to do."""
        with_room = [i for i, executor in enumerate(self._executors) if executor.has_room()]
        index = min(with_room, key=lambda i: self._executors[i].awaited)
        self._executors[index].submit(request)
        self._tickets[index].append(self._submitted)
        self._submitted += 1

    def receive(self, *, block: bool) -> list[tuple[Request, Verdict]]:
        """Return what is answered, in the order of submission."""
        while True:
            busy = [(i, executor) for i, executor in enumerate(self._executors) if executor.awaited]
            for index, executor in busy:
                for answer in executor.receive(block=False):
                    self._answers[self._tickets[index].popleft()] = answer
            ready = []
            while self._returned in self._answers:
                ready.append(self._answers.pop(self._returned))
                self._returned += 1
            if ready or not block or not busy:
                return ready
            # Not for longer than until a worker is next looked after: it may be dead and a child keep its connection.
            seconds = min(LOOK_SECONDS, *(executor.seconds_left for _, executor in busy))
            wait([executor.connection for _, executor in busy], seconds)

    def run(self, request: Request) -> Verdict:
        """Run one request on the first worker."""
        return self._executors[0].run(request)

    def close(self) -> None:
        """End the workers."""
        for executor in self._executors:
            executor.close()
