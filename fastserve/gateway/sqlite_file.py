"""A SQLite file that all API server processes share. One thread of each process uses it, never the event loop;
processes are kept apart by SQLite's own locks (WAL).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fastserve.errors import ServiceError, StartupError

ResultT = TypeVar("ResultT")
BUSY_TIMEOUT_S = 10.0
"""How long to wait for another process that writes."""


def state_folder(environ: Mapping[str, str]) -> Path:
    """Folder for what services keep beyond their life, by the XDG base directory specification."""
    folder = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or Path.home()) / ".local" / "state"
    return Path(folder) / "fastserve"


class SqliteFile:
    def __init__(self, path: Path, tables: str, version: int, option: str) -> None:
        """`tables`: SQL that makes those that are missing. `version`: of the tables, kept in the file's `user_version`.
        `option`: the flag that names the file, for errors.
        """
        self._path = path
        self._tables = tables
        self._version = version
        self._option = option
        self._thread = ThreadPoolExecutor(1, f"sqlite-{path.name}")
        self._connection: sqlite3.Connection | None = None
        self._opened: os.stat_result | None = None

    async def run(
        self, work: Callable[[sqlite3.Connection], ResultT], *, writes: bool = True, may_be_lost: bool = False
    ) -> ResultT:
        """Run `work` in one transaction. `may_be_lost`: the result holds even if nothing can be written, as on a full
        disk. Raises ServiceError if the file cannot be used.
        """
        return await asyncio.wrap_future(self._thread.submit(self._transact, work, writes, may_be_lost))

    def open_now(self) -> None:
        """Raises StartupError if the file cannot be used."""
        try:
            self._thread.submit(self._open).result()
        except (OSError, sqlite3.Error) as error:
            raise StartupError(
                f"{self._option} {self._path} cannot be used: {error}. Give another path, or `none`."
            ) from error

    def close(self) -> None:
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and not self._is_in_place():
            self._close()  # it was deleted: what would be written to it, nobody could find
        if self._connection is None:
            self._create()
            self._opened = self._path.stat()
            connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _is_in_place(self) -> bool:
        try:
            return self._opened is not None and os.path.samestat(self._opened, self._path.stat())
        except FileNotFoundError:
            return False

    def _create(self) -> None:
        """Make the file, if it is not there."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            # SQLite gives its other files the mode of the first. Only the user may read what clients have said.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return
        for suffix in ("-wal", "-shm"):  # of a file that was deleted; SQLite would take them to be of this one
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, self._version):
            raise sqlite3.DatabaseError(
                f"it is of another version of fastserve (tables {version}, not {self._version})"
            )
        connection.executescript(f"BEGIN IMMEDIATE; {self._tables} PRAGMA user_version = {self._version}; COMMIT;")

    def _transact(self, work: Callable[[sqlite3.Connection], ResultT], writes: bool, may_be_lost: bool) -> ResultT:
        try:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                result = work(connection)
                if writes:
                    self.before_commit(connection)
                try:
                    connection.execute("COMMIT")
                except sqlite3.OperationalError:
                    if not may_be_lost:
                        raise
            finally:
                if connection.in_transaction:  # after some errors SQLite itself has ended it
                    connection.execute("ROLLBACK")
        except (OSError, sqlite3.Error) as error:
            raise ServiceError(
                f"The file of {self._option} cannot be used now ({error}). Try again in a moment.",
                code="store_unavailable",
            ) from error
        return result

    def before_commit(self, connection: sqlite3.Connection) -> None:
        """Keep the file within its bounds, in the transaction of each write."""
