"""The search for failures of one job: chunks of examples that are drawn while workers run them, and one shrinking
Hypothesis test for each fingerprint that they show.

Hypothesis waits for a verdict before it draws on, and a worker would wait for Hypothesis. So a chunk is drawn by a test
that always passes, and its cases are run meanwhile. What failed is then drawn once more from the same seed: every
verdict up to it is known by now, so that this takes no launches, and this time the test fails where it failed.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from unittest import SkipTest

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.executor import Executor, Request, WorkerLostError
from kernelfuzz.fuzz.failures import CaseFailedError, exception_class, fingerprint
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.case import Case, derive_seed
from kernelfuzz.strategies.errors import KernelfuzzError

FIRST_CHUNK = 50
LARGEST_CHUNK = 1600
"""Examples of the first chunk, doubled from one to the next, and at most: drawing them again takes seconds."""

SHRINK_SECONDS = 60.0
"""How long one failure may be shrunk where the budget is time. Where it is examples, Hypothesis's own limit of 300 s
holds."""

SMALL_SIZE = 4
"""Tokens of a shrunk case that a person takes in at once."""

SECOND_TRY_EXAMPLES = 300
"""Cases that are tried for a failure that is still large, or that was seen but not shrunk."""

MOST_ERRORS = 20
"""Cases that the harness may fail to judge before it gives up on a job."""

Answer = TypeVar("Answer")

RecordInFlight = Callable[[Sequence[Request]], None]
"""Called with all requests that are in workers' hands, or about to be."""


@dataclass
class _Chunk:
    """What is known of the examples that were drawn from one seed, and which new fingerprints they show, first the
    earliest."""

    strategy: st.SearchStrategy[Case]
    seed: int
    size: int
    verdicts: dict[Case, Verdict] = field(default_factory=dict)
    found: dict[str, None] = field(default_factory=dict)


class Search:
    """Looks for failures of `job` until `limit` examples were tried or the monotonic clock reaches `deadline`.

    Each example is run by `executor` with `seeds` content seeds. Finds and verdicts are emitted as they come, in the
    order in which the cases were drawn. It ends early once `enough` says so.
    """

    def __init__(
        self,
        job: Job,
        executor: Executor,
        bus: events.Bus,
        limit: int | None,
        deadline: float | None,
        seeds: int = 1,
        record_in_flight: RecordInFlight | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        self.job = job
        self.limit = limit
        self.deadline = deadline
        self.examples = 0
        self.reported: dict[str, int] = {}
        """Every fingerprint that was seen, and the number of examples at that time."""
        self._executor = executor
        self._bus = bus
        self._seeds = seeds
        self._record_in_flight = record_in_flight
        self._enough = enough
        self._in_flight: dict[Request, int] = {}
        self._finished: set[str] = set()
        self._errors = 0

    def run(
        self,
        strategy: st.SearchStrategy[Case],
        seed: int,
        database: ExampleDatabase,
        small: st.SearchStrategy[Case] | None = None,
        first: Sequence[Request] = (),
    ) -> None:
        """Search until the budget is spent or a chunk has nothing new to try. Raises what the executor raises.

        Requests of `first` are run before anything else, and then the failures that an earlier search saved in
        `database`.

        The shrinker walks downhill only: where a bug needs either many tokens or a large rank, it stays with what it
        came from. So a failure that is left with many tokens is looked for once more among the cases of `small`. In the
        end so is one that was seen while another one was shrunk, and never again.
        """
        saved = _SavedExamples(database)
        for request in first:
            if self.budget_spent():
                break
            self.examples += 1
            self._judge(request, records=False)  # what ends the campaign twice is not run a third time
        self._replay(_Chunk(strategy, seed, FIRST_CHUNK), saved, small)
        number, size = 0, FIRST_CHUNK
        while not self.budget_spent():
            before = self.examples
            left = size if self.limit is None else self.limit - before
            chunk = _Chunk(strategy, derive_seed(seed, number), min(size, left))
            self._draw(chunk)
            for name in chunk.found:
                if self._enough():
                    break
                saved.keep = True
                self._shrink(_Shrinking(self, chunk.verdicts, name), chunk, saved, small)
            if self.examples == before:
                break
            number, size = number + 1, min(2 * size, LARGEST_CHUNK)
        while (unshrunk := self.reported.keys() - self._finished) and not self._enough():
            chunk = _Chunk(strategy, derive_seed(seed, number), SECOND_TRY_EXAMPLES)
            self._shrink(_Shrinking(self, {}, min(unshrunk)), chunk, saved, small)
            number += 1

    def _replay(self, chunk: _Chunk, saved: "_SavedExamples", small: st.SearchStrategy[Case] | None) -> None:
        """Try what an earlier search saved, once for each failure that it shows."""
        while not self.budget_spent():
            replay = _Shrinking(self, {})
            self._shrink(replay, chunk, saved, small, Phase.reuse)
            if replay.focus is None:
                return
            saved.keep = True

    def _draw(self, chunk: _Chunk) -> None:
        """Draw a chunk and run it."""

        def test(case: Case) -> None:
            if self.budget_spent() or (chunk.found and self.deadline is not None):
                raise _EndedError
            self.examples += 1
            request = self._request(case)
            if case not in chunk.verdicts and request not in self._in_flight:
                self._submit(request, chunk)

        hypothesis_test(test, chunk, None, Phase.generate)
        while self._in_flight:
            self._receive(chunk, block=True)

    def _submit(self, request: Request, chunk: _Chunk) -> None:
        while not self._executor.has_room():
            self._receive(chunk, block=True)
        self._in_flight[request] = self.examples
        self._record()
        self._executor.submit(request)
        self._receive(chunk, block=False)

    def _receive(self, chunk: _Chunk, *, block: bool) -> None:
        for request, verdict in self._kept(partial(self._executor.receive, block=block)):
            number = self._in_flight.pop(request)
            chunk.verdicts[request.case] = verdict
            for name in self._take(request, verdict, number, shrinking=False):
                if name not in self._finished:
                    chunk.found[name] = None

    def _record(self) -> None:
        if self._record_in_flight is not None:
            self._record_in_flight(list(self._in_flight))

    def _request(self, case: Case) -> Request:
        return Request(case, tuple(derive_seed(case.seed, index) for index in range(self._seeds)))

    def _kept(self, call: Callable[[], Answer]) -> Answer:
        """Return what the executor answers. What it says of the request over which it lost its last worker is taken
        before its error goes on."""
        try:
            return call()
        except WorkerLostError as lost:
            number = self._in_flight.pop(lost.request, self.examples)
            self._take(lost.request, lost.verdict, number, shrinking=False)
            raise

    def _judge(self, request: Request, *, shrinking: bool = False, records: bool = True) -> Verdict:
        """Run a request and wait for the verdict."""
        self._in_flight[request] = self.examples
        if records:
            self._record()
        verdict = self._kept(partial(self._executor.run, request))
        del self._in_flight[request]
        self._take(request, verdict, self.examples, shrinking=shrinking)
        return verdict

    def judge_example(self, case: Case, *, shrinking: bool) -> Verdict:
        """Run an example and wait for the verdict."""
        return self._judge(self._request(case), shrinking=shrinking)

    def _take(self, request: Request, verdict: Verdict, number: int, *, shrinking: bool) -> list[str]:
        """Emit a verdict and what is new in it; return the fingerprints of its failures."""
        if verdict.error:
            self._errors += 1
        regimes = frozenset(self.job.target.regimes(request.case))
        case = pinned(request.case, verdict)
        self._bus.emit(events.CaseFinished(self.job, case, regimes, verdict, number, shrinking))
        if self._errors > MOST_ERRORS:
            raise KernelfuzzError(f"{self.job}: kernelfuzz could not judge {self._errors} cases: {verdict.error}")
        names = []
        for failure in verdict.failures:
            names.append(fingerprint(self.job, failure))
            if names[-1] not in self.reported:
                self.reported[names[-1]] = number
                self._bus.emit(events.FailureFound(self.job, names[-1], failure, case, number))
        return names

    def _shrink(
        self,
        first: "_Shrinking",
        chunk: _Chunk,
        saved: "_SavedExamples",
        small: st.SearchStrategy[Case] | None,
        phase: Phase = Phase.generate,
    ) -> None:
        """Shrink the focus, look for it among small cases too, and emit the smallest failing case."""
        rounds = [first]
        try:
            first.run(chunk, saved, phase)
            is_small = first.smallest is not None and first.smallest[1].size <= SMALL_SIZE
            if small is not None and first.focus is not None and not is_small:
                rounds.append(_Shrinking(self, {}, first.focus))
                rounds[1].run(_Chunk(small, chunk.seed, SECOND_TRY_EXAMPLES), None, Phase.generate)
        finally:
            found = [each.smallest for each in rounds if each.smallest is not None]
            if first.focus is not None and found:
                failure, case = found[-1]
                number = self.reported[first.focus]
                self._bus.emit(events.FailureFound(self.job, first.focus, failure, case, number, shrunk=True))
        if first.focus is not None:
            self._finished.add(first.focus)

    def budget_spent(self) -> bool:
        """Whether the limit is reached, the deadline has passed or it is enough."""
        if (self.limit is not None and self.examples >= self.limit) or self._enough():
            return True
        return self.deadline is not None and time.monotonic() >= self.deadline

    def is_finished(self, name: str) -> bool:
        """Whether the fingerprint was shrunk already."""
        return name in self._finished


def draw(strategy: st.SearchStrategy[Case], seed: int, count: int) -> list[Case]:
    """Return up to `count` different cases, the same for the same seed."""
    cases: dict[Case, None] = {}
    hypothesis_test(cases.setdefault, _Chunk(strategy, seed, count), None, Phase.generate)
    return list(cases)


def pinned(case: Case, verdict: Verdict) -> Case:
    """Return the case with the content seed that its verdict is about."""
    return case if verdict.seed is None else dataclasses.replace(case, seed=verdict.seed)


class _Shrinking:
    """One `@given` test that fails where `focus` does, and so shrinks it; all other fingerprints pass, so that the
    shrinker cannot slip from one bug to another.

    Without a focus the first fingerprint that is not finished becomes it. A verdict is remembered by case, so that a
    kernel that fails now and then still shrinks.
    """

    def __init__(self, search: Search, verdicts: dict[Case, Verdict], focus: str | None = None) -> None:
        self.focus = focus
        self._search = search
        self._verdicts = verdicts
        # What failed last with the focus: Hypothesis ends by running the smallest case once more.
        self.smallest: tuple[Failure, Case] | None = None
        self._until: float | None = None
        if focus is not None:
            self._start_clock()

    def run(self, chunk: _Chunk, database: ExampleDatabase | None, phase: Phase) -> None:
        """Draw a chunk, or with Phase.reuse what the database holds, until the focus fails, and shrink that."""
        known = frozenset(self._verdicts)

        def test(case: Case) -> None:
            self._check(case, rejects=case not in known)

        hypothesis_test(test, chunk, database, phase, Phase.shrink)

    def _check(self, case: Case, *, rejects: bool) -> None:
        """Raise the focus's exception if the case fails with it. A case that was drawn before passed then, rejected or
        not, and must do so again for Hypothesis to draw the same cases after it."""
        verdict = self._verdict(case)
        if (verdict.rejected or verdict.error) and rejects:
            hypothesis.reject()
        for failure in verdict.failures:
            name = fingerprint(self._search.job, failure)
            if self.focus is None and not self._search.is_finished(name):
                self.focus = name
                self._start_clock()
            if name == self.focus:
                self.smallest = failure, pinned(case, verdict)
                raise exception_class(name)(failure.message)

    def _start_clock(self) -> None:
        if self._search.deadline is not None:
            self._until = time.monotonic() + SHRINK_SECONDS

    def _verdict(self, case: Case) -> Verdict:
        shrinking = self.focus is not None
        if not shrinking:
            if self._search.budget_spent():
                raise _EndedError
            self._search.examples += 1
        if case not in self._verdicts:
            if self._until is not None and time.monotonic() >= self._until:
                return Verdict()
            self._verdicts[case] = self._search.judge_example(case, shrinking=shrinking)
        return self._verdicts[case]


def hypothesis_test(
    check: Callable[[Case], None], chunk: _Chunk, database: ExampleDatabase | None, *phases: Phase
) -> None:
    """Run a Hypothesis test over a chunk. It ends when `check` raises `CaseFailedError` for what was shrunk.

    Raises what else `check` raises, at once: Hypothesis would shrink a case that raises an Exception, and save one that
    raises anything but KeyboardInterrupt.
    """

    # `settings` stands above `seed` because `seed` takes the database away.
    @hypothesis.settings(
        max_examples=chunk.size,
        deadline=None,
        derandomize=False,  # whatever the profile of the surrounding tests says
        database=database,
        # Not Phase.target: climbing towards a worse err/bound takes most of the time and runs few new cases.
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        print_blob=False,
    )
    @hypothesis.seed(chunk.seed)
    @hypothesis.given(chunk.strategy)
    def test(case: Case) -> None:
        try:
            check(case)
        except KernelfuzzError as error:
            raise _EndedError(error) from None

    try:
        test()
    except _EndedError as end:
        if end.error is not None:
            raise end.error from None
    except (CaseFailedError, hypothesis.errors.Flaky, hypothesis.errors.Unsatisfiable, SkipTest):
        pass  # Unsatisfiable: the kernel rejected every case; SkipTest: nothing was saved that could be tried again


class _EndedError(KeyboardInterrupt):
    """Ends a Hypothesis test from inside: the budget is spent, or `error` leaves no way to go on."""

    def __init__(self, error: KernelfuzzError | None = None) -> None:
        self.error = error


class _SavedExamples(ExampleDatabase):
    """An example database for the tests of one search: each of them sees what earlier searches saved.

    Once `keep` is set, that is not deleted any more: what was found passes in the tests after it, and Hypothesis
    deletes what passes.
    """

    def __init__(self, database: ExampleDatabase) -> None:
        super().__init__()
        self.keep = False
        self._database = database
        self._own: set[tuple[bytes, bytes]] = set()

    def fetch(self, key: bytes) -> Iterable[bytes]:
        """Return what earlier searches saved, in an order that does not depend on the file system."""
        return sorted(value for value in self._database.fetch(key) if (key, value) not in self._own)

    def save(self, key: bytes, value: bytes) -> None:
        """Save an example."""
        if value not in self._database.fetch(key):
            self._own.add((key, value))
            self._database.save(key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        """Delete an example that this search saved, or any while nothing was found."""
        if not self.keep or (key, value) in self._own:
            self._database.delete(key, value)
