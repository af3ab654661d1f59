"""A private folder for the socket between a worker and its engine process, and the removal of what dead ones left.

The path of a Unix socket holds about a hundred characters, so a long TMPDIR is passed over. A folder belongs to the
process that holds the lock in it: the kernel gives the lock back however the process ends, so a folder whose lock is
free was left by one that was killed. Process ids would not do: they are used again, and containers that share a folder
have their own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastserve.errors import StartupError

MAX_SOCKET_PATH_BYTES = 103
"""macOS takes 103, Linux 107."""
_PREFIX = "fastserve-"
_LOCK = "lock"
_SOCKET = "engine"
_RANDOM_CHARS = 8


class SocketFolder:
    """Mode 0700, so that nobody else can join. To be closed."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises StartupError when there is no place for it."""
        problems = []
        for parent in _parents(environ):
            problem = _problem(parent)
            if problem is None:
                remove_abandoned(parent)
                try:
                    self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
                except OSError as error:
                    problem = str(error.strerror)
                else:
                    self._lock = _lock_new(self.path)
                    return
            problems.append(f"{parent} ({problem})")
        raise StartupError(
            "There is no folder for the socket between worker and engine: " + ", ".join(problems) + ". Set TMPDIR to a "
            "short path that can be written to."
        )

    @property
    def socket(self) -> Path:
        return self.path / _SOCKET

    def close(self) -> None:
        """Remove the folder. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _parents(environ: Mapping[str, str]) -> Iterable[Path]:
    try:
        usual = tempfile.gettempdir()
    except FileNotFoundError:  # none that can be written to, by its own list
        usual = ""
    candidates = (usual, environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp")
    return dict.fromkeys(Path(parent) for parent in candidates if parent)


def _problem(parent: Path) -> str | None:
    length = len(os.fsencode(parent / (_PREFIX + "x" * _RANDOM_CHARS) / _SOCKET))
    if length > MAX_SOCKET_PATH_BYTES:
        return f"too long by {length - MAX_SOCKET_PATH_BYTES} bytes for a socket"
    return None if parent.is_dir() else "no such folder"


def _lock_new(folder: Path) -> int | None:
    """The lock appears under its name when it is held, so that nobody takes a new folder for an abandoned one."""
    unfinished = folder / f"{_LOCK}.new"
    descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    _try_lock(descriptor)
    unfinished.rename(folder / _LOCK)
    return descriptor


def _try_lock(descriptor: int) -> bool:
    import fcntl  # not on Windows, where engines are joined by TCP

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_abandoned(parent: Path) -> int:
    """Remove our own folders in `parent` that no living process holds; return how many there were."""
    removed = 0
    for folder in parent.glob(_PREFIX + "*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # not one of ours, or going away at this moment
            continue
        try:
            if _try_lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        finally:
            os.close(descriptor)
    return removed
