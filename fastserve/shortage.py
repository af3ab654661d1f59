"""Recognises errors that say that this process, and not the one it talks to, has run out of something."""

from __future__ import annotations

import errno

OWN_SHORTAGE = frozenset(
    {
        errno.EMFILE,  # open files of this process
        errno.ENFILE,  # open files of the machine
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EADDRNOTAVAIL,  # local ports
    }
)


def is_own_shortage(error: BaseException) -> bool:
    """Whether the error, or one that it wraps (aiohttp's `os_error`, a cause), is a shortage of this process."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        wrapped = getattr(current, "os_error", None)
        for candidate in (current, wrapped):
            if isinstance(candidate, MemoryError):
                return True
            if isinstance(candidate, OSError) and candidate.errno in OWN_SHORTAGE:
                return True
        current = current.__cause__
    return False
