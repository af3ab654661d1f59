"""The services' logs: names, the folder, rotation, and their last lines.

A service's standard output and error go straight to its log file, so the output of a crash is kept and the service
depends on no other process. Therefore a log that grows too large is copied and truncated, not renamed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastserve.errors import StartupError
from fastserve.observability.private_files import FILE_MODE, FOLDER_MODE, NO_FOLLOW, open_for_append, reason

logger = logging.getLogger(__name__)

TAIL_BYTES = 65536
MAX_MODEL_PART_BYTES = 120
"""Bytes of a log's name that come from model and host. File names have at most 255 bytes, and `worker_`, the port and
`.log.1` need room too."""
MAX_LOCK_WAIT_S = 60.0
_OURS = re.compile(r"\.gitkeep|.*\.log(\.\d+)?|fastserve-\d+-[0-9a-f]+\.(pid|stop)\.(json|tmp)", re.DOTALL)
_COPY_BYTES = 1 << 20


def worker_log_name(model: str, host: str, port: int) -> str:
    """Name of a worker's log: the last part of the model's path, host and port, with characters safe in file names."""
    stem = re.sub(r"[-@.]", "_", re.split(r"[/\\]", f"{model}@{host}")[-1])
    stem = "".join(char if char.isprintable() else "_" for char in stem)
    encoded = stem.encode("utf-8")
    if len(encoded) > MAX_MODEL_PART_BYTES:
        kept = encoded[:MAX_MODEL_PART_BYTES].decode("utf-8", "ignore")
        stem = f"{kept}_{hashlib.sha256(encoded).hexdigest()[:8]}"
    return f"worker_{stem}_{port}.log"


# ---- the folder -------------------------------------------------------------------------------------------------


def prepare_folder(folder: Path, flag: str) -> list[str]:
    """Create the folder with access for its owner only. Returns warnings about a folder that existed before.

    An existing folder that holds only our files is closed to others; any other keeps its mode. Raises StartupError if
    it cannot be created or written, or belongs to another user.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        found = folder.stat()
        names = [] if made else os.listdir(folder)
    except OSError as error:
        raise StartupError(f"{flag}: the folder cannot be made ({reason(error)}).") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StartupError(f"{flag}: no file can be made in this folder: choose another one with --log-dir.")
    if os.name != "posix":
        return []
    if found.st_uid not in (0, os.geteuid()):
        raise StartupError(
            f"{flag}: the folder belongs to another user (id {found.st_uid}), who could replace the logs: choose "
            "another one with --log-dir."
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077 == 0:
        return []
    is_shared = mode & stat.S_ISVTX  # such as /tmp, which may be empty
    if found.st_uid == os.geteuid() and not is_shared and all(_OURS.fullmatch(name) for name in names):
        with suppress(OSError):  # a file system without modes
            folder.chmod(FOLDER_MODE)
        return []
    if mode & 0o022 and not is_shared:
        return [f"Warning: other users can write to {folder} (mode {mode:04o}) and replace the logs: chmod 700 it."]
    return []


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lock the folder for this process. The block runs without the lock if the folder is gone, the system has no
    locks, or another process holds it for a minute.

    `on_wait` is called repeatedly while another process holds the lock; an exception from it ends the wait.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except (ImportError, OSError):
        yield
        return
    try:
        deadline = time.monotonic() + MAX_LOCK_WAIT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(descriptor)


# ---- rotation ---------------------------------------------------------------------------------------------------


def rotate(log: Path, keep: int) -> None:
    """Make room for a new log: the old one becomes LOG.1, that one LOG.2, and so on; LOG.`keep` is the last.

    Raises OSError if we may not write to the log, or it cannot be renamed.
    """
    descriptor = open_for_append(log)
    try:
        is_empty = os.fstat(descriptor).st_size == 0
    finally:
        os.close(descriptor)
    if not is_empty:
        _move_up(log, keep)
        log.replace(_numbered(log, 1))


def rotate_in_use(log: Path, keep: int) -> None:
    """Rotate a log that a service keeps writing to: copy it to LOG.1 and truncate it. Raises OSError."""
    _move_up(log, keep)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW
    with open(os.open(log, os.O_RDWR | NO_FOLLOW), "r+b") as source:
        try:
            with open(os.open(_numbered(log, 1), flags, FILE_MODE), "wb") as copy:
                # Copy until nothing new has come. Lines written between the last read and the truncation are lost.
                while source.tell() < os.fstat(source.fileno()).st_size:
                    shutil.copyfileobj(source, copy, _COPY_BYTES)
                    copy.flush()
        finally:
            # Even if the copy failed (a full disk), so that the size limit holds.
            source.truncate(0)


def _move_up(log: Path, keep: int) -> None:
    """Free the name LOG.1."""
    free = 1
    while free < keep and _numbered(log, free).exists():
        free += 1
    for number in range(free, 1, -1):
        _numbered(log, number - 1).replace(_numbered(log, number))
    _numbered(log, 1).unlink(missing_ok=True)
    # Old logs of an earlier launch that kept more of them.
    number = keep + 1
    while _numbered(log, number).exists():
        _numbered(log, number).unlink()
        number += 1


def _numbered(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}")


# ---- reading ----------------------------------------------------------------------------------------------------


def tail(path: Path, start: int = 0) -> list[str]:
    """The last non-empty lines of a log from byte `start` on; each rewrite of a progress bar counts as a line."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            # A log shorter than `start` has been truncated since.
            file.seek(max(0 if size < start else start, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]
