"""The summary of a campaign: what was run, how far it came, what was found. A consumer of events."""

import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.events import Event, FailureFound
from kernelfuzz.fuzz.executor import Replacements
from kernelfuzz.fuzz.failures import fingerprint
from kernelfuzz.fuzz.job import Job, Skipped
from kernelfuzz.fuzz.known_failures import KnownFailure

SCHEMA = 1


@dataclass
class JobSummary:
    """What one job did.

    - notes: what the kernel says of what ran and what was left out
    - examples: draws that looked for failures; cases: launches, those of the shrinker included; rejected: cases that
      the kernel does not offer; errors: cases that the harness could not judge, by what it said
    - replacements: workers that died or hung; hits: in how many examples each fingerprint was seen
    - seconds: wall time since the kernel was loaded; spent: seconds of that by phase of a case
    - worst_ratio: the worst err/bound of a passing case; worst_ratios: the same by regime
    """

    job: Job
    version: str = ""
    notes: tuple[str, ...] = ()
    state: str = "waiting"
    error: str = ""
    examples: int = 0
    cases: int = 0
    rejected: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    replacements: Replacements = field(default_factory=Replacements)
    hits: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    worst_ratio: float = 0.0
    regimes: Counter[str] = field(default_factory=Counter)
    worst_ratios: dict[str, float] = field(default_factory=dict)
    spent: Counter[str] = field(default_factory=Counter)
    failures: dict[str, FailureFound] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of `results` in summary.json."""
        return {
            "target": self.job.target.name,
            "kernel": str(self.job.kernel),
            "version": self.version or self.job.kernel.version,
            "device": str(self.job.device),
            "notes": list(self.notes),
            "error": self.error,
            "examples": self.examples,
            "cases": self.cases,
            "rejected": self.rejected,
            "errors": dict(self.errors),
            "workers_replaced": self.replacements.workers,
            "waits_for_workers": self.replacements.waits,
            "seconds": round(self.seconds, 3),
            "spent": {phase: round(seconds, 3) for phase, seconds in self.spent.items()},
            "worst_ratio": self.worst_ratio,
            "worst_ratios": dict(sorted(self.worst_ratios.items())),
            "regimes": dict(sorted(self.regimes.items())),
            "failures": list(self.failures),
            "hits": {name: self.hits_of(found) for name, found in self.failures.items()},
        }

    def hits_of(self, found: FailureFound) -> int:
        """Return in how many examples a bug was seen, by the most frequent of its fingerprints."""
        return max(self.hits[name] for name in (found.fingerprint, *found.withdrawn))


class Summary:
    """Adds up the events of a campaign. `known` failures are no reason to fail it."""

    def __init__(self, known: Sequence[KnownFailure] = ()) -> None:
        self._known = known
        self.jobs: list[JobSummary] = []
        self.skipped: tuple[Skipped, ...] = ()
        self.seed: int | None = None
        self.finished = False
        self.interrupted = False
        self._job_started = 0.0

    def __call__(self, event: Event) -> None:
        """Take one event into account."""
        match event:
            case events.CampaignStarted(jobs, skipped, seed):
                self.jobs = [JobSummary(job) for job in jobs]
                self.skipped, self.seed = skipped, seed
            case events.JobStarted(job, version, _, notes):
                entry = self.entry(job)
                entry.version, entry.notes = version, notes
                entry.state = "compiling" if job.compiles else "running"
                self._job_started = time.monotonic()
            case events.CaseFinished():
                self._count(event)
            case events.FailureFound(job, name):
                entry = self.entry(job)
                for symptom in event.withdrawn:
                    entry.failures.pop(symptom, None)
                entry.failures[name] = event
                entry.state = "running" if event.shrunk else "shrinking"
            case events.JobFinished(job, examples, error, replacements):
                entry = self.entry(job)
                entry.examples, entry.replacements = examples, replacements
                entry.error, entry.state = error, "error" if error else "done"
            case events.CampaignFinished(interrupted):
                self.finished, self.interrupted = True, interrupted

    def entry(self, job: Job) -> JobSummary:
        """Return the summary of a job."""
        return next(entry for entry in self.jobs if entry.job is job)

    def _count(self, event: events.CaseFinished) -> None:
        entry = self.entry(event.job)
        entry.seconds = time.monotonic() - self._job_started
        verdict = event.verdict
        entry.state = "running" if entry.state == "compiling" else entry.state
        entry.cases += verdict.cases
        entry.examples = event.examples
        entry.spent.update(verdict.seconds)
        if verdict.error:
            entry.errors[verdict.error] += 1
        entry.rejected += bool(verdict.rejected)
        if event.shrinking or verdict.rejected or verdict.error:
            return
        entry.hits.update({fingerprint(event.job, failure) for failure in verdict.failures})
        entry.regimes.update(event.regimes)
        if not verdict.failures:
            entry.worst_ratio = max(entry.worst_ratio, verdict.ratio)
            for regime in event.regimes:
                entry.worst_ratios[regime] = max(entry.worst_ratios.get(regime, 0.0), verdict.ratio)

    def known(self, entry: JobSummary, found: FailureFound) -> KnownFailure | None:
        """Return what is known of a failure that a job found, if anything."""
        return next((each for each in self._known if each.excuses(found, entry.version)), None)

    def unknown(self) -> list[FailureFound]:
        """Return the failures that nobody knows of."""
        return [found for entry in self.jobs for found in entry.failures.values() if not self.known(entry, found)]

    def fixed(self) -> dict[KnownFailure, int]:
        """Return the known failures that were not seen in any of the jobs they concern, and in how many examples."""
        fixed = {}
        for known in self._known:
            concerned = [entry for entry in self.jobs if known.concerns(entry.job) and entry.examples]
            if concerned and not any(entry.hits[known.fingerprint] for entry in concerned):
                fixed[known] = sum(entry.examples for entry in concerned)
        return fixed

    @property
    def failed(self) -> bool:
        """Whether any job found a failure that nobody knows of."""
        return bool(self.unknown())

    @property
    def broken(self) -> bool:
        """Whether any job could not do its work, or any case could not be judged."""
        return any(entry.error or entry.errors for entry in self.jobs)

    def to_json(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        return {
            "schema": SCHEMA,
            "environment": environment(),
            "seed": self.seed,
            "interrupted": self.interrupted,
            "results": [entry.to_json() for entry in self.jobs],
            "known_failures": [
                name for entry in self.jobs for name, found in entry.failures.items() if self.known(entry, found)
            ],
            "fixed_failures": [known.fingerprint for known in self.fixed()],
            "skipped": [
                {"target": s.target, "kernel": str(s.kernel), "device": s.device, "reason": s.reason}
                for s in self.skipped
            ],
        }


def environment() -> dict[str, str]:
    """Return what a result may depend on: versions, machine, devices."""
    packages = ("kernelfuzz", "torch", "triton", "numpy", "hypothesis", "pyopencl", "intel-opencl-rt")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    if torch.xpu.is_available():
        found["xpu"] = torch.xpu.get_device_name()
    return found
