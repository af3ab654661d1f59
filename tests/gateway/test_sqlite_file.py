"""The file that API servers share, when others delete it, or its disk is full or may not be written."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
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


FULL_DISK = """
import asyncio, resource, signal, sys
from pathlib import Path
from fastserve.errors import ServiceError
from tests.gateway.test_sqlite_file import add, file_at, words

async def main():
    file = file_at(Path(sys.argv[1]))
    await add(file, "kept")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    for _ in range(2):
        try:
            await add(file, "x" * 100_000)
        except ServiceError as error:
            print(error.message)

    def touch(rows):
        rows.execute("UPDATE words SET word = word || ?", ("y" * 100_000,))
        return "read"

    print(await file.run(touch, may_be_lost=True), await words(file))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await add(file, "later")
    print(await words(file))
    file.close()

asyncio.run(main())
"""


def test_a_full_disk_is_named_and_reading_goes_on(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "words.sqlite3")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    *refused, read, later = run.stdout.splitlines()
    assert len(refused) == 2
    assert all("disk" in line and "rollback" not in line for line in refused), refused
    assert read == "read ['kept']"
    assert later == "['kept', 'later']"
