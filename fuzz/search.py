"""The search for failures of one job: chunks of examples that are drawn while workers run them, and one shrinking
Hypothesis test for each fingerprint that they show.

Hypothesis waits for a verdict before it draws on, and a worker would wait for Hypothesis. So a chunk is drawn by a test
that always passes, and its cases are run meanwhile. What failed is then drawn once more from the same seed: every
verdict up to it is known by now, so that this takes no launches, and this time the test fails where it failed.

One bug often shows in several ways, in other outputs or in other elements. All that its smallest case shows is taken
for one bug, which is called by the first of these failures.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import hypothesis
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.executor import Executor, Request, WorkerLostError
from kernelfuzz.fuzz.failures import exception_class, fingerprint, fingerprints
from kernelfuzz.fuzz.generation import Chunk, EndedError, SavedExamples, hypothesis_test
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.smallest import SHRINK_LAUNCHES, SHRINK_SECONDS, Sighting, confirm, pinned, simplify
from kernelfuzz.fuzz.verdict import KINDS, Verdict
from kernelfuzz.strategies.case import Case, derive_seed
from kernelfuzz.strategies.errors import KernelfuzzError

FIRST_CHUNK = 50
LARGEST_CHUNK = 1600
"""Examples of the first chunk, doubled from one to the next, and at most: drawing them again takes seconds."""

SMALL_SIZE = 4
"""Tokens of a shrunk case that a person takes in at once."""

SECOND_TRY_EXAMPLES = 300
"""Cases that are tried for a failure that is still large, or that was seen but not shrunk."""

MOST_ERRORS = 20
"""Cases that the harness may fail to judge before it gives up on a job."""

Answer = TypeVar("Answer")


RecordInFlight = Callable[[Sequence[Request]], None]
"""Called with all requests that are in workers' hands, or about to be."""


class Search:
    """Looks for failures of `job` until `limit` examples were tried or the monotonic clock reaches `deadline`.

    Each example is run by `executor` with `seeds` content seeds. Finds and verdicts are emitted as they come, in the
    order in which the cases were drawn. It ends early once `enough` says so. `known` bugs pass for shrunk ones.
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
        known: Sequence[events.FailureFound] = (),
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
        self._sightings: dict[str, Sighting] = {}
        self._announced: set[str] = set()
        self._bugs = {name: bug for bug in known for name in (bug.fingerprint, *bug.withdrawn)}
        """Every fingerprint that was shrunk, and the bug that it is taken for."""
        self.reported.update(dict.fromkeys(self._bugs, 0))
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
        saved = SavedExamples(database)
        saved.keep = bool(self._bugs)  # the examples of known bugs pass
        try:
            self._run(strategy, seed, saved, small, first)
        finally:
            self._announce_rest(at_the_end=True)

    def _run(
        self,
        strategy: st.SearchStrategy[Case],
        seed: int,
        saved: SavedExamples,
        small: st.SearchStrategy[Case] | None,
        first: Sequence[Request],
    ) -> None:
        for request in first:
            if self.budget_spent():
                break
            self.examples += 1
            self._judge(request, records=False)  # what ends the campaign twice is not run a third time
        self._replay(Chunk(strategy, seed, FIRST_CHUNK), saved, small)
        number, size = 0, FIRST_CHUNK
        while not self.budget_spent():
            before = self.examples
            left = size if self.limit is None else self.limit - before
            chunk = Chunk(strategy, derive_seed(seed, number), min(size, left))
            self._draw(chunk)
            for name in chunk.found:
                if self._enough():
                    break
                if name in self._bugs:
                    continue
                saved.keep = True
                self._shrink(_Shrinking(self, chunk.verdicts, name), chunk, saved, small)
            if self.examples == before:
                break
            number, size = number + 1, min(2 * size, LARGEST_CHUNK)
        while (unshrunk := self.reported.keys() - self._bugs) and not self._enough():
            chunk = Chunk(strategy, derive_seed(seed, number), SECOND_TRY_EXAMPLES)
            name = min(unshrunk)
            self._shrink(_Shrinking(self, {}, name), chunk, saved, small)
            if name not in self._bugs:  # it is not to be seen again, and is reported as it was found
                again = confirm(self.job, partial(self._judge, shrinking=True), name, self._sightings[name])
                self._finish(name, again, shrunk=False, is_smallest=False)
            number += 1

    def _replay(self, chunk: Chunk, saved: "SavedExamples", small: st.SearchStrategy[Case] | None) -> None:
        """Try what an earlier search saved, once for each failure that it shows."""
        while not self.budget_spent():
            replay = _Shrinking(self, {})
            self._shrink(replay, chunk, saved, small, Phase.reuse)
            if replay.focus is None:
                return
            saved.keep = True

    def _draw(self, chunk: Chunk) -> None:
        """Draw a chunk and run it."""

        def test(case: Case) -> None:
            if self.budget_spent() or (chunk.found and self.deadline is not None):
                raise EndedError
            self.examples += 1
            request = self._request(case)
            if case not in chunk.verdicts and request not in self._in_flight:
                self._submit(request, chunk)

        hypothesis_test(test, chunk, None, Phase.generate)
        while self._in_flight:
            self._receive(chunk, block=True)

    def _submit(self, request: Request, chunk: Chunk) -> None:
        while not self._executor.has_room():
            self._receive(chunk, block=True)
        self._in_flight[request] = self.examples
        self._record()
        self._executor.submit(request)
        self._receive(chunk, block=False)

    def _receive(self, chunk: Chunk, *, block: bool) -> None:
        for request, verdict in self._kept(partial(self._executor.receive, block=block)):
            number = self._in_flight.pop(request)
            chunk.verdicts[request.case] = verdict
            for name in self._take(request, verdict, number, shrinking=False):
                if name not in self._bugs:
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
        found = fingerprints(self.job, verdict)
        new = [name for name in found if name not in self.reported]
        for name in new:
            self.reported[name] = number
            self._sightings[name] = Sighting(found[name], case, verdict)
        # What shows together with a bug that is still to be shrunk is probably that bug; shrinking it will tell.
        if new and not any(name in self._announced and name not in self._bugs for name in found):
            self._announce(new[0])
        return list(found)

    def _announce(self, name: str) -> None:
        """Emit a fingerprint as it was found."""
        self._announced.add(name)
        seen = self._sightings[name]
        self._bus.emit(events.FailureFound(self.job, name, seen.failure, seen.case, self.reported[name]))

    def _announce_rest(self, *, at_the_end: bool = False) -> None:
        """Emit what was seen together with other fingerprints only, and turned out not to be the same bug; in the end
        also what there was no time to tell of."""
        for name in sorted(self.reported.keys() - self._announced - self._bugs.keys()):
            together = fingerprints(self.job, self._sightings[name].verdict)
            if at_the_end or not any(other in self._announced and other not in self._bugs for other in together):
                self._announce(name)

    def _shrink(
        self,
        first: "_Shrinking",
        chunk: Chunk,
        saved: SavedExamples,
        small: st.SearchStrategy[Case] | None,
        phase: Phase = Phase.generate,
    ) -> None:
        """Shrink the focus, look for it among small cases too, make the contents simple, and emit the smallest failing
        case. However this ends, what was found by then is emitted."""
        rounds = [first]
        best: Sighting | None = None
        is_smallest = False
        try:
            first.run(chunk, saved, phase)
            best = first.smallest
            is_small = best is not None and best.case.size <= SMALL_SIZE
            if small is not None and first.focus is not None and not is_small:
                rounds.append(_Shrinking(self, {}, first.focus))
                rounds[1].run(Chunk(small, chunk.seed, SECOND_TRY_EXAMPLES), None, Phase.generate)
                best = rounds[1].smallest or best
            if first.focus is not None and best is not None:
                judge = partial(self._judge, shrinking=True)
                hurries = self.deadline is not None
                best = simplify(self.job, judge, first.focus, best, hurries=hurries, enough=self._enough)
                best = confirm(self.job, judge, first.focus, best)
                original = self._sightings[first.focus]
                is_smallest = True
                if best.failed_runs < best.runs or best.case.size > original.case.size:
                    best = min(best, confirm(self.job, judge, first.focus, original), key=_worth)
                    is_smallest = best.case != original.case
        finally:
            best = best or rounds[-1].smallest or first.smallest
            if first.focus is not None and best is not None:
                self._finish(first.focus, best, shrunk=True, is_smallest=is_smallest)

    def _finish(self, name: str, best: Sighting, *, shrunk: bool, is_smallest: bool) -> None:
        """Emit the smallest case of a bug. All that it shows is the bug; if that was shrunk before, it is that one. A
        case that is not the smallest may show several."""
        shown = {name: best.failure}
        if is_smallest:
            shown = fingerprints(self.job, best.verdict)
        known = next((self._bugs[each] for each in shown if each in self._bugs), None)
        # What is known to be yet another bug stays one.
        shown = {each: shown[each] for each in shown if self._bugs.get(each, known) is known}
        first, failure = next(iter(shown.items()))
        bug = events.FailureFound(
            self.job,
            first,
            failure,
            best.case,
            self.reported[name],
            shrunk=shrunk,
            failed_runs=best.failed_runs,
            runs=best.runs,
            maps=best.verdict.maps,
        )
        if known is not None:
            shown = {fingerprint(self.job, each): each for each in (known.failure, *known.symptoms)} | shown
            bug = min(known, bug, key=_rank)
        symptoms = tuple(failure for each, failure in shown.items() if each != bug.fingerprint)
        bug = dataclasses.replace(bug, symptoms=symptoms)
        for each in shown:
            self.reported.setdefault(each, bug.examples)
            self._bugs[each] = bug
        self._bus.emit(bug)
        self._announce_rest()

    def budget_spent(self) -> bool:
        """Whether the limit is reached, the deadline has passed or it is enough."""
        if (self.limit is not None and self.examples >= self.limit) or self._enough():
            return True
        return self.deadline is not None and time.monotonic() >= self.deadline

    def is_enough(self) -> bool:
        """Whether the search is to end at once."""
        return self._enough()

    def launches_to_shrink(self, name: str) -> int | None:
        """Return how many launches a fingerprint may be shrunk with; None where only time counts."""
        seen = self._sightings.get(name)
        return None if seen is None else SHRINK_LAUNCHES.get(seen.failure.kind)

    def is_finished(self, name: str) -> bool:
        """Whether the fingerprint was shrunk already."""
        return name in self._bugs


def _worth(found: Sighting) -> tuple[float, int]:
    """Return a key that puts first what a person would rather get: what fails more often, then what is smaller."""
    return -found.failed_runs / found.runs, found.case.size


def _rank(bug: events.FailureFound) -> tuple[int, int]:
    """Return a key that puts first what a bug is reported as: the most severe failure, then the smallest case."""
    return KINDS.index(bug.failure.kind), bug.case.size


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
        self.smallest: Sighting | None = None
        self._until: float | None = None
        self._launches_left: int | None = None
        if focus is not None:
            self._start_clock()

    def run(self, chunk: Chunk, database: ExampleDatabase | None, phase: Phase) -> None:
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
        for name, failure in fingerprints(self._search.job, verdict).items():
            if self.focus is None and not self._search.is_finished(name):
                self.focus = name
                self._start_clock()
            if name == self.focus:
                self.smallest = Sighting(failure, pinned(case, verdict), verdict)
                raise exception_class(name)(failure.message)

    def _start_clock(self) -> None:
        if self._search.deadline is not None:
            self._until = time.monotonic() + SHRINK_SECONDS
        assert self.focus is not None
        self._launches_left = self._search.launches_to_shrink(self.focus)

    def _verdict(self, case: Case) -> Verdict:
        shrinking = self.focus is not None
        if not shrinking:
            if self._search.budget_spent():
                raise EndedError
            self._search.examples += 1
        if case not in self._verdicts:
            if self._launches_left is not None and shrinking:
                self._launches_left -= 1
            is_late = self._search.is_enough() or (self._until is not None and time.monotonic() >= self._until)
            if is_late or (self._launches_left is not None and self._launches_left < 0):
                return Verdict()
            self._verdicts[case] = self._search.judge_example(case, shrinking=shrinking)
        return self._verdicts[case]
