"""What a night counts for one job, over all its slices and lanes."""

import bisect
from collections import Counter
from typing import Any

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.events import Event
from kernelfuzz.fuzz.failures import fingerprints
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.nightly.coverage import Coverage

RATIO_BINS = 20
RATIO_EDGES = (*(index / RATIO_BINS for index in range(1, RATIO_BINS + 1)), 2.0, 10.0)
"""Upper edges of the bins in which err/bound is counted; one more bin holds what is above the last."""

MOST_POINTS = 200
"""Points of a curve over time; where there would be more, every second one is left out."""


class Statistics:
    """Adds up the events of one job.

    A slice is what a lane does in one go; its `gain` is what it found that no earlier slice had: regimes and failures,
    one each, and how far it raised the worst err/bound, where one tenth counts as one.
    """

    def __init__(self, job: Job) -> None:
        self.version = ""
        self.notes: tuple[str, ...] = ()
        self.error = ""
        self.examples = 0
        self.cases = 0
        self.rejected = 0
        self.errors: Counter[str] = Counter()
        self.replaced = 0
        self.seconds = 0.0
        self.spent: dict[str, float] = {}
        self.regimes: Counter[str] = Counter()
        self.worst_ratio = 0.0
        self.worst_ratios: dict[str, float] = {}
        self.hits: Counter[str] = Counter()
        self._gain = 0.0
        self._ratios: dict[str, list[int]] = {}
        self._growth: list[tuple[float, int, int, float]] = []
        self._spacing = 0.0
        self._coverage = Coverage(job.target.case_type)

    def take(self, event: Event, at: float) -> None:
        """Take an event of the job into account, `at` seconds after the night began."""
        match event:
            case events.JobStarted(_, version, _, notes):
                self.version, self.notes, self.error = version, notes, ""
            case events.KernelsCompiled(_, _, seconds):
                self.spent["compiling"] = self.spent.get("compiling", 0.0) + seconds
            case events.CaseFinished():
                self._count(event)
                self._sample(at)
            case events.FailureFound() if not event.shrunk:
                self._gain += 1
            case events.JobFinished(_, _, error, replacements):
                self.error = error
                self.replaced += replacements.workers
                self._sample(at, last=True)

    def slice_gain(self) -> float:
        """Return the gain since the last call."""
        gain, self._gain = self._gain, 0.0
        return gain

    def _count(self, event: events.CaseFinished) -> None:
        verdict = event.verdict
        self.cases += verdict.cases
        self.examples += not event.shrinking
        for phase, seconds in verdict.seconds.items():
            self.spent[phase] = self.spent.get(phase, 0.0) + seconds
        if verdict.error:
            self.errors[verdict.error] += 1
        elif verdict.rejected:
            self.rejected += 1
        if event.shrinking or verdict.error or verdict.rejected:
            return
        self._gain += sum(regime not in self.regimes for regime in event.regimes)
        self.regimes.update(event.regimes)
        self.hits.update(fingerprints(event.job, verdict).keys())
        self._coverage.add(event.case)
        if verdict.ratio > 0:
            self._count_ratio(event)

    def _count_ratio(self, event: events.CaseFinished) -> None:
        ratio, passed = event.verdict.ratio, not event.verdict.failures
        for regime in ("all", *event.regimes):
            self._ratios.setdefault(regime, [0] * (len(RATIO_EDGES) + 1))[bisect.bisect_left(RATIO_EDGES, ratio)] += 1
        if passed and ratio > self.worst_ratio:
            self._gain += 10 * (ratio - self.worst_ratio)
            self.worst_ratio = ratio
        for regime in event.regimes if passed else ():
            self.worst_ratios[regime] = max(self.worst_ratios.get(regime, 0.0), ratio)

    def _sample(self, at: float, *, last: bool = False) -> None:
        if self._growth and at < self._growth[-1][0] + self._spacing and not last:
            return
        self._growth.append((round(at, 2), self.cases, len(self.regimes), self.worst_ratio))
        if len(self._growth) > MOST_POINTS:
            self._growth = self._growth[::2]
            self._spacing = self._growth[1][0] - self._growth[0][0]

    def to_json(self) -> dict[str, Any]:
        """Return what was counted, in JSON types.

        - seconds: how long lanes were busy with the job; spent: workers' seconds by phase, and those of compiling
        - ratios: for "all" cases and by regime how many cases had an err/bound in each bin of RATIO_EDGES
        - growth: [seconds since the night began, cases, regimes, worst err/bound], in order of time
        - coverage: see Coverage.to_json
        """
        return {
            "version": self.version,
            "notes": list(self.notes),
            "error": self.error,
            "examples": self.examples,
            "cases": self.cases,
            "rejected": self.rejected,
            "errors": dict(self.errors),
            "workers_replaced": self.replaced,
            "seconds": round(self.seconds, 3),
            "spent": {phase: round(seconds, 3) for phase, seconds in self.spent.items()},
            "worst_ratio": self.worst_ratio,
            "worst_ratios": dict(sorted(self.worst_ratios.items())),
            "regimes": dict(sorted(self.regimes.items())),
            "hits": dict(self.hits),
            "ratios": self._ratios,
            "growth": [list(point) for point in self._growth],
            "coverage": self._coverage.to_json(),
        }
