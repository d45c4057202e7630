"""A store: the file in which nights are kept, and all that is written to it."""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from kernelfuzz.fuzz.store.schema import APPLICATION_ID, SCHEMA, migrate
from kernelfuzz.strategies.errors import KernelfuzzError

BUSY_SECONDS = 5.0
"""How long another writer is waited for; what could not be written then is tried again."""

MOST_FILES = 100

Status = Literal["new", "returned", "known", "listed", "fixed", "unseen"]
"""What a failure was in a run: seen for the first time; seen again after it was fixed, or counting again after it was
listed; seen before and open; on the list of known failures; gone; or open, and neither seen nor known to be gone."""


def now() -> str:
    """Return the time as stores write it: ISO 8601, UTC, with seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Seen:
    """A failure as a run sees it.

    - folder: its name below `failures`; document: failure.json, with the content of case.json under "case"
    - kernel, version, device: where it was seen this time
    """

    fingerprint: str
    target: str
    kernel: str
    version: str
    device: str
    folder: str
    document: Mapping[str, Any]


class Store:
    """The store of a folder, opened for writing; it is made if there is none. Several processes may write it.

    A file that is damaged, or that a newer kernelfuzz has written, is left alone, and one beside it is used;
    `problems` says so. Raises KernelfuzzError for a folder that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KernelfuzzError(f"--store {folder}: {error.strerror}; name a folder that can be written") from error
        self.path, self.connection = _open(folder, self.problems)

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all of what follows or nothing. Raises KernelfuzzError where that is impossible: a full disk, say."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise KernelfuzzError(f"cannot write {self.path}: {error}") from error

    def start_run(
        self,
        seed: int,
        budget: float,
        environment: Mapping[str, str],
        settings: Mapping[str, Any],
        skipped: Sequence[Mapping[str, str]],
    ) -> int:
        """Begin a run that may take `budget` seconds, and return its number."""
        values = now(), "running", seed, budget, *map(json.dumps, (environment, settings, skipped, self.problems))
        with self._transaction() as connection:
            cursor = connection.execute(
                "INSERT INTO runs (started, state, seed, budget, environment, settings, skipped, problems)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def cut_off(self, run: int) -> None:
        """Take a run as ended whose process is gone, unless it has ended by itself."""
        with self._transaction() as connection:
            connection.execute("UPDATE runs SET state = 'cut off' WHERE id = ? AND state = 'running'", (run,))

    def finish_run(self, run: int, state: str, exit_status: int, problems: Sequence[str]) -> None:
        """End a run: `finished` or `interrupted`."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE runs SET finished = ?, state = ?, exit_status = ?, problems = ? WHERE id = ?",
                (now(), state, exit_status, json.dumps(list(problems)), run),
            )

    def save_statistics(self, run: int, entries: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> None:
        """Write what was counted until now, by (target, kernel, device), in the place of what was written before."""
        rows = [(run, *key, json.dumps(document, allow_nan=False)) for key, document in entries.items()]
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO statistics VALUES (?, ?, ?, ?, ?)", rows)

    def save_failure(self, run: int, seen: Seen, *, listed: str = "", withdrawn: Sequence[str] = ()) -> Status:
        """Write that a run has seen a failure, and return what it is in this run.

        It is known if an earlier run ended by itself after it had seen the failure: what a run that was cut off saw,
        nobody was told of. `listed` says why it is on the list of known failures. What was said in this run of
        `withdrawn` fingerprints was said of this failure.
        """
        with self._transaction() as connection:
            for name in withdrawn:
                connection.execute("DELETE FROM sightings WHERE run = ? AND fingerprint = ?", (run, name))
                connection.execute("DELETE FROM failures WHERE first_run = ? AND fingerprint = ?", (run, name))
            # One kernel's excuse is none for another one in the same run.
            status = self._said(run, seen.fingerprint) or ("listed" if listed else self._status(run, seen.fingerprint))
            time, document = now(), json.dumps(seen.document, allow_nan=False)
            connection.execute(
                "INSERT INTO failures VALUES (?, ?, ?, ?, ?, ?, NULL, ?, ?) ON CONFLICT (fingerprint) DO UPDATE SET"
                " last_run = excluded.last_run, last_seen = excluded.last_seen, fixed_run = NULL,"
                " folder = excluded.folder, document = excluded.document",
                (seen.fingerprint, seen.target, run, time, run, time, seen.folder, document),
            )
            connection.execute(
                "INSERT OR REPLACE INTO sightings VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (run, seen.fingerprint, status, seen.kernel, seen.version, seen.device, time, listed),
            )
        return status

    def _said(self, run: int, fingerprint: str) -> Status | None:
        """Return what a failure was called in this run without an excuse, if it was."""
        said = self.connection.execute(
            "SELECT status FROM sightings WHERE run = ? AND fingerprint = ? AND status IN ('new', 'returned', 'known')",
            (run, fingerprint),
        ).fetchone()
        return said[0] if said else None

    def _status(self, run: int, fingerprint: str) -> Status:
        """Return what a failure is in a run that sees it for the first time."""
        earlier = self.connection.execute(
            "SELECT status FROM sightings JOIN runs ON runs.id = run"
            " WHERE fingerprint = ? AND run < ? AND status NOT IN ('unseen') AND finished IS NOT NULL"
            " ORDER BY run DESC LIMIT 1",
            (fingerprint, run),
        ).fetchone()
        if earlier is None:
            return "new"
        return "returned" if earlier[0] in ("fixed", "listed") else "known"

    def save_gone(self, run: int, fingerprint: str, status: Literal["fixed", "unseen"], note: str) -> None:
        """Write that an open failure was not seen in a run: it is `fixed`, or that cannot be said."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO sightings VALUES (?, ?, ?, '', '', '', ?, ?)",
                (run, fingerprint, status, now(), note),
            )
            if status == "fixed":
                connection.execute("UPDATE failures SET fixed_run = ? WHERE fingerprint = ?", (run, fingerprint))

    def save_replay(
        self, run: int, fingerprint: str, kernel: str, device: str, version: str, outcome: str, reason: str
    ) -> None:
        """Write what became of a stored failure on one of the run's kernels."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO replays VALUES (?, ?, ?, ?, ?, ?, ?)",
                (run, fingerprint, kernel, device, version, outcome, reason),
            )

    def save_regression(self, run: int, pull_request: str, title: str, outcome: str, problem: str) -> None:
        """Write what became of a historical bug."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO regressions VALUES (?, ?, ?, ?, ?)",
                (run, pull_request, title, outcome, problem),
            )


def find_store(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the file that is in use as the store of a folder, None if there is none, and what is wrong with others."""
    problems: list[str] = []
    for path in _candidates(folder):
        if not path.exists():
            return None, problems
        problem = _problem(path)
        if problem is None:
            return path, problems
        problems.append(problem)
    return None, problems


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder / "store.sqlite"
    for number in range(2, MOST_FILES):
        yield folder / f"store-{number}.sqlite"


def _open(folder: Path, problems: list[str]) -> tuple[Path, sqlite3.Connection]:
    """Return the first file of a folder that can be used, or is not there yet, and a connection to it."""
    for path in _candidates(folder):
        problem = _problem(path) if path.exists() else None
        if problem is not None:
            problems.append(problem)
            continue
        try:
            connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # what was told of survives a loss of power
            migrate(connection)
        except sqlite3.Error as error:
            raise KernelfuzzError(f"--store {path}: {error}; name a folder that can be written") from error
        if problems:
            problems[:] = [f"{each}; using {path.name}" for each in problems]
        return path, connection
    raise KernelfuzzError(f"--store {folder}: {MOST_FILES} stores there cannot be used; name another folder")


def _problem(path: Path) -> str | None:
    """Return why a file cannot be used as a store, None if it can. One that is empty becomes one."""
    try:
        with sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None) as connection:
            (schema,) = connection.execute("PRAGMA user_version").fetchone()
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            (damage,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        connection.close()
    except sqlite3.OperationalError as error:  # it is locked or cannot be read, which says nothing of what it holds
        raise KernelfuzzError(f"{path}: {error}; free it, or name another --store") from error
    except sqlite3.DatabaseError as error:
        return f"{path} is damaged ({error})"
    if damage != "ok":
        return f"{path} is damaged ({damage.splitlines()[-1]})"
    if tables and application != APPLICATION_ID:
        return f"{path} is the SQLite file of another program"
    if schema > SCHEMA:
        return f"{path} has schema {schema}, this kernelfuzz knows {SCHEMA}: a newer one has written it"
    return None
