"""Files that only their owner can read, opened without following links: logs and run files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
FILE_MODE = 0o600
FOLDER_MODE = 0o700


def open_for_append(path: Path) -> int:
    """Descriptor of a file opened for appending, created if missing. The caller closes it.

    Raises OSError with the reason for anything but a regular file of this user: symbolic links, hard links, pipes,
    devices and other users' files are refused.
    """
    try:
        # Non-blocking: opening a pipe without a reader would block forever.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags, FILE_MODE)
    except OSError as error:
        if path.is_symlink():
            raise OSError(error.errno, "it is a link, and links are not followed: remove it", str(path)) from error
        raise
    problem = _problem(os.fstat(descriptor))
    if problem is not None:
        os.close(descriptor)
        raise OSError(0, f"{problem}: remove it or choose another folder", str(path))
    if os.name == "posix":
        os.set_blocking(descriptor, True)
        os.fchmod(descriptor, FILE_MODE)
    return descriptor


def _problem(found: os.stat_result) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file"
    if os.name == "posix" and found.st_uid != os.geteuid():
        return f"it belongs to another user (id {found.st_uid})"
    if found.st_nlink > 1:
        return "it has a second name (a hard link)"
    return None


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, so that no reader sees a part of it. Raises OSError."""
    draft = draft_of(path)
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, FILE_MODE)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def draft_of(path: Path) -> Path:
    """Path of the temporary file of `replace_file`."""
    return path.with_suffix(".tmp")


def reason(error: OSError) -> str:
    return error.strerror or str(error)
