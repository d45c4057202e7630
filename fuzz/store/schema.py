"""The tables of a store, as the steps that led to them.

A step is never changed once it was released: a new one is added at the end. `PRAGMA user_version` counts the steps that
a store has taken.
"""

import sqlite3

APPLICATION_ID = 0x6B667A7A
"""Tells a store from other SQLite files: `PRAGMA application_id`."""

MIGRATIONS = (
    """
    CREATE TABLE identity (name TEXT NOT NULL);
    INSERT INTO identity VALUES (lower(hex(randomblob(8))));
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        started TEXT NOT NULL,
        finished TEXT,
        state TEXT NOT NULL,                -- running, finished, interrupted, cut off
        exit_status INTEGER,
        seed INTEGER NOT NULL,
        budget REAL NOT NULL,               -- seconds
        environment TEXT NOT NULL,          -- JSON
        settings TEXT NOT NULL,             -- JSON
        skipped TEXT NOT NULL,              -- JSON: what could not run here, and why
        problems TEXT NOT NULL              -- JSON: lines on what went wrong in the run itself
    );
    CREATE TABLE statistics (
        run INTEGER NOT NULL REFERENCES runs(id),
        target TEXT NOT NULL,
        kernel TEXT NOT NULL,
        device TEXT NOT NULL,
        document TEXT NOT NULL,             -- JSON: what Statistics.to_json returns
        PRIMARY KEY (run, target, kernel, device)
    );
    CREATE TABLE failures (
        fingerprint TEXT PRIMARY KEY,
        target TEXT NOT NULL,
        first_run INTEGER NOT NULL REFERENCES runs(id),
        first_seen TEXT NOT NULL,
        last_run INTEGER NOT NULL REFERENCES runs(id),
        last_seen TEXT NOT NULL,
        fixed_run INTEGER REFERENCES runs(id),  -- the run that saw it pass; NULL while it is open
        folder TEXT NOT NULL,               -- its name in failures/
        document TEXT NOT NULL              -- JSON: failure.json, with the content of case.json under "case"
    );
    CREATE TABLE sightings (
        run INTEGER NOT NULL REFERENCES runs(id),
        fingerprint TEXT NOT NULL,
        status TEXT NOT NULL,               -- new, returned, known, listed, fixed, unseen
        kernel TEXT NOT NULL,
        version TEXT NOT NULL,
        device TEXT NOT NULL,
        seen TEXT NOT NULL,
        note TEXT NOT NULL,
        PRIMARY KEY (run, fingerprint)
    );
    CREATE TABLE replays (
        run INTEGER NOT NULL REFERENCES runs(id),
        fingerprint TEXT NOT NULL,
        kernel TEXT NOT NULL,
        device TEXT NOT NULL,
        version TEXT NOT NULL,
        outcome TEXT NOT NULL,              -- FIXED, FAILED, ERROR
        reason TEXT NOT NULL,
        PRIMARY KEY (run, fingerprint, kernel, device)
    );
    CREATE TABLE regressions (
        run INTEGER NOT NULL REFERENCES runs(id),
        pull_request TEXT NOT NULL,
        title TEXT NOT NULL,
        outcome TEXT NOT NULL,              -- PASS, FAIL, NOT RUN
        problem TEXT NOT NULL,
        PRIMARY KEY (run, pull_request)
    );
    """,
)

SCHEMA = len(MIGRATIONS)
"""Schema number of a store that has taken every step."""


def migrate(connection: sqlite3.Connection) -> None:
    """Take the steps that a store has not taken yet, all or none of them, while no other process does."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        (taken,) = connection.execute("PRAGMA user_version").fetchone()
        for step in MIGRATIONS[taken:]:
            for statement in _statements(step):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _statements(step: str) -> list[str]:
    """Return the statements of a step one by one: `executescript` would commit what was begun."""
    statements, statement = [], ""
    for part in step.split(";")[:-1]:
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            statements.append(statement)
            statement = ""
    return statements
