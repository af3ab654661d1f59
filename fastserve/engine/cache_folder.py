"""Cache folders for files that are built once and reused: in the user's cache or, without a writable home, among the
temporary files."""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


def user_cache() -> Path:
    """Our folder in $XDG_CACHE_HOME or ~/.cache; it need not exist yet. Raises OSError when the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "fastserve"
    try:
        return Path.home() / ".cache" / "fastserve"
    except RuntimeError as error:  # a container may run as a user without an entry in /etc/passwd
        raise FileNotFoundError(str(error)) from error


def private_temporary() -> Path:
    """Our folder among the temporary files, the same at each start. Other users may create folders there."""
    return Path(tempfile.gettempdir()) / f"fastserve_cache-{_user()}"


FOLDERS: tuple[Callable[[], Path], ...] = (user_cache, private_temporary)
"""Functions that return a cache folder, in the order in which they are tried."""


def make_private(folder: Path) -> Path:
    """Create the folder if it is missing, and keep other users from writing to it, because code in it is executed.
    Raises OSError when that fails, or when the folder belongs to another user."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    # A link may lead to another disk, but only if this user made it.
    if hasattr(os, "getuid") and {found.st_uid, folder.lstat().st_uid} != {os.getuid()}:
        raise PermissionError(f"{folder} belongs to another user")
    if os.name == "posix" and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(0o700)
    return folder


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
