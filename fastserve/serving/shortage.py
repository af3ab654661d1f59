"""Limit of open files, and distinguishing this process's own shortages from failures of the other side."""

from __future__ import annotations

import errno
import logging
import os
import socket

logger = logging.getLogger(__name__)

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""Errors for no free file descriptor, buffer, memory or ephemeral port on this side of a connection."""
MIN_CONNECTIONS = 8
_RESERVED_FILES = 128
"""Open files for logs, libraries, the engine's sockets and so on."""
_MAX_CAUSES = 8


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one. Does nothing on systems without such limits."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # macOS accepts no infinite limit
        logger.info("the limit of %d open files stays: %s", soft, error)


def max_connections_of_process(max_connections: int) -> int:
    """`max_connections`, or fewer if the limit of open files requires: each client may need a second file, upstream."""
    try:
        import resource
    except ImportError:
        return max_connections
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return max_connections
    return min(max_connections, max(MIN_CONNECTIONS, (soft - min(_RESERVED_FILES, soft // 4)) // 2))


def is_own_shortage(error: BaseException) -> bool:
    """Whether a connection failed because this process or machine ran out of a resource, not because of the other side.

    Follows the causes of an error and the `os_error` of aiohttp's errors.
    """
    pending: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if pending is None:
            return False
        if isinstance(pending, MemoryError):
            return True
        inner = getattr(pending, "os_error", None)
        if isinstance(pending, socket.gaierror) or isinstance(inner, socket.gaierror):
            # Its errno has other values, and a resolver without free files reports an unknown name.
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
