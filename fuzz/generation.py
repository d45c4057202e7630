"""Cases as Hypothesis generates them: tests over chunks of examples that are drawn from a seed, and the examples that
earlier searches saved."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from unittest import SkipTest

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase

from kernelfuzz.fuzz.failures import CaseFailedError
from kernelfuzz.fuzz.verdict import Verdict
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.errors import KernelfuzzError


@dataclass
class Chunk:
    """What is known of the examples that were drawn from one seed, and which new fingerprints they show, first the
    earliest."""

    strategy: st.SearchStrategy[Case]
    seed: int
    size: int
    verdicts: dict[Case, Verdict] = field(default_factory=dict)
    found: dict[str, None] = field(default_factory=dict)


def draw(strategy: st.SearchStrategy[Case], seed: int, count: int) -> list[Case]:
    """Return up to `count` different cases, the same for the same seed."""
    cases: dict[Case, None] = {}
    hypothesis_test(cases.setdefault, Chunk(strategy, seed, count), None, Phase.generate)
    return list(cases)


def hypothesis_test(
    check: Callable[[Case], None], chunk: Chunk, database: ExampleDatabase | None, *phases: Phase
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
            raise EndedError(error) from None

    try:
        test()
    except EndedError as end:
        if end.error is not None:
            raise end.error from None
    except (CaseFailedError, hypothesis.errors.Flaky, hypothesis.errors.Unsatisfiable, SkipTest):
        pass  # Unsatisfiable: the kernel rejected every case; SkipTest: nothing was saved that could be tried again


class EndedError(KeyboardInterrupt):
    """Ends a Hypothesis test from inside: the budget is spent, or `error` leaves no way to go on."""

    def __init__(self, error: KernelfuzzError | None = None) -> None:
        self.error = error


class SavedExamples(ExampleDatabase):
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
