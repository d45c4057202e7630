"""Failures as bugs: what makes two failures the same bug, and the exception that carries one through Hypothesis."""

import functools

from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.verdict import Failure


def fingerprint(job: Job, failure: Failure) -> str:
    """Return the name of the bug: target, kernel without its version, kind, output and broken clause.

    It is a legal file name.
    """
    return file_name(job.target.name, job.kernel.package, failure.kind, failure.output, failure.clause)


class CaseFailedError(AssertionError):
    """A case failed; a subclass for each fingerprint, because Hypothesis tells bugs apart by exception type."""


@functools.cache
def exception_class(name: str) -> type[CaseFailedError]:
    """Return the exception class of a fingerprint, made once."""
    return type(f"CaseFailedError[{name}]", (CaseFailedError,), {})
