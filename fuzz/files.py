"""Files that a campaign leaves, written atomically."""

import json
import os
from pathlib import Path
from typing import Any

from kernelfuzz.fuzz.events import CampaignFinished, Event, FailureFound
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.summary import Summary, environment
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.strategies.case import Case, from_json, to_json
from kernelfuzz.strategies.errors import KernelfuzzError

FAILURE_SCHEMA = 1


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it.

    Raises KernelfuzzError where it cannot be written.
    """
    try:
        _replace(path, document)
    except OSError as error:
        raise KernelfuzzError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")  # not a tempfile: those only their owner may read
    try:
        with new.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def read_case(path: Path) -> Case:
    """Read a case file. Raises KernelfuzzError for a file that is not one."""
    try:
        document = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except OSError as error:
        raise KernelfuzzError(f"cannot read case file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise KernelfuzzError(f"case file {path} is not JSON: {error}") from error
    try:
        if not isinstance(document, dict):
            raise KernelfuzzError("not a case file: it is not an object")
        return from_json(get_target(str(document.get("target"))).case_type, document)
    except KernelfuzzError as error:
        raise KernelfuzzError(f"{path}: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


class FailureFiles:
    """Keeps `failures/<fingerprint>/case.json` and `failure.json` below `folder` up to date. A consumer of events.

    A second kernel with the same fingerprint in one campaign gets a folder that names it too.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._owners: dict[str, Job] = {}

    def folder(self, found: FailureFound) -> Path:
        """Return the folder of a failure."""
        owner = self._owners.setdefault(found.fingerprint, found.job)
        name = found.fingerprint
        if owner is not found.job:
            name = file_name(name, str(found.job.kernel), str(found.job.device))
        return self._folder / "failures" / name

    def __call__(self, event: Event) -> None:
        """Write a failure as soon as it is found, and again when it is shrunk."""
        if not isinstance(event, FailureFound):
            return
        folder = self.folder(event)
        write_json(folder / "case.json", to_json(event.case))
        failure = event.failure
        write_json(
            folder / "failure.json",
            {
                "schema": FAILURE_SCHEMA,
                "fingerprint": event.fingerprint,
                "target": event.job.target.name,
                "kernel": str(event.job.kernel),
                "device": str(event.job.device),
                "kind": failure.kind,
                "output": failure.output,
                "clause": failure.clause,
                "message": failure.message,
                "elements": failure.elements,
                "shrunk": event.shrunk,
                "examples": event.examples,
                "seed": self._seed,
                "environment": environment(),
            },
        )


class SummaryFile:
    """Writes `summary.json` when the campaign is over. A consumer of events, after the summary itself."""

    def __init__(self, folder: Path, summary: Summary) -> None:
        self._folder = folder
        self._summary = summary

    def __call__(self, event: Event) -> None:
        """Write the summary at the end."""
        if isinstance(event, CampaignFinished):
            write_json(self._folder / "summary.json", self._summary.to_json())
