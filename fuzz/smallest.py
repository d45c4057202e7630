"""What is done with the smallest case of a failure that Hypothesis has found: it is made simpler, and run again."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.failures import fingerprints
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.simplify import simpler
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.case import Case

SHRINK_SECONDS = 60.0
"""How long one failure may be shrunk where the budget is time. Where it is examples, Hypothesis's own limit of 300 s
holds."""

SHRINK_LAUNCHES = {"crash": 60, "hang": 6}
"""How many launches that may take, where each costs a worker."""

SIMPLIFY_SECONDS = 20.0
"""How long simpler contents and round sizes may be tried for it after that."""

RUNS = 10
"""How often a shrunk case is run again, to say how reliably it fails."""

RUNS_OF_KIND = {"crash": 3, "hang": 1}
"""Where that takes long it is run less often, unless it passes once."""

Judge = Callable[[Request], Verdict]


@dataclass(frozen=True)
class Sighting:
    """A case that failed: with what, and in how many of so many further runs."""

    failure: Failure
    case: Case
    verdict: Verdict
    failed_runs: int = 1
    runs: int = 1


def simplify(
    job: Job,
    judge: Judge,
    name: str,
    best: Sighting,
    *,
    hurries: bool,
    enough: Callable[[], bool] = lambda: False,
) -> Sighting:
    """Return a failing case with simpler contents and round sizes, if there is one that has the fingerprint `name` too
    and shows nothing else. With `hurries` it is looked for during some seconds only, and no longer once it is
    `enough`."""
    tried = {best.case}
    until = time.monotonic() + SIMPLIFY_SECONDS
    while True:
        for case in simpler(best.case, job.target.reducible, job.target.roundable):
            if case in tried or (hurries and time.monotonic() >= until) or enough():
                continue
            if best.failure.kind == "hang":  # each would take as long again
                return best
            tried.add(case)
            verdict = judge(Request.alone(case))
            found = fingerprints(job, verdict)
            # A case that shows more than before would take another bug for the same one.
            if name in found and found.keys() <= fingerprints(job, best.verdict).keys():
                best = Sighting(found[name], case, verdict)
                break
        else:
            return best


def confirm(job: Job, judge: Judge, name: str, found: Sighting) -> Sighting:
    """Run a failing case again, and say how often it failed, with the verdict of a run in which it did."""
    request = dataclasses.replace(Request.alone(found.case), maps=True)
    failed, runs, best = 0, 0, found
    while runs < (RUNS if failed < runs else RUNS_OF_KIND.get(found.failure.kind, RUNS)):
        verdict = judge(request)
        runs += 1
        if failure := fingerprints(job, verdict).get(name):
            failed += 1
            best = Sighting(failure, found.case, verdict) if failed == 1 else best
    return dataclasses.replace(best, failed_runs=failed, runs=runs)


def pinned(case: Case, verdict: Verdict) -> Case:
    """Return the case with the content seed that its verdict is about."""
    return case if verdict.seed is None else dataclasses.replace(case, seed=verdict.seed)
