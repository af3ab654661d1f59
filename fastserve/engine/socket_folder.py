"""A private folder for the socket between a worker and its engine process, and removal of abandoned ones.

The path of a Unix socket is limited to about a hundred characters, so a long TMPDIR is skipped. A folder belongs to the
process that holds the lock in it: the kernel releases the lock however the process ends, so a folder whose lock is free
was left by a killed process. Process ids do not work here: they are reused, and containers that share a folder have
their own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastserve.errors import StartupError

MAX_SOCKET_PATH_BYTES = 103
"""The limit is 103 on macOS, 107 on Linux."""
_PREFIX = "fastserve-"
_LOCK = "lock"
_SOCKET = "engine"
_RANDOM_CHARS = 8


class SocketFolder:
    """Mode 0700, so that no other user can connect. Must be closed."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises StartupError when no folder can be made."""
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
    except FileNotFoundError:  # no writable folder in its own list
        usual = ""
    candidates = (usual, environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp")
    return dict.fromkeys(Path(parent) for parent in candidates if parent)


def _problem(parent: Path) -> str | None:
    length = len(os.fsencode(parent / (_PREFIX + "x" * _RANDOM_CHARS) / _SOCKET))
    if length > MAX_SOCKET_PATH_BYTES:
        return f"too long by {length - MAX_SOCKET_PATH_BYTES} bytes for a socket"
    return None if parent.is_dir() else "no such folder"


def _lock_new(folder: Path) -> int | None:
    """The lock file gets its name only once it is locked, so that a new folder never looks abandoned."""
    unfinished = folder / f"{_LOCK}.new"
    descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    _try_lock(descriptor)
    unfinished.rename(folder / _LOCK)
    return descriptor


def _try_lock(descriptor: int) -> bool:
    import fcntl  # missing on Windows, where engines use TCP

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
        except OSError:  # not one of ours, or just being removed
            continue
        try:
            if _try_lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        finally:
            os.close(descriptor)
    return removed
