"""Failures as bugs: what makes two failures the same bug, and the exception that carries one through Hypothesis."""

import functools
from dataclasses import astuple, dataclass

from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.verdict import Failure, FailureKind, Verdict


@dataclass(frozen=True)
class Fingerprint:
    """What two failures have in common that are taken for the same bug.

    - target; kernel: the package, or the user's MODULE:FUNCTION, without a version, so that a bug keeps its fingerprint
      from release to release. Which of a kernel's paths ran is evidence and not compared
    - kind; output: the output or input concerned, empty where none is
    - clause: the contract's clause that was broken; of an exception its type and the function that raised it; of a
      crash the device's error, the signal or the exit status
    """

    target: str
    kernel: str
    kind: FailureKind
    output: str
    clause: str

    @classmethod
    def of(cls, job: Job, failure: Failure) -> "Fingerprint":
        """Return the fingerprint of a failure that a job has shown."""
        return cls(job.target.name, job.kernel.package, failure.kind, failure.output, failure.clause)

    def __str__(self) -> str:
        """Return the fingerprint as a legal file name."""
        return file_name(*astuple(self))


def fingerprint(job: Job, failure: Failure) -> str:
    """Return the name of a failure's fingerprint."""
    return str(Fingerprint.of(job, failure))


def fingerprints(job: Job, verdict: Verdict) -> dict[str, Failure]:
    """Return a verdict's failures by the names of their fingerprints, in the verdict's order."""
    return {fingerprint(job, failure): failure for failure in verdict.failures}


class CaseFailedError(AssertionError):
    """A case failed; a subclass for each fingerprint, because Hypothesis tells bugs apart by exception type."""


@functools.cache
def exception_class(name: str) -> type[CaseFailedError]:
    """Return the exception class of a fingerprint, made once."""
    return type(f"CaseFailedError[{name}]", (CaseFailedError,), {})
