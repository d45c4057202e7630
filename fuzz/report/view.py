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


@dataclass(frozen=True)
class FailureView:
    """A failure as the page shows it.

    - folder: where its files are; None where they are gone
    - case, elements: lines for a person; text, script: README.md and repro.py, or empty
    - picture: writemap.png in base64, or empty
    - bisection: versions and what they did: good, bad or cannot run
    - replays: on which kernels it was run again in this run
    - timeline: what it was in which run
    """

    failure: queries.Failure
    sighting: queries.Sighting
    folder: Path | None
    case: list[str]
    elements: list[str]
    text: str
    script: str
    picture: str
    bisection: list[tuple[str, str]]
    replays: list[queries.Replay]
    timeline: Mapping[int, Status]

    @property
    def document(self) -> Mapping[str, Any]:
        """What failure.json said when it was last seen."""
        return self.failure.document

    @property
    def change(self) -> str:
        """Where the bisection saw the failure come in or go away, or empty."""
        judged = [each for each in self.bisection if each[1] != "cannot run"]
        for (before, one), (after, other) in zip(judged, judged[1:]):
            if one != other:
                return f"{'came in' if other == 'bad' else 'went away'} between {before} and {after}"
        return ""

    @property
    def message(self) -> str:
        """What is wrong, in one line."""
        return " ".join(str(self.document.get("message", "")).split())


@dataclass(frozen=True)
class View:
    """A run, with all runs before it for comparison; `nights` has the newest first."""

    folder: Path
    run: queries.Run
    jobs: list[queries.JobStatistics]
    failures: list[FailureView]
    regressions: list[queries.Regression]
    nights: list[queries.Night]

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


def _bisection(path: Path, fingerprint: str) -> list[tuple[str, str]]:
    """Return what `kernelfuzz bisect` saw of a failure, by version, in their order if they are releases."""
    try:
        found = read_json(path)["results"]
        states = {str(each["version"]): str(each["state"]) for each in found if each["fingerprint"] == fingerprint}
    except (KernelfuzzError, KeyError, TypeError):
        return []
    try:
        return sorted(states.items(), key=lambda each: Version(each[0]))
    except InvalidVersion:  # commits, in the order in which they were run
        return list(states.items())
