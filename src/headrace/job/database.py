"""SQLite files that are on the disk when they say so. Knows no table."""

from __future__ import annotations

import sqlite3

from headrace.core import InputError


def prepare_database(database: sqlite3.Connection, schema: str, version: int, complaint: str) -> None:
    """WAL mode with synchronous=FULL: a transaction is on the disk before it counts, and a torn one was never there.

    A new file gets the tables of `schema`. Raises InputError with the complaint where the file is of another version.
    """
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    found = database.execute("PRAGMA user_version").fetchone()[0]
    if found == 0:
        database.executescript(f"BEGIN IMMEDIATE; {schema} PRAGMA user_version={version}; COMMIT;")
    elif found != version:
        raise InputError(complaint)
