"""The SQLite file of the store. One thread of each process uses it; processes share it by SQLite's locks (WAL)."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastserve.errors import ServiceError, StartupError

ResultT = TypeVar("ResultT")

VERSION = 1
"""Of the tables, in the file's `user_version`."""
BUSY_TIMEOUT_S = 10.0
"""How long to wait for another process that writes."""
_TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, created_at INTEGER NOT NULL, used_at REAL NOT NULL,
    size INTEGER NOT NULL, status TEXT NOT NULL, alive_at REAL, previous TEXT, conversation TEXT, content BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used_at);
CREATE TABLE IF NOT EXISTS items (
    entry TEXT NOT NULL REFERENCES entries ON DELETE CASCADE, position INTEGER NOT NULL, id TEXT NOT NULL,
    is_output INTEGER NOT NULL, content BLOB NOT NULL, PRIMARY KEY (entry, position)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_by_id ON items (id);
CREATE TABLE IF NOT EXISTS events (
    entry TEXT NOT NULL REFERENCES entries ON DELETE CASCADE, number INTEGER NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (entry, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (entries INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM totals);
CREATE TRIGGER IF NOT EXISTS entry_added AFTER INSERT ON entries
    BEGIN UPDATE totals SET entries = entries + 1, bytes = bytes + NEW.size; END;
CREATE TRIGGER IF NOT EXISTS entry_removed AFTER DELETE ON entries
    BEGIN UPDATE totals SET entries = entries - 1, bytes = bytes - OLD.size; END;
CREATE TRIGGER IF NOT EXISTS entry_resized AFTER UPDATE OF size ON entries
    BEGIN UPDATE totals SET bytes = bytes + NEW.size - OLD.size; END;
"""


@dataclass(frozen=True)
class StoreBounds:
    max_entries: int
    max_bytes: int
    max_age_s: float


def default_path(environ: Mapping[str, str]) -> Path:
    folder = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or Path.home()) / ".local" / "state"
    return Path(folder) / "fastserve" / "responses.sqlite3"


class Database:
    def __init__(self, path: Path, bounds: StoreBounds, clock: Callable[[], float] = time.time) -> None:
        """`clock`: Unix time in seconds."""
        self._path = path
        self._bounds = bounds
        self.clock = clock
        self._thread = ThreadPoolExecutor(1, "responses-store")
        self._connection: sqlite3.Connection | None = None

    async def run(self, work: Callable[[sqlite3.Connection], ResultT], *, writes: bool = True) -> ResultT:
        """Run `work` in one transaction, in the store's thread. Raises ServiceError if the file cannot be used."""
        return await asyncio.wrap_future(self._thread.submit(self._transact, work, writes))

    def open_now(self) -> None:
        """Raises StartupError if the file cannot be used."""
        try:
            self._thread.submit(self._open).result()
        except (OSError, sqlite3.Error) as error:
            raise StartupError(
                f"--responses-store {self._path} cannot be used: {error}. Give another path, or `none`."
            ) from error

    def close(self) -> None:
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives its other files the mode of the first. Only the user may read what clients have said.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"it is of another version of fastserve (tables {version}, not {VERSION})")
        connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")

    def _transact(self, work: Callable[[sqlite3.Connection], ResultT], writes: bool) -> ResultT:
        try:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                result = work(connection)
                if writes:
                    self._evict(connection)
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise
        except (OSError, sqlite3.Error) as error:
            raise ServiceError(
                f"The store of responses cannot be used ({error}). Try again, or send store=false.",
                code="store_unavailable",
            ) from error
        return result

    def _evict(self, connection: sqlite3.Connection) -> None:
        """Remove entries that are too old, and beyond the bounds those used longest ago."""
        connection.execute("DELETE FROM entries WHERE used_at < ?", (self.clock() - self._bounds.max_age_s,))
        while True:
            entries, size = connection.execute("SELECT entries, bytes FROM totals").fetchone()
            surplus = entries - self._bounds.max_entries
            if surplus <= 0 and size <= self._bounds.max_bytes:
                return
            connection.execute(
                "DELETE FROM entries WHERE id IN (SELECT id FROM entries ORDER BY used_at LIMIT ?)", (max(1, surplus),)
            )
