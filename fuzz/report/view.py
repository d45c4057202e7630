"""What is known of one run, gathered from its store and the folders of failures."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from kernelfuzz.fuzz.files import read_json
from kernelfuzz.fuzz.readable import case_lines, element_lines
from kernelfuzz.fuzz.store import queries
from kernelfuzz.fuzz.store.store import Status
from kernelfuzz.fuzz.targets import case_type
from kernelfuzz.strategies.case import from_json
from kernelfuzz.strategies.errors import KernelfuzzError

STATUSES: tuple[Status, ...] = ("new", "returned", "known", "listed", "fixed", "unseen")
"""What a failure can be in a run, what needs a person first."""

FAILING: tuple[Status, ...] = ("new", "returned")
"""Those that fail a night."""

_SAME_BISECTION = ("case", "package", "device", "sanitizer")
"""What the outcomes of one bisection have in common in bisect.json."""


def visible(text: str) -> str:
    """Return a text without characters that cannot be seen, that turn the text around them, or that files cannot hold:
    what kernels say may have any."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


@dataclass(frozen=True)
class Trial:
    """What `kernelfuzz bisect` saw on a version, a release or a commit's hash: good, bad or cannot run; the note says
    how it failed otherwise, or why it could not run."""

    version: str
    state: str
    note: str

    @property
    def release(self) -> Version | None:
        """The version for comparison, None for a commit."""
        try:
            return Version(self.version)
        except InvalidVersion:
            return None


@dataclass(frozen=True)
class FailureView:
    """A failure as the page shows it.

    - folder: where its files are; None where they are gone
    - case, elements: lines for a person; text, script: README.md and repro.py, or empty
    - picture: writemap.png in base64, or empty
    - bisection: releases by age, then commits in the order in which they were run
    - replays: on which kernels it was run again in this run
    - timeline: what it was in this run and in those before
    """

    failure: queries.Failure
    sighting: queries.Sighting
    folder: Path | None
    case: list[str]
    elements: list[str]
    text: str
    script: str
    picture: str
    bisection: list[Trial]
    replays: list[queries.Replay]
    timeline: Mapping[int, Status]

    @property
    def document(self) -> Mapping[str, Any]:
        """What failure.json said when it was last seen."""
        return self.failure.document

    @property
    def change(self) -> str:
        """Between which releases the bisection saw the failure come in or go away, or empty."""
        judged = [each for each in self.bisection if each.release is not None and each.state != "cannot run"]
        for before, after in zip(judged, judged[1:]):
            if before.state != after.state:
                came = "came in" if after.state == "bad" else "went away"
                return f"{came} between {before.version} and {after.version}"
        return ""

    @property
    def last_seen(self) -> int:
        """The last run, up to this one, that saw it."""
        return max((run for run, status in self.timeline.items() if status not in ("fixed", "unseen")), default=0)

    @property
    def message(self) -> str:
        """What is wrong, in one line."""
        return " ".join(str(self.document.get("message", "")).split())


@dataclass(frozen=True)
class View:
    """A run, with all runs before it for comparison.

    - nights: this run and those before, the newest first
    - timelines: of every failure that these runs know, what it was in which of them
    """

    folder: Path
    run: queries.Run
    jobs: list[queries.JobStatistics]
    failures: list[FailureView]
    regressions: list[queries.Regression]
    nights: list[queries.Night]
    timelines: Mapping[str, Mapping[int, Status]]

    def of(self, *statuses: Status) -> list[FailureView]:
        """Return the failures with one of these statuses."""
        return [each for each in self.failures if each.sighting.status in statuses]

    @property
    def verdict(self) -> str:
        """The run in a few words."""
        counts = [(len(self.of(status)), status) for status in STATUSES]
        said = ", ".join(f"{count} {status}" for count, status in counts if count)
        return said or "no failure"

    @property
    def lost_regressions(self) -> list[queries.Regression]:
        """The historical bugs that were not told apart."""
        return [each for each in self.regressions if each.outcome == "FAIL"]

    @property
    def changes(self) -> list[tuple[str, str, str]]:
        """What of the environment is not as it was in the run before: name, before, now."""
        older = [night.run for night in self.nights if night.run.id < self.run.id]
        if not older:
            return []
        before, now = older[0].environment, self.run.environment
        names = sorted(before.keys() | now.keys())
        return [(n, before.get(n, ""), now.get(n, "")) for n in names if before.get(n) != now.get(n)]


def read_view(folder: Path, number: int | None = None) -> View:
    """Gather the run of that number, or the last one, of the store in `folder`.

    Raises KernelfuzzError where there is no store, or no such run.
    """
    connection = queries.connect(folder)
    try:
        nights = queries.history(connection)
        runs = [night.run for night in nights]
        chosen = next((run for run in runs if number in (None, run.id)), None)
        if chosen is None:
            has = f"it has runs {runs[-1].id} to {runs[0].id}" if runs else "it has none yet"
            raise KernelfuzzError(f"{folder}: no run {'' if number is None else number}".rstrip() + f": {has}")
        failures = queries.failures(connection)
        replays = queries.replays(connection, chosen.id)
        timelines: dict[str, dict[int, Status]] = {}
        for each in queries.sightings(connection):
            if each.run <= chosen.id:
                timelines.setdefault(each.fingerprint, {})[each.run] = each.status
        views = [
            _failure(
                folder,
                failures[each.fingerprint],
                each,
                [replay for replay in replays if replay.fingerprint == each.fingerprint],
                timelines[each.fingerprint],
            )
            for each in queries.sightings(connection, chosen.id)
            if each.fingerprint in failures
        ]
        views.sort(key=lambda each: (STATUSES.index(each.sighting.status), each.failure.fingerprint))
        return View(
            folder,
            chosen,
            queries.statistics(connection, chosen.id),
            views,
            queries.regressions(connection, chosen.id),
            [night for night in nights if night.run.id <= chosen.id],
            timelines,
        )
    finally:
        connection.close()


def _failure(
    folder: Path,
    failure: queries.Failure,
    sighting: queries.Sighting,
    replays: list[queries.Replay],
    timeline: Mapping[int, Status],
) -> FailureView:
    path = folder / "failures" / failure.folder
    picture = path / "writemap.png"
    return FailureView(
        failure,
        sighting,
        path if path.is_dir() else None,
        _case(failure.document.get("case")),
        [line.plain.strip() for line in element_lines(tuple(failure.document.get("elements", ())))],
        _read(path / "README.md"),
        _read(path / "repro.py"),
        base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else "",
        _bisection(path / "bisect.json", failure.fingerprint),
        replays,
        timeline,
    )


def _case(document: Any) -> list[str]:
    """Return a case's lines; one of a kernelfuzz that is not this one as it stands there."""
    try:
        return [line.plain.strip() for line in case_lines(from_json(case_type(document["target"]), document))]
    except (KernelfuzzError, KeyError, TypeError):
        return [str(document)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _bisection(path: Path, fingerprint: str) -> list[Trial]:
    """Return what `kernelfuzz bisect` saw of a failure when it was called last: outcomes of another case, or on another
    device, say nothing of where this one changes."""
    try:
        found = [each for each in read_json(path)["results"] if each["fingerprint"] == fingerprint]
        last = [each for each in found if all(each.get(name) == found[-1].get(name) for name in _SAME_BISECTION)]
        trials = [Trial(*(str(each.get(name, "")) for name in ("version", "state", "note"))) for each in last]
    except (KernelfuzzError, KeyError, TypeError, AttributeError):
        return []
    releases = [each for each in trials if each.release is not None]
    return sorted(releases, key=lambda each: Version(each.version)) + [each for each in trials if each.release is None]
