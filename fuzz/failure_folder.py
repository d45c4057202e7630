"""The folder of a failure as it is read back: what the commands start from that take one."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernelfuzz.fuzz.failures import Fingerprint
from kernelfuzz.fuzz.files import read_case, read_json
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.errors import KernelfuzzError

SCHEMA = 2
"""Schema number of failure.json. A reader refuses files with another number."""


@dataclass(frozen=True)
class SavedFailure:
    """A failure folder; or a case file alone, of which no more is known than its case.

    - path: as the user named it
    - failures: the bug's own and then the further ones that the case shows; none for a case alone
    - kernel, device, sanitizer: where it failed, as one writes them on the command line; empty for a case alone
    - version: of the kernel, as it says itself
    - failed_runs of `runs`: how often the case failed when it was run again
    - test: the id of the kernel test that found it, without what pytest puts in brackets; empty for a campaign
    - parameters: the plain ones of its fixtures, by their repr; arguments: what else was drawn
    """

    path: Path
    case: Case
    failures: tuple[Failure, ...] = ()
    kernel: str = ""
    version: str = ""
    device: str = ""
    sanitizer: str | None = None
    failed_runs: int = 1
    runs: int = 1
    test: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """The name of the bug's fingerprint, empty for a case alone."""
        return str(self._fingerprint(self.failures[0])) if self.failures else ""

    @property
    def is_reliable(self) -> bool:
        """Whether the case failed in every run."""
        return self.failed_runs == self.runs

    def shown_by(self, verdict: Verdict) -> bool:
        """Whether a verdict on the case shows the bug: one of its fingerprints, whatever the kernel is called; any
        failure at all where no fingerprint is known."""
        if not self.failures:
            return bool(verdict.failures)
        known = {self._fingerprint(failure) for failure in self.failures}
        return any(self._fingerprint(failure) in known for failure in verdict.failures)

    def _fingerprint(self, failure: Failure) -> Fingerprint:
        package = self.kernel.partition("@")[0]
        return Fingerprint(self.case.target, package, failure.kind, failure.output, failure.clause)


def find_failures(path: Path) -> list[Path]:
    """Return the failure folders in `path` at any depth, in order; a path that is none of them by itself, unread.

    A folder that holds a case only, as a campaign that was killed may leave it, counts as its case file. A folder that
    cannot be looked into counts as a failure, so that reading it says why.
    """
    if not path.is_dir():
        return [path]
    found: list[Path] = []
    for folder, below, files in os.walk(path, onerror=lambda error: found.append(Path(error.filename))):
        below.sort()
        if "failure.json" in files:
            found.append(Path(folder))
        elif "case.json" in files:
            found.append(Path(folder, "case.json"))
    return found


def read_failure(path: Path) -> SavedFailure:
    """Read a failure folder, or a case file. Raises KernelfuzzError, in one line, for anything else."""
    if not path.is_dir():
        return SavedFailure(path, read_case(path))
    file = path / "failure.json"
    document = read_json(file)
    if document.get("schema") != SCHEMA:
        has = f"has schema {document['schema']!r}" if "schema" in document else "has no schema number"
        raise KernelfuzzError(f"{file} {has}, this kernelfuzz reads schema {SCHEMA}")
    case = read_case(path / "case.json")
    try:
        test = document.get("test") or {"id": "", "parameters": {}, "arguments": {}}  # campaigns of old lack it
        if test["arguments"] is None:
            raise KernelfuzzError(f"{path}: what its test was called with could not be saved: run the test again")
        return SavedFailure(
            path,
            case,
            tuple(_failure(each) for each in (document, *document["symptoms"])),
            **{name: str(document[name]) for name in ("kernel", "version", "device")},
            sanitizer=document["sanitizer"],
            failed_runs=int(document["failed_runs"]),
            runs=int(document["runs"]),
            test=str(test["id"]).partition("[")[0],
            parameters=dict(test["parameters"]),
            arguments=dict(test["arguments"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise KernelfuzzError(f"{file} is malformed: {type(error).__name__}: {error}") from error


def _failure(document: Mapping[str, Any]) -> Failure:
    values = {each.name: document[each.name] for each in dataclasses.fields(Failure)}
    for name, value in values.items():
        if not isinstance(value, list if name == "elements" else str):
            raise TypeError(f"{name} is {value!r}")
    return Failure(**{**values, "elements": tuple(values["elements"])})
