"""Files and batches on disk: a row each in SQLite, and the contents of files beside it."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fastserve.errors import ConflictError, EntryNotFoundError, InvalidRequestError, OverloadedError
from fastserve.gateway.sqlite_file import SqliteFile
from fastserve.openai.batches import ENDED, OUTPUT_PURPOSE, Batch, File
from fastserve.openai.body import shown

VERSION = 1
MAX_ENDED = 10_000
"""Ended batches that are kept, the newest ones. Their files are kept until they are deleted."""
SILENCE_S = 15.0
"""A batch whose process gave no sign of life for this long is taken over by another one."""
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at INTEGER NOT NULL, number INTEGER NOT NULL,
    bytes INTEGER NOT NULL, content BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS files_by_owner ON files (owner, number);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at INTEGER NOT NULL, number INTEGER NOT NULL,
    status TEXT NOT NULL, runner TEXT NOT NULL, alive_at REAL NOT NULL, content BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_by_owner ON batches (owner, number);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status, number);
"""
_decode_file = msgspec.json.Decoder(File).decode
_decode_batch = msgspec.json.Decoder(Batch).decode
_encode = msgspec.json.Encoder().encode
_ENDED = ", ".join(f"'{status}'" for status in ENDED)


@dataclass(frozen=True)
class BatchBounds:
    max_files: int
    max_file_bytes: int
    """Maximum size of all files together."""
    max_batches: int
    """Maximum number of batches that have not ended."""
    max_requests: int
    """Maximum number of requests in one batch."""


class BatchStore:
    def __init__(self, folder: Path, bounds: BatchBounds, clock: Callable[[], float] = time.time) -> None:
        """`clock`: Unix time in seconds. Nothing is written before the first file comes."""
        self.bounds = bounds
        self.clock = clock
        self._contents = folder / "files"
        self._rows = SqliteFile(folder / "batches.sqlite3", _TABLES, VERSION, "--batches-folder")
        self._folder = folder

    @property
    def is_empty(self) -> bool:
        """No file was ever uploaded here: there is nothing to run, and nothing is made on disk."""
        return not (self._folder / "batches.sqlite3").exists()

    def close(self) -> None:
        self._rows.close()

    def path_of(self, file_id: str) -> Path:
        """Path of a file's content. `file_id`: one that this class made, or read from the database."""
        return self._contents / file_id

    async def new_content(self) -> tuple[str, Path]:
        """The id of a file to be, and the path for its content."""
        file_id = f"file-{secrets.token_hex(12)}"
        await asyncio.to_thread(self._contents.mkdir, mode=0o700, parents=True, exist_ok=True)
        return file_id, self.path_of(file_id)

    async def add_file(self, owner: str, file: File) -> None:
        """Add or replace the row of a file whose content is in place. Raises OverloadedError beyond the bounds."""

        def add(rows: sqlite3.Connection) -> None:
            if file.purpose != OUTPUT_PURPOSE:  # what has been computed is kept
                self._check_room(rows, file.bytes)
            rows.execute(
                "INSERT OR REPLACE INTO files SELECT ?, ?, ?, coalesce(max(number), 0) + 1, ?, ? FROM files",
                (file.id, owner, file.created_at, file.bytes, _encode(file)),
            )

        await self._rows.run(add)

    def _check_room(self, rows: sqlite3.Connection, num_bytes: int) -> None:
        """Raises OverloadedError if there is no room for one more file of this size."""
        number, total = rows.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM files").fetchone()
        if number >= self.bounds.max_files or total + num_bytes > self.bounds.max_file_bytes:
            raise OverloadedError(
                f"{number} files with {total} bytes are kept here, and the server takes no more "
                "(--max-batch-files, --max-batch-file-bytes). Delete files that are not needed any more."
            )

    async def file(self, owner: str, file_id: str) -> File:
        """Raises EntryNotFoundError."""

        def find(rows: sqlite3.Connection) -> File | None:
            row = rows.execute("SELECT content FROM files WHERE id = ? AND owner = ?", (file_id, owner)).fetchone()
            return None if row is None else _decode_file(row[0])

        found = None if self.is_empty else await self._rows.run(find, writes=False)
        if found is None:
            raise EntryNotFoundError(f"No such file: {shown(file_id)}. GET /v1/files lists those there are.")
        return found

    async def delete_file(self, owner: str, file_id: str) -> None:
        """Raises EntryNotFoundError, and ConflictError while a batch reads the file."""
        await self.file(owner, file_id)

        def delete(rows: sqlite3.Connection) -> None:
            for (content,) in rows.execute(f"SELECT content FROM batches WHERE status NOT IN ({_ENDED})"):
                batch = _decode_batch(content)
                if file_id == batch.input_file_id:
                    raise ConflictError(f"The batch {batch.id} still reads the file. Cancel it first.")
            rows.execute("DELETE FROM files WHERE id = ?", (file_id,))

        await self._rows.run(delete)
        await asyncio.to_thread(self.path_of(file_id).unlink, missing_ok=True)

    async def files(
        self, owner: str, *, after: str | None, limit: int, descending: bool, purpose: str | None
    ) -> tuple[list[File], bool]:
        """A page of files, and whether there are more."""
        rows, has_more = await self._page("files", owner, after, limit, descending, purpose)
        return [_decode_file(row) for row in rows], has_more

    async def batches(self, owner: str, *, after: str | None, limit: int, descending: bool) -> tuple[list[Batch], bool]:
        rows, has_more = await self._page("batches", owner, after, limit, descending, None)
        return [_decode_batch(row) for row in rows], has_more

    async def _page(
        self, table: str, owner: str, after: str | None, limit: int, descending: bool, purpose: str | None
    ) -> tuple[list[bytes], bool]:
        if self.is_empty:
            return [], False

        def read(rows: sqlite3.Connection) -> list[bytes]:
            conditions, values = ["owner = ?"], [owner]
            if after is not None:
                found = rows.execute(
                    f"SELECT number FROM {table} WHERE id = ? AND owner = ?", (after, owner)
                ).fetchone()
                if found is None:
                    raise InvalidRequestError(
                        f"Invalid value for 'after': {shown(after)}. Give the id of an item of the list.", param="after"
                    )
                conditions.append(f"number {'<' if descending else '>'} ?")
                values.append(found[0])
            if purpose is not None:
                conditions.append("json_extract(CAST(content AS TEXT), '$.purpose') = ?")
                values.append(purpose)
            direction = "DESC" if descending else "ASC"
            query = f"SELECT content FROM {table} WHERE {' AND '.join(conditions)} ORDER BY number {direction} LIMIT ?"
            return [row[0] for row in rows.execute(query, (*values, limit + 1))]

        found = await self._rows.run(read, writes=False)
        return found[:limit], len(found) > limit

    async def add_batch(self, owner: str, batch: Batch) -> None:
        """Raises OverloadedError beyond the bounds."""

        def add(rows: sqlite3.Connection) -> None:
            (running,) = rows.execute(f"SELECT count(*) FROM batches WHERE status NOT IN ({_ENDED})").fetchone()
            if running >= self.bounds.max_batches:
                raise OverloadedError(
                    f"{running} batches wait or run here, which is the maximum (--max-batches). Try again later."
                )
            self._check_room(rows, 0)  # for its answers: one input can be run again and again
            rows.execute(
                f"DELETE FROM batches WHERE id IN (SELECT id FROM batches WHERE status IN ({_ENDED}) "
                "ORDER BY number DESC LIMIT -1 OFFSET ?)",
                (MAX_ENDED,),
            )
            rows.execute(
                "INSERT INTO batches SELECT ?, ?, ?, coalesce(max(number), 0) + 1, ?, '', 0, ? FROM batches",
                (batch.id, owner, batch.created_at, batch.status, _encode(batch)),
            )

        await self._rows.run(add)

    async def batch(self, owner: str, batch_id: str) -> Batch:
        """Raises EntryNotFoundError."""

        def find(rows: sqlite3.Connection) -> Batch | None:
            row = rows.execute("SELECT content FROM batches WHERE id = ? AND owner = ?", (batch_id, owner)).fetchone()
            return None if row is None else _decode_batch(row[0])

        found = None if self.is_empty else await self._rows.run(find, writes=False)
        if found is None:
            raise EntryNotFoundError(f"No such batch: {shown(batch_id)}. GET /v1/batches lists those there are.")
        return found

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """Ask the process that runs the batch to end it. Raises EntryNotFoundError, and ConflictError for one that
        has ended."""
        await self.batch(owner, batch_id)

        def mark(rows: sqlite3.Connection) -> Batch:
            batch = _read_batch(rows, batch_id)
            if batch.status in ENDED:
                raise ConflictError(f"The batch is {batch.status}; it cannot be cancelled any more.")
            if batch.status != "cancelling":
                batch.status, batch.cancelling_at = "cancelling", int(self.clock())
                _write_batch(rows, batch)
            return batch

        return await self._rows.run(mark)

    async def claim(self, runner: str, running: Collection[str] = ()) -> tuple[str, Batch] | None:
        """Take the oldest batch that no live process runs: its owner and the batch, or None. `runner`: name of this
        process; `running`: ids of the batches that it runs."""
        if self.is_empty:
            return None

        def take(rows: sqlite3.Connection) -> tuple[str, Batch] | None:
            now = self.clock()
            row = rows.execute(
                f"SELECT owner, id FROM batches WHERE status NOT IN ({_ENDED}) AND alive_at < ? "
                f"AND id NOT IN ({', '.join('?' * len(running))}) ORDER BY number LIMIT 1",
                (now - SILENCE_S, *running),
            ).fetchone()
            if row is None:
                return None
            rows.execute("UPDATE batches SET runner = ?, alive_at = ? WHERE id = ?", (runner, now, row[1]))
            return row[0], _read_batch(rows, row[1])

        return await self._rows.run(take)

    async def update(self, runner: str, batch: Batch) -> bool:
        """Write the batch, and give a sign of life. Returns whether it goes on: it has not been cancelled, and no other
        process has taken it."""

        def write(rows: sqlite3.Connection) -> bool:
            if rows.execute("SELECT 1 FROM batches WHERE id = ? AND runner = ?", (batch.id, runner)).fetchone() is None:
                return False
            before = _read_batch(rows, batch.id)
            is_cancelled = before.status == "cancelling" and batch.status not in ENDED
            if is_cancelled:
                batch.status, batch.cancelling_at = before.status, before.cancelling_at
            _write_batch(rows, batch)
            rows.execute("UPDATE batches SET alive_at = ? WHERE id = ?", (self.clock(), batch.id))
            return not is_cancelled

        return await self._rows.run(write)

    async def let_go(self, runner: str) -> None:
        """This process ends: others may take its batches at once."""
        if not self.is_empty:
            await self._rows.run(
                lambda rows: rows.execute("UPDATE batches SET alive_at = 0 WHERE runner = ?", (runner,))
            )


def _read_batch(rows: sqlite3.Connection, batch_id: str) -> Batch:
    return _decode_batch(rows.execute("SELECT content FROM batches WHERE id = ?", (batch_id,)).fetchone()[0])


def _write_batch(rows: sqlite3.Connection, batch: Batch) -> None:
    rows.execute("UPDATE batches SET content = ?, status = ? WHERE id = ?", (_encode(batch), batch.status, batch.id))
