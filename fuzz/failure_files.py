"""The folder of a failure as a campaign writes it."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kernelfuzz.fuzz import picture, reproducer
from kernelfuzz.fuzz.events import CampaignFinished, CaseFinished, Event, FailureFound, JobStarted
from kernelfuzz.fuzz.failure_folder import SCHEMA
from kernelfuzz.fuzz.files import write_file, write_json
from kernelfuzz.fuzz.issue_text import issue_text
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.summary import environment
from kernelfuzz.strategies.case import to_json
from kernelfuzz.strategies.errors import KernelfuzzError


class FailureFiles:
    """Keeps a folder for each bug below `folder`/failures up to date, and cases that the harness could not judge in
    `errors/`. A consumer of events.

    A folder holds case.json and failure.json as soon as the failure is found, and once it is shrunk, or in the end,
    README.md, repro.py and, where the kernel's memory could be looked at, writemap.png. A second kernel with the same
    fingerprint in one campaign gets a folder that names it too. What cannot be written is tried again with the next
    failure and at the end; `problem` says what could not be.

    A kernel `test` is named in the folder: its id, and the plain ones of its parameters.
    """

    def __init__(
        self, folder: Path, seed: int | None, sanitizer: str | None = None, test: Mapping[str, Any] | None = None
    ) -> None:
        self.problem = ""
        self._folder = folder
        self._seed = seed
        self._sanitizer = sanitizer
        self._test = test
        self._owners: dict[str, Job] = {}
        self._versions: dict[str, str] = {}
        self._first_seen: dict[Path, str] = {}
        self._unsaved: dict[Path, Callable[[Path], None]] = {}
        self._unshrunk: dict[Path, tuple[FailureFound, dict[str, Any]]] = {}

    def folder(self, found: FailureFound) -> Path:
        """Return the folder of a failure."""
        return self._named(found.job, found.fingerprint)

    def document(self, found: FailureFound) -> dict[str, Any]:
        """Return what failure.json says of a failure, with what case.json says under "case"."""
        first_seen = self._first_seen.get(self.folder(found)) or _now()
        return {**self._document(found, first_seen), "case": to_json(found.case)}

    def _named(self, job: Job, fingerprint: str) -> Path:
        owner = self._owners.setdefault(fingerprint, job)
        name = fingerprint if owner is job else file_name(fingerprint, str(job.kernel), str(job.device))
        return self._folder / "failures" / name

    def is_saved(self, found: FailureFound) -> bool:
        """Whether the failure's case is on disk."""
        return self.folder(found) / "case.json" not in self._unsaved

    def __call__(self, event: Event) -> None:
        """Write a failure as soon as it is found, and again when it is shrunk."""
        match event:
            case JobStarted(job, version):
                self._versions[str(job)] = version
                return
            case FailureFound():
                self._take(event)
            case CaseFinished(job, case, _, verdict) if verdict.error:
                name = file_name(str(job), verdict.error)[:120]
                self._unsaved[self._folder / "errors" / f"{name}.json"] = _json(to_json(case))
            case CampaignFinished():
                for folder, (found, document) in self._unshrunk.items():
                    self._explain(folder, found, document)
            case _:
                return
        problems = []
        for path, write in list(self._unsaved.items()):
            try:
                write(path)
                del self._unsaved[path]
            except KernelfuzzError as error:
                problems.append(str(error))
            except Exception as error:  # a picture that cannot be drawn must not end the campaign
                problems.append(f"cannot write {path}: {type(error).__name__}: {error}")
        self.problem = problems[0] if problems else ""

    def _take(self, found: FailureFound) -> None:
        """Plan what must be written of a failure, and take away the folders of what turned out to be the same bug."""
        folder, now = self.folder(found), _now()
        earliest = self._first_seen.setdefault(folder, now)
        for name in found.withdrawn:
            other = self._named(found.job, name)
            earliest = min(earliest, self._first_seen.pop(other, now))
            self._unshrunk.pop(other, None)
            self._unsaved = {path: write for path, write in self._unsaved.items() if path.parent != other}
            shutil.rmtree(other, ignore_errors=True)
        self._first_seen[folder] = earliest
        document = self._document(found, earliest)
        self._unsaved[folder / "case.json"] = _json(to_json(found.case))
        self._unsaved[folder / "failure.json"] = _json(document)
        self._unshrunk.pop(folder, None)
        if found.shrunk:
            self._explain(folder, found, document)
        else:
            self._unshrunk[folder] = found, document

    def _explain(self, folder: Path, found: FailureFound, document: dict[str, Any]) -> None:
        """Plan what a person reads of a failure."""
        script, why_not = self._script(found)
        self._unsaved[folder / "README.md"] = _text(issue_text(found, document, why_not))
        if script:
            self._unsaved[folder / "repro.py"] = _text(script)
        if found.maps and picture.is_available():
            title = f"{found.job.kernel}, {found.failure.kind}: {found.failure.message}"
            self._unsaved[folder / "writemap.png"] = lambda path: picture.draw(found.maps, title, path)

    def _script(self, found: FailureFound) -> tuple[str, str]:
        """Return the reproducer, or why there is none."""
        version = self._versions.get(str(found.job), "")
        try:
            return reproducer.script(
                found.job,
                found.case,
                found.failure,
                version=version,
                sanitizer=self._sanitizer,
                arguments=found.arguments,
            ), ""
        except KernelfuzzError as error:
            return "", str(error)
        except Exception as error:  # a script that cannot be made must not end the campaign
            return "", f"{type(error).__name__}: {error}"

    def _document(self, found: FailureFound, first_seen: str) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "fingerprint": found.fingerprint,
            "target": found.job.target.name,
            "kernel": str(found.job.kernel),
            "version": self._versions.get(str(found.job), ""),
            "device": str(found.job.device),
            **dataclasses.asdict(found.failure),
            "symptoms": [dataclasses.asdict(failure) for failure in found.symptoms],
            "shrunk": found.shrunk,
            "failed_runs": found.failed_runs,
            "runs": found.runs,
            "examples": found.examples,
            "seed": self._seed,
            "sanitizer": self._sanitizer,
            "test": None if self._test is None else {**self._test, "arguments": _in_json(found.arguments)},
            "first_seen": first_seen,
            "environment": environment(),
        }


def _in_json(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return arguments that JSON can hold, None if it cannot."""
    try:
        again: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError):
        return None
    return again if again == arguments else None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _json(document: Any) -> Callable[[Path], None]:
    return lambda path: write_json(path, document)


def _text(content: str) -> Callable[[Path], None]:
    return lambda path: write_file(path, content)
