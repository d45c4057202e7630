"""Everything that is read from a store."""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelfuzz.fuzz.store.schema import SCHEMA
from kernelfuzz.fuzz.store.store import BUSY_SECONDS, Status, find_store
from kernelfuzz.strategies.errors import KernelfuzzError


@dataclass(frozen=True)
class Run:
    """A night.

    - started, finished: ISO 8601, UTC; finished is empty where the run has not ended by itself
    - state: running, finished, interrupted, or cut off; exit_status: None unless it has ended by itself
    - budget: seconds
    - environment: versions, machine, devices; settings: what was asked for
    - skipped: what could not run, as {target, kernel, device, reason}; problems: lines on the run itself
    """

    id: int
    started: str
    finished: str
    state: str
    exit_status: int | None
    seed: int
    budget: float
    environment: dict[str, str]
    settings: dict[str, Any]
    skipped: list[dict[str, str]]
    problems: list[str]


@dataclass(frozen=True)
class JobStatistics:
    """What a run counted for one job; `document` is what Statistics.to_json returned."""

    target: str
    kernel: str
    device: str
    document: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A bug, as all runs together know it.

    - fixed_run: the run that saw it pass; None while it is open
    - folder: its name below `failures`
    - document: failure.json of the last sighting, with the content of case.json under "case"
    """

    fingerprint: str
    target: str
    first_run: int
    first_seen: str
    last_run: int
    last_seen: str
    fixed_run: int | None
    folder: str
    document: dict[str, Any]


@dataclass(frozen=True)
class Sighting:
    """What a failure was in one run; kernel, version and device are empty where it was not seen."""

    run: int
    fingerprint: str
    status: Status
    kernel: str
    version: str
    device: str
    seen: str
    note: str


@dataclass(frozen=True)
class Replay:
    """What became of a stored failure on one kernel."""

    fingerprint: str
    kernel: str
    device: str
    version: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Regression:
    """What became of a historical bug in a run."""

    pull_request: str
    title: str
    outcome: str
    problem: str


@dataclass(frozen=True)
class Night:
    """One line of the history.

    - cases, examples: of all jobs together; worst_ratio: the worst err/bound of a passing case
    - statuses: how many failures were what
    """

    run: Run
    examples: int
    cases: int
    worst_ratio: float
    statuses: dict[str, int]


def connect(folder: Path) -> sqlite3.Connection:
    """Open the store of a folder for reading. Raises KernelfuzzError if there is none that can be read."""
    path, problems = find_store(folder)
    if path is None:
        remedy = "kernelfuzz nightly --store makes one"
        raise KernelfuzzError("; ".join([*problems, f"no store in {folder}: {remedy}"]))
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA query_only = ON")
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    if schema < SCHEMA:
        connection.close()
        raise KernelfuzzError(f"{path} has schema {schema}, this kernelfuzz reads {SCHEMA}: its next night converts it")
    return connection


def identity(connection: sqlite3.Connection) -> str:
    """Return a name that no other store has."""
    (name,) = connection.execute("SELECT name FROM identity").fetchone()
    return str(name)


def runs(connection: sqlite3.Connection) -> list[Run]:
    """Return all runs, the newest first."""
    rows = connection.execute(
        "SELECT id, started, ifnull(finished, ''), state, exit_status, seed, budget, environment, settings, skipped,"
        " problems FROM runs ORDER BY id DESC"
    )
    return [Run(*row[:7], *map(json.loads, row[7:])) for row in rows]


def statistics(connection: sqlite3.Connection, run: int) -> list[JobStatistics]:
    """Return what a run counted, by target and kernel."""
    rows = connection.execute(
        "SELECT target, kernel, device, document FROM statistics WHERE run = ? ORDER BY target, kernel, device", (run,)
    )
    return [JobStatistics(row[0], row[1], row[2], json.loads(row[3])) for row in rows]


def failures(connection: sqlite3.Connection) -> dict[str, Failure]:
    """Return all failures by fingerprint."""
    rows = connection.execute(
        "SELECT fingerprint, target, first_run, first_seen, last_run, last_seen, fixed_run, folder, document"
        " FROM failures ORDER BY fingerprint"
    )
    return {row[0]: Failure(*(*row[:8], json.loads(row[8]))) for row in rows}


def open_failures(connection: sqlite3.Connection) -> list[Failure]:
    """Return the failures that no run has seen pass."""
    return [each for each in failures(connection).values() if each.fixed_run is None]


def sightings(connection: sqlite3.Connection, run: int | None = None) -> list[Sighting]:
    """Return what failures were in a run, or in all of them."""
    rows = connection.execute(
        "SELECT run, fingerprint, status, kernel, version, device, seen, note FROM sightings"
        " WHERE ?1 IS NULL OR run = ?1 ORDER BY run, fingerprint",
        (run,),
    )
    return [Sighting(*row) for row in rows]


def replays(connection: sqlite3.Connection, run: int) -> list[Replay]:
    """Return what became of stored failures in a run."""
    rows = connection.execute(
        "SELECT fingerprint, kernel, device, version, outcome, reason FROM replays WHERE run = ?"
        " ORDER BY fingerprint, kernel, device",
        (run,),
    )
    return [Replay(*row) for row in rows]


def quiet_runs(connection: sqlite3.Connection, fingerprint: str, before: int) -> int:
    """Return in how many runs in a row, up to the one before, a failure was not seen, and its case passed wherever it
    was run."""
    rows = connection.execute(
        "SELECT status, (SELECT count(*) FROM replays WHERE run = sightings.run AND fingerprint = ?1"
        " AND outcome = 'FIXED'), (SELECT count(*) FROM replays WHERE run = sightings.run AND fingerprint = ?1)"
        " FROM sightings WHERE fingerprint = ?1 AND run < ?2 ORDER BY run DESC",
        (fingerprint, before),
    )
    quiet = 0
    for status, passed, replayed in rows:
        if status != "unseen" or not 0 < passed == replayed:
            break
        quiet += 1
    return quiet


def regressions(connection: sqlite3.Connection, run: int) -> list[Regression]:
    """Return what became of the historical bugs in a run."""
    rows = connection.execute(
        "SELECT pull_request, title, outcome, problem FROM regressions WHERE run = ? ORDER BY pull_request", (run,)
    )
    return [Regression(*row) for row in rows]


def last_regressions(connection: sqlite3.Connection, before: int) -> dict[str, str]:
    """Return the outcome that each historical bug had in the last earlier run that ran it and ended by itself."""
    rows = connection.execute(
        "SELECT pull_request, outcome FROM regressions JOIN runs ON runs.id = run"
        " WHERE run < ? AND outcome <> 'NOT RUN' AND finished IS NOT NULL ORDER BY run",
        (before,),
    )
    return dict(rows.fetchall())


def history(connection: sqlite3.Connection) -> list[Night]:
    """Return all nights, the newest first."""
    counts: dict[int, tuple[int, int, float]] = {
        row[0]: tuple(row[1:])
        for row in connection.execute(
            "SELECT run, sum(json_extract(document, '$.examples')), sum(json_extract(document, '$.cases')),"
            " max(json_extract(document, '$.worst_ratio')) FROM statistics GROUP BY run"
        )
    }
    statuses: dict[int, dict[str, int]] = {}
    for run, status, count in connection.execute("SELECT run, status, count(*) FROM sightings GROUP BY run, status"):
        statuses.setdefault(run, {})[status] = count
    return [Night(run, *counts.get(run.id, (0, 0, 0.0)), statuses=statuses.get(run.id, {})) for run in runs(connection)]
