"""The search for failures of one job: rounds of a Hypothesis test.

Hypothesis stops at what it found, so a round ends with the first new fingerprint, found and shrunk; it counts as passed
in the rounds after it.
"""

import time
from collections.abc import Callable, Iterable

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.failures import CaseFailedError, exception_class, fingerprint
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.case import Case, derive_seed
from kernelfuzz.strategies.errors import KernelfuzzError

ROUND_EXAMPLES = 10_000
"""Examples of a round at most. Hypothesis remembers each of them, some 1.7 KB."""

SHRINK_SECONDS = 60.0
"""How long one failure may be shrunk where the budget is time. Where it is examples, Hypothesis's own limit of 300 s
holds."""

SMALL_SIZE = 4
"""Tokens of a shrunk case that a person takes in at once."""

SECOND_TRY_EXAMPLES = 300
"""Cases that are tried for a failure that is still large, or that was seen but not shrunk."""


class Search:
    """Looks for failures of `job` until `limit` examples were tried or the monotonic clock reaches `deadline`.

    `run_case` runs one case and returns the verdict. Finds and verdicts are emitted as they come.
    """

    def __init__(
        self,
        job: Job,
        run_case: Callable[[Case], Verdict],
        bus: events.Bus,
        limit: int | None,
        deadline: float | None,
    ) -> None:
        self.job = job
        self.run_case = run_case
        self.bus = bus
        self.limit = limit
        self.deadline = deadline
        self.examples = 0
        self.reported: dict[str, int] = {}
        """Every fingerprint that was seen, and the number of examples at that time."""

    def run(
        self,
        strategy: st.SearchStrategy[Case],
        seed: int,
        database: ExampleDatabase,
        small: st.SearchStrategy[Case] | None = None,
    ) -> None:
        """Run rounds until the budget is spent or a round has nothing new to try. Raises what `run_case` raises.

        Failures that an earlier search saved in `database` are tried first.

        The shrinker walks downhill only: where a bug needs either many tokens or a large rank, it stays with what it
        came from. So a failure that is left with many tokens is looked for once more among the cases of `small`. In the
        end so is one that was seen while another one was shrunk, and never again.
        """
        finished: set[str] = set()
        saved = _SavedExamples(database)
        number = 0
        while not self.budget_spent():
            before = self.examples
            first = _Round(self, frozenset(finished))
            self._find(first, strategy, derive_seed(seed, number), self._round_size(), saved, small)
            if first.focus is not None:
                saved.keep = True
                finished.add(first.focus)
            elif self.examples == before:
                break
            number += 1
        while unshrunk := self.reported.keys() - finished:
            first = _Round(self, frozenset(finished), min(unshrunk))
            self._find(first, strategy, derive_seed(seed, number), SECOND_TRY_EXAMPLES, saved, small)
            finished.add(min(unshrunk))
            number += 1

    def _find(
        self,
        first: "_Round",
        strategy: st.SearchStrategy[Case],
        seed: int,
        size: int,
        database: ExampleDatabase,
        small: st.SearchStrategy[Case] | None,
    ) -> None:
        """Run a round, look for its focus among small cases too, and emit the smallest failing case."""
        rounds = [first]
        try:
            first.run(strategy, seed, size, database)
            is_small = first.smallest is not None and first.smallest[1].size <= SMALL_SIZE
            if small is not None and first.focus is not None and not is_small:
                rounds.append(_Round(self, first.finished, first.focus))
                rounds[1].run(small, seed, SECOND_TRY_EXAMPLES, None)
        finally:
            found = [round_.smallest for round_ in rounds if round_.smallest is not None]
            if first.focus is not None and found:
                failure, case = found[-1]
                seen = self.reported[first.focus]
                self.bus.emit(events.FailureFound(self.job, first.focus, failure, case, seen, shrunk=True))

    def _round_size(self) -> int:
        return ROUND_EXAMPLES if self.limit is None else min(ROUND_EXAMPLES, self.limit - self.examples)

    def budget_spent(self) -> bool:
        """Whether the limit is reached or the deadline has passed."""
        if self.limit is not None and self.examples >= self.limit:
            return True
        return self.deadline is not None and time.monotonic() >= self.deadline


class _Round:
    """One `@given` test, in which fingerprints of earlier rounds pass.

    The first new fingerprint becomes the round's `focus`; others pass from then on, so that the shrinker cannot slip
    from one bug to another. A verdict is remembered by case, so that a kernel that fails now and then still shrinks.
    """

    def __init__(self, search: Search, finished: frozenset[str], focus: str | None = None) -> None:
        self.focus = focus
        self._search = search
        self.finished = finished
        self._verdicts: dict[Case, Verdict] = {}
        # What failed last with the focus: Hypothesis ends a round by running the smallest case once more.
        self.smallest: tuple[Failure, Case] | None = None
        self._shrink_until: float | None = None
        if focus is not None:
            self._start_shrinking()

    def run(self, strategy: st.SearchStrategy[Case], seed: int, size: int, database: ExampleDatabase | None) -> None:
        """Draw up to `size` examples, run them, and shrink what fails first."""

        # `settings` stands above `seed` because `seed` takes the database away.
        @hypothesis.settings(
            max_examples=size,
            deadline=None,
            derandomize=False,  # whatever the profile of the surrounding tests says
            database=database,
            # Not Phase.target: climbing towards a worse err/bound takes most of the time and runs few new cases.
            phases=(Phase.reuse, Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            print_blob=False,
        )
        @hypothesis.seed(seed)
        @hypothesis.given(strategy)
        def test(case: Case) -> None:
            self._check(case)

        try:
            test()
        except _RoundEndedError as end:
            if end.error is not None:
                raise end.error from None
        except (CaseFailedError, hypothesis.errors.Flaky, hypothesis.errors.Unsatisfiable):
            pass  # Unsatisfiable: the kernel rejected every case

    def _check(self, case: Case) -> None:
        """Judge one case and raise the focus's exception if it fails with it."""
        verdict = self._verdict(case)
        if verdict.rejected:
            hypothesis.reject()
        for failure in verdict.failures:
            name = fingerprint(self._search.job, failure)
            if name in self.finished:
                continue
            if name not in self._search.reported:
                self._search.reported[name] = self._search.examples
                self._emit(events.FailureFound(self._search.job, name, failure, case, self._search.examples))
            if self.focus is None:
                self.focus = name
                self._start_shrinking()
            if name == self.focus:
                self.smallest = failure, case
                raise exception_class(name)(failure.message)

    def _emit(self, event: events.Event) -> None:
        """Emit an event. A consumer's error ends the round: Hypothesis would take it for a failure of the case."""
        try:
            self._search.bus.emit(event)
        except KernelfuzzError as error:
            raise _RoundEndedError(error) from None

    def _start_shrinking(self) -> None:
        if self._search.deadline is not None:
            self._shrink_until = time.monotonic() + SHRINK_SECONDS

    def _verdict(self, case: Case) -> Verdict:
        shrinking = self.focus is not None
        if not shrinking:
            if self._search.budget_spent():
                raise _RoundEndedError
            self._search.examples += 1
        if case in self._verdicts:
            return self._verdicts[case]
        if self._shrink_until is not None and time.monotonic() >= self._shrink_until:
            return Verdict()
        try:
            verdict = self._search.run_case(case)
        except KernelfuzzError as error:
            raise _RoundEndedError(error) from None
        self._verdicts[case] = verdict
        regimes = frozenset(self._search.job.target.regimes(case))
        self._emit(events.CaseFinished(self._search.job, regimes, verdict, self._search.examples, shrinking))
        return verdict


class _RoundEndedError(KeyboardInterrupt):
    """Ends a round from inside a Hypothesis test: the budget is spent, or `error` leaves no way to go on.

    Like Ctrl-C, because Hypothesis would shrink a case that raises an Exception, and save one that raises anything
    else.
    """

    def __init__(self, error: KernelfuzzError | None = None) -> None:
        self.error = error


class _SavedExamples(ExampleDatabase):
    """An example database for the rounds of one search: each of them replays what earlier searches saved.

    Once `keep` is set, that is not deleted any more: what a round found passes in the rounds after it, and Hypothesis
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
