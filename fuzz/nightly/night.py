"""One night: stored failures first, then the historical bugs, then slices of all jobs until the time is over.

This process hands out tasks and writes down what comes back; all kernels run in lanes.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.failure_folder import SavedFailure
from kernelfuzz.fuzz.failures import fingerprint
from kernelfuzz.fuzz.files import write_file, write_json
from kernelfuzz.fuzz.job import Job, Skipped
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.nightly.config import Config
from kernelfuzz.fuzz.nightly.lane import Done, Emitted, Lost, Message
from kernelfuzz.fuzz.nightly.lanes import Lane, Lanes
from kernelfuzz.fuzz.nightly.ledger import Ledger, Observer
from kernelfuzz.fuzz.nightly.records import RunFolder, alone
from kernelfuzz.fuzz.nightly.schedule import Schedule
from kernelfuzz.fuzz.nightly.statistics import Statistics
from kernelfuzz.fuzz.nightly.tasks import FuzzTask, RegressionTask, ReplayTask, RetryTask, Running, Task
from kernelfuzz.fuzz.regressions import missing_releases
from kernelfuzz.fuzz.replay import Trial
from kernelfuzz.fuzz.store import queries
from kernelfuzz.fuzz.store.store import Store
from kernelfuzz.fuzz.summary import environment
from kernelfuzz.fuzz.verdict import Failure
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.kernels.registry import DEVICE_KINDS, find
from kernelfuzz.kernels.regressions import REGRESSIONS, Regression
from kernelfuzz.strategies.case import derive_seed, to_json

SAVE_SECONDS = 20.0
"""How often what was counted is written down: more is not lost, whatever happens."""

GRACE_SECONDS = 12.0
GRACE_AFTER_SIGNAL_SECONDS = 4.0
"""How long lanes may take to end their tasks when the time is over, or after a signal; then they are killed. Who sends
the signal may not wait for long: a CI service ten seconds."""

REGRESSIONS_PART = 0.25
"""The part of the time within which historical bugs are looked for."""

MOST_ERRORS = 2
"""How many slices of a job in a row may end with an error before it gets no further one."""

WAIT_SECONDS = 0.2


@dataclass
class JobState:
    """How far a job is: what was counted, the bugs that are not looked for any more, slices in a row that ended with an
    error, how many lanes run it now, and the names of those that have compiled its palette."""

    job: Job
    statistics: Statistics
    known: dict[str, events.FailureFound] = field(default_factory=dict)
    errors: int = 0
    lanes: int = 0
    compiled: set[str] = field(default_factory=set)


class Night:
    """One run of a night for `seconds`, remembered in `store`.

    - jobs: what is to run; skipped: what cannot run here
    - lanes: where it runs; they are opened by it
    - is_interrupted: asked several times a second; once it is true the night ends as if its time were over
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        jobs: Sequence[Job],
        skipped: Sequence[Skipped],
        lanes: Lanes,
        seconds: float,
        seed: int,
        observer: Observer,
        is_interrupted: Callable[[], bool],
    ) -> None:
        self.jobs = {str(job): JobState(job, Statistics(job)) for job in jobs}
        self.seconds = seconds
        self.interrupted = False
        self._config = config
        self._folder = store.folder
        self._seed = seed
        self._is_interrupted = is_interrupted
        self._started = time.monotonic()
        self._end = self._started + seconds
        self._saved_at = self._started
        self._tasks: deque[Task] = deque()
        self._slices = 0
        self._granted: dict[Lane, float] = {}
        self._replayed_twice: set[str] = set()
        self._retries: dict[int, Path] = {}
        self._skipped = skipped
        self._is_broken = False
        identity = queries.identity(store.connection)
        with alone(store.folder):
            for run in queries.runs(store.connection):
                if run.state == "running" and RunFolder(store.folder, identity, run.id).is_left():
                    store.cut_off(run.id)
            run_number = store.start_run(
                seed,
                seconds,
                environment(),
                config.to_json(),
                [
                    {"target": each.target, "kernel": str(each.kernel), "device": each.device, "reason": each.reason}
                    for each in skipped
                ],
            )
            self._run_folder = RunFolder(store.folder, identity, run_number)
            self._run_folder.hold()
            self._left = self._run_folder.take_left()
        self.ledger = Ledger(store, run_number, seed, config.known, observer)
        self._lanes = lanes
        kinds: dict[str, int | None] = dict.fromkeys(job.device.type for job in jobs)
        if config.regressions:
            kinds.setdefault("cpu", 1)  # some of them show on a CPU only
        lanes.open(kinds, self._run_folder.path)
        self._schedule = Schedule(jobs, self._lanes.kinds(), seconds)
        for lane in self._lanes.adopted():
            self._adopt(lane)

    @property
    def elapsed(self) -> float:
        """Seconds since the night began."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float:
        """Seconds of its time that are left."""
        return max(0.0, self._end - time.monotonic())

    def run(self) -> int:
        """Run it and return the exit status, see Ledger.exit_status."""
        try:
            self._plan()
            while self.remaining > 0 and not self.interrupted and self._hand_out():
                self._listen()
            self._stop()
        finally:
            self._lanes.close()
        self.ledger.settle(interrupted=self.interrupted)
        self._save()
        counted = [state.statistics for state in self.jobs.values()]
        broken = self._is_broken or any(each.error or each.errors or not each.cases for each in counted)
        for state in self.jobs.values():
            if not (state.statistics.cases or state.statistics.error or self.interrupted):
                self.ledger.problem(f"{state.job}: not a single case came to its end")
        status = self.ledger.exit_status(interrupted=self.interrupted, broken=broken)
        status = self.ledger.finish("interrupted" if self.interrupted else "finished", status)
        self._run_folder.release()
        return status

    # What there is to do

    def _adopt(self, lane: Lane) -> None:
        """Go on with the task of a lane that an earlier night has left."""
        self._granted[lane] = 0.0
        if isinstance(lane.task, (FuzzTask, RetryTask)):
            job = lane.task.job
            self.jobs.setdefault(str(job), JobState(job, Statistics(job))).lanes += 1
        what = _describe(lane.task)
        self.ledger.problem(f"lane {lane.name} goes on with what a night that was cut off has begun: {what}")

    def _plan(self) -> None:
        """Line up what is done before anything else: what was cut off, stored failures, historical bugs."""
        for number, running in self._left:
            self._retry(running, f"run {number} ended")
        trials: dict[str, list[tuple[str, Trial]]] = {}
        for name in self.ledger.open:
            saved = self.ledger.saved(name)
            if saved is not None:
                self.ledger.concerned[name] = self._jobs_of(saved)
                self.ledger.left_out[name] = self._left_out(saved)
                for job in self.ledger.concerned[name]:
                    trials.setdefault(str(job), []).append((name, Trial(saved, job, None)))
        self._tasks += [ReplayTask(self.jobs[name].job, tuple(some)) for name, some in trials.items()]
        for regression in REGRESSIONS if self._config.regressions else ():
            self._plan_regression(regression)

    def _jobs_of(self, saved: SavedFailure) -> list[Job]:
        """Return the jobs that could show a stored failure: of its target and kernel, on the kind of device on which
        it was seen if there is one."""
        package, kind = saved.kernel.partition("@")[0], saved.device.partition(":")[0]
        jobs = [state.job for state in self.jobs.values()]
        matching = [job for job in jobs if job.target.name == saved.case.target and job.kernel.package == package]
        return [job for job in matching if job.device.type == kind] or matching

    def _left_out(self, saved: SavedFailure) -> list[str]:
        """Return the jobs that could show a stored failure if they could run here."""
        package, kind = saved.kernel.partition("@")[0], saved.device.partition(":")[0]
        return [
            f"{each.target} on {each.kernel} ({each.device})"
            for each in self._skipped
            if (each.target, each.kernel.package, each.device.partition(":")[0]) == (saved.case.target, package, kind)
        ]

    def _retry(self, running: Running, why: str) -> None:
        """Line up what workers had when they were lost. What was lost twice is left to a person."""
        state = self.jobs.get(str(running.job))
        if running.retried:
            path = self._folder / "interrupted" / f"{file_name(str(running.job))}.json"
            self.ledger.write(lambda: write_json(path, to_json(running.requests[0].case)))
            self.ledger.problem(f"{running.job}: {path} was running twice when its night was cut off; not run again")
        elif state is not None:
            for request in running.requests:
                task = RetryTask(state.job, request, tuple(state.known.values()))
                self._tasks.append(task)
                self._retries[id(task)] = self._run_folder.keep(Running(state.job, (request,)), len(self._retries))
            count = len(running.requests)
            self.ledger.problem(f"{running.job}: {count} case(s) that were running when {why} are run again")

    def _plan_regression(self, regression: Regression) -> None:
        kinds = self._lanes.kinds()
        number = str(regression.pull_request)
        implementation = find(regression.target, KernelName(regression.kernel))
        devices = () if implementation is None else regression.devices or implementation.devices
        kind = next((kind for kind in DEVICE_KINDS if kind in devices and kind in kinds), None)
        if kind is None:
            self._leave_out(number, f"it shows on {' or '.join(devices)} only")
        elif missing := missing_releases([regression], None):
            self._leave_out(number, f"not fetched: kernelfuzz releases fetch {' '.join(missing)}")
        else:
            self._tasks.append(RegressionTask(number, kind, self._seed, REGRESSIONS_PART * self.seconds))

    def _leave_out(self, number: str, why: str) -> None:
        """Write down that a historical bug is not looked for."""
        title = next(each.title for each in REGRESSIONS if str(each.pull_request) == number)
        self.ledger.regression(events.RegressionFinished(number, title, "NOT RUN", why))

    def _hand_out(self) -> bool:
        """Give idle lanes something to do; return whether there is anything left to wait for."""
        if not self._lanes.kinds():
            self.ledger.problem("all lanes were lost: the night ends early")
            self._is_broken = True
            return False
        for lane in self._lanes.idle():
            task = self._next_task(lane)
            if task is not None:
                if isinstance(task, (FuzzTask, RetryTask)):
                    self.jobs[str(task.job)].lanes += 1
                self._granted[lane] = task.seconds if isinstance(task, FuzzTask) else 0.0
                self._lanes.start(lane, task)
                if id(task) in self._retries:
                    self._retries.pop(id(task)).unlink(missing_ok=True)
        return bool(self._granted) or any(state.errors < MOST_ERRORS for state in self.jobs.values())

    def _next_task(self, lane: Lane) -> Task | None:
        for task in [task for task in self._tasks if task.kind == lane.kind]:
            self._tasks.remove(task)
            if not isinstance(task, RegressionTask):
                return task
            left = REGRESSIONS_PART * self.seconds - self.elapsed
            if left > 0:
                return dataclasses.replace(task, at_most=left)
            self._leave_out(task.pull_request, "there was no time left for it")
        slice_ = self._schedule.next(lane.kind, self.remaining)
        if slice_ is None:
            return None
        job, seconds = slice_
        self._slices += 1
        state = self.jobs[str(job)]
        return FuzzTask(
            job,
            seed=derive_seed(self._seed, self._slices),
            palette=self._seed,
            seconds=seconds,
            at_most=self.remaining,
            known=tuple(state.known.values()),
            examples=self._config.examples,
            compiles=lane.name not in state.compiled,
        )

    # What comes back

    def _listen(self) -> None:
        for lane, message in self._lanes.wait(WAIT_SECONDS):
            self._take(lane, message)
        self.interrupted = self.interrupted or self._is_interrupted()
        if time.monotonic() >= self._saved_at + SAVE_SECONDS:
            self._save()

    def _take(self, lane: Lane, message: Message) -> None:
        match message:
            case Emitted(event):
                self._take_event(lane, self._with_own_job(event))
            case Running():
                pass  # the lanes keep the last one
            case Done(problem, trace):
                if problem:
                    self._take_problem(lane.task, problem)
                if trace:
                    name = f"run-{self.ledger.run}-{file_name(lane.name)}.txt"
                    self.ledger.write(lambda: write_file(self._folder / "errors" / name, trace))
                self._end_task(lane)
                lane.task = None
            case Lost(reason):
                self.ledger.problem(f"lane {lane.name} was lost: {reason}")
                self._take_loss(lane)
                self._end_task(lane)

    def _with_own_job(self, event: events.Event) -> Any:
        """Return the event with the job that this process knows, instead of its copy from another one."""
        job = getattr(event, "job", None)
        if job is None or str(job) not in self.jobs:
            return event
        return dataclasses.replace(event, job=self.jobs[str(job)].job)  # type: ignore[arg-type]

    def _take_event(self, lane: Lane, event: events.Event) -> None:
        match event:
            case events.FailureFound():
                self._count(event.job, event)
                self._take_failure(event)
                return
            case events.FailureReplayed(job, name):
                if str(job) not in self.jobs or name not in self.ledger.open:
                    return  # of a night that was cut off
                state = self.jobs[str(job)]
                state.statistics.version = state.statistics.version or event.version
                state.known.update({bug.fingerprint: bug for bug in self.ledger.replay(event) if bug.shrunk})
                return
            case events.RegressionFinished():
                self.ledger.regression(event)
                return
            case events.KernelsCompiled(job):
                self._count(job, event)
                if event.complete:
                    self.jobs[str(job)].compiled.add(lane.name)
            case events.JobStarted(job) | events.CaseFinished(job) | events.JobFinished(job):
                self._count(job, event)
        self.ledger.event(event)

    def _count(self, job: Job, event: events.Event) -> None:
        self.jobs[str(job)].statistics.take(event, self.elapsed)

    def _take_problem(self, task: Task | None, problem: str) -> None:
        """Take what went wrong in kernelfuzz itself."""
        self.ledger.problem(f"{_describe(task)}: {problem}")
        if isinstance(task, (FuzzTask, RetryTask)):
            self.jobs[str(task.job)].statistics.error = problem

    def _take_failure(self, found: events.FailureFound) -> None:
        state = self.jobs[str(found.job)]
        if found.shrunk:
            state.known = {name: bug for name, bug in state.known.items() if name not in found.withdrawn}
            state.known[found.fingerprint] = found
        self.ledger.failure(found, state.statistics.version)

    def _take_loss(self, lane: Lane) -> None:
        """See to what a lost lane was doing: what its workers had is run once more, elsewhere; what is lost twice is
        reported."""
        running = self._lanes.running(lane)
        match lane.task:
            case FuzzTask() | RetryTask() if running is not None and running.requests:
                if not running.retried:
                    self._retry(running, f"lane {lane.name} was lost")
                elif str(running.job) in self.jobs:
                    self._take_failure(_lost_twice(self.jobs[str(running.job)].job, running))
            case ReplayTask(job, trials) if str(job) not in self._replayed_twice:
                self._replayed_twice.add(str(job))
                left = tuple(each for each in trials if not self.ledger.was_replayed(each[0], job))
                self._tasks.appendleft(ReplayTask(job, left))
            case RegressionTask(number):
                self._leave_out(number, "its lane was lost")

    def _end_task(self, lane: Lane) -> None:
        """Account for what a lane has done. A job that ends with an error again and again gets no further slice."""
        granted = self._granted.pop(lane, 0.0)
        if isinstance(lane.task, (FuzzTask, RetryTask)):
            state, seconds = self.jobs[str(lane.task.job)], time.monotonic() - lane.since
            state.lanes -= 1
            state.statistics.seconds += seconds
            if isinstance(lane.task, FuzzTask):
                self._schedule.finished(lane.task.job, granted, seconds, state.statistics.slice_gain())
            state.errors = state.errors + 1 if state.statistics.error else 0
            if state.errors >= MOST_ERRORS:
                self._schedule.drop(state.job)

    def _save(self) -> None:
        """Write down what was counted."""
        self._saved_at = time.monotonic()
        self.ledger.save(
            {
                (state.job.target.name, str(state.job.kernel), str(state.job.device)): state.statistics.to_json()
                for state in self.jobs.values()
            }
        )

    def _stop(self) -> None:
        """End the lanes' tasks, and take what they still have to tell."""
        self._lanes.stop()
        last = time.monotonic() + (GRACE_AFTER_SIGNAL_SECONDS if self.interrupted else GRACE_SECONDS)
        while self._granted and time.monotonic() < last:
            self._listen()
        for task in self._tasks:
            if isinstance(task, RegressionTask):
                self._leave_out(task.pull_request, "the night ended before its turn")
        for lane in list(self._granted):
            self.ledger.problem(f"lane {lane.name} did not end in time and was killed: {_describe(lane.task)}")
            self._is_broken = True
            self._end_task(lane)


def _describe(task: Task | None) -> str:
    """Return what a task does, for a person."""
    match task:
        case FuzzTask(job) | RetryTask(job):
            return str(job)
        case ReplayTask(job):
            return f"replaying {job}"
        case RegressionTask(number):
            return f"regression {number}"
    return "no task"


def _lost_twice(job: Job, running: Running) -> events.FailureFound:
    message = "the process or machine that ran it was lost, and so was the other one on which it was run again"
    failure = Failure("crash", "", "lane_lost", message)
    return events.FailureFound(job, fingerprint(job, failure), failure, running.requests[0].case, 0)
