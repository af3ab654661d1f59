"""The file that API servers share, when others delete it, or its disk is full or may not be written."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest

from fastserve.gateway.sqlite_file import SqliteFile

TABLES = "CREATE TABLE IF NOT EXISTS words (word TEXT PRIMARY KEY);"


def file_at(path: Path) -> SqliteFile:
    return SqliteFile(path, TABLES, 1, "--file")


async def add(file: SqliteFile, word: str) -> None:
    await file.run(lambda rows: rows.execute("INSERT INTO words VALUES (?)", (word,)))


async def words(file: SqliteFile) -> list[str]:
    def read(rows: sqlite3.Connection) -> list[str]:
        return [word for (word,) in rows.execute("SELECT word FROM words ORDER BY word")]

    return await file.run(read, writes=False)


@pytest.mark.parametrize("deleted", ["all files", "the main file", "the folder"])
async def test_a_deleted_file_is_made_anew_for_all_processes(tmp_path: Path, deleted: str) -> None:
    path = tmp_path / "store" / "words.sqlite3"
    first, second = file_at(path), file_at(path)
    await add(first, "old")
    assert await words(second) == ["old"]
    if deleted == "the folder":
        shutil.rmtree(path.parent)
    else:
        for each in path.parent.glob("*" if deleted == "all files" else path.name):
            each.unlink()
    await asyncio.gather(add(first, "new"), add(second, "newer"))
    for file in (first, second):
        assert await words(file) == ["new", "newer"]
        file.close()
    later = file_at(path)
    assert await words(later) == ["new", "newer"]
    assert path.stat().st_mode & 0o777 == 0o600
    later.close()
