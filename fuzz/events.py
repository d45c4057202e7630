"""What a campaign says while it runs. Displays, files and reports are consumers of these events and nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kernelfuzz.fuzz.executor import Replacements
from kernelfuzz.fuzz.failures import fingerprint
from kernelfuzz.fuzz.job import Job, Skipped
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.fuzz.writemap import OutputMap
from kernelfuzz.strategies.case import Case


@dataclass(frozen=True)
class CampaignStarted:
    """The jobs that will run, in order, and the kernels that cannot. `seed` is None where the settings of a kernel test
    decide what is drawn."""

    jobs: tuple[Job, ...]
    skipped: tuple[Skipped, ...]
    seed: int | None


@dataclass(frozen=True)
class JobStarted:
    """A job's kernel is loaded; `version` and `notes` are what it says of itself.

    `retried` requests were running when an earlier campaign of this job was killed; they are run first.
    """

    job: Job
    version: str
    retried: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class KernelsCompiled:
    """The job's palette of `cases` was run once in parallel, to compile what it needs, in `seconds`; not all of it
    unless it is `complete`."""

    job: Job
    cases: int
    seconds: float
    complete: bool = True


@dataclass(frozen=True)
class CaseFinished:
    """A structure was run: example number `examples`, or one more try to make a failure smaller where `shrinking`.

    `case` has the content seed that the verdict is about: the failing one, or the first.
    """

    job: Job
    case: Case
    regimes: frozenset[str]
    verdict: Verdict
    examples: int
    shrinking: bool


@dataclass(frozen=True)
class FailureFound:
    """A fingerprint was seen for the first time in this campaign, or its smallest case (`shrunk`), or more of what is
    taken for it.

    - symptoms: the other failures of the smallest case: the same bug, so that what was said of their fingerprints
      before is withdrawn
    - failed_runs of `runs`: how often the case failed when it was run again
    - maps: what the kernel wrote then
    - arguments: what else a kernel test's function was called with, that was drawn
    """

    job: Job
    fingerprint: str
    failure: Failure
    case: Case
    examples: int
    shrunk: bool = False
    symptoms: tuple[Failure, ...] = ()
    failed_runs: int = 1
    runs: int = 1
    maps: tuple[OutputMap, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def withdrawn(self) -> list[str]:
        """The fingerprints that are taken for this bug."""
        return [fingerprint(self.job, failure) for failure in self.symptoms]


@dataclass(frozen=True)
class JobFinished:
    """A job is over after `examples`: its budget was spent, it was interrupted, or its kernel could not be loaded
    (`error`). `replacements` counts the workers that died or hung."""

    job: Job
    examples: int = 0
    error: str = ""
    replacements: Replacements = field(default_factory=Replacements)


@dataclass(frozen=True)
class FailureReplayed:
    """A saved failure, by its fingerprint, was run again on a job's kernel: FIXED, FAILED or ERROR, and the reason or
    what else is to be known. `failures` are what it shows now, by their fingerprints."""

    job: Job
    fingerprint: str
    case: Case
    version: str
    outcome: str
    reason: str
    failures: Mapping[str, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class RegressionFinished:
    """A historical bug was looked for: PASS, FAIL with what is wrong, or NOT RUN with the reason."""

    pull_request: str
    title: str
    outcome: str
    problem: str


@dataclass(frozen=True)
class CampaignFinished:
    """All jobs are over, or the campaign was interrupted."""

    interrupted: bool = False


Event = (
    CampaignStarted
    | JobStarted
    | KernelsCompiled
    | CaseFinished
    | FailureFound
    | JobFinished
    | FailureReplayed
    | RegressionFinished
    | CampaignFinished
)
Consumer = Callable[[Event], None]


@dataclass
class Bus:
    """Hands every event to every consumer, in order."""

    consumers: list[Consumer] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        """Hand out one event."""
        for consumer in self.consumers:
            consumer(event)
