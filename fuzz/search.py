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

ROUND_EXAMPLES = 10_000
"""Examples of a round at most. Hypothesis remembers each of them, some 1.7 KB."""

SHRINK_SECONDS = 60.0
"""How long one failure may be shrunk where the budget is time. Where it is examples, Hypothesis's own limit of 300 s
holds."""


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
        self.reported: set[str] = set()

    def run(self, strategy: st.SearchStrategy[Case], seed: int, database: ExampleDatabase) -> None:
        """Run rounds until the budget is spent or a round has nothing new to try."""
        finished: set[str] = set()
        number = 0
        while not self.out_of_time() and (self.limit is None or self.examples < self.limit):
            before = self.examples
            round_ = _Round(self, frozenset(finished))
            round_.run(strategy, derive_seed(seed, number), database if number == 0 else _SaveOnlyDatabase(database))
            if round_.focus is not None:
                finished.add(round_.focus)
            elif self.examples == before:
                break
            number += 1

    def out_of_time(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


class _Round:
    """One `@given` test, in which fingerprints of earlier rounds pass.

    The first new fingerprint becomes the round's `focus`; others pass from then on, so that the shrinker cannot slip
    from one bug to another. A verdict is remembered by case, so that a kernel that fails now and then still shrinks.
    """

    def __init__(self, search: Search, finished: frozenset[str]) -> None:
        self.focus: str | None = None
        self._search = search
        self._finished = finished
        self._verdicts: dict[Case, Verdict] = {}
        self._last: tuple[Failure, Case] | None = None
        self._shrink_until: float | None = None

    def run(self, strategy: st.SearchStrategy[Case], seed: int, database: ExampleDatabase) -> None:
        """Draw, run, and shrink what fails first."""
        search = self._search
        size = ROUND_EXAMPLES if search.limit is None else min(ROUND_EXAMPLES, search.limit - search.examples)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=size,
            deadline=None,
            database=database,
            phases=(Phase.reuse, Phase.generate, Phase.target, Phase.shrink),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            print_blob=False,
        )
        @hypothesis.given(strategy)
        def test(case: Case) -> None:
            self._check(case)

        try:
            test()
        except (CaseFailedError, _BudgetSpentError, hypothesis.errors.Flaky):
            pass
        finally:
            if self.focus is not None and self._last is not None:
                # Hypothesis runs the smallest case last; after an interruption it is the last one that failed.
                failure, case = self._last
                search.bus.emit(
                    events.FailureFound(search.job, self.focus, failure, case, search.examples, shrunk=True)
                )

    def _check(self, case: Case) -> None:
        """Judge one case and raise the focus's exception if it fails with it."""
        verdict = self._verdict(case)
        if verdict.rejected:
            hypothesis.reject()
        for failure in verdict.failures:
            name = fingerprint(self._search.job, failure)
            if name in self._finished:
                continue
            if name not in self._search.reported:
                self._search.reported.add(name)
                self._search.bus.emit(events.FailureFound(self._search.job, name, failure, case, self._search.examples))
            if self.focus is None:
                self.focus = name
                if self._search.deadline is not None:
                    self._shrink_until = time.monotonic() + SHRINK_SECONDS
            if name == self.focus:
                self._last = failure, case
                raise exception_class(name)(failure.message)
        if verdict.ratio > 0.0 and self.focus is None:
            hypothesis.target(min(verdict.ratio, 1e6), label="error over bound")

    def _verdict(self, case: Case) -> Verdict:
        shrinking = self.focus is not None
        if not shrinking and self._search.out_of_time():
            raise _BudgetSpentError
        if not shrinking:
            self._search.examples += 1
        if case in self._verdicts:
            return self._verdicts[case]
        if self._shrink_until is not None and time.monotonic() >= self._shrink_until:
            return Verdict()
        verdict = self._search.run_case(case)
        self._verdicts[case] = verdict
        regimes = frozenset(self._search.job.target.regimes(case))
        self._search.bus.emit(events.CaseFinished(self._search.job, regimes, verdict, self._search.examples, shrinking))
        return verdict


class _BudgetSpentError(BaseException):
    """Ends a round from inside a Hypothesis test. Not an Exception: that would count as a failure of the test."""


class _SaveOnlyDatabase(ExampleDatabase):
    """Saves examples but replays none.

    For the rounds after the first: what was saved then counts as passed now, and Hypothesis would delete it.
    """

    def __init__(self, database: ExampleDatabase) -> None:
        super().__init__()
        self._database = database

    def fetch(self, key: bytes) -> Iterable[bytes]:
        """Replay nothing."""
        del key
        return ()

    def save(self, key: bytes, value: bytes) -> None:
        """Save an example."""
        self._database.save(key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        """Keep what was saved."""
