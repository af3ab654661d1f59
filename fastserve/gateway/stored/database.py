"""The SQLite file of stored responses and conversations, with its bounds."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastserve.gateway.sqlite_file import SqliteFile, state_folder

VERSION = 1
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
    return state_folder(environ) / "responses.sqlite3"


class Database(SqliteFile):
    def __init__(self, path: Path, bounds: StoreBounds, clock: Callable[[], float] = time.time) -> None:
        """`clock`: Unix time in seconds."""
        super().__init__(path, _TABLES, VERSION, "--responses-store")
        self._bounds = bounds
        self.clock = clock

    def before_commit(self, connection: sqlite3.Connection) -> None:
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
