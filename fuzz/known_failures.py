"""Failures that someone knows of already, from a file `known_failures.toml`: reported, but no reason to fail a run.

    [[failure]]
    fingerprint = "moe_lora_align.vllm.wrong_value.expert_ids.active_adapter_row"
    reason = "ids out of range are counted"
    link = "https://github.com/vllm-project/vllm/issues/1"
    until-version = "0.34.0"

`link` and `until-version` may be left out. From that version of the kernel on, the failure counts again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from kernelfuzz.fuzz.events import FailureFound
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.strategies.errors import KernelfuzzError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_REQUIRED, _OPTIONAL = ("fingerprint", "reason"), ("link", "until-version")


@dataclass(frozen=True)
class KnownFailure:
    """One entry: the bug's fingerprint, why it is accepted, where to read on, and the version that mends it, if any."""

    fingerprint: str
    reason: str
    link: str = ""
    until_version: str = ""

    def excuses(self, found: FailureFound, version: str) -> bool:
        """Whether a failure of a kernel of that version is this one. What other failures its case shows says nothing:
        a bug that is not listed must not hide behind one that is."""
        return found.fingerprint == self.fingerprint and not self.has_expired(version)

    def has_expired(self, version: str) -> bool:
        """Whether a kernel of that version should not show the bug any more; one without a number may."""
        try:
            return bool(self.until_version) and Version(version) >= Version(self.until_version)
        except InvalidVersion:
            return False

    def concerns(self, job: Job) -> bool:
        """Whether the bug is one of the job's target and kernel."""
        return self.fingerprint.startswith(file_name(job.target.name, job.kernel.package) + ".")

    def __str__(self) -> str:
        """Return what is known, for a person."""
        until = f"until {self.until_version}" if self.until_version else ""
        return "; ".join(filter(None, (self.reason, until, self.link)))


def read_known_failures(path: Path) -> tuple[KnownFailure, ...]:
    """Read the file. Raises KernelfuzzError, in one line, for a file that is none."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KernelfuzzError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise KernelfuzzError(f"{path} is not TOML: {str(error).splitlines()[0]}") from error
    entries = document.pop("failure", [])
    if document or not isinstance(entries, list):
        wrong = ", ".join(document) or "failure"
        raise KernelfuzzError(f"{path}: {wrong}: expected [[failure]] entries and nothing else")
    known = tuple(_entry(path, number, entry) for number, entry in enumerate(entries, start=1))
    _refuse_doubles(path, known)
    return known


def _entry(path: Path, number: int, entry: Any) -> KnownFailure:
    where = f"{path}: entry {number}"
    if not isinstance(entry, dict):
        raise KernelfuzzError(f"{where} is no table: write [[failure]] above it")
    for key, value in entry.items():
        if key not in (*_REQUIRED, *_OPTIONAL):
            raise KernelfuzzError(f"{where}: unknown key {key!r}: expected {', '.join((*_REQUIRED, *_OPTIONAL))}")
        if not isinstance(value, str):
            raise KernelfuzzError(f"{where}: {key} is {value!r}: expected text")
    for key in _REQUIRED:
        if not entry.get(key):
            raise KernelfuzzError(f"{where} has no {key}")
    until = entry.get("until-version", "")
    try:
        Version(until or "0")
    except InvalidVersion:
        raise KernelfuzzError(f"{where}: until-version {until!r} is no version: write one like 0.34.0") from None
    return KnownFailure(entry["fingerprint"], entry["reason"], entry.get("link", ""), until)


def _refuse_doubles(path: Path, known: Sequence[KnownFailure]) -> None:
    seen: set[str] = set()
    for entry in known:
        if entry.fingerprint in seen:
            raise KernelfuzzError(f"{path}: {entry.fingerprint} is listed twice")
        seen.add(entry.fingerprint)
