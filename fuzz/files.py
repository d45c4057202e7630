"""Files that a campaign leaves, written atomically."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from kernelfuzz.fuzz.events import CampaignFinished, Event
from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.summary import Summary
from kernelfuzz.fuzz.targets import case_type
from kernelfuzz.strategies.case import Case, from_json
from kernelfuzz.strategies.errors import KernelfuzzError


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Raises KernelfuzzError where it cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")  # not a tempfile: those only their owner may read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise KernelfuzzError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file as `write_file` does."""
    write_file(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises KernelfuzzError for a file that does not."""
    try:
        document = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except OSError as error:
        raise KernelfuzzError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise KernelfuzzError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise KernelfuzzError(f"{path}: not an object")
    return document


def read_case(path: Path) -> Case:
    """Read a case file. Raises KernelfuzzError for a file that is not one."""
    document = read_json(path)
    try:
        return from_json(case_type(str(document.get("target"))), document)
    except KernelfuzzError as error:
        raise KernelfuzzError(f"{path}: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


class SummaryFile:
    """Writes `summary.json` when the campaign is over. A consumer of events, after the summary itself."""

    def __init__(self, folder: Path, summary: Summary) -> None:
        self.problem = ""
        self._folder = folder
        self._summary = summary

    def __call__(self, event: Event) -> None:
        """Write the summary at the end."""
        if isinstance(event, CampaignFinished):
            try:
                write_json(self._folder / "summary.json", self._summary.to_json())
            except KernelfuzzError as error:
                self.problem = str(error)


class InFlight(Protocol):
    """Where the requests that a job's workers have now are kept, as a context manager."""

    def __enter__(self) -> "InFlight":
        """Begin."""

    def left(self) -> list[Request]:
        """Return the requests that an earlier campaign of this job left, to be run again."""

    def record(self, requests: Sequence[Request]) -> None:
        """Take the requests that the workers have now, in the place of those before."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End: what came of the requests has been reported, unless there is an error."""


class InFlightFile:
    """The requests that a job's workers have now: on disk before they are launched, so that they outlive this process.

    Use it as a context manager. A file that a killed campaign left is moved to `interrupted/`, and its requests are for
    the caller to run again, once: should they end the campaign once more, the file stays there for a person to look at.

    It is not flushed to the disk itself, which would take longer than most cases: it survives the death of processes,
    not of the machine.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        name = file_name(str(job)) + ".jsonl"
        self._path = folder / "running" / name
        self._interrupted = folder / "interrupted" / name
        self._job = job
        self._was_left = False

    def __enter__(self) -> "InFlightFile":
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._interrupted.parent.mkdir(exist_ok=True)
                self._path.replace(self._interrupted)
                self._was_left = True
        return self

    def left(self) -> list[Request]:
        """Return the requests that an earlier campaign of this job left. A line that is cut off is left out."""
        requests = []
        for line in self._interrupted.read_text(errors="replace").splitlines() if self._was_left else ():
            with suppress(ValueError, KeyError, TypeError, KernelfuzzError):
                document = json.loads(line)
                case = from_json(self._job.target.case_type, document["case"])
                requests.append(Request(case, tuple(map(int, document["seeds"]))))
        return requests

    def record(self, requests: Sequence[Request]) -> None:
        """Replace the file's content, all at once. A disk that is full costs no more than this record."""
        new = self._path.with_suffix(".new")
        with suppress(OSError):
            new.write_bytes(b"".join(request.message + b"\n" for request in requests))
            new.replace(self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the files: what came of their requests has been reported. After an error or Ctrl-C the file stays, for
        the next campaign."""
        if error is not None:
            return
        for path in (self._path, self._interrupted) if self._was_left else (self._path,):
            with suppress(OSError):
                path.unlink()
        for path in (self._path, self._interrupted):
            with suppress(OSError):  # other jobs' files are there
                path.parent.rmdir()
