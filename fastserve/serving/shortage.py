"""Open files: raising the limit on them, and telling this process's own shortages from another's failure."""

from __future__ import annotations

import errno
import logging
import os
import socket

logger = logging.getLogger(__name__)

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""No file descriptor, buffer, memory or ephemeral port left on this side of a connection."""
MIN_CONNECTIONS = 8
_RESERVED_FILES = 128
"""For logs, libraries, the engine's sockets and the like."""
_MAX_CAUSES = 8


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one. Does nothing where the system has no such limits."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # macOS takes no infinite one
        logger.info("the limit of %d open files stays: %s", soft, error)


def max_connections_of_process(wanted: int) -> int:
    """`wanted` connections, or as many as the limit of open files leaves; a client may need one more file, upstream."""
    try:
        import resource
    except ImportError:
        return wanted
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, max(MIN_CONNECTIONS, (soft - min(_RESERVED_FILES, soft // 4)) // 2))


def is_own_shortage(error: BaseException) -> bool:
    """Whether a connection failed because this process or machine ran out of something: the other side may be well.

    Looks through what an error was raised from, and through the `os_error` of aiohttp's errors.
    """
    pending: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if pending is None:
            return False
        if isinstance(pending, MemoryError):
            return True
        inner = getattr(pending, "os_error", None)
        if isinstance(pending, socket.gaierror) or isinstance(inner, socket.gaierror):
            # Its numbers are of another kind. A resolver without files says that the name is not known.
            return not _can_open_file()
        if isinstance(pending, OSError) and pending.errno in SHORTAGES:
            return True
        pending = inner if isinstance(inner, BaseException) else pending.__cause__
    return False


def _can_open_file() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    return True
